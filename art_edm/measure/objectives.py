"""What a grid is made for: the choice of the weight that a profile holds, and how many trajectories measure it.

    solver  None  |Q| of equation (8), from one evaluation per point, or from three
            NAME  C_p, the local errors of that solver's steps
            sde   the strong errors of ancestral steps of the reverse SDE

A third of the trajectories is measured first. The others follow only where that third leaves its optimum uncertain.
Each part is kept in the store of the context as soon as it is there, and a later call with the same arguments reads it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Callable, Optional, Tuple

import numpy as np
import torch

from art_edm.grids.clocks import Clock, make_clock
from art_edm.measure.dense_paths import BATCH, PathOptions, draws, measure_along, measure_profile
from art_edm.measure.field import choose_step
from art_edm.measure.local_errors import measure_errors, path_stages
from art_edm.measure.profile import Profile, smoothed
from art_edm.measure.sde_errors import ORDERS_SDE, TRACERS, measure_stochastic
from art_edm.models.denoiser import Denoiser
from art_edm.models.evaluate import profile_batch
from art_edm.runtime.context import Context
from art_edm.runtime.errors import Stopped
from art_edm.runtime.memory import with_back_off
from art_edm.runtime.progress import GracefulStop, Progress
from art_edm.runtime.store import code_version
from art_edm.sampling.noise import seeded_generator
from art_edm.sampling.solvers import nfe, order_of

__all__ = ["Objective", "expected_evaluations", "measure_objective", "set_difference_step"]

STREAM = 1 << 30  # of the trajectories' noises; iterations of learning count up from 0
LEAST_FIRST = 8  # trajectories that tell whether more are needed
JUMP_SHARE = 0.5  # of all |Q| somewhere, which one of a few trajectories has: 0.34 at most on networks, 0.95 at jumps
SHORT_POINTS = 20  # points of the trajectories that are many because few did not agree
ROUNDING = 1e-4  # q sigma^(p + 1) below this share of sigma_data is the rounding of a float32 network


@dataclass(frozen=True)
class Objective:
    """What is measured, and on how many trajectories; all that decides a profile besides the denoiser."""

    solver: Optional[str] = None  # None: |Q|; a solver's name: its local errors; sde: those of the reverse SDE
    trajectories: int = 24  # M, at most
    points: int = 85  # P, noise levels on each
    tolerance: float = 0.002  # how far J/J* - 1 of the first third may be off for the rest to be spared; 0: all
    path_differences: bool = True  # difference D from level to level, M P evaluations; False: about each level, 3 M P
    seed: int = 0

    @property
    def order(self) -> int:
        """p; raises a ValueError for an unknown solver."""
        return 1 if self.solver is None else ORDERS_SDE["strong"] if self.solver == "sde" else order_of(self.solver)

    @property
    def _first(self) -> int:
        """Trajectories of the first part."""
        few = self.trajectories // 3
        return few if self.tolerance and few >= LEAST_FIRST else self.trajectories

    def _method(self) -> Tuple[Callable[..., Profile], int]:
        """The measurement, and its evaluations per point."""
        if self.solver is None:
            return (measure_along, 1) if self.path_differences else (measure_profile, 3)
        if self.solver == "sde":
            return measure_stochastic, 1 + TRACERS // 2
        stages = path_stages(self.solver) + nfe(self.solver, 2) - 2
        return partial(measure_errors, solver=self.solver), stages


def expected_evaluations(objective: Objective) -> Tuple[int, int]:
    """Fewest and most evaluations that `measure_objective` takes, as far as the sizes tell."""
    each = objective._method()[1] * objective.points
    return each * objective._first, each * objective.trajectories


def set_difference_step(denoiser: Denoiser, seed: int) -> int:
    """Choose the step of central differences where the denoiser leaves it open; returns the evaluations it took."""
    before = denoiser.evaluations
    if denoiser.difference_step is None:
        draw = draws(denoiser, seeded_generator(seed, STREAM + 1))
        denoiser.difference_step = choose_step(denoiser, *draw(1))
    return denoiser.evaluations - before


def measure_objective(denoiser: Denoiser, objective: Objective, context: Optional[Context] = None) -> Profile:
    """The profile: a third of the trajectories, and others only where it leaves its optimum uncertain.

    Where one trajectory somewhere has most of |Q|, a few late jumps decide, and many trajectories must be seen. As
    |Q| is differenced from level to level, an interval's difference holds all that happens within it, however short:
    what is left of the evaluations goes to many trajectories of `SHORT_POINTS`, placed by what the first third has
    seen, and `smoothed` joins the two. Elsewhere, and by other methods, the rest are measured like the first third.
    No more than M P points are measured in all.

    Raises:
        Stopped: Ctrl-C or SIGTERM; finished parts are kept.
        NonFiniteOutput: the denoiser failed at a noise level.
        ValueError: an unknown solver, too few levels for its steps, or a weight that is zero everywhere.
    """
    context = context or Context()
    clock = make_clock("gaussian", denoiser.sigma_max, denoiser.sigma_data)
    with GracefulStop() as stop:
        profile = _Measurement(denoiser, objective, context, clock, stop).profile()
    _check_weight(profile, objective, denoiser.sigma_data)
    if stop.requested:
        raise Stopped(_stopped(context))
    return profile


class _Measurement:
    """One call of `measure_objective`."""

    def __init__(
        self, denoiser: Denoiser, objective: Objective, context: Context, clock: Clock, stop: GracefulStop
    ) -> None:
        self.denoiser, self.objective, self.context, self.clock, self.stop = denoiser, objective, context, clock, stop
        draw, count = draws(denoiser, seeded_generator(objective.seed, STREAM)), objective.trajectories
        self.draw, (self.latents, self.labels) = draw, draw(count)
        self.batch = profile_batch(denoiser, count, BATCH, context.world)

    def profile(self) -> Profile:
        """Both parts, as far as they are needed."""
        objective, first = self.objective, self.objective._first
        found = self.part("first", slice(first), objective.points)
        if first == objective.trajectories:
            return found
        jumps = objective._method()[0] is measure_along and found.largest_share > JUMP_SHARE
        if found.sampling_excess <= objective.tolerance and not jumps:
            return found
        rest = slice(first, None)
        if not jumps:
            return found.joined(self.part("rest", rest, objective.points))
        points = min(SHORT_POINTS, objective.points)
        others = objective.trajectories - first
        latents, labels = self.draw(others * objective.points // points - others)
        self.latents = torch.cat([self.latents, latents])
        self.labels = None if labels is None else torch.cat([self.labels, labels])
        return smoothed([found, self.part("short", rest, points, known=smoothed([found]))])

    def part(self, name: str, rows: slice, points: int, **known: Profile) -> Profile:
        """The trajectories `rows`, from the store or measured now."""
        store, world, denoiser = self.context.store, self.context.world, self.denoiser
        what = {"kind": "profile", "part": name, "version": code_version(), "network": self.context.identity,
                "device": denoiser.device.type, "levels": [denoiser.sigma_min, denoiser.sigma_max],
                **asdict(self.objective)}
        with world.phase():
            content = world.share(store.load(what) if world.rank == 0 and self.context.identity else None)
        if content is None:
            found = self.measured(rows, points, **known)
            content = {"sigma": found.sigma, "norm": found.norm, "cost": np.array([found.evaluations, found.seconds])}
            with world.phase():
                if world.rank == 0:
                    store.save(what, content)
        evaluations, seconds = content["cost"].tolist()
        return Profile(self.clock, content["sigma"], content["norm"], int(evaluations), seconds, self.objective.order)

    def measured(self, rows: slice, points: int, **known: Profile) -> Profile:
        """The trajectories `rows`, in batches that fit into memory."""
        (method, cost), latents = self.objective._method(), self.latents[rows]
        labels = None if self.labels is None else self.labels[rows]
        progress = Progress(cost * len(latents) * points, "profile, images", self.context.quiet)

        def on_step(done: int) -> None:
            progress.update(done)
            if self.stop.requested:
                progress.close()
                raise Stopped(_stopped(self.context))

        def attempt(batch: int) -> Profile:
            options = PathOptions(labels, batch, on_step, self.context.world)
            return method(self.denoiser, latents, self.clock, points, options, **known)

        found = with_back_off(attempt, self.batch, self.denoiser.device)
        progress.close()
        return found


def _stopped(context: Context) -> str:
    folder = context.store.folder
    kept = "" if folder is None else f"; finished parts are in {folder}, run the same command again to continue"
    return f"stopped while measuring the profile{kept}"


def _check_weight(profile: Profile, objective: Objective, scale: float) -> None:
    """Raise a ValueError where the weight is zero but for rounding: any clock would be as good."""
    size = float((profile.norm.mean(axis=0) * profile.sigma ** (profile.order + 1)).max())  # in units of x
    size = size**0.5 if objective.solver == "sde" else size  # of squares
    if size > ROUNDING * scale:
        return
    what = "|Q|" if objective.solver is None else f"the local error of {objective.solver}"
    raise ValueError(
        f"found {what} = 0 but for rounding at all noise levels, expected a denoiser whose image changes along its "
        "paths; check the network: for a constant denoiser every grid gives the same images, and one step is enough"
    )
