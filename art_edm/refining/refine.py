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

With a detector, what is minimised and validated is the Frechet distance between the features of ends and exact ends
in place of the mean error (see `feature_runs`), and a grid of less distance is better.

With `config.weights` the weights of each step are moved with the levels (see `sampling.weighted`). They begin as the
solver's own or as those of a solver in `WEIGHTS_OF`, whichever end nearest on the grid. A ridge can hold them there:
f + rho/2 f_0 |w - w_0|^2, f_0 the mean error at the start. rho takes the values of `config.ridges` one after the other,
each from where the one before ended; validation noises decide which step, and so which rho, is returned. By default it
is 0.
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
from art_edm.metrics.detectors import Detector
from art_edm.metrics.end_point import EndPointError
from art_edm.models.denoiser import Denoiser
from art_edm.refining import levenberg_marquardt
from art_edm.refining.config import RefineConfig
from art_edm.refining.feature_runs import FeatureRuns
from art_edm.refining.noise_sets import NoiseSets, draw_noises
from art_edm.refining.parameters import Parameters, free_places
from art_edm.refining.solver_jacobian import Noises, Run, Scheme, SolverRuns
from art_edm.refining.stage import Stage
from art_edm.runtime.context import Context
from art_edm.runtime.memory import with_back_off
from art_edm.runtime.store import Store
from art_edm.sampling.solvers import SOLVERS, fitted, nfe, supported
from art_edm.sampling.weighted import table_of

__all__ = ["RefineResult", "RefinedGrids", "check_refinable", "own_start", "refine", "refine_grids"]

GIVEN, OWN = "given", "own local errors"  # names of grids to start from
WEIGHTS_OF = ("clock-denoised", "ipndm3")  # solvers whose weights are starts as well as the solver's own
MAX_TRIALS = 7  # ever shorter steps of one search
ERROR_FLOOR = 1e-4  # of the error at the start: nothing is gained below, as the exact ends are no better
SHARES = (0.75, 0.5, 0.25)  # of the way to a grid that is not taken
TINY = 1e-300
DEFAULT = RefineConfig()
T = TypeVar("T")


@dataclass
class RefineResult:
    """What a refinement leaves behind."""

    grid: Grid
    start: str  # where it began: "given", or the name of another grid or of the solver whose weights those were
    share: float  # of the way from the given grid to a step not taken, in log sigma; 1 unless `grid` is there
    error_before: EndPointError  # of the given grid
    error_after: EndPointError  # of `grid`, in the mean never above; it helped to choose, so a little too good
    history: List[Dict[str, float]]  # evaluations, and what is minimised as `train` and `validation`, from the start on
    evaluations: int
    seconds: float
    settings: Dict[str, Any]  # of the refinement, `solver` among them
    distances: Optional[Dict[str, float]] = None  # "before" and "after", of features, where they were minimised
    weights: Optional[np.ndarray] = None  # of the slopes in each step, [K, K], where they were moved: `grids.weights`

    def record(self) -> Dict[str, Any]:
        """For a grid's provenance: what was done and what it gave, ready for JSON."""
        left_out = ("grid", "weights", *(("distances",) if self.distances is None else ()))
        return {**{name: value for name, value in vars(self).items() if name not in left_out},
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
    context: Optional[Context] = None, own_clock: bool = True, detector: Optional[Detector] = None,
) -> RefinedGrids:
    """For each key, such as K, a grid refined for a solver; all share noises, and a solver's clock to start from.

    Args:
        grids: key -> solver -> the grid that nothing may be worse than; all begin at the same level. Of several
            solvers the one is refined that ends nearest on its grid, over the validation noises.
        own_clock: False where the grids are those of the solver's own local errors already.
        detector: minimise the distance between the features of ends and exact ends, in place of the end-point error.
    Raises as `refine`, and CheckpointMismatch where the context resumes and its store has other settings.
    """
    context = context or Context()
    if not context.identity:  # here it is the only denoiser: what one stage has found serves the next
        context = replace(context, store=Store(), identity="this denoiser")
    solvers = ", ".join(dict.fromkeys(solver for each in grids.values() for solver in each))
    context.claim("refinement", {"solver": solvers, "batch": context.batch, **_judge(detector), **asdict(config)})
    spent = _Spent({}, {})
    top = next(grid.sigma_max for each in grids.values() for grid in each.values())
    noises = _backed_off(partial(draw_noises, denoiser, config, top), denoiser, context)._replace(detector=detector)
    spent.add("ends", noises)
    tried, chosen = {}, {key: next(iter(each)) for key, each in grids.items()}
    for key, each in grids.items():
        if len(each) > 1:
            scores = {solver: _backed_off(partial(_score, denoiser, grid, solver, noises), denoiser, context)
                      for solver, grid in each.items()}
            tried[key] = {solver: score.error for solver, score in scores.items()}
            chosen[key] = min(each, key=lambda solver, scores=scores: scores[solver].minimised)
            spent.add("choose", *(score for solver, score in scores.items() if solver != chosen[key]))
    owns: Dict[str, Profile] = {}
    for key, solver in chosen.items():
        if own_clock and SOLVERS[solver].alone and solver not in owns and grids[key][solver].num_steps > 1:
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
    minimised: float  # its mean, or the distance of features
    evaluations: int  # of all processes
    seconds: float


