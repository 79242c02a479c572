"""What a grid costs: evaluations, seconds, memory, and what is left to the network; every ratio from one run.

Symbols
-------
own       the network's own time: one batch through it, called as the profile calls it and nothing around
share     (time of the profile stage) / (batches * own); both measured in turns in the same run, so that what else
          the machine does falls on both alike. `wall` by the clock on the wall, `busy` by the processor's time (CPU)
J/J*      of the learned clock on a reference profile of other noises, three evaluations at each of its points
budget    evaluations that the paper pays for a number of steps K: 5,000 iterations x K x 2
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from art_edm.grids.clocks import make_clock
from art_edm.learning.provenance import FINE_STEPS, clock_score
from art_edm.learning.training import PRESETS, TrainConfig, TrainResult, train
from art_edm.measure.dense_paths import PathOptions, measure_along, measure_profile
from art_edm.measure.profile import Profile
from art_edm.models.denoiser import Denoiser
from art_edm.models.unet import ScoreUNet
from art_edm.runtime.memory import peak_memory
from art_edm.runtime.precision import full_precision
from art_edm.sampling.noise import seeded_generator

__all__ = ["budget", "costs", "layouts", "learned_score", "paper", "profile_memory", "profile_share",
           "reference", "run"]

PAPER_ITERATIONS, PAPER_EVALUATIONS = 5000, 2


class Seconds(NamedTuple):
    """Time by the clock on the wall, and of the processor."""

    wall: float
    busy: float


def _now(device: torch.device) -> Seconds:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Seconds(time.perf_counter(), time.process_time())


def _since(began: Seconds, device: torch.device) -> np.ndarray:
    return np.subtract(_now(device), began)


def _noise(denoiser: Denoiser, count: int, seed: int) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Unit noise [count, C, H, W] float64 and labels, on the denoiser's device."""
    generator = seeded_generator(seed, 1 << 29)
    latents = torch.randn((count, *denoiser.img_shape), generator=generator, dtype=torch.float64)
    return latents.to(denoiser.device), denoiser.draw_labels(count, generator)


def _clock(denoiser: Denoiser) -> Any:
    return make_clock("gaussian", denoiser.sigma_max, denoiser.sigma_data)


# ---- the profile beside the network ----


def own_evaluation(denoiser: Denoiser, batch: int) -> Callable[[], None]:
    """One batch through the network, uncounted, with nothing of ours around it."""
    latents, labels = _noise(denoiser, batch, 1)
    x, sigma = latents.float(), torch.ones(1, device=latents.device).expand(batch)

    @torch.no_grad()
    def once() -> None:
        with full_precision():
            denoiser.denoise(x, sigma, labels)

    return once


def profile_share(denoiser: Denoiser, trajectories: int, points: int, batch: int) -> Dict[str, Any]:
    """Time of the profile stage over that of its evaluations alone.

    On a CPU the two take turns, level by level; a GPU, which must not be held up between levels, runs the network
    alone before and after.
    """
    device, once = denoiser.device, own_evaluation(denoiser, batch)
    latents, labels = _noise(denoiser, trajectories, 0)
    own: List[np.ndarray] = []

    def measure_own(_: int = 0) -> None:
        began = _now(device)
        once()
        own.append(_since(began, device))

    once()  # what is made once
    turns = device.type == "cpu"
    for _ in range(0 if turns else 5):
        measure_own()
    inside, began = len(own), _now(device)
    options = PathOptions(labels, batch, measure_own if turns else None)
    profile = measure_along(denoiser, latents, _clock(denoiser), points, options)
    total = _since(began, device) - (np.sum(own[inside:], axis=0) if turns else 0)
    for _ in range(0 if turns else 5):
        measure_own()
    each = np.mean(own, axis=0) if turns else np.median(own, axis=0)
    batches = profile.evaluations / batch
    found = {"evaluations": profile.evaluations, "batch": batch, "seconds": float(total[0]),
             "own_seconds_per_image": float(each[0] / batch), "share_wall": float(total[0] / (batches * each[0]))}
    if turns:
        found["share_busy"] = float(total[1] / (batches * each[1]))
    return found


# ---- a whole run, and the paper's ----


def reference(denoiser: Denoiser, trajectories: int, points: int, batch: int) -> Profile:
    """A profile of other noises than any run's, three evaluations at each point."""
    latents, labels = _noise(denoiser, trajectories, 10**6)
    return measure_profile(denoiser, latents, _clock(denoiser), points, PathOptions(labels, batch))


def learned_score(result: TrainResult, profile: Profile) -> float:
    """J/J* of the learned clock on `profile`."""
    return clock_score(SimpleNamespace(learned=result.learned, profile=profile))


