"""Grids in the schedulers of diffusers: `use_grid`, right against a closed form or refused.

Symbols
-------
sigmas     a scheduler's noise levels, float32; K + 1 values, of which the last is 0
timesteps  what a scheduler hands the network for each level: log(sigma) / 4 in EDM's formulation, else the place
           of sigma among the levels of the network's training

Of its schedulers only EulerDiscreteScheduler has an argument for noise levels; EDMEulerScheduler's `sigmas` are
places in [0, 1] of its own rule, and the others have none.

Which of theirs is which of ours: Euler's is `euler`, Heun's `heun`, DPMSolverMultistepScheduler of order 2 `dpmpp2m`,
all three on any grid. None of theirs extrapolates in the learned clock: the nearest to `clock-denoised` is
DPMSolverMultistep, to `clock` DEISMultistepScheduler, whose polynomials are in log sigma. LMSDiscreteScheduler has the
weights of `ab4-sigma`, PNDMScheduler with skip_prk_steps those of `ipndm`, UniPCMultistepScheduler is `unipc`; these
take no grid here, as their levels follow from integer timesteps or from a rule of their own.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, Optional, Tuple

import numpy as np
import torch

from art_edm.grids.grid import Grid

__all__ = ["SCHEDULERS", "use_grid"]


_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
SCHEDULERS = (*_EDM, "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler")


def use_grid(scheduler: Any, grid: Grid) -> Any:
    """Let a scheduler of diffusers run on a grid, in a pipeline or in a loop of one's own.

    From then on its `set_timesteps` lays out the grid, exact to float32, whatever rule it is configured for. An
    EDM scheduler's sigma_max becomes the grid's, since pipelines scale the first noise by it.

    Args:
        scheduler: one of `SCHEDULERS`; it is changed, its class is not.
        grid: the grid; sigma in the units of x, within the levels of training unless the scheduler is EDM's.
    Returns:
        The scheduler.
    Raises:
        ValueError: another scheduler; a configuration that does not end at 0, or that is for flow matching; a grid
            outside the network's levels, or too fine for float32. Later: another number of steps is asked for.
    """
    kind = next((base.__name__ for base in type(scheduler).__mro__ if base.__name__ in SCHEDULERS), None)
    if kind is None:
        raise ValueError(f"found {type(scheduler).__name__}, expected one of {', '.join(SCHEDULERS)} of diffusers")
    _check_configuration(scheduler.config)
    sigmas, steps = _single(grid), grid.num_steps
    if kind in _EDM:
        scheduler.register_to_config(sigma_max=grid.sigma_max)
    elif not _continuous(scheduler, kind):
        _places(scheduler, sigmas)  # refuses a grid outside the network's levels

    def set_timesteps(self: Any, num_inference_steps: Optional[int] = None, device: Any = None) -> None:
        if num_inference_steps not in (None, steps):
            raise ValueError(f"found num_inference_steps = {num_inference_steps}, expected {steps}, the grid's steps; "
                             f"pass {steps}, or resample the grid with tools/make_grid.py")
        if kind == "EulerDiscreteScheduler":
            type(self).set_timesteps(self, sigmas=sigmas.numpy(), device=device)
            return
        type(self).set_timesteps(self, steps, device=device)  # forgets the last run
        timesteps = _distinct(grid, self.precondition_noise(sigmas[:-1])) if kind in _EDM else _places(self, sigmas)
        self.sigmas, self.timesteps = _laid_out(sigmas, timesteps.to(device), twice=kind == "HeunDiscreteScheduler")

    scheduler.set_timesteps = MethodType(set_timesteps, scheduler)  # bound, so that a deep copy has its own
    return scheduler


def _continuous(scheduler: Any, kind: str) -> bool:
    """Whether the network takes log(sigma) / 4, and so has no table of levels; other schedulers ignore the option."""
    config = scheduler.config
    return (kind, config.get("timestep_type"), config.get("prediction_type")) == (
        "EulerDiscreteScheduler", "continuous", "v_prediction")


def _check_configuration(config: Any) -> None:
    end, algorithm = config.get("final_sigmas_type", "zero"), config.get("algorithm_type", "dpmsolver++")
    if end != "zero":
        better = {"dpmsolver": "dpmsolver++", "sde-dpmsolver": "sde-dpmsolver++"}.get(algorithm)  # cannot end at 0
        change = f"algorithm_type={better!r}, " if better else ""
        raise ValueError(f"found a scheduler with final_sigmas_type = {end!r}, expected 'zero', where every grid ends; "
                         f"make it with from_config(..., {change}final_sigmas_type='zero')")
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        raise ValueError("found a scheduler for flow matching, expected one whose noise is added to the image; "
                         "a grid's noise levels do not apply to it")


def _single(grid: Grid) -> torch.Tensor:
    """The grid in float32 [K + 1], in which diffusers keeps its levels; still strictly descending."""
    sigmas = torch.tensor(grid.values, dtype=torch.float32)
    same = (sigmas.diff() >= 0).nonzero()
    if len(same):
        i = int(same[0])
        raise ValueError(f"steps {i} and {i + 1} (sigma = {grid.values[i]:.9g} and {grid.values[i + 1]:.9g}) are the "
                         "same noise level in float32, in which diffusers samples; use fewer steps")
    return sigmas


def _places(scheduler: Any, sigmas: torch.Tensor) -> torch.Tensor:
    """Where the levels sigmas[:-1] lie among those of the training, log-linear between two: [K] float32."""
    kept = scheduler.alphas_cumprod.to("cpu", torch.float64).numpy()
    trained, levels = np.sqrt((1 - kept) / kept), sigmas[:-1].to(torch.float64).numpy()  # ascending; descending
    clipped = scheduler.config.get("lambda_min_clipped", -float("inf"))  # least log(1 / sigma) that may be used
    if clipped > -np.log(trained[-1]):
        trained = trained[trained <= np.exp(-clipped)]
    if levels[0] > trained[-1] * 1.001 or levels[-1] < trained[0] * 0.999:
        raise ValueError(f"found a grid from {levels[0]:.6g} to {levels[-1]:.6g}, expected none outside the network's "
                         f"levels, {trained[-1]:.6g} to {trained[0]:.6g}; make a grid with --sigma-max and --sigma-min")
    places = torch.from_numpy(np.interp(np.log(levels), np.log(trained), np.arange(len(trained)))).to(torch.float32)
    return _distinct(Grid(sigmas.to(torch.float64).numpy()), places)


def _distinct(grid: Grid, timesteps: torch.Tensor) -> torch.Tensor:
    """The timesteps [K]; two that are equal in float32 are refused, as schedulers find their place by them."""
    same = (timesteps.diff() >= 0).nonzero()
    if len(same):
        i = int(same[0])
        raise ValueError(f"steps {i} and {i + 1} (sigma = {grid.values[i]:.9g} and {grid.values[i + 1]:.9g}) have one "
                         "timestep in float32, by which diffusers tells steps apart; use fewer steps")
    return timesteps


def _laid_out(sigmas: torch.Tensor, timesteps: torch.Tensor, twice: bool) -> Tuple[torch.Tensor, torch.Tensor]:
    """Levels [K + 1] and timesteps [K], or for Heun [2K] and [2K - 1]: every level but the first evaluated twice."""
    if not twice:
        return sigmas.clone(), timesteps
    inner, rest = sigmas[1:-1].repeat_interleave(2), timesteps[1:].repeat_interleave(2)
    return torch.cat([sigmas[:1], inner, sigmas[-1:]]), torch.cat([timesteps[:1], rest])
