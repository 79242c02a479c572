"""The front door: a denoiser and numbers of steps in, grids of noise levels and their records out.

    from art_edm.schedule import ScheduleOptions, learn_schedule

    learned = learn_schedule("mnist", steps=(5, 18))                 # ART-RL, one run for both
    sigmas = learned[18].grid.values                                 # [19], from sigma_max down to 0
    print(learned[18].record["J_over_J_star"])                       # 1 is the optimum

    options = ScheduleOptions(refine=True, solver="heun", quiet=False)
    learn_schedule("edm-cifar10-32x32-uncond-vp.pkl", (18,), options, out="cifar{steps}.npy")
    learn_schedule("mnist", options=ScheduleOptions(nfe=(4, 6)))     # 4 and 6 evaluations: solver and K are chosen
    learn_schedule("mnist", (5,), ScheduleOptions(refine="weights")) # the record has the weights of each step, too
    learn_schedule(my_denoiser, steps=(8,))                          # any `art_edm.models.denoiser.Denoiser`

Symbols
-------
K       steps of a grid; a grid has K + 1 levels, the last is 0
N, NFE  evaluations of the denoiser per image
key     what a grid is asked by: its K, or its N
record  what a grid's JSON sidecar holds: scores, settings, costs, network, versions
"""

from __future__ import annotations

import json
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from art_edm.grids.grid import Grid, GridError, check_grid_destination, load_provenance, save_grid
from art_edm.grids.plots import check_plotting
from art_edm.grids.weights import WEIGHTS, written_rows
from art_edm.learning.config import PRESETS, TrainConfig, live
from art_edm.learning.provenance import provenance
from art_edm.learning.training import TrainResult, train
from art_edm.measure.local_errors import check_alone
from art_edm.measure.objectives import expected_evaluations
from art_edm.models.denoiser import Denoiser
from art_edm.models.loading import Network, load_network
from art_edm.refining.config import RefineConfig
from art_edm.refining.feature_runs import check_judge, described, load_judge
from art_edm.refining.refine import check_refinable, refine_grids
from art_edm.runtime.context import Context
from art_edm.runtime.distributed import World, world
from art_edm.runtime.progress import GracefulStop
from art_edm.runtime.store import Store
from art_edm.sampling.baselines import hand_made
from art_edm.sampling.budget import candidates, recommended, steps_of
from art_edm.sampling.solvers import SOLVERS, check_steps, fitted, order_of

__all__ = ["Schedule", "ScheduleOptions", "learn_schedule", "parse_steps"]

OBJECTIVES = ("art", "solver", "sde")
REFINEMENTS = ("levels", "weights")
WEIGHTS_SOLVER = "clock"  # from whose weights refinement begins, where no other is asked for
MAX_STEPS = 100_000
DECIDING = ("num_steps", "network", "settings", "objective", "solver", "candidates", "refine", "sigma_min", "sigma_max")

Wanted = Dict[int, Dict[Optional[str], int]]  # key -> solver, None for a grid that serves any -> K


@dataclass(frozen=True)
class ScheduleOptions:
    """What `learn_schedule` may be asked for; None is the preset's, or the network's own, value."""

    preset: str = "default"  # default, or paper: its literal recipe, one run for each K (slow)
    method: str = "rl"  # rl, or direct: the closed-form optimum of the measured profile
    rollout: Optional[str] = None  # cached: learn on interpolated trajectories; live: call the denoiser in each rollout
    clock: Optional[str] = None  # base clock in which to learn: gaussian, linear, edm
    iterations: Optional[int] = None  # of ART-RL
    trajectories: Optional[int] = None  # dense trajectories, at most
    seed: int = 0  # of all randomness
    objective: str = "art"  # art: |Q|, as in the paper; solver: the local errors of `solver`; sde: of the reverse SDE
    solver: Optional[str] = None  # of objective "solver", `refine`, `nfe`; None: heun, weights: clock, `nfe`: chosen
    refine: Union[bool, str] = False  # then move the levels to where `solver` ends nearest to the exact solution: True
    # or "levels"; "weights": those of each step, too, beginning with the solver's
    refine_by: str = "error"  # near by the end-point error, or by the "features" that `detector` gives of the ends
    detector: Optional[str] = None  # as of `metrics.detectors`; None: lenet for grey 28 x 28 images, else inception
    nfe: Optional[Sequence[int]] = None  # numbers of evaluations per image, in place of steps: `budget.recommended`
    # says by which solver, with `refine` the one of `budget.candidates` that ends nearest on validation noises
    sigma_max: Optional[float] = None  # first noise level
    sigma_min: Optional[float] = None  # lowest noise level at which the network is measured
    gnet: Optional[str] = None  # path or address of a guiding network's pickle
    guidance: float = 1.0  # strength; 1 is none
    class_idx: Optional[int] = None  # class of all images; None: random
    trust_pickle: bool = False  # run the code in a pickle even if it is no known version of NVlabs' modules
    device: str = "auto"  # where the denoiser runs: auto, cpu, cuda
    resume: bool = False  # unfinished work of other settings is an error rather than left aside
    force: bool = False  # overwrite grids of other settings
    plot: bool = False  # draw the clock and the grids beside the .npy
    quiet: bool = True  # print nothing


