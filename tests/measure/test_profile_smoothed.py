"""Profiles where a few late jumps decide: the likeliest smooth q, and many trajectories of few points."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Tuple

import numpy as np
import pytest
import torch

from art_edm.grids.clocks import GaussianClock, LinearClock
from art_edm.measure import objectives
from art_edm.measure import profile as profile_module
from art_edm.measure.dense_paths import PathOptions, draws, measure_along, place_points
from art_edm.measure.objectives import SHORT_POINTS, STREAM, Objective, measure_objective
from art_edm.measure.profile import TINY, Profile, smoothed
from art_edm.models.analytic import EmpiricalDenoiser, GaussianDenoiser
from art_edm.models.denoiser import Denoiser
from art_edm.runtime.context import Context
from art_edm.runtime.distributed import ALONE, World
from art_edm.sampling.noise import seeded_generator

TOP = 4.0
LEVELS = np.append(np.linspace(TOP, 0.01, 400), 1e-4)
S = 1 - LEVELS / TOP  # fraction of the linear clock


def made(norm: np.ndarray) -> Profile:
    return Profile(LinearClock(TOP), LEVELS, norm, len(norm), 0.5)


def jumps(count: int, seed: int) -> np.ndarray:
    """|Q| of trajectories that jump once, each at a time of its own: a narrow bump, exponentially rare later on."""
    when = np.random.default_rng(seed).exponential(0.3, size=count)
    return np.exp(-np.square((S - when[:, None]) / 0.03) / 2)


def excess(profile: Profile, truth: Profile) -> float:
    """J/J* - 1 on the truth of the profile's own optimum."""
    return truth.cost(profile.direct(4096).values) / truth.optimum - 1


@pytest.fixture(scope="module")
def truth() -> Profile:
    many = jumps(20_000, 0).mean(axis=0)
    return made(np.maximum(many, 1e-12)[None])


def test_rare_jumps_that_were_not_seen_are_expected(truth, monkeypatch):
    """Twelve draws of 40 trajectories; single ones go far astray, so that it is the middle one that counts."""
    draws = [made(jumps(40, seed)) for seed in range(1, 13)]

    def middle() -> float:
        return float(np.median([excess(smoothed([each]), truth) for each in draws]))

    plain, found = np.median([excess(each, truth) for each in draws]), middle()
    assert found < 0.1 < 0.4 < plain  # where none of the 40 jumps, their own optimum rushes through
    monkeypatch.setattr(profile_module, "STIFFNESS", 1e-14)
    assert middle() > 0.4


def test_the_floor_bounds_what_an_unseen_jump_can_cost(truth, monkeypatch):
    """All of 40 trajectories jump early: nothing tells of the rest of the clock but the floor."""
    early = made(np.exp(-np.square((S - np.linspace(0.1, 0.3, 40)[:, None]) / 0.01) / 2))
    late = made(np.exp(-np.square((S - 0.8) / 0.03) / 2)[None])
    costs = []
    for floor in (1e-4, 1e-12):
        monkeypatch.setattr(profile_module, "FLOOR", floor)
        found = smoothed([early])
        weight = found.mean(np.array([TOP * 0.2]))[0][0]
        costs.append(late.cost(found.direct(4096).values))
        assert weight >= floor * found.optimum / TOP * 0.9
    assert costs[1] > 10 * costs[0]


def test_nothing_changes_where_trajectories_agree():
    """As much evidence as can be: a wavy q of equal trajectories."""
    wavy = np.exp(1.5 * np.sin(9 * S) - 2 * S)
    own = made(np.tile(wavy, (24, 1)))
    assert excess(smoothed([own]), own) < 1e-5
    np.testing.assert_allclose(smoothed([own]).mean(LEVELS[5:-5])[0], wavy[5:-5], rtol=0.02)
    unequal = made(wavy * np.random.default_rng(0).exponential(size=(3, 1)))
    assert excess(smoothed([unequal]), unequal) < 1e-3


def test_exponential_and_normal_laws_are_kept_whatever_the_noise():
    """log q of second degree in s: the fit is the mean, up to the floor. One that wavers is not."""
    scales = np.array([0.1, 1.0, 10.0])[:, None]
    sigma = TOP * (1 - np.linspace(0, S[-1], profile_module.KNOTS + 1))
    for power in (-7 * S, 3 * S - 9 * S**2):
        own = made(scales * np.exp(power))
        np.testing.assert_allclose(smoothed([own]).norm.mean(axis=0), own.mean(sigma)[0], rtol=3e-3)
    wavering = made(scales * np.exp(np.sin(60 * S)))
    assert np.abs(smoothed([wavering]).norm.mean(axis=0) / wavering.mean(sigma)[0] - 1).max() > 0.1


