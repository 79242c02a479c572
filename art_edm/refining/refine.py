"""A grid refined at its own number of steps: the sampler's end-point error, minimised through the solver itself.

From a grid such as ART's, whose first level and number of steps stay, Levenberg-Marquardt steps (see `descent`)
move the inner levels to where the solver in use ends nearest to the exact solution, over M noises. The derivatives
are differences through the solver (see `sensitivity`), so that every network, guidance and solver will do. Errors
have many minima, and other grids may be nearer to a lower one: it begins with the best of those it is given.

Only steps that lower the error are taken. Noises held out of all this, three times as many, decide when it ends,
and that no grid is returned which they do not find better than the given one: in mean and geometric mean, and not
worse in the mean square, which few paths that end on another image can decide. Among the others it is the least mean
error over all noises that counts. Where the best of the steps is not taken, they are asked about grids between the
given one and that, too. A run that is resumed gives the bytes of an uninterrupted one.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np
import torch

from art_edm.grids.grid import Grid
from art_edm.models.denoiser import Denoiser
from art_edm.refining import levenberg_marquardt as descent
from art_edm.refining.config import Drawn, EndError, RefineConfig, RefineState, better, read_state, write_state
from art_edm.refining.noise_sets import draw, draw_noises, teller
from art_edm.refining.solver_jacobian import Run, Travel
from art_edm.runtime.distributed import ALONE, World
from art_edm.runtime.errors import NonFiniteOutput, Stopped
from art_edm.runtime.pieces import Pieces
from art_edm.runtime.progress import GracefulStop
from art_edm.sampling.solvers import SOLVERS, nfe, supported

__all__ = ["Drawn", "EndError", "RefineConfig", "RefineResult", "check_refinable", "draw_noises", "refine"]

GIVEN = "given"
TRIALS = 7  # of one search
TINY = 1e-300
ENOUGH = 1e-4  # error over that of the start: nothing is gained below, the reference is not better
BETWEEN = (0.75, 0.5, 0.25)  # shares of the way to a grid that is not taken
DEFAULT = RefineConfig()


@dataclass
class RefineResult:
    """What a refinement leaves behind."""

    grid: Grid
    start: str  # where it began: "given", or the name of another grid
    share: float  # of the way from the given grid to a step not taken, in log sigma; 1 unless `grid` is there
    error_before: EndError  # of the given grid
    error_after: EndError  # of `grid`, in the mean never above; it was among what chose the grid, so a little too good
    history: List[Dict[str, float]]  # evaluations, and errors `train` and `held`, from the start on
    evaluations: int
    seconds: float
    settings: Dict[str, Any]  # of the refinement, `solver` among them

    def record(self) -> Dict[str, Any]:
        """For a grid's provenance: what was done and what it gave, ready for JSON."""
        return {**{name: value for name, value in vars(self).items() if name != "grid"},
                "error_before": self.error_before._asdict(), "error_after": self.error_after._asdict()}


def refine(
    denoiser: Denoiser, grid: Grid, solver: str, config: RefineConfig = DEFAULT, identity: str = "",
    checkpoint: Optional[Path] = None, resume: bool = False, quiet: bool = True, world: World = ALONE,
    noises: Optional[Drawn] = None, others: Mapping[str, Grid] = {}, pieces: Optional[Pieces] = None,
) -> RefineResult:
    """Move the inner levels of `grid` to where `solver` ends nearest to the exact solution.

    Args:
        grid: such as ART's, to start from and never be worse than; its number of steps and its first level stay.
        solver: a name in `solvers.SOLVERS`.
        identity: what the denoiser is (name and hash); a checkpoint of another one is refused.
        checkpoint: file for the state, rewritten after every iteration; None keeps nothing.
        resume: continue from `checkpoint` where it exists.
        world: processes that share the noises, all with the same arguments; each returns the same result.
        noises: from `draw_noises` with the same config, shared by several refinements, whose cost is then not
            counted here. None draws them.
        others: grids by name, of as many steps and the same first level, from which it may start in place of `grid`.
        pieces: where exact ends of each batch are kept and found; those of `noises`, too, if both are given.
    Raises:
        Stopped, NonFiniteOutput: Ctrl-C or SIGTERM; NaN or infinity of the denoiser; what was finished is saved.
        CheckpointMismatch: the checkpoint is of other settings.
        ValueError: a model of discrete noise levels, an unknown solver, a grid the model does not support, or
            settings out of range.
    """
    if GIVEN in others:
        raise ValueError(f"found another grid of the name {GIVEN!r}, which is that of `grid`; use another name")
    grids = {GIVEN: grid, **others}
    _check(denoiser, grids, solver, config)
    job = _Refinement(denoiser, grids, solver, config, identity, checkpoint, quiet, world, pieces, noises)
    if resume and checkpoint is not None and world.share(checkpoint.exists()):
        with world.phase():
            job.restore()
    with GracefulStop() as stop:
        try:
            return job.work(stop)
        except (NonFiniteOutput, Stopped) as error:
            if not job.saved:
                raise
            raise type(error)(f"{error}; what was finished is in {checkpoint}, continue with --resume") from None