class Schedule(NamedTuple):
    """A learned grid."""

    grid: Grid
    record: Dict[str, Any]
    path: Optional[Path]  # where it was written, its record beside it as .json

    def save(self, path: Union[str, Path]) -> None:
        """Write grid and record as F.npy and F.json; raises a GridError or OSError."""
        save_grid(check_grid_destination(path), self.grid, self.record)


def learn_schedule(
    network: Union[str, Path, Denoiser, Network], steps: Optional[Sequence[int]] = None,
    options: Optional[ScheduleOptions] = None, out: Optional[str] = None,
) -> Dict[int, Schedule]:
    """Learn grids for a denoiser, all read off one run, and score them against the exact optimum.

    Under torchrun the processes share the work; process 0 writes, and each returns the same grids.

    Args:
        network: a `Denoiser`; or a name, path or address as `load_network` takes them. "package.module:factory" calls
            factory(), which returns a `Denoiser`: this runs that module's code. Unfinished work is kept beside `out`,
            and found again by the same call, but for a `Denoiser`, since two of them cannot be distinguished.
        steps: numbers of steps K, from 1; none twice. None is 18, or what `options.nfe` asks for.
        out: where to write F.npy and F.json; {steps} becomes K, or with `options.nfe` {nfe} becomes N; {network} the
            network's name with its class and guidance. None writes nothing.
    Returns:
        K, or with `options.nfe` N -> `Schedule`.
    Raises:
        ValueError: something given cannot be used: a network, options that contradict each other or have no effect,
            more steps than the network has levels, a destination.
        NonFiniteOutput: the network returned NaN or infinity; the message names the noise level.
        Stopped: Ctrl-C or SIGTERM; finished work is kept.
        FloatingPointError: learning diverged.
        OSError, ConnectionError: a file cannot be written; an address or another process cannot be reached.
    """
    options = options or ScheduleOptions()
    config, wanted = _config(options), _wanted(steps, options)
    label = "steps" if options.nfe is None else "nfe"
    if out is not None:  # before the network is loaded, or even downloaded
        _check_pattern(out.replace("{network}", "network"), label, wanted)
    if options.plot:
        check_plotting()
    with world(options.device) as here:
        with here.phase():  # everything that can fail early
            began = time.perf_counter()
            loaded = _loaded(network, here.device, options)
            paths = _paths(out and _named(out, loaded), label, wanted)
            named = not isinstance(network, (Denoiser, Network)) or loaded.sha256 is not None  # else it may be any
            goal = _Goal(_wanted(steps, options, loaded.denoiser.img_shape[0]), paths, out is not None and named)
            job = _Job(loaded, config, options, here, goal)
            job.seconds["load"] = time.perf_counter() - began
        with _range(loaded.denoiser, options), GracefulStop():  # asked between two stages, the next one ends
            with here.phase():
                job.check()
            if not options.quiet:
                print("\n".join(job.plan()), flush=True)
            if options.preset != "paper":
                return job.run(config, list(wanted))
            learned: Dict[int, Schedule] = {}  # the paper learns every number of steps by itself
            for key in wanted:
                learned.update(job.run(job.config_of(key), [key]))
            return learned


# ---- checks before any work ----


