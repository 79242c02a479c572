"""Grids refined at their own number of steps: the sampler's end-point error, minimised through the solver itself.

From a grid such as ART's, whose first level and number of steps stay, Levenberg-Marquardt steps (see
`levenberg_marquardt`) move the inner levels to where the solver in use ends nearest to the exact solution, over M
noises. The derivatives are differences through the solver (see `solver_jacobian`), so that every network, guidance
and solver will do. Errors have many minima, and other grids may be nearer to a lower one: it begins with the best of
those it is given. One is the optimum of the solver's own local errors: often worse than ART's, but Heun's method
gains a sixth by it on networks. It costs one to three times ART's profile, RK4's up to eleven times, and one serves
every K.

Only steps that lower the error are taken. Validation noises, three times as many, decide when it ends, and that no
grid is returned which they do not find better than the given one (see `better`). Among the others it is the least
mean error over all noises that counts. Where the best of the steps is not taken, they are asked about grids between
the given one and that, too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple, TypeVar

import numpy as np
import torch

from art_edm.grids.grid import Grid
from art_edm.measure.objectives import Objective, measure_objective
from art_edm.measure.profile import Profile
from art_edm.metrics.end_point import EndPointError
from art_edm.models.denoiser import Denoiser
from art_edm.refining import levenberg_marquardt
from art_edm.refining.config import RefineConfig
from art_edm.refining.noise_sets import NoiseSets, draw_noises
from art_edm.refining.solver_jacobian import Run, SolverRuns
from art_edm.refining.stage import Stage
from art_edm.runtime.context import Context
from art_edm.runtime.memory import with_back_off
from art_edm.runtime.store import Store
from art_edm.sampling.solvers import SOLVERS, fitted, nfe, supported

__all__ = ["RefineResult", "RefinedGrids", "better", "check_refinable", "own_start", "refine", "refine_grids"]

GIVEN, OWN = "given", "own local errors"  # names of grids to start from
MAX_TRIALS = 7  # ever shorter steps of one search
ERROR_FLOOR = 1e-4  # of the error at the start: nothing is gained below, as the exact ends are no better
GEOMETRIC_FLOOR = 0.01  # of the mean error: what is less counts as this much in a geometric mean
SHARES = (0.75, 0.5, 0.25)  # of the way to a grid that is not taken
TINY = 1e-300
DEFAULT = RefineConfig()
T = TypeVar("T")


@dataclass
class RefineResult:
    """What a refinement leaves behind."""

    grid: Grid
    start: str  # where it began: "given", or the name of another grid
    share: float  # of the way from the given grid to a step not taken, in log sigma; 1 unless `grid` is there
    error_before: EndPointError  # of the given grid
    error_after: EndPointError  # of `grid`, in the mean never above; it helped to choose, so a little too good
    history: List[Dict[str, float]]  # evaluations, and mean errors `train` and `validation`, from the start on
    evaluations: int
    seconds: float
    settings: Dict[str, Any]  # of the refinement, `solver` among them

    def record(self) -> Dict[str, Any]:
        """For a grid's provenance: what was done and what it gave, ready for JSON."""
        return {**{name: value for name, value in vars(self).items() if name != "grid"},
                "error_before": self.error_before._asdict(), "error_after": self.error_after._asdict()}


class RefinedGrids(NamedTuple):
    """Refinements by their keys, and what each stage cost: "ends", "choose" (of solvers), "start" (the other clocks)
    and "refine"."""

    results: Dict[int, RefineResult]
    tried: Dict[int, Dict[str, EndPointError]]  # of each solver on its given grid, where there were several
    evaluations: Dict[str, int]
    seconds: Dict[str, float]


