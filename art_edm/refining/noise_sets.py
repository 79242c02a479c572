"""Sets of noises, and where their exact paths end: what end-point errors are measured against."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from art_edm.grids.grid import edm, edm_unpinned
from art_edm.metrics.detectors import Detector
from art_edm.models.denoiser import Denoiser
from art_edm.refining.config import RefineConfig
from art_edm.refining.solver_jacobian import Noises, solve_ends
from art_edm.refining.stage import Stage
from art_edm.runtime.context import Context
from art_edm.sampling.noise import seeded_generator
from art_edm.sampling.solvers import nfe

__all__ = ["NoiseSets", "draw_noises"]

STREAM = (1 << 30) + 7  # of the noises' generator, other than those of learning


class NoiseSets(NamedTuple):
    """Noises to minimise over, noises that validate, and what solving their exact paths took."""

    train: Noises
    validation: Noises
    evaluations: int  # of all processes
    seconds: float
    detector: Optional[Detector] = None  # of the features that are compared, in place of pixels


def draw_noises(
    denoiser: Denoiser, config: RefineConfig, sigma_max: float, context: Optional[Context] = None
) -> NoiseSets:
    """The noises of `config` and the ends of their exact paths from `sigma_max`; for any solver and number of steps.

    Raises Stopped when asked to stop, and NonFiniteOutput where the denoiser returned NaN or infinity.
    """
    count, generator = config.noises + config.validation, seeded_generator(config.seed, STREAM)
    latents = torch.randn((count, *denoiser.img_shape), generator=generator, dtype=torch.float64)
    labels, steps = denoiser.draw_labels(count, generator), config.fine_steps
    fine = edm(steps, denoiser.sigma_min, sigma_max) if denoiser.pinned else edm_unpinned(steps, sigma_max)
    total = count * nfe(config.fine_solver, steps)
    with Stage(denoiser, context or Context(), "exact paths, images", total) as stage:
        both, cost = solve_ends(config.fine_solver, latents.to(denoiser.device), labels, fine.values, stage)
    return NoiseSets(
        both.part(slice(0, config.noises)), both.part(slice(config.noises, count)), cost, stage.seconds
    )
