"""Pieces of long work: a killed run finds them again, and nothing is computed twice."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from art_edm.grids.clocks import GaussianClock
from art_edm.models.analytic import GaussianDenoiser
from art_edm.refining.endpoint_objective import end_point_grids
from art_edm.refining.error_growth import weighted
from art_edm.refining.noise_sets import draw_noises
from art_edm.refining.refine_all import refined_grids
from art_edm.refining.solver_jacobian import Noises, Travel
from art_edm.runtime import pieces as pieces_module
from art_edm.runtime.distributed import ALONE
from art_edm.runtime.pieces import Pieces
from art_edm.runtime.store import key_of
from art_edm.sampling.solvers import nfe
from tests.support.refine_fields import SHORT, Threads, mixture

S, TOP = 0.5, 80.0
CLOCK = GaussianClock(TOP, S)
LEVELS = np.array([20.0, 3.0, 0.5, 0.0])
ENDS = nfe(SHORT.fine_solver, SHORT.fine)  # evaluations for one exact path


class Killed(BaseException):
    """As kill -9: nothing is written when it comes."""


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Every piece is written as soon as it is there."""
    monkeypatch.setattr(pieces_module, "EVERY", 0.0)
    monkeypatch.setattr(pieces_module, "SHARE", 0.0)


def gaussian() -> GaussianDenoiser:
    return GaussianDenoiser(0.0, S**2, (1, 2, 2), sigma_max=TOP)