def refine_grids(
    denoiser: Denoiser, grids: Mapping[int, Mapping[str, Grid]], config: RefineConfig = DEFAULT,
    context: Optional[Context] = None, own_clock: bool = True,
) -> RefinedGrids:
    """For each key, such as K, a grid refined for a solver; all share noises, and a solver's clock to start from.

    Args:
        grids: key -> solver -> the grid that nothing may be worse than; all begin at the same level. Of several
            solvers the one is refined that ends nearest on its grid, in the mean over the validation noises.
        own_clock: False where the grids are those of the solver's own local errors already.
    Raises as `refine`, and CheckpointMismatch where the context resumes and its store has other settings.
    """
    context = context or Context()
    if not context.identity:  # here it is the only denoiser: what one stage has found serves the next
        context = replace(context, store=Store(), identity="this denoiser")
    solvers = ", ".join(dict.fromkeys(solver for each in grids.values() for solver in each))
    context.claim("refinement", {"solver": solvers, "batch": context.batch, **asdict(config)})
    spent = _Spent({}, {})
    top = next(grid.sigma_max for each in grids.values() for grid in each.values())
    noises = _backed_off(partial(draw_noises, denoiser, config, top), denoiser, context)
    spent.add("ends", noises)
    tried, chosen = {}, {key: next(iter(each)) for key, each in grids.items()}
    for key, each in grids.items():
        if len(each) > 1:
            scores = {solver: _backed_off(partial(_score, denoiser, grid, solver, noises), denoiser, context)
                      for solver, grid in each.items()}
            tried[key] = {solver: score.error for solver, score in scores.items()}
            chosen[key] = min(each, key=lambda solver, errors=tried[key]: errors[solver].mean)
            spent.add("choose", *(score for solver, score in scores.items() if solver != chosen[key]))
    owns: Dict[str, Profile] = {}
    for key, solver in chosen.items():
        if own_clock and solver not in owns and grids[key][solver].num_steps > 1:
            owns[solver] = measure_objective(denoiser, Objective(solver, seed=config.seed), context)
            spent.add("start", owns[solver])
    results: Dict[int, RefineResult] = {}
    for key, solver in chosen.items():
        grid = grids[key][solver]
        starts = own_start(denoiser, owns.get(solver), grid.num_steps)
        work = partial(refine, denoiser, grid, solver, config, noises=noises, starts=starts)
        results[key] = _backed_off(work, denoiser, context)
        spent.add("refine", results[key])
    return RefinedGrids(results, tried, *spent)


def _backed_off(work: Callable[..., T], denoiser: Denoiser, context: Context) -> T:
    """`work(context=...)`, in smaller batches where memory runs out."""
    attempt = lambda batch: work(context=replace(context, batch=batch))
    return with_back_off(attempt, context.batch, denoiser.device)


class _Spent(NamedTuple):
    """By stage."""

    evaluations: Dict[str, int]
    seconds: Dict[str, float]

    def add(self, stage: str, *parts: Any) -> None:
        """What more parts of a stage took."""
        for part in parts:
            self.evaluations[stage] = self.evaluations.get(stage, 0) + part.evaluations
            self.seconds[stage] = self.seconds.get(stage, 0.0) + part.seconds


class _Score(NamedTuple):
    error: EndPointError
    evaluations: int  # of all processes
    seconds: float


def _score(denoiser: Denoiser, grid: Grid, solver: str, noises: NoiseSets, context: Context) -> _Score:
    """How far a solver ends on the validation noises; `refine` finds these errors in the store, and counts them."""
    total = nfe(solver, grid.num_steps) * len(noises.validation.latents)
    with Stage(denoiser, context, f"trying {solver}, images", total) as stage:
        runs = SolverRuns(solver, noises.validation, stage)
        error = EndPointError.of(runs.run(grid.values, False).errors)
    return _Score(error, runs.evaluations, stage.seconds)


def own_start(denoiser: Denoiser, own: Optional[Profile], num_steps: int) -> Dict[str, Grid]:
    """The optimum of the solver's own local errors, by name, at levels that the model has; none without a profile."""
    return {} if own is None else {OWN: fitted(denoiser, own.direct(num_steps))}


def refine(
    denoiser: Denoiser, grid: Grid, solver: str, config: RefineConfig = DEFAULT, context: Optional[Context] = None,
    noises: Optional[NoiseSets] = None, starts: Mapping[str, Grid] = MappingProxyType({}),
) -> RefineResult:
    """Move the inner levels of `grid` to where `solver` ends nearest to the exact solution.

    Args:
        grid: such as ART's, to start from and never be worse than; its number of steps and its first level stay.
        solver: a name in `solvers.SOLVERS`.
        context: its store keeps what each batch gave, so that the same call after a stop continues from there; its
            world shares the batches, and each process returns the same result.
        noises: from `draw_noises` with the same config, shared by several refinements, whose cost is then not
            counted here. None draws them.
        starts: grids by name, of as many steps and the same first level, from which it may start in place of `grid`.
    Raises:
        Stopped, NonFiniteOutput: Ctrl-C or SIGTERM; NaN or infinity of the denoiser.
        ValueError: a model of discrete noise levels, an unknown solver, a grid the model does not support, or
            settings out of range.
        OSError: the store cannot be written.
    """
    if GIVEN in starts:
        raise ValueError(f"found another grid of the name {GIVEN!r}, which is that of `grid`; use another name")
    grids, context = {GIVEN: grid, **starts}, context or Context()
    _check(denoiser, grids, solver, config)
    drawn = noises is None
    if drawn:
        noises = draw_noises(denoiser, config, grid.sigma_max, context)
    with Stage(denoiser, context, "refining, images", _expected(grid.num_steps, solver, config)) as stage:
        train, validation = (SolverRuns(solver, part, stage) for part in noises[:2])
        found = _Refinement(grids, config, train, validation, noises.evaluations if drawn else 0).result()
    seconds = stage.seconds + (noises.seconds if drawn else 0.0)
    settings = {"solver": solver, "batch": context.batch, **asdict(config)}
    return RefineResult(*found, seconds, settings)


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
            " expected one of all levels, as they are moved by little; use the grid as it is, without --refine"
        )