def run(denoiser: Denoiser, config: TrainConfig, profile: Optional[Profile]) -> Tuple[TrainResult, Dict[str, Any]]:
    """One run and its cost; scored where there is a reference profile."""
    result = train(denoiser, config)
    found = {"evaluations": sum(result.evaluations.values()), "by_stage": result.evaluations,
             "profile_seconds": result.seconds["profile"], "rl_seconds": result.seconds["rl"]}
    if profile is not None:
        found.update(J_over_J_star=learned_score(result, profile),
                     optimum_over_J_star=profile.cost(result.profile.direct(FINE_STEPS).values) / profile.optimum)
    return result, found


def paper(denoiser: Denoiser, steps: Sequence[int], iterations: int) -> Dict[str, Any]:
    """The paper's recipe: measured for a few iterations at the first K, and its whole budget for all of `steps`.

    Only the evaluations of its rollouts count; the small profile measured beside them is ours.
    """
    config = PRESETS["paper"].changed(train_steps=steps[0], trajectories=2, points=8, iterations=iterations)
    result = train(denoiser, config)
    each = result.evaluations["rl"] / iterations
    return {
        "iterations": iterations, "num_steps": steps[0], "evaluations_per_iteration": each,
        "seconds_per_iteration": result.seconds["rl"] / iterations,
        "budget": {str(k): budget(k) for k in steps}, "budget_all": sum(map(budget, steps)),
        "ours_at_full_length": round(each * PAPER_ITERATIONS),
        "seconds_at_full_length": result.seconds["rl"] / iterations * PAPER_ITERATIONS,
    }


def budget(num_steps: int) -> int:
    """Evaluations the paper pays for one K."""
    return PAPER_ITERATIONS * num_steps * PAPER_EVALUATIONS


# ---- what more costs ----


def costs(result: TrainResult, device: torch.device, points: Tuple[int, int] = (20, 160)) -> Dict[str, Any]:
    """One more K, twice the pixels, twice the trajectories, and more points.

    The last three on small networks of the bundled kind with random weights: they are the method's costs.
    """
    began = _now(device)
    for k in range(10, 30):
        result.learned.grid(k)
    one_more = float(_since(began, device)[0]) / 20
    small, large = (_small(side).to(device) for side in (28, 40))  # 2.04 times the pixels
    seconds = {name: _profile_busy(net, count, device) for name, net, count in (
        ("one", small, 16), ("pixels", large, 16), ("trajectories", small, 32))}
    own = {name: _busy(own_evaluation(net, 8), device, 20) for name, net in (("one", small), ("pixels", large))}
    peaks = [profile_memory(small, count) for count in points]
    return {
        "one_more_K_seconds": one_more, "twice_pixels": seconds["pixels"] / seconds["one"],
        "twice_pixels_network_alone": own["pixels"] / own["one"],
        "twice_trajectories": seconds["trajectories"] / seconds["one"],
        "points": list(points), "peak_bytes": peaks, "peak_ratio": peaks[1] / peaks[0],
    }


def profile_memory(denoiser: Denoiser, points: int) -> int:
    """Most bytes in use while a profile of one batch of trajectories is measured."""
    latents, clock = _noise(denoiser, 8, 0)[0], _clock(denoiser)
    return peak_memory(lambda: measure_along(denoiser, latents, clock, points), denoiser.device)


def _small(side: int) -> ScoreUNet:
    """A network of the bundled kind with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ScoreUNet(side).eval().requires_grad_(False)
        for value in net.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return net.to(memory_format=torch.channels_last)


def _busy(function: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Least time of a few repeats: the processor's on a CPU, which others do not lengthen, else on the wall."""
    function()
    kept = []
    for _ in range(repeats):
        began = _now(device)
        function()
        kept.append(float(_since(began, device)[int(device.type == "cpu")]))
    return min(kept)


def _profile_busy(net: Denoiser, trajectories: int, device: torch.device) -> float:
    latents, clock = _noise(net, trajectories, 0)[0], _clock(net)
    return _busy(lambda: measure_along(net, latents, clock, 12), device, 2)


# ---- layouts of memory ----


def layouts(denoiser: Denoiser, batch: int, compiled: bool) -> Dict[str, float]:
    """Speed of channels_last, and of torch.compile, over the plain network; above 1 is faster. Leaves it plain."""
    device, net = denoiser.device, getattr(denoiser, "net", denoiser)
    once = own_evaluation(denoiser, batch)
    net.to(memory_format=torch.contiguous_format)
    plain = _busy(once, device)
    net.to(memory_format=torch.channels_last)
    found = {"plain_seconds_per_image": plain / batch, "channels_last": plain / _busy(once, device)}
    net.to(memory_format=torch.contiguous_format)
    if compiled:
        original, began = denoiser.denoise, time.perf_counter()
        try:
            denoiser.denoise = torch.compile(original, dynamic=False)
            once()
            found["compile_seconds"] = time.perf_counter() - began
            found["compile"] = plain / _busy(once, device)
        finally:
            del denoiser.denoise
    return found