def noises_of(count: int = 3, seed: int = 0) -> Noises:
    generator = torch.Generator().manual_seed(seed)
    latents, ends = (torch.randn(count, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return Noises(latents, None, ends)


# --- one piece -----------------------------------------------------------------------------------------


def test_a_piece_is_computed_once_and_counted_once_in_each_run(tmp_path):
    model, noises, path = mixture(), noises_of(), tmp_path / "kept"
    plain = Travel(model, "heun", noises, 2)
    expected, cost = plain.run(LEVELS, keep=False).errors, plain.evaluations
    for resume, fresh, told in ((False, cost, cost), (True, 0, cost), (False, cost, cost)):
        pieces, before = Pieces(path, "it", resume), model.evaluations
        travel = Travel(model, "heun", noises, 2, pieces=pieces)
        np.testing.assert_array_equal(travel.run(LEVELS, keep=False).errors, expected)
        assert (model.evaluations - before, travel.evaluations) == (fresh, told)
        np.testing.assert_array_equal(travel.run(LEVELS, keep=False).errors, expected)  # again, in the same run
        assert (model.evaluations - before, travel.evaluations) == (fresh, told)
        assert pieces.recovered == told - fresh and pieces.spent(model) == model.evaluations + pieces.recovered
        assert (pieces.seconds > 0) == resume


OTHERS = ["identity", "solver", "levels", "latents", "ends", "labels", "batch", "work", "version", "device"]


@pytest.mark.parametrize("other", OTHERS)
def test_whatever_decides_a_piece_tells_it_apart(tmp_path, monkeypatch, other):
    """Else a wrong number would be believed: every one of these alone makes the work be done."""
    model, noises, path = mixture(), noises_of(), tmp_path / "kept"
    Travel(model, "heun", noises, 2, pieces=Pieces(path, "it")).run(LEVELS, keep=False)
    pieces = Pieces(path, "that" if other == "identity" else "it", resume=True)
    levels = LEVELS * (1 + 1e-15) if other == "levels" else LEVELS
    assert (levels != LEVELS).any() == (other == "levels")
    if other in ("latents", "ends"):
        noises = noises._replace(**{other: getattr(noises, other) + torch.tensor(1e-15, dtype=torch.float64)})
    if other == "labels":
        noises = noises._replace(labels=torch.eye(3))
    solver, batch = "euler" if other == "solver" else "heun", 3 if other == "batch" else 2
    if other == "version":
        monkeypatch.setattr(pieces_module, "__version__", "0")
    if other == "device":
        monkeypatch.setattr(pieces_module, "key_of", lambda what: key_of(["cuda" if x == "cpu" else x for x in what]))
    travel, before = Travel(model, solver, noises, batch, pieces=pieces), model.evaluations
    if other == "work":
        travel.grown(levels, (levels[1:] + levels[:-1]) / 2)
    else:
        travel.run(levels, keep=False)
    assert pieces.recovered == 0 and model.evaluations - before == travel.evaluations > 0


@pytest.mark.parametrize("other", ["levels", "middles"])
def test_growth_is_told_apart_by_all_its_levels(tmp_path, other):
    model, noises, path = mixture(), noises_of(), tmp_path / "kept"
    given = {"levels": LEVELS, "middles": (LEVELS[1:] + LEVELS[:-1]) / 2}
    expected = Travel(model, "heun", noises, 2, pieces=Pieces(path, "it")).grown(**given)
    for changed, recovered in (({}, True), ({other: given[other] * (1 + 1e-15)}, False)):
        pieces = Pieces(path, "it", resume=True)
        found = Travel(model, "heun", noises, 2, pieces=pieces).grown(**{**given, **changed})
        assert (pieces.recovered > 0) == recovered
        np.testing.assert_allclose(found, expected, rtol=0 if recovered else 1e-9)


@pytest.mark.parametrize("content", [b"", b"no tensors", "training", "half"])
def test_a_file_that_is_none_of_ours_costs_time_alone(tmp_path, content):
    model, noises, path = mixture(), noises_of(), tmp_path / "kept"
    expected = Travel(model, "heun", noises, 2, pieces=Pieces(path, "it")).run(LEVELS, keep=False).errors
    if content == "training":
        torch.save({"settings": {}, "iteration": 3}, path)
    else:
        path.write_bytes(path.read_bytes()[:300] if content == "half" else content)
    travel = Travel(model, "heun", noises, 2, pieces=Pieces(path, "it", resume=True))
    np.testing.assert_array_equal(travel.run(LEVELS, keep=False).errors, expected)
    assert Pieces(path, "it", resume=True)._pieces  # and it is one of ours now


def test_a_flipped_bit_is_not_believed(tmp_path):
    """In a number, or in what is told of it; torch reads such a file without a word."""
    model, path = gaussian(), tmp_path / "kept"
    Pieces(path, "it").get(model, [1], lambda: torch.full((64,), 0.25, dtype=torch.float64))
    whole, kept = path.read_bytes(), lambda: len(Pieces(path, "it", resume=True)._pieces)
    where = whole.index(np.full(64, 0.25).tobytes())
    damaged = bytearray(whole)
    damaged[where + 30] ^= 1
    path.write_bytes(damaged)
    assert torch.load(path, weights_only=True) and kept() == 0
    path.write_bytes(whole)
    assert kept() == 1
    (key, (*fields, checksum)), = torch.load(path, weights_only=True).items()
    for changed in ([fields[0], 5, fields[2]], [fields[0], fields[1], 5.0], [fields[0].reshape(8, 8), *fields[1:]]):
        torch.save({key: [*changed, checksum]}, path)
        assert kept() == 0


def test_pieces_are_written_now_and_then_and_when_an_error_ends_the_work(tmp_path, monkeypatch):
    """Two seconds apart, whatever the clock shows; a kill in between loses no more."""
    monkeypatch.setattr(pieces_module, "EVERY", 2.0)
    model, path, clock = gaussian(), tmp_path / "kept", [100.0]
    monkeypatch.setattr(pieces_module.time, "monotonic", lambda: clock[0])
    pieces = Pieces(path, "it")
    piece = lambda number: pieces.get(model, [number], lambda: torch.tensor([float(number)]))
    kept = lambda: len(Pieces(path, "it", resume=True)._pieces)
    piece(1)
    assert not path.exists()
    clock[0] += 2.1
    piece(2)
    assert kept() == 2
    piece(3)
    assert kept() == 2
    clock[0] -= 50.0
    piece(4)
    assert kept() == 4
    with pytest.raises(KeyboardInterrupt), pieces:
        piece(5)
        raise KeyboardInterrupt
    assert kept() == 5
    with pieces:
        piece(6)
    assert kept() == 5 and pieces.done() == 0.0 and kept() == 6  # a stage's end
    monkeypatch.setattr(pieces_module, "SHARE", 5.0)
    pieces._took, clock[0] = 3.0, clock[0] + 10.0  # a slow disk: no more than a sixth of the time
    piece(7)
    assert kept() == 6
    clock[0] += 6.0
    piece(8)
    assert kept() == 8
    for name in (".kept.part", ".kept-3.part"):  # of killed writers
        (tmp_path / name).write_text("half of it")
    others = ["kept-20261122", "kept-x", ".kept-x.part", "kept-4"]  # a user's copies, and his folder
    for name in others[:-1]:
        (tmp_path / name).write_text("not ours")
    (tmp_path / "kept-4").mkdir()
    pieces.remove()
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_a_full_disk_is_told_and_what_was_written_stays(tmp_path, monkeypatch):
    model, path = gaussian(), tmp_path / "kept"
    pieces = Pieces(path, "it")
    pieces.get(model, [1], lambda: torch.zeros(1))

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message = r"cannot write the checkpoint .*kept: No space left on device; the one before is kept; make room and "
        with pytest.raises(OSError, match=message + "use --resume"), pieces:
            pieces.get(model, [2], lambda: torch.zeros(1))
    assert len(Pieces(path, "it", resume=True)._pieces) == 1 and os.listdir(tmp_path) == ["kept"]
    pieces.get(model, [3], lambda: torch.zeros(1))
    assert len(Pieces(path, "it", resume=True)._pieces) == 3


# --- whole commands ------------------------------------------------------------------------------------


def job(model, pieces=None, world=ALONE, states=None, resume=False, refine=True):
    """The end-point objective, and a refinement, for two K: the grids' bytes, and all costs that were told."""
    costs = []
    count = lambda stage, began, evaluations: costs.append((stage, evaluations))
    grids, more = {k: weighted(CLOCK.sigma, 0.0, S, k) for k in (3, 4)}, {"world": world, "pieces": pieces}
    found = end_point_grids(model, CLOCK.sigma, grids, "euler", SHORT, None, count, **more)
    chosen = {k: each.grid for k, each in found.items()}
    if not refine:
        return [each.grid.values.tobytes() for each in found.values()], costs
    refined = refined_grids(model, chosen, "euler", SHORT, count, "it", states or {}, resume, own_clock=False, **more)
    return [each.grid.values.tobytes() for each in (*found.values(), *refined.values())], costs


def test_killed_anywhere_little_is_evaluated_again(tmp_path):
    """At eight moments of the end-point objective; no more is lost than the batch under way."""
    whole = gaussian()
    expected = job(whole, Pieces(), refine=False)
    assert sum(cost for _, cost in expected[1]) == whole.evaluations
    largest = 2 * (18 * (18 + 10) + 18)  # the growth of a batch of two; exact ends take less, 2 * ENDS
    for moment in np.linspace(1, whole.evaluations - 1, 8).astype(int):
        again, lost = killed_and_resumed(moment, tmp_path / f"{moment}")
        assert again == expected and lost <= largest
    assert killed_and_resumed(moment, None)[1] >= moment  # the twin that keeps nothing


def killed_and_resumed(moment, path):
    """What a run gives after one that was killed at an evaluation, and how many evaluations were lost."""
    model, original = gaussian(), GaussianDenoiser.denoise

    def denoise(self, x, sigma, labels):
        if self.evaluations >= moment:
            raise Killed
        return original(self, x, sigma, labels)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(GaussianDenoiser, "denoise", denoise)
        job(model, Pieces(path, "it"), refine=False)
    pieces = Pieces(path, "it", resume=True)
    again = job(gaussian(), pieces, refine=False)
    return again, model.evaluations - pieces.recovered


def test_ends_that_several_refinements_share_survive_a_kill(tmp_path):
    """Exact ends of the objective's noises serve the refinement, too: they are its first ones."""
    model, path, states = gaussian(), tmp_path / "kept", {k: tmp_path / f"{k}.ckpt" for k in (3, 4)}
    plain, apart = job(model)
    expected, costs = job(model, Pieces(path, "it"), states=states)
    assert expected == plain
    drawn = SHORT.noises + SHORT.held
    ends = [cost for stage, cost in costs if stage == "ends"]
    assert ends == [drawn * ENDS, 3 * drawn * ENDS, 0] and apart.count(("ends", drawn * ENDS)) == 2
    before = model.evaluations
    again, costs = job(model, Pieces(path, "it", resume=True), states=states, resume=True)
    assert again == expected and model.evaluations == before  # a kill before the grids were written


@pytest.mark.parametrize("size", [2, 3])
def test_processes_keep_what_is_theirs_and_any_number_goes_on(tmp_path, size):
    def work(rank, resume=False, box=None, store=None, barrier=None):
        world = ALONE if store is None else Threads(rank, size, store, barrier, box)
        model = gaussian()
        return (*job(model, Pieces(tmp_path / "kept", "it", resume, rank), world), model.evaluations)

    def together(resume):
        store, barrier, box = HashStore(), threading.Barrier(size), [None] * size
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(lambda rank: work(rank, resume, box, store, barrier), range(size)))

    alone, costs = job(gaussian(), Pieces())
    first = together(False)
    assert all(each[:2] == (alone, costs) for each in first)
    assert sum(each[2] for each in first) == sum(cost for _, cost in costs)
    assert sorted(os.listdir(tmp_path)) == ["kept", *(f"kept-{rank}" for rank in range(1, size))]
    refining = sum(cost for stage, cost in costs if stage == "refine")
    assert sum(each[2] for each in together(True)) == refining  # no state of theirs was kept
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert work(0, resume=True) == (alone, costs, refining)  # one process goes on with what all had
    pieces = Pieces(tmp_path / "kept", "it", resume=True)
    pieces.get(gaussian(), ["small"], lambda: torch.zeros(1))
    assert (tmp_path / "kept").stat().st_size < sizes["kept"] + 2000  # it writes its own ones alone
    pieces.remove()
    assert os.listdir(tmp_path) == []


def test_exact_ends_found_again_are_those_that_were_solved(tmp_path):
    """Gaussian data: x_0 = x s / sqrt(s^2 + sigma_max^2); of another top they are others, and solved."""
    model, path = gaussian(), tmp_path / "kept"
    for top in (TOP, 20.0):
        for resume in (False, True):
            before = model.evaluations
            drawn = draw_noises(model, SHORT, top, pieces=Pieces(path, "it", resume or top < TOP))
            for part in drawn[:2]:
                expected = part.latents * top * S / np.hypot(S, top)
                torch.testing.assert_close(part.ends, expected, rtol=0, atol=1e-3)
            assert drawn.evaluations == 10 * ENDS
            assert model.evaluations - before == (0 if resume else drawn.evaluations)