def test_each_trajectory_keeps_its_share_of_the_mean():
    parts = [made(jumps(5, 1)), replace(made(jumps(3, 2)[:, ::4]), sigma=LEVELS[::4])]
    whole = smoothed(parts)
    before = np.concatenate([part.norms(whole.sigma) for part in parts])
    seen = before.mean(axis=0) > 1e-20
    share = before[:, seen] / before[:, seen].mean(axis=0)
    np.testing.assert_allclose(whole.norm[:, seen] / whole.norm[:, seen].mean(axis=0), share, rtol=1e-9)
    nobody = before.max(axis=0) < 2 * TINY
    assert nobody.sum() > 10 and np.ptp(whole.norm[:, nobody], axis=0).max() == 0  # there all are alike
    assert whole.norm[:, nobody].min() > 0
    assert (len(whole.norm), whole.evaluations, whole.seconds) == (8, 8, 1.0)
    assert whole.sigma[0] == TOP and whole.sigma[-1] == LEVELS[-1]


def test_levels_are_placed_by_what_is_known():
    """Equal shares of the mixture, which is written out here; without a profile, of the other one."""
    clock, known = LinearClock(TOP), made(np.exp(-12 * S)[None])
    levels = place_points(clock, 1e-4, 20, known)
    low = np.log(levels / TOP) / np.log(1e-4 / TOP)
    optimum = (1 - np.exp(-6 * (1 - levels / TOP))) / (1 - np.exp(-6))  # sqrt q = exp(-6 s)
    mixture = 0.95 * (0.25 * (1 - levels / TOP) + 0.75 * optimum) + 0.05 * low
    np.testing.assert_allclose(mixture, np.linspace(0, 1, 20), atol=2e-3)
    plain = place_points(clock, 1e-4, 20)
    np.testing.assert_allclose(0.75 * (1 - plain / TOP) + 0.25 * np.log(plain / TOP) / np.log(1e-4 / TOP),
                               np.linspace(0, 1, 20), atol=2e-3)
    assert np.abs(plain - levels).max() > 0.3


def latents_of(model: Denoiser, seed: int, *counts: int) -> Tuple[torch.Tensor, ...]:
    """The noises that a measurement with this seed draws, one batch after the other."""
    draw = draws(model, seeded_generator(seed, STREAM))
    return tuple(draw(count)[0] for count in counts)


def measured(model: Denoiser, seed: int, points: int, tolerance: float = 0.002, world: World = ALONE) -> Profile:
    """Of 24 trajectories at most."""
    return measure_objective(model, Objective(None, 24, points, tolerance, seed=seed), Context(world))


@pytest.fixture(scope="module")
def empirical() -> EmpiricalDenoiser:
    """Clusters of images: which one of a cluster it will be is decided late."""
    generator = torch.Generator().manual_seed(1)
    centres, near = (torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64) for n in (60, 240))
    return EmpiricalDenoiser((centres.repeat(4, 1, 1, 1) + 0.4 * near).clamp(-1, 1))