def parse_steps(text: str, option: str = "--steps") -> Tuple[int, ...]:
    """'18' or '2,3,5' to numbers of steps; raises a ValueError for what is none, or is there twice."""
    parts = text.split(",")
    return _checked_steps([int(part) if re.fullmatch(r" *[1-9][0-9]{0,5} *", part) else part for part in parts], option)


def _checked_steps(steps: Sequence[Any], option: str) -> Tuple[int, ...]:
    """Numbers of steps, or of evaluations: whole, from 1, each once."""
    for k in steps:
        if not isinstance(k, Integral) or isinstance(k, bool) or not 1 <= k <= MAX_STEPS:
            raise ValueError(f"found {k!r} in {option}, expected whole numbers from 1 to {MAX_STEPS}, such as 2,3,5")
    twice = [k for i, k in enumerate(steps) if k in steps[:i]]
    if twice or not steps:
        raise ValueError(f"found {twice[0]} twice in {option}; give each number once" if twice else
                         f"found no numbers in {option}; give one, such as 18")
    return tuple(int(k) for k in steps)


def _wanted(steps: Optional[Sequence[int]], options: ScheduleOptions, channels: int = 3) -> Wanted:
    """What is asked for; no K depends on the channels. Of several solvers under one key refinement chooses one."""
    solver = options.solver
    if options.nfe is None:
        default = WEIGHTS_SOLVER if options.refine == "weights" else "heun"
        solver = solver or (default if options.refine or options.objective == "solver" else None)
        return {k: {solver: k} for k in _checked_steps((18,) if steps is None else steps, "--steps")}
    evaluations = _checked_steps(options.nfe, "--nfe")
    given = f"found --nfe={','.join(map(str, evaluations))}"
    if steps is not None:
        raise ValueError(f"{given} and --steps={','.join(map(str, steps))}, but the solver's number of steps follows "
                         "from its evaluations; leave one of them out")
    if solver is None and (options.objective == "solver" or options.refine and options.preset == "paper"):
        option = "--objective=solver" if options.objective == "solver" else "--refine --preset=paper"
        raise ValueError(f"{given} with {option}, which learns for one solver; say for which with --solver")
    if options.objective == "sde":
        raise ValueError(f"{given} with --objective=sde, but it chooses a deterministic solver; leave one of them out")
    names = lambda n: (solver,) if solver else candidates(n) if options.refine else (recommended(n, channels),)
    single = lambda name: solver or options.refine != "weights" or SOLVERS[name].stages == 1
    return {n: {name: steps_of(name, n) for name in names(n) if single(name)} for n in evaluations}


def _config(options: ScheduleOptions) -> TrainConfig:
    """The preset's configuration with the options that were given; a ValueError for one that has no effect."""
    for name, known in (("preset", tuple(PRESETS)), ("objective", OBJECTIVES)):
        if getattr(options, name) not in known:
            found, more = getattr(options, name), "; --refine does more for fewer evaluations"
            gone = more if found == "endpoint" else ""
            raise ValueError(f"found --{name}={found}, expected {', '.join(known)}{gone}")
    if options.refine not in (False, True, *REFINEMENTS):
        raise ValueError(f"found --refine={options.refine}, expected {' or '.join(REFINEMENTS)}")
    check_judge(options.refine_by, options.detector, bool(options.refine))
    if options.solver is not None:
        order_of(options.solver)
        if options.objective == "solver":
            check_alone(options.solver)
        if options.objective != "solver" and not options.refine and options.nfe is None:
            raise ValueError(f"found --solver={options.solver}, which has no effect here; add --refine, --nfe=N or "
                             "--objective=solver, or leave it out: a grid of the default objective is for all solvers")
    if options.refine and options.objective == "sde":
        raise ValueError("--refine follows a deterministic solver; leave it out with --objective=sde")
    for name in ("rollout", "clock", "iterations"):
        if options.method == "direct" and getattr(options, name) is not None:
            raise ValueError(f"found --{name}={getattr(options, name)}, which has no effect with --method=direct, as "
                             "that learns nothing; leave one of them out")
    config = PRESETS[options.preset]
    if options.rollout == "live" and config.rollout != "live":
        config = live(config)
    if options.objective != "art":
        config = replace(config, solver="sde" if options.objective == "sde" else options.solver or "heun")
    given = {name: getattr(options, name) for name in ("method", "rollout", "clock", "iterations", "trajectories",
                                                       "seed")}
    config = config.changed(**{name: value for name, value in given.items() if value is not None})
    config.check()
    return config


