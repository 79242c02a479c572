"""Noises, and where their exact paths end: what end-point errors are measured against."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Callable, Iterator, Optional

import torch

from art_edm.grids.grid import edm, edm_unpinned
from art_edm.models.denoiser import Denoiser
from art_edm.refining.config import Drawn, RefineConfig
from art_edm.refining.solver_jacobian import solve_ends
from art_edm.runtime.distributed import ALONE, World
from art_edm.runtime.errors import Stopped
from art_edm.runtime.pieces import Pieces
from art_edm.runtime.progress import GracefulStop, Progress
from art_edm.sampling.noise import seeded_generator
from art_edm.sampling.solvers import nfe

__all__ = ["draw", "draw_noises", "teller"]

STREAM = (1 << 30) + 7  # of the noises, apart from the training's


def draw_noises(
    denoiser: Denoiser, config: RefineConfig, sigma_max: float, quiet: bool = True, world: World = ALONE,
    stream: int = STREAM, pieces: Optional[Pieces] = None,
) -> Drawn:
    """The noises of `config`, and where their exact paths from `sigma_max` end; for any solver and number of steps.

    Another `stream` gives other noises. Ends that are found among the `pieces` are not solved again.

    Raises Stopped when asked to stop, and NonFiniteOutput where the denoiser returned NaN or infinity.
    """
    with GracefulStop() as stop:
        return draw(denoiser, config, sigma_max, quiet, world, stop, stream, pieces)


def draw(
    denoiser: Denoiser, config: RefineConfig, sigma_max: float, quiet: bool, world: World, stop: GracefulStop,
    stream: int = STREAM, pieces: Optional[Pieces] = None,
) -> Drawn:
    """As `draw_noises`, for a caller that watches for the signal to stop itself."""
    count, generator = config.noises + config.held, seeded_generator(config.seed, stream)
    latents = torch.randn((count, *denoiser.img_shape), generator=generator, dtype=torch.float64)
    labels = denoiser.draw_labels(count, generator)
    fine = edm(config.fine, denoiser.sigma_min, sigma_max) if denoiser.pinned else edm_unpinned(config.fine, sigma_max)
    total = count * nfe(config.fine_solver, config.fine)
    with teller(denoiser, "exact paths, images", total, quiet, world, stop, pieces) as tell:
        both, cost = solve_ends(
            denoiser, latents.to(denoiser.device), labels, fine.values, config.fine_solver, config.batch, tell, world,
            pieces,
        )
    return Drawn(both.part(slice(0, config.noises)), both.part(slice(config.noises, count)), cost)


@contextmanager
def teller(
    denoiser: Denoiser, label: str, total: int, quiet: bool, world: World, stop: GracefulStop,
    pieces: Optional[Pieces] = None,
) -> Iterator[Callable[[], None]]:
    """What long work calls between its pieces: it shows progress, and ends the work when asked to stop.

    Args:
        label: the stage and the unit of `total`, such as "refining, images".
    """
    pieces = pieces or Pieces()
    progress, before = Progress(total // world.size, label, quiet), pieces.spent(denoiser)
    recovered = pieces.recovered

    def tell() -> None:
        world.check()
        progress.start = pieces.recovered - recovered  # what was found tells nothing of the rate
        progress.update(min(pieces.spent(denoiser) - before, total // world.size))
        if stop.requested:
            raise Stopped(f"stopped during {label.split(',')[0]}")

    try:
        yield tell
    finally:
        progress.close()
