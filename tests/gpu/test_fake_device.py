"""Nothing mixes devices, and loops do not wait for one: on a pretended device, where no GPU is needed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from paper import context as laboratory
from paper.context import Lab
from paper.experiments import TABLES
from paper.tables import table1

from art_edm.grids.clocks import GaussianClock
from art_edm.grids.grid import edm
from art_edm.learning.config import PRESETS
from art_edm.learning.rollouts import LiveEnvironment
from art_edm.measure.dense_paths import measure_along, measure_profile
from art_edm.measure.field import choose_step
from art_edm.measure.local_errors import measure_errors
from art_edm.measure.sde_errors import measure_stochastic
from art_edm.metrics.detectors import Detector
from art_edm.metrics.feature_stats import RunningMoments
from art_edm.models.analytic import MixtureDenoiser
from art_edm.models.evaluate import FiniteCheck
from art_edm.models.unet import ScoreUNet
from art_edm.refining.config import RefineConfig
from art_edm.refining.noise_sets import draw_noises
from art_edm.refining.refine import refine
from art_edm.refining.stage import Stage
from art_edm.runtime.distributed import World
from art_edm.runtime.store import Store
from art_edm.sampling.solvers import SOLVERS, sample
from tests.support.fake_device import DEVICE, FakeDevice, Held, Mixed

CLOCK = GaussianClock(80.0, 0.5)


def network():
    return MixtureDenoiser([0.3, 0.7], torch.tensor([-0.4, 0.6]).reshape(2, 1, 1, 1), 0.01)


def noises(count=3):
    return torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def counted(work):
    """What `work(denoiser, latents)` returns there, brought back, and the device, which knows the reads and copies."""
    with FakeDevice() as device:
        result = work(device.take(network()), device.take(noises()))
        reads, copies = device.reads, device.copies
        return (result.cpu() if isinstance(result, torch.Tensor) else result), reads, copies


def on_device(work):
    """As `counted`, without the copies."""
    return counted(work)[:2]


def measured(measure, **options):
    return lambda points: lambda net, x: measure(net, x, CLOCK, points, **options).norm


def sampled(solver):
    return lambda points: lambda net, x: sample(net, x, edm(points, 0.002, 80.0), solver)


WORK = {"along": measured(measure_along), "points": measured(measure_profile), "sde": measured(measure_stochastic),
        **{f"errors of {name}": measured(measure_errors, solver=name) for name in ("euler", "heun", "rk4", "deis")},
        **{name: sampled(name) for name in SOLVERS}}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
def test_the_cpus_numbers_without_mixing_and_with_a_bounded_number_of_reads(name):
    found, *waits = counted(WORK[name](12))
    assert np.array_equal(found, WORK[name](12)(network(), noises()))
    assert waits == list(counted(WORK[name](24))[1:]) and waits[0] <= 4 and waits[1] <= 1


def test_a_network_with_its_weights_there():
    net = ScoreUNet(img_resolution=8, sigma_data=0.5, width=8, deep_width=12, emb=8).eval().requires_grad_(False)
    latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = edm(3, 0.002, 80.0)
    expected = sample(net, latents, grid)
    with FakeDevice() as device:
        found = sample(device.take(net), device.take(latents), grid)
        assert isinstance(found, Held) and found.device == DEVICE and device.reads <= 4
        with pytest.raises(Mixed):
            sample(net, latents, grid)
    assert torch.equal(found.as_subclass(torch.Tensor), expected)


def test_moments_are_read_once():
    features = [torch.randn(5, 3, generator=torch.Generator().manual_seed(k)) for k in range(6)]

    def moments(device, batches):
        running = RunningMoments(3, device)
        for batch in batches:
            running.update(batch)
        return running.result()

    with FakeDevice() as device:
        found = moments(DEVICE, map(device.take, features))
        assert device.reads == 2  # the mean and the scatter
    assert all(np.array_equal(*pair) for pair in zip(found, moments("cpu", features)))


@pytest.mark.parametrize("mix", [
    lambda net, x: x + noises(), lambda net, x: x.add_(noises()), lambda net, x: x.numpy(),
    lambda net, x: network()(x, 1.0), lambda net, x: torch.cat([x, noises()]), lambda net, x: np.asarray(x),
])
def test_a_mix_is_found(mix):
    mix(network(), noises())  # on the CPU alone nobody sees it
    with pytest.raises((Mixed, RuntimeError)):
        on_device(mix)


@pytest.mark.parametrize("read", [
    lambda x: float(x.max()), lambda x: bool((x > 0).any()), lambda x: x[x > 0], lambda x: x.to("cpu"),
    lambda x: x.sum().item(), lambda x: x.flatten().tolist(), lambda x: torch.zeros(3, 1, 1, 1).double().copy_(x),
])
def test_a_read_in_a_loop_is_counted(read):
    assert on_device(lambda net, x: [read(x) for _ in range(7)])[1] == 7
    assert on_device(lambda net, x: [x.sum() for _ in range(7)])[1] == 0


@pytest.mark.parametrize("copy", [
    lambda x: x + noises().to(x.device), lambda x: x.new_tensor([1.0]), lambda x: torch.tensor([1.0], device=x.device),
    lambda x: x.clone().copy_(noises()),
])
def test_a_copy_in_a_loop_is_counted(copy):
    assert counted(lambda net, x: [copy(x) for _ in range(7)])[1:] == (0, 7)
    free = lambda x: (x.new_full((1,), 2.0), noises().to(x.device, non_blocking=True), x.to(DEVICE))
    assert counted(lambda net, x: [free(x) for _ in range(7)])[1:] == (0, 0)


def test_a_level_of_the_cpu_is_not_copied():
    level = torch.tensor(2.0, dtype=torch.float64)
    found, *waits = counted(lambda net, x: net(x, level))
    assert torch.equal(found, network()(noises(), level)) and waits == [0, 0]
    assert counted(lambda net, x: net(x, level.expand(3)))[2] == 1  # one for each image is


def test_the_choice_of_a_step_reads_three_times_for_each_that_is_tried():
    found, reads = on_device(choose_step)
    assert found == choose_step(network(), noises()) and reads <= 3 * 3


@pytest.mark.parametrize("paths", [4, 16])
def test_live_rollouts_read_as_often_however_many_noises_there_are(paths):
    def follow(net, x):
        live = LiveEnvironment(net, CLOCK, 1.0)
        live.reset(paths, 2, torch.Generator().manual_seed(0))
        for _ in range(5):
            live.weight()
            live.move(np.full(paths, 0.1))

    _, reads, copies = counted(follow)
    assert reads <= 2 * 5 and copies <= 2 + 5  # q and its check; noises, then a level for each path


# --- refinement, and whole commands ------------------------------------------------------------------

CONFIG = RefineConfig(noises=4, validation=4, fine_steps=6, iterations=2, cheap_iterations=2)


def refined(solver, net, _=None):
    name, _, weights = solver.partition(" ")
    return refine(net, edm(4, 0.002, 80.0), name, replace(CONFIG, weights=bool(weights))).record()


@pytest.fixture
def made(monkeypatch):
    """How often a batch was worked on."""
    entries, make = [], Stage.make
    monkeypatch.setattr(Stage, "make", lambda *args: entries.append(1) or make(*args))
    return entries


@pytest.mark.parametrize("solver", [
    "heun", *(pytest.param(name, marks=pytest.mark.slow) for name in ("clock", "unipc", "clock with weights"))])
def test_refinement_reads_twice_for_a_batch(solver, made):
    found, reads, copies = counted(partial(refined, solver))
    batches = len(made)
    assert {**found, "seconds": 0} == {**refined(solver, network()), "seconds": 0}
    digests = 2 * 2 + 2  # of latents and ends, for training and validation; and once before the ends are known
    assert batches >= 9 and reads <= 2 * batches + digests + 1 and copies <= 3


class Waves(Detector):
    """Three features of an image of one pixel."""

    name, sha256, dim = "waves", "0" * 64, 3

    def features(self, images):
        return torch.cat([(images.flatten(1) * k / 100).sin() for k in (1, 2, 3)], dim=1)


@pytest.mark.slow
def test_refinement_by_features_is_that_of_the_cpu(made):
    def work(net, _=None):
        noises = draw_noises(net, CONFIG, 80.0)._replace(detector=Waves())
        return {**refine(net, edm(4, 0.002, 80.0), "heun", CONFIG, noises=noises).record(), "seconds": 0}

    found, reads, copies = counted(work)
    batches = len(made)
    assert found == work(network()) and batches >= 9
    assert reads <= 2 * batches + 6 + 3 and copies <= 4  # as above, and features of the exact ends


def test_a_check_at_once_reads_in_every_evaluation(made, monkeypatch):
    now = lambda device: FiniteCheck(device, deferred=False)
    monkeypatch.setattr("art_edm.refining.solver_jacobian.FiniteCheck", now)
    assert counted(partial(refined, "heun"))[1] > 5 * len(made)


def commanded(tool, name, *args):
    """Run a tool there; its output, and how often the host waited: (reads, copies)."""
    with FakeDevice() as device:
        result = tool(name)(*args, "--device=cuda")
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output, device.reads, device.copies


@pytest.fixture
def small(monkeypatch):
    """Refinements and learning of seconds."""
    monkeypatch.setattr("art_edm.schedule.RefineConfig", lambda seed: CONFIG)
    tiny = PRESETS["default"].changed(iterations=2, batch=16, repeats=4, trajectories=4, points=80, train_steps=6,
                                      distill_paths=32)
    monkeypatch.setitem(laboratory.PRESETS, "default", tiny)


@pytest.mark.slow
def test_a_grid_refined_there_is_that_of_the_cpu(tool, small, made):
    args = ["--network=gaussian:0.5", "--nfe=3", "--refine", "--method=direct", "--trajectories=8", "--quiet"]
    _, reads, copies = commanded(tool, "train_schedule", *args, "--out=there.npy")
    assert reads <= 2 * len(made) + 24 and copies <= len(made) + 8
    assert tool("train_schedule")(*args, "--out=here.npy", "--device=cpu").exit_code == 0
    assert np.array_equal(np.load("there.npy"), np.load("here.npy"))


def test_end_point_errors_read_as_often_however_many_steps_there_are(tool):
    args = ["gen", "--network=gaussian:0.2", "--grid=edm", "--reference-error", "--error-noises=9", "--quiet"]
    few, *waits = commanded(tool, "fid", *args, "--steps=3", "--error-steps=10", "--cache=a")
    assert commanded(tool, "fid", *args, "--steps=6", "--error-steps=20", "--cache=b")[1:] == tuple(waits)
    assert waits[0] <= 2 * 4 and waits[1] <= 2 * 3  # the samples and the fine solution
    assert tool("fid")(*args, "--steps=3", "--error-steps=10", "--cache=c", "--device=cpu").output == few


@pytest.mark.slow
def test_table_1_is_that_of_the_cpu(tmp_path, small):
    def table(device, name):
        (tmp_path / name).mkdir()
        lab = Lab(Store(tmp_path / name), World(device=device), tmp_path / name, num=200)
        return table1.run_oned(replace(TABLES["table1"], steps=(2,), blocks=2), lab)

    with FakeDevice() as device:
        there = table(DEVICE, "there")
        assert device.reads <= 4 * 2 * len(there.rows) + 8  # for each block
    assert there.rows == table(torch.device("cpu"), "here").rows