def _loaded(network: Union[str, Path, Denoiser, Network], device: torch.device, options: ScheduleOptions) -> Network:
    """The network; a `Denoiser` as it is, where it is."""
    if isinstance(network, Network):
        return network
    given = (options.gnet, options.guidance, options.class_idx)
    if not isinstance(network, Denoiser):
        return load_network(str(network), device, *given, options.trust_pickle, options.quiet)
    if given != (None, 1, None):
        raise ValueError("found gnet, guidance or class_idx for a Denoiser, which is guided by its own code; leave "
                         "them out, or set the denoiser's own class_idx")
    return Network(network, type(network).__name__, None)


@contextmanager
def _range(denoiser: Denoiser, options: ScheduleOptions) -> Iterator[None]:
    """The denoiser with the noise levels that are asked for, and afterwards as it was."""
    before, (low, high) = (denoiser.sigma_min, denoiser.sigma_max), denoiser.sigma_limits
    given = {name: getattr(options, name) for name in ("sigma_min", "sigma_max") if getattr(options, name) is not None}
    try:
        for name, level in given.items():
            option = f"--{name.replace('_', '-')}"
            if not max(low, 0) <= level <= high or not 0 < level < float("inf"):
                least = f"from {low:g}" if low > 0 else "above 0, up"
                raise ValueError(f"found {option}={level:g}, expected a noise level {least} to {high:g}, as the "
                                 "network supports; change it")
            setattr(denoiser, name, float(denoiser.round_sigma(torch.tensor(level, dtype=torch.float64))))
        if denoiser.sigma_min >= denoiser.sigma_max:
            found = f"found --sigma-min={denoiser.sigma_min:g} and --sigma-max={denoiser.sigma_max:g}"
            raise ValueError(f"{found}, expected the first below the second; change one")
        yield
    finally:
        denoiser.sigma_min, denoiser.sigma_max = before


# ---- files ----


def _named(pattern: str, network: Network) -> str:
    """The pattern with a name that tells network, class and guidance apart, and is legal on every system."""
    details = network.details
    parts = [network.name]
    if details.get("class_idx") is not None:
        parts.append(f"class{details['class_idx']}")
    if details.get("gnet") is not None:
        parts.append(f"guided{details['guidance']:g}-{Path(details['gnet']).stem}")
    name = re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(parts))[:100]
    apart = "-" if name[-1:].isdigit() or name.endswith("-") else ""  # gaussian0.5 in 13 steps, gaussian0.51 in 3
    for label in ("steps", "nfe"):
        pattern = pattern.replace(f"{{network}}{{{label}}}", f"{name}{apart}{{{label}}}")
    return pattern.replace("{network}", name)


def _check_pattern(pattern: str, label: str, keys: Iterable[int]) -> None:
    """Raise a ValueError for a pattern to which the grids cannot be written."""
    count, other = len(list(keys)), "{nfe}" if label == "steps" else "{steps}"
    if count > 1 and f"{{{label}}}" not in pattern or other in pattern:
        found = f"has {other}" if other in pattern else f"is one file for {count} grids"
        raise ValueError(f"--out={pattern} {found}; put {{{label}}} into the name")
    for path in _paths(pattern, label, keys).values():
        check_grid_destination(path)


def _paths(pattern: Optional[str], label: str, keys: Iterable[int]) -> Dict[int, Path]:
    """Where the grid of each key goes; `label` is "steps" or "nfe", what the pattern calls the key."""
    return {} if pattern is None else {key: Path(pattern.replace(f"{{{label}}}", str(key))) for key in keys}


def _check_overwriting(path: Path, record: Dict[str, Any]) -> None:
    """Raise a ValueError where a grid of other settings stands at `path`; what the record leaves open may differ."""
    if not path.exists():
        return
    try:
        found = load_provenance(path)
    except GridError:
        found = {}
    here = _flat(json.loads(json.dumps({name: record[name] for name in DECIDING if name in record})))
    found = _flat({name: found.get(name) for name in DECIDING})
    differing = [name for name in here if found.get(name) != here[name]]
    if differing:
        name = differing[0]
        there, this = _short(found.get(name)), _short(here[name])
        raise ValueError(f"{path} is a grid of other settings ({name} is {there} there, {this} here); give --force to "
                         "overwrite it, or another --out")