@pytest.mark.slow
def test_many_trajectories_where_few_do_not_agree(empirical, monkeypatch):
    """Of three draws of noise; which ones decides by how much many short trajectories win."""
    def drawn_by(seed):
        generator = torch.Generator().manual_seed(seed)
        shape = empirical.img_shape
        draw = lambda count: (torch.randn((count, *shape), generator=generator, dtype=torch.float64), None)
        monkeypatch.setattr(objectives, "draws", lambda denoiser, own: draw)
        return draw

    clock = GaussianClock(80.0, empirical.sigma_data)
    latents = torch.randn((1000, 1, 4, 4), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    truth = measure_along(empirical, latents, clock, 100, options=PathOptions(batch=500))
    losses = {"two stages": [], "alike": []}
    for seed in range(3):
        drawn_by(seed)
        found, wide = measured(empirical, seed, 85), 16 * 85 // SHORT_POINTS
        assert len(found.norm) == 8 + wide and found.evaluations == 8 * 85 + wide * SHORT_POINTS <= 24 * 85
        drawn_by(seed)
        alike = measured(empirical, seed, 85, tolerance=0.0)  # one kind
        assert alike.norm.shape[0] == 24 and alike.evaluations == 24 * 85
        losses["two stages"].append(excess(found, truth))
        losses["alike"].append(excess(alike, truth))
    assert np.mean(losses["alike"]) > 2 * np.mean(losses["two stages"]), losses
    assert all(b > 1.5 * a for a, b in zip(losses["two stages"], losses["alike"])), losses
    by_few = measure_along(empirical, drawn_by(0)(8)[0], clock, 85)
    assert by_few.largest_share > 0.9 and excess(by_few, truth) > 2 * losses["two stages"][0]


class Part(World):
    """One of several processes, here threads: what they sum goes through a list."""

    def __init__(self, rank: int, sums: list, barrier: threading.Barrier) -> None:
        super().__init__(rank, barrier.parties)
        self.sums, self.barrier = sums, barrier

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sums[self.rank] = tensor.clone()
        self.barrier.wait()
        total = torch.stack(self.sums).sum(dim=0)
        self.barrier.wait()
        return total

    def share(self, value):
        return value  # of a store that each has in its own memory, empty

    def check(self) -> None:
        pass

    def phase(self):
        return nullcontext()


@pytest.mark.parametrize("size", [2, 3])
def test_the_number_of_processes_changes_no_byte(empirical, size):
    barrier, sums = threading.Barrier(size), [None] * size
    measure = lambda world: measured(copy.deepcopy(empirical), 0, 30, world=world)
    alone = measure(World())
    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(lambda rank: measure(Part(rank, sums, barrier)), range(size)))
    assert len(alone.norm) == 8 + 16 * 30 // SHORT_POINTS and alone.evaluations == 24 * 30
    for each in found:
        assert each.norm.tobytes() == alone.norm.tobytes() and each.evaluations == alone.evaluations
    assert measured(empirical, 1, 30).norm.tobytes() != alone.norm.tobytes()


def test_trajectories_that_differ_without_jumps_get_more_of_their_kind(monkeypatch):
    model = GaussianDenoiser(0.0, torch.logspace(-2, 2, 4).reshape(1, 2, 2), (1, 2, 2))
    clock = GaussianClock(80.0, model.sigma_data)
    found = measured(model, 0, 40, 1e-5)
    whole = measure_along(model, latents_of(model, 0, 24)[0], clock, 40)
    assert found.evaluations == 24 * 40
    np.testing.assert_array_equal(found.norm[:, 1:-1], whole.norm[:, 1:-1])  # the ends are extrapolated in parts
    monkeypatch.setattr(objectives, "JUMP_SHARE", 1 / 9)
    many = measured(model, 0, 40, 1e-5)
    assert len(many.norm) == 8 + 16 * 40 // SHORT_POINTS and many.evaluations == 24 * 40


def test_jumps_ask_for_many_even_where_the_first_third_seems_to_agree(empirical):
    """With a tolerance that anything meets."""
    found = measured(empirical, 0, 30, tolerance=1e9)
    assert len(found.norm) == 8 + 16 * 30 // SHORT_POINTS
    assert len(measured(GaussianDenoiser(0.0, 0.25, (1, 8, 8)), 0, 30, tolerance=1e9).norm) == 8


def test_the_floor_as_it_is_keeps_an_unseen_time_from_being_rushed_through():
    """All jump early; later no weight is below the floor, which is not zero."""
    early = made(np.exp(-np.square((S - np.linspace(0.1, 0.3, 40)[:, None]) / 0.01) / 2))
    found = smoothed([early])
    least = found.mean(np.linspace(0.1, TOP / 2, 50))[0].min()
    assert profile_module.FLOOR > 0 and least >= 0.9 * profile_module.FLOOR * found.optimum / TOP > 0


def test_the_largest_share():
    norm = np.array([[1.0, 2.0, 0.0], [1.0, 2.0, 6.0], [2.0, 2.0, 3.0]])
    part = replace(made(norm), sigma=LEVELS[:3])
    assert part.largest_share == pytest.approx(6 / 9)
    assert replace(part, norm=norm[:, :2]).largest_share == pytest.approx(2 / 4)
    assert replace(part, norm=np.zeros((3, 3))).largest_share == 0.0  # nobody moves


def test_a_field_whose_trajectories_agree_is_left_as_it_was():
    model, clock = GaussianDenoiser(0.0, 0.25, (1, 8, 8)), GaussianClock(80.0, 0.5)
    found, (latents,) = measured(model, 0, 30), latents_of(model, 0, 24)
    assert found.evaluations == 8 * 30
    assert found.norm.tobytes() == measure_along(model, latents[:8], clock, 30).norm.tobytes()
    assert found.norm.tobytes() != measure_along(model, latents[8:16], clock, 30).norm.tobytes()