def _score(denoiser: Denoiser, grid: Grid, solver: str, noises: NoiseSets, context: Context) -> _Score:
    """How far a solver ends on the validation noises; `refine` finds these errors in the store, and counts them."""
    total = nfe(solver, grid.num_steps) * len(noises.validation.latents)
    with Stage(denoiser, context, f"trying {solver}, images", total) as stage:
        runs = runs_of(solver, noises.validation, stage, noises.detector)
        run = runs.run(Scheme(grid.values), False)
    return _Score(EndPointError.of(run.figures[:, 0]), run.errors.mean().item(), runs.evaluations, stage.seconds)


def own_start(denoiser: Denoiser, own: Optional[Profile], num_steps: int) -> Dict[str, Grid]:
    """The optimum of the solver's own local errors, by name, at levels that the model has; none without a profile."""
    return {} if own is None else {OWN: fitted(denoiser, own.direct(num_steps))}


def refine(
    denoiser: Denoiser, grid: Grid, solver: str, config: RefineConfig = DEFAULT, context: Optional[Context] = None,
    noises: Optional[NoiseSets] = None, starts: Mapping[str, Grid] = MappingProxyType({}),
) -> RefineResult:
    """Move the inner levels of `grid`, and the weights of `solver` if the config says so, to end nearest to the exact
    solution.

    Args:
        grid: such as ART's, to start from and never be worse than; its number of steps and its first level stay.
        solver: a name in `solvers.SOLVERS`.
        context: its store keeps what each batch gave, so that the same call after a stop continues from there; its
            world shares the batches, and each process returns the same result.
        noises: from `draw_noises` with the same config, shared by several refinements, whose cost is then not
            counted here; with a detector, the distance of features is minimised. None draws them.
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
        train, validation = (runs_of(solver, part, stage, noises.detector) for part in noises[:2])
        schemes = {name: _scheme(each, solver, config) for name, each in grids.items()}
        if config.weights:
            schemes.update({other: _scheme(grid, other, config) for other in WEIGHTS_OF if other != solver})
        work = _Refinement(schemes, config, train, validation, noises.evaluations if drawn else 0)
        found, best = work.result(), work.best.scheme
    seconds = stage.seconds + (noises.seconds if drawn else 0.0)
    settings = {"solver": solver, "batch": context.batch, **_judge(noises.detector), **asdict(config)}
    runs = {"before": work.before, "after": work.best.run}
    distances = {name: run.errors.mean().item() for name, run in runs.items()} if noises.detector else None
    return RefineResult(Grid(best.levels), *found, seconds, settings, distances, best.weights)


def runs_of(solver: str, noises: Noises, stage: Stage, detector: Optional[Detector]) -> SolverRuns:
    """Runs whose end-point error is minimised, or the distance of their ends' features where there is a detector."""
    return FeatureRuns(solver, noises, stage, detector) if detector else SolverRuns(solver, noises, stage)


def _judge(detector: Optional[Detector]) -> Dict[str, str]:
    return {"detector": f"{detector.name}, SHA-256 {detector.sha256}"} if detector else {}


def _scheme(grid: Grid, solver: str, config: RefineConfig) -> Scheme:
    return Scheme(grid.values, table_of(solver, grid.values) if config.weights else None)


def check_refinable(denoiser: Denoiser, solver: str, weights: bool = False) -> None:
    """Raise a ValueError, before any work, for an unknown solver, one without `weights` where they shall be moved, or
    a model that knows discrete noise levels only."""
    nfe(solver, 1)
    if weights:
        table_of(solver, np.array([1.0, 0.0]))
    low = max(denoiser.sigma_min, denoiser.sigma_limits[0])
    probe = torch.from_numpy(np.geomspace(low, denoiser.sigma_max, 64)[1:-1])
    rounded = denoiser.round_sigma(probe.to(denoiser.device)).to(probe)
    worst = int(((rounded - probe) / probe).abs().argmax())
    if not torch.allclose(rounded, probe, rtol=1e-6, atol=0):
        raise ValueError(
            f"found a network of discrete noise levels ({float(probe[worst]):.6g} becomes {float(rounded[worst]):.6g}),"
            " expected one of all levels, as they are moved by little; use the grid as it is, without --refine"
        )