def _check(denoiser: Denoiser, grids: Mapping[str, Grid], solver: str, config: RefineConfig) -> None:
    nfe(config.fine_solver, config.fine)
    check_refinable(denoiser, solver)
    steps, top = grids[GIVEN].num_steps, grids[GIVEN].sigma_max
    for name, grid in grids.items():
        supported(denoiser, grid)
        if (grid.num_steps, grid.sigma_max) != (steps, top):
            found = f"found {grid.num_steps} steps from {grid.sigma_max:.6g} in the grid {name}"
            raise ValueError(f"{found}, expected {steps} from {top:.6g}, as in the given one; leave it out")
    for name in ("noises", "held", "batch", "step", "damping", "patience"):
        if not getattr(config, name) > 0:
            raise ValueError(f"found {name} = {getattr(config, name)}, expected more than 0; change the settings")


def check_refinable(denoiser: Denoiser, solver: str) -> None:
    """Raise a ValueError, before any work, for an unknown solver or a model that knows discrete noise levels only."""
    nfe(solver, 1)
    low = max(denoiser.sigma_min, denoiser.sigma_limits[0])
    probe = torch.from_numpy(np.geomspace(low, denoiser.sigma_max, 64)[1:-1])
    rounded = denoiser.round_sigma(probe.to(denoiser.device)).to(probe)
    worst = int(((rounded - probe) / probe).abs().argmax())
    if not torch.allclose(rounded, probe, rtol=1e-6, atol=0):
        raise ValueError(
            f"found a network of discrete noise levels ({float(probe[worst]):.6g} becomes {float(rounded[worst]):.6g}),"
            " expected one of all levels, as they are moved by little; use the grid as it is, without --refine or "
            "--objective=endpoint"
        )