def _flat(record: Dict[str, Any]) -> Dict[str, Any]:
    """The record with the entries of its dictionaries under their own names, such as settings.seed."""
    flat: Dict[str, Any] = {}
    for name, value in record.items():
        inner = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        flat.update(inner)
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."


# ---- the work ----


class _Goal(NamedTuple):
    """What a call is for."""

    wanted: Wanted
    paths: Dict[int, Path]  # by key; empty where nothing is written
    keeps: bool  # unfinished work, beside the first path


class _Job:
    """One call: the network, what is asked for, and where it goes."""

    def __init__(
        self, network: Network, config: TrainConfig, options: ScheduleOptions, here: World, goal: _Goal
    ) -> None:
        self.network, self.config, self.options, self.world, self.goal = network, config, options, here, goal
        self.denoiser, self.seconds, self.detector = network.denoiser, {}, None
        self.solvers = list(dict.fromkeys(solver for each in goal.wanted.values() for solver in each))
        self.most_steps = max(k for each in goal.wanted.values() for k in each.values())

    def check(self) -> None:
        """What needs the network, and not yet its evaluation."""
        check_steps(self.denoiser, self.most_steps)
        self.detector = load_judge(self.options.refine_by, self.options.detector, self.denoiser, self.options.quiet)
        if self.options.refine:
            for solver in self.solvers:
                check_refinable(self.denoiser, solver, self.options.refine == "weights")
        for key, path in self.goal.paths.items():
            check_grid_destination(path)
            if not self.options.force:
                _check_overwriting(path, self.deciding(self.config_of(key), key))

    def config_of(self, key: int) -> TrainConfig:
        """The settings by which the grid of this key is learned; the paper's preset has one solver for it."""
        paper = self.options.preset == "paper"
        return self.config.changed(train_steps=max(self.goal.wanted[key].values())) if paper else self.config

    def deciding(self, config: TrainConfig, key: int) -> Dict[str, Any]:
        """All that decides the grid of this key; a part of its record. What is not chosen yet is left open."""
        network, denoiser, solvers = self.network, self.denoiser, self.goal.wanted[key]
        record = {
            "network": {"name": network.name, "sha256": network.sha256, **network.details},
            "settings": config.settings(), "objective": self.options.objective,
            "refine": described(self.options.refine, self.detector),
            "sigma_min": denoiser.sigma_min, "sigma_max": denoiser.sigma_max,
        }
        if self.options.nfe is not None:
            record["nfe"] = key
        if len(solvers) > 1:
            return {**record, "candidates": list(solvers)}
        solver, num_steps = next(iter(solvers.items()))
        return {**record, "solver": solver, "num_steps": num_steps}

    def plan(self) -> List[str]:
        """Lines shown before the work: network, device, noise levels, stages and what they will evaluate."""
        config, denoiser, high = self.config, self.denoiser, self.denoiser.sigma_limits[1]
        more = f" (the network knows up to {high:g}: --sigma-max)" if denoiser.sigma_max < high < float("inf") else ""
        least, most = expected_evaluations(config.objective)
        weight = {"art": "|Q|", "sde": "the SDE's errors"}.get(self.options.objective, f"errors of {config.solver}")
        count = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        stages = [f"profile of {weight}, {count} evaluations"]
        if config.method == "rl":
            each = 3 * config.recipe.batch * (config.recipe.train_steps * (2 if config.recipe.simpson else 1)
                                              + config.recipe.simpson)
            cost = f"{each * config.iterations:,}" if config.rollout == "live" else "no"
            stages.append(f"ART-RL, {config.iterations} iterations, {cost} evaluations")
        if self.options.refine and (self.most_steps > 1 or self.options.refine == "weights"):
            what = "of levels and weights, from" if self.options.refine == "weights" else "for"
            stages.append(f"refinement {what} {' or '.join(self.solvers)}, as many evaluations as it takes")
        asked = "K" if self.options.nfe is None else "NFE"
        return [f"{self.network.name} on {device_name(self.world.device)}, noise levels from {denoiser.sigma_max:g} to "
                f"{denoiser.sigma_min:g}{more}", f"{asked} = {', '.join(map(str, self.goal.wanted))}: "
                f"{'; '.join(stages)}"]

    def run(self, config: TrainConfig, keys: Sequence[int]) -> Dict[int, Schedule]:
        """One run of the learner, and its grids."""
        first = self.goal.paths.get(keys[0])
        store = Store(first.with_name(f"{first.stem}.unfinished") if first and self.goal.keeps else None)
        identity = f"{self.network.identity} {self.denoiser.sigma_min!r} {self.denoiser.sigma_max!r}"
        context = Context(self.world, store, self.options.quiet, identity, resume=self.options.resume)
        result = train(self.denoiser, config, context)
        by_solver, records = self.grids(result, keys), {key: self.deciding(config, key) for key in keys}
        if self.options.refine:
            grids = self.refined(config.seed, by_solver, result, records, context)
        else:
            grids = {key: next(iter(each.values())) for key, each in by_solver.items()}
        with self.world.phase():
            learned = self.written(config, result, grids, records)
        store.remove()  # by every process: those of another machine have a folder there
        return learned

    def grids(self, result: TrainResult, keys: Sequence[int]) -> Dict[int, Dict[Optional[str], Grid]]:
        """The learned grids of each key by solver, at levels that the network has."""
        read = result.learned.grid if result.learned else result.profile.direct
        return {key: {solver: fitted(self.denoiser, read(k)) for solver, k in self.goal.wanted[key].items()}
                for key in keys}

    def refined(
        self, seed: int, grids: Dict[int, Dict[Optional[str], Grid]], result: TrainResult,
        records: Dict[int, Dict[str, Any]], context: Context,
    ) -> Dict[int, Grid]:
        """The refined grids; what they cost becomes stages of `result`, what was found a part of the records."""
        weights = self.options.refine == "weights"
        own_clock = self.options.objective != "solver" and not weights
        settings = RefineConfig.of_weights(seed=seed) if weights else RefineConfig(seed=seed)
        found = refine_grids(self.denoiser, grids, settings.judged_by(self.detector), context, own_clock, self.detector)
        result.evaluations.update(found.evaluations)
        result.seconds.update(found.seconds)
        for key, one in found.results.items():
            records[key].update(refined=one.record(), solver=one.settings["solver"], num_steps=one.grid.num_steps)
            if one.weights is not None:
                records[key][WEIGHTS] = written_rows(one.weights)
        for key, errors in found.tried.items():
            records[key]["tried"] = {solver: {"num_steps": self.goal.wanted[key][solver], **error._asdict()}
                                     for solver, error in errors.items()}
        return {key: one.grid for key, one in found.results.items()}

    def written(
        self, config: TrainConfig, result: TrainResult, grids: Dict[int, Grid], records: Dict[int, Dict[str, Any]]
    ) -> Dict[int, Schedule]:
        """The grids with their whole records, written by process 0 where they have a place."""
        began, learned = time.perf_counter(), {}
        for key, grid in grids.items():
            path, seconds = self.goal.paths.get(key), {**self.seconds, **result.seconds}
            record = {
                **provenance(self.network, config, result, grid, {**seconds, "write": time.perf_counter() - began}),
                **records[key], "processes": self.world.size, "device": device_name(self.world.device),
            }
            if path is not None and self.world.rank == 0:
                if not self.options.force:  # another run may have been faster
                    _check_overwriting(path, record)
                _write(path, grid, record)
            if path is not None and self.options.plot and self.world.rank == 0:
                from art_edm.learning.plots import plot_run

                k = grid.num_steps
                shown = {**hand_made(self.denoiser, k), path.stem: grid}
                plot_run(path.with_suffix(".png"), f"{self.network.name}, K = {k}", shown, result.learned)
            learned[key] = Schedule(grid, record, path)
        return learned


def _write(path: Path, grid: Grid, record: Dict[str, Any]) -> None:
    """Save, or say that the disk is the matter and that nothing old was lost."""
    try:
        save_grid(path, grid, record)
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}; any older file is as it was; make room and run the same "
            "command again, what was learned is kept"
        ) from None


def device_name(device: torch.device) -> str:
    """The device as a person knows it, a GPU with its name."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