def _check(denoiser: Denoiser, grids: Mapping[str, Grid], solver: str, config: RefineConfig) -> None:
    nfe(config.fine_solver, config.fine_steps)
    check_refinable(denoiser, solver, config.weights)
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
    reach = 0 if config.weights else SOLVERS[solver].reach
    columns = sum(nfe(solver, min(n + reach, steps)) - 1 for n in range(2, steps + 1))
    columns += sum(steps - 1 - k for k, _ in free_places(steps, config.free if config.weights else 0))
    derivatives = columns * config.noises
    whole = config.iterations * (derivatives + nfe(solver, steps) * (config.noises + config.validation))
    return max(whole, config.cheap_evaluations if config.cheap_iterations > config.iterations else 0)


@dataclass
class _Candidate:
    """A scheme that may be returned, its error summed over all noises, and its run over the validation noises."""

    scheme: Scheme
    total: float
    run: Run
    share: float = 1.0


@dataclass
class _Descent:
    """Where the descent is."""

    p: np.ndarray  # parameters of the last scheme that was accepted, [P]
    damping: float
    secant: np.ndarray  # S, [P, P]
    step: Optional[np.ndarray] = None  # the last one in p, [P]
    gradient: Optional[np.ndarray] = None  # before that step, [P]
    history: List[Dict[str, float]] = field(default_factory=list)