class _Refinement:
    """One refinement: its state, and what changes it."""

    def __init__(
        self, denoiser: Denoiser, grids: Mapping[str, Grid], solver: str, config: RefineConfig, identity: str,
        checkpoint: Optional[Path], quiet: bool, world: World, pieces: Optional[Pieces], noises: Optional[Drawn],
    ) -> None:
        self.denoiser, self.grids, self.solver, self.config, self.pieces = denoiser, grids, solver, config, pieces
        self.checkpoint, self.quiet, self.world, self.saved = checkpoint, quiet, world, False
        self.first, self.low = grids[GIVEN].sigma_max, denoiser.sigma_limits[0]
        starts = {name: grid.values.tolist() for name, grid in grids.items()}
        self.settings = {**asdict(config), "network": identity, "solver": solver, "grids": starts}
        self.noises, self.given = noises, noises is not None
        self.began = time.perf_counter()
        q = self._parameters(GIVEN)
        zero, levels, none = torch.zeros_like(q), torch.tensor(grids[GIVEN].values), q[:0]
        self.state = RefineState(q, levels, levels, none, torch.outer(zero, zero), zero, zero, config.damping)

    def _parameters(self, start: str) -> torch.Tensor:
        return torch.from_numpy(descent.parameters_of(self.grids[start].values, self.low))

    def work(self, stop: GracefulStop) -> RefineResult:
        """All of it, from wherever the state is."""
        state = self.state
        if self.noises is None:
            self.noises = draw(self.denoiser, self.config, self.first, self.quiet, self.world, stop, pieces=self.pieces)
            state.drawn, state.evaluations = self.noises.evaluations, state.evaluations + self.noises.evaluations
            self.save()
        with teller(self.denoiser, "refining, images", self._expected(), self.quiet, self.world, stop) as tell:
            batch, world = self.config.batch, self.world
            train, held = (Travel(self.denoiser, self.solver, part, batch, tell, world) for part in self.noises[:2])
            if state.history:
                run = None if state.finished else train.run(self._levels(state.q))  # counted when it was accepted
                train.evaluations = state.evaluations - state.drawn
            else:
                run = self._begin(train, held)
            while not state.finished:
                run = self._iterate(run, train, held)
            if not state.settled:
                self._settle(train, held)
        return RefineResult(
            Grid(state.best.numpy()), state.start, state.share, EndError(*state.before), EndError(*state.after),
            state.history, state.evaluations, state.seconds, {"solver": self.solver, **asdict(self.config)},
        )

    def _begin(self, train: Travel, held: Travel) -> Run:
        """The run of the best of the grids to start from, which noises held out must find better than the given one."""
        state, grids = self.state, self.grids
        runs = {name: train.run(self._levels(self._parameters(name))) for name in grids}  # as a resumed run has it
        errors = {name: held.run(grid.values, False).errors for name, grid in grids.items()}
        total = {name: run.errors.sum() + errors[name].sum() for name, run in runs.items()}
        allowed = [name for name in grids if name == GIVEN or better(errors[GIVEN], errors[name])]
        state.start = min(allowed, key=total.__getitem__)
        state.q, state.errors = self._parameters(state.start), torch.from_numpy(errors[GIVEN])
        state.before = list(EndError.of(errors[GIVEN]))
        state.finished = grids[GIVEN].num_steps == 1
        self._note(runs[state.start], errors[state.start], train, held)
        return runs[state.start]

    def _expected(self) -> int:
        """Evaluations, should it take all iterations."""
        steps, config = self.grids[GIVEN].num_steps, self.config
        reach = SOLVERS[self.solver].reach
        derivatives = sum(nfe(self.solver, min(n + reach, steps)) - 1 for n in range(2, steps + 1)) * config.noises
        whole = config.iterations * (derivatives + nfe(self.solver, steps) * (config.noises + config.held))
        return max(whole, config.cheap if config.more > config.iterations else 0)

    def _levels(self, q: torch.Tensor) -> np.ndarray:
        return descent.levels_of(q.numpy(), self.first, self.low)

    def _iterate(self, run: Run, train: Travel, held: Travel) -> Run:
        """Derivatives, one accepted step if there is any, and what it does to the noises held out."""
        state, config, q = self.state, self.config, self.state.q.numpy()
        gram, pull = train.derivatives(run, config.step)
        gradient, H, scale = descent.model(run.errors, gram, pull, descent.chain(q, run.levels, self.low))
        S = state.secant.numpy()
        if state.step.any():
            S = descent.secant(S, H, state.step.numpy(), gradient - state.gradient.numpy())
        after = self._search(run, train, gradient, (H, S), scale)
        if after is None and S.any():  # what was learned about the curvature may mislead
            after = self._search(run, train, gradient, (H, np.zeros_like(S)), scale)
        if after is None:
            state.finished = True
            self._note(None, None, train, held)
            return run
        errors = held.run(after.levels, False).errors
        state.gradient = torch.from_numpy(gradient)
        self._note(after, errors, train, held)
        return after

    def _search(
        self, run: Run, train: Travel, gradient: np.ndarray, curvature: Tuple[np.ndarray, np.ndarray], scale: np.ndarray
    ) -> Optional[Run]:
        """The first of ever shorter steps that lowers the error, taken; None if there is none."""
        state, f, growth = self.state, run.errors.mean(), 2.0
        for _ in range(TRIALS):
            step, promised = descent.proposal(gradient, sum(curvature), scale, state.damping)
            q = state.q + torch.from_numpy(step)
            after = train.run(self._levels(q))
            gain = f - after.errors.mean()
            if gain > 0:
                ratio = gain / promised if promised > 0 else 0.0
                state.damping = max(float(state.damping * max(0.2, 1 - (2 * min(ratio, 1.0) - 1) ** 3)), 1e-4)
                state.q, state.step, state.secant = q, torch.from_numpy(step), torch.from_numpy(curvature[1])
                return after
            state.damping, growth = max(state.damping, 1e-2) * growth, 2 * growth
        return None

    def _note(self, run: Optional[Run], errors: Optional[np.ndarray], train: Travel, held: Travel) -> None:
        """Write down where things are after a step, or after the search for one that found none (no run)."""
        state, config, rows = self.state, self.config, self.state.history
        state.evaluations = state.drawn + train.evaluations + held.evaluations
        if run is not None:
            rows.append(dict(evaluations=state.evaluations, train=run.errors.mean().item(), held=errors.mean().item()))
            levels = self.grids[state.start].values if len(rows) == 1 else run.levels
            total = float(run.errors.sum() + errors.sum())
            if len(rows) > 1 and total < state.least_total:
                state.least, state.least_total = torch.tensor(levels), total
            if len(rows) == 1 or better(state.errors.numpy(), errors):
                self._offer(levels, total, errors)
        gains = [1 - after["train"] / max(before["train"], TINY) for before, after in zip(rows, rows[1:])]
        least = min(range(len(rows)), key=lambda i: rows[i]["held"])
        idle = len(rows) - 1 - least >= config.patience or (len(gains) > 1 and max(gains[-2:]) < config.tolerance)
        cheap = state.evaluations - state.drawn < config.cheap
        limit = max(config.more, config.iterations) if cheap else config.iterations
        state.finished = state.finished or idle or len(gains) >= limit
        state.finished = state.finished or rows[-1]["train"] <= ENOUGH * rows[0]["train"]
        self.save()

    def _offer(self, levels: np.ndarray, total: float, errors: np.ndarray) -> bool:
        """A grid that is allowed, its error over all noises and those held out; whether it is the best so far."""
        state = self.state
        if total >= state.best_total:
            return False
        state.best, state.best_total, state.after = torch.tensor(levels), total, list(EndError.of(errors))
        return True

    def _settle(self, train: Travel, held: Travel) -> None:
        """Where the best of the steps was not taken: the best grid between the given one and that, if it is better."""
        state, given = self.state, torch.tensor(self.grids[GIVEN].values)
        left = state.least_total < np.inf and not torch.equal(state.least, state.best)
        for share in BETWEEN if left else ():
            inner = torch.lerp(given[:-1].log(), state.least[:-1].log(), share).exp()
            levels = torch.cat([given[:1], inner[1:], given[-1:]])
            errors = held.run(levels.numpy(), False).errors
            total = float(train.run(levels.numpy(), False).errors.sum() + errors.sum())
            allowed = better(state.errors.numpy(), errors)
            state.share = share if allowed and self._offer(levels.numpy(), total, errors) else state.share
        state.settled = True
        state.evaluations = state.drawn + train.evaluations + held.evaluations
        self.save()

    def save(self) -> None:
        """Write the checkpoint, if there is to be one."""
        self.state.seconds = time.perf_counter() - self.began
        if self.checkpoint is not None and self.world.rank == 0:
            write_state(self.checkpoint, self.state, None if self.given else self.noises, self.settings)
            self.saved = True

    def restore(self) -> None:
        """Read the checkpoint; settings must agree."""
        self.state, drawn = read_state(self.checkpoint, self.settings, self.denoiser.device)
        if self.given and self.pieces:  # who gave the noises found these ends there, and counts them
            self.state.evaluations, self.state.drawn = self.state.evaluations - self.state.drawn, 0
        self.noises, self.saved = drawn if self.noises is None else self.noises, True
        self.began -= self.state.seconds