def better(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether errors [M] are less in mean and geometric mean, and not more in the mean square.

    The mean square is what few paths that end on another image can decide, the geometric mean what most noises do.
    """
    floor = GEOMETRIC_FLOOR * before.mean() + TINY
    logarithm = lambda errors: np.log(np.maximum(errors, floor)).mean()
    squares = np.square(after).mean() <= np.square(before).mean()
    return bool(after.mean() < before.mean() and logarithm(after) < logarithm(before) and squares)


def _check(denoiser: Denoiser, grids: Mapping[str, Grid], solver: str, config: RefineConfig) -> None:
    nfe(config.fine_solver, config.fine_steps)
    check_refinable(denoiser, solver)
    steps, top = grids[GIVEN].num_steps, grids[GIVEN].sigma_max
    for name, grid in grids.items():
        supported(denoiser, grid)
        if (grid.num_steps, grid.sigma_max) != (steps, top):
            found = f"found {grid.num_steps} steps from {grid.sigma_max:.6g} in the grid {name}"
            raise ValueError(f"{found}, expected {steps} from {top:.6g}, as in the given one; leave it out")
    for name in ("noises", "validation", "step", "damping", "patience"):
        if not getattr(config, name) > 0:
            raise ValueError(f"found {name} = {getattr(config, name)}, expected more than 0; change the settings")


def _expected(steps: int, solver: str, config: RefineConfig) -> int:
    """Evaluations, should it take all iterations."""
    reach = SOLVERS[solver].reach
    derivatives = sum(nfe(solver, min(n + reach, steps)) - 1 for n in range(2, steps + 1)) * config.noises
    whole = config.iterations * (derivatives + nfe(solver, steps) * (config.noises + config.validation))
    return max(whole, config.cheap_evaluations if config.cheap_iterations > config.iterations else 0)


@dataclass
class _Candidate:
    """A grid that may be returned, its error summed over all noises, and its errors over the validation noises."""

    levels: np.ndarray  # [K + 1]
    total: float
    errors: np.ndarray  # [validation]
    share: float = 1.0


@dataclass
class _Descent:
    """Where the descent is."""

    q: np.ndarray  # parameters of the last grid that was accepted, [K - 1]
    damping: float
    secant: np.ndarray  # S, [K - 1, K - 1]
    step: Optional[np.ndarray] = None  # the last one in q, [K - 1]
    gradient: Optional[np.ndarray] = None  # before that step, [K - 1]
    history: List[Dict[str, float]] = field(default_factory=list)


class _Refinement:
    """One refinement. All its numbers come from `train` and `validation`, so that it can be replayed from a store."""

    def __init__(
        self, grids: Mapping[str, Grid], config: RefineConfig, train: SolverRuns, validation: SolverRuns, drawn: int
    ) -> None:
        self.grids, self.config, self.train, self.validation, self.drawn = grids, config, train, validation, drawn
        self.given, self.first = grids[GIVEN].values, grids[GIVEN].sigma_max
        self.low = train.stage.denoiser.sigma_limits[0]

    def result(self) -> Tuple[Any, ...]:
        """All of it: the fields of a `RefineResult`, up to its evaluations."""
        run = self._begin()
        while not self.finished:
            run = self._iterate(run)
        if self.least is not None and not np.array_equal(self.least.levels, self.best.levels):
            self._look_between()
        before, after = (EndPointError.of(errors) for errors in (self.before, self.best.errors))
        history = self.descent.history
        return Grid(self.best.levels), self.start, self.best.share, before, after, history, self._evaluations()

    def _evaluations(self) -> int:
        return self.drawn + self.train.evaluations + self.validation.evaluations

    def _parameters(self, start: str) -> np.ndarray:
        return levenberg_marquardt.parameters_of(self.grids[start].values, self.low)

    def _levels(self, q: np.ndarray) -> np.ndarray:
        return levenberg_marquardt.levels_of(q, self.first, self.low)

    def _begin(self) -> Run:
        """The run of the best of the grids to start from, which validation must find better than the given one."""
        runs = {name: self.train.run(self._levels(self._parameters(name))) for name in self.grids}
        errors = {name: self.validation.run(grid.values, False).errors for name, grid in self.grids.items()}
        totals = {name: float(run.errors.sum() + errors[name].sum()) for name, run in runs.items()}
        allowed = [name for name in self.grids if name == GIVEN or better(errors[GIVEN], errors[name])]
        self.start, self.before = min(allowed, key=totals.__getitem__), errors[GIVEN]
        q = self._parameters(self.start)
        self.descent = _Descent(q, self.config.damping, np.zeros((len(q), len(q))))
        self.best = _Candidate(self.grids[self.start].values, totals[self.start], errors[self.start])
        self.least: Optional[_Candidate] = None  # after the step of least error over all noises, allowed or not
        self.finished = len(self.given) == 2
        self._note(runs[self.start], errors[self.start])
        return runs[self.start]

    def _iterate(self, run: Run) -> Run:
        """Derivatives, one accepted step if there is any, and what it does to the validation noises."""
        at = self.descent
        jtj, jtr = self.train.derivatives(run, self.config.step)
        to_q = levenberg_marquardt.chain(at.q, run.levels, self.low)
        gradient, H, scale = levenberg_marquardt.model(run.errors, jtj, jtr, to_q)
        S = at.secant
        if at.step is not None:
            S = levenberg_marquardt.secant(S, H, at.step, gradient - at.gradient)
        after = self._search(run, gradient, (H, S), scale)
        if after is None and S.any():  # what was learned about the curvature may mislead
            after = self._search(run, gradient, (H, np.zeros_like(S)), scale)
        if after is None:
            self.finished = True
            return run
        errors, at.gradient = self.validation.run(after.levels, False).errors, gradient
        found = _Candidate(after.levels, float(after.errors.sum() + errors.sum()), errors)
        if self.least is None or found.total < self.least.total:
            self.least = found
        self._offer(found)
        self._note(after, errors)
        return after

    def _search(
        self, run: Run, gradient: np.ndarray, curvature: Tuple[np.ndarray, np.ndarray], scale: np.ndarray
    ) -> Optional[Run]:
        """The first of ever shorter steps that lowers the error, taken; None if there is none."""
        at, f, growth = self.descent, run.errors.mean(), 2.0
        for _ in range(MAX_TRIALS):
            step, promised = levenberg_marquardt.proposal(gradient, sum(curvature), scale, at.damping)
            after = self.train.run(self._levels(at.q + step))
            gain = f - after.errors.mean()
            if gain > 0:
                ratio = gain / promised if promised > 0 else 0.0
                at.damping = max(float(at.damping * max(0.2, 1 - (2 * min(ratio, 1.0) - 1) ** 3)), 1e-4)
                at.q, at.step, at.secant = at.q + step, step, curvature[1]
                return after
            at.damping, growth = max(at.damping, 1e-2) * growth, 2 * growth
        return None

    def _note(self, run: Run, errors: np.ndarray) -> None:
        """Write down where things are after a step, and whether that is the end."""
        config, rows = self.config, self.descent.history
        rows.append({"evaluations": self._evaluations(), "train": run.errors.mean().item(),
                     "validation": errors.mean().item()})
        gains = [1 - after["train"] / max(before["train"], TINY) for before, after in zip(rows, rows[1:])]
        least = min(range(len(rows)), key=lambda i: rows[i]["validation"])
        idle = len(rows) - 1 - least >= config.patience or (len(gains) > 1 and max(gains[-2:]) < config.tolerance)
        cheap = self._evaluations() - self.drawn < config.cheap_evaluations
        limit = max(config.cheap_iterations, config.iterations) if cheap else config.iterations
        floor = rows[-1]["train"] <= ERROR_FLOOR * rows[0]["train"]
        self.finished = self.finished or idle or len(gains) >= limit or floor

    def _offer(self, found: _Candidate) -> None:
        """Take a grid that is better than the given one and the best so far."""
        if found.total < self.best.total and better(self.before, found.errors):
            self.best = found

    def _look_between(self) -> None:
        """The best of the steps was not taken: ask for grids between the given one and that."""
        given, least = (torch.tensor(levels[:-1]).log() for levels in (self.given, self.least.levels))
        for share in SHARES:
            inner = torch.lerp(given, least, share).exp().numpy()
            levels = np.concatenate([self.given[:1], inner[1:], self.given[-1:]])
            errors = self.validation.run(levels, False).errors
            total = float(self.train.run(levels, False).errors.sum() + errors.sum())
            self._offer(_Candidate(levels, total, errors, share))