class _Refinement:
    """One refinement. All its numbers come from `train` and `validation`, so that it can be replayed from a store."""

    def __init__(
        self, starts: Mapping[str, Scheme], config: RefineConfig, train: SolverRuns, validation: SolverRuns, drawn: int
    ) -> None:
        self.starts, self.config, self.train, self.validation, self.drawn = starts, config, train, validation, drawn
        self.given = starts[GIVEN]
        self.low = train.stage.denoiser.sigma_limits[0]

    def result(self) -> Tuple[Any, ...]:
        """All of it: the fields of a `RefineResult` after its grid, up to its evaluations."""
        run = self._begin()
        while not self.finished:
            run = self._iterate(run)
        if self.least is not None and self.least.scheme is not self.best.scheme:
            self._look_between()
        before, after = (EndPointError.of(run.figures[:, 0]) for run in (self.before, self.best.run))
        return self.start, self.best.share, before, after, self.descent.history, self._evaluations()

    def _evaluations(self) -> int:
        return self.drawn + self.train.evaluations + self.validation.evaluations

    def _total(self, train: Run, validation: Run) -> float:
        """What is least of the best scheme: over the noises of which they are found, free weights look too good."""
        return float(validation.errors.sum() + (0.0 if self.config.weights else train.errors.sum()))

    def _begin(self) -> Run:
        """The run of the best of the schemes to start from, which validation must find better than the given one."""
        config, first = self.config, float(self.given.levels[0])
        places = free_places(len(self.given.levels) - 1, config.free) if config.weights else ()
        forms = {name: Parameters(first, self.low, places, each.weights) for name, each in self.starts.items()}
        vectors = {name: form.vector(self.starts[name]) for name, form in forms.items()}
        runs = {name: self.train.run(form.scheme(vectors[name])) for name, form in forms.items()}
        validated = {name: self.validation.run(scheme, False) for name, scheme in self.starts.items()}
        totals = {name: self._total(run, validated[name]) for name, run in runs.items()}
        better = partial(self.validation.better, validated[GIVEN])
        allowed = [name for name in self.starts if name == GIVEN or better(validated[name])]
        self.start, self.before = min(allowed, key=totals.__getitem__), validated[GIVEN]
        self.parameters, self.origin = forms[self.start], vectors[self.start]
        self.ridges = list(config.ridges if places else (0.0,))
        self.stiffness = np.append(np.zeros(len(self.given.levels) - 2), np.ones(len(places)))
        self.stiffness *= runs[self.start].errors.mean()
        self.descent = self._descent(self.origin, [])
        self.best = _Candidate(self.starts[self.start], totals[self.start], validated[self.start])
        self.least: Optional[_Candidate] = None  # after the step of least error over all noises, allowed or not
        self.finished = len(self.given.levels) == 2 and not places
        self._note(runs[self.start], validated[self.start])
        return runs[self.start]

    def _descent(self, p: np.ndarray, history: List[Dict[str, float]]) -> _Descent:
        return _Descent(p, self.config.damping, np.zeros((len(p), len(p))), history=history)

    def _ridge(self, p: np.ndarray) -> Tuple[float, np.ndarray, np.ndarray]:
        """What the ridge adds to the error, its gradient [P] and curvature [P, P]."""
        weight, apart = self.ridges[0] * self.stiffness, p - self.origin
        return float(weight @ np.square(apart)) / 2, weight * apart, np.diag(weight)

    def _iterate(self, run: Run) -> Run:
        """Derivatives, one accepted step if there is any, and what it does to the validation noises."""
        at, parameters = self.descent, self.parameters
        to_p = parameters.chain(at.p, run.scheme)
        gradient, H, scale = self.train.model(run, to_p, self.config.step, parameters.places)
        _, pull, stiffness = self._ridge(at.p)
        scale, S = np.hypot(scale, np.sqrt(np.diag(stiffness))), at.secant
        if at.step is not None:
            S = levenberg_marquardt.secant(S, H, at.step, gradient - at.gradient)
        after = self._search(run, gradient + pull, (H + stiffness, S), scale)
        if after is None and S.any():  # what was learned about the curvature may mislead
            after = self._search(run, gradient + pull, (H + stiffness, np.zeros_like(S)), scale)
        if after is None:
            self._loosen()
            return run
        validated, at.gradient = self.validation.run(after.scheme, False), gradient
        found = _Candidate(after.scheme, self._total(after, validated), validated)
        if self.least is None or found.total < self.least.total:
            self.least = found
        self._offer(found)
        self._note(after, validated)
        return after

    def _loosen(self) -> None:
        """The next ridge, from here; after the last it is finished."""
        del self.ridges[:1]
        self.finished = not self.ridges
        self.descent = self._descent(self.descent.p, self.descent.history)

    def _search(
        self, run: Run, gradient: np.ndarray, curvature: Tuple[np.ndarray, np.ndarray], scale: np.ndarray
    ) -> Optional[Run]:
        """The first of ever shorter steps that lowers the error with the ridge, taken; None if there is none."""
        at, growth = self.descent, 2.0
        f = run.errors.mean() + self._ridge(at.p)[0]
        for _ in range(MAX_TRIALS):
            step, promised = levenberg_marquardt.proposal(gradient, sum(curvature), scale, at.damping)
            after = self.train.run(self.parameters.scheme(at.p + step))
            gain = f - after.errors.mean() - self._ridge(at.p + step)[0]
            if gain > 0:
                ratio = gain / promised if promised > 0 else 0.0
                at.damping = max(float(at.damping * max(0.2, 1 - (2 * min(ratio, 1.0) - 1) ** 3)), 1e-4)
                at.p, at.step, at.secant = at.p + step, step, curvature[1]
                return after
            at.damping, growth = max(at.damping, 1e-2) * growth, 2 * growth
        return None

    def _note(self, run: Run, validated: Run) -> None:
        """Write down where things are after a step, and whether that is the end."""
        config, rows = self.config, self.descent.history
        rows.append({"evaluations": self._evaluations(), "train": run.errors.mean().item(),
                     "validation": validated.errors.mean().item()})
        gains = [1 - after["train"] / max(before["train"], TINY) for before, after in zip(rows, rows[1:])]
        least = min(range(len(rows)), key=lambda i: rows[i]["validation"])
        cheap = self._evaluations() - self.drawn < config.cheap_evaluations
        limit = max(config.cheap_iterations, config.iterations) if cheap else config.iterations
        floor = rows[-1]["train"] <= ERROR_FLOOR * rows[0]["train"]
        idle = len(rows) - 1 - least >= config.patience
        self.finished = self.finished or idle or len(gains) >= limit or floor
        if not self.finished and len(gains) > 1 and max(gains[-2:]) < config.tolerance:
            self._loosen()

    def _offer(self, found: _Candidate) -> None:
        """Take a grid that is better than the given one and the best so far."""
        if found.total < self.best.total and self.validation.better(self.before, found.run):
            self.best = found

    def _look_between(self) -> None:
        """The best of the steps was not taken: ask for schemes between the given one and that."""
        least = self.least.scheme
        for share in SHARES:
            scheme = between(self.given, least, share)
            validated = self.validation.run(scheme, False)
            total = self._total(self.train.run(scheme, False), validated)
            self._offer(_Candidate(scheme, total, validated, share))


def between(given: Scheme, other: Scheme, share: float) -> Scheme:
    """A share of the way from one scheme to another of the same first level: in log sigma, and in the weights."""
    logs = (torch.tensor(scheme.levels[:-1]).log() for scheme in (given, other))
    inner = torch.lerp(*logs, share).exp().numpy()
    levels = np.concatenate([given.levels[:1], inner[1:], given.levels[-1:]])
    apart = None if given.weights is None else other.weights - given.weights
    return Scheme(levels, None if apart is None else given.weights + share * apart)
