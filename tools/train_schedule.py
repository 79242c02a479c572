"""Learn a timestep grid for a denoiser: a network goes in, a .npy of noise levels comes out."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import click

from art_edm.runtime.cli import Command


def parse_steps(context: click.Context, parameter: click.Parameter, text: str) -> Tuple[int, ...]:
    """'18' or '2,3,5' to numbers of steps; each at least 1, none twice."""
    steps: List[int] = []
    for part in text.split(","):
        try:
            value = int(part)
        except ValueError:
            value = 0
        if not 1 <= value <= 100_000:
            raise click.BadParameter(f"found {part!r}, expected whole numbers from 1, such as 18 or 2,3,5")
        if value in steps:
            raise click.BadParameter(f"found {value} twice; give each number of steps once")
        steps.append(value)
    return tuple(steps)


def destinations(out: Optional[str], name: str, steps: Tuple[int, ...]) -> Dict[int, Path]:
    """One path per number of steps, each checked to be writable before any work."""
    from art_edm.grids.grid import check_grid_destination

    pattern = out or f"art_{name}{{steps}}.npy"
    if len(steps) > 1 and "{steps}" not in pattern:
        message = f"{pattern} is one file for {len(steps)} grids; put {{steps}} into the name"
        raise click.BadParameter(message, param_hint="--out")
    return {k: check_grid_destination(Path(pattern.replace("{steps}", str(k)))) for k in steps}


def configure(preset: str, given: Dict[str, Any]) -> Any:
    """The preset's configuration with the options that were given."""
    from dataclasses import replace

    from art_edm.learning.training import PRESETS, live

    config = PRESETS[preset]
    if given["rollout"] == "live" and config.rollout != "live":
        config = live(config)
    return replace(config, **{key: value for key, value in given.items() if value is not None})


@click.command(cls=Command)
@click.option("--network", required=True, metavar="NAME|PATH|URL",
              help="mnist, oned, gaussian:S, a network pickle of EDM or EDM2, or a weight file.")
@click.option("--gnet", metavar="PATH|URL", help="Guiding network pickle (EDM2); the field is then the guided one.")
@click.option("--guidance", type=float, default=1.0, show_default=True, help="Guidance strength; 1 is none.")
@click.option("--class", "class_idx", type=click.IntRange(0), default=None, metavar="INT",
              help="Class of all images.  [default: random]")
@click.option("--trust-pickle", is_flag=True,
              help="Run the code in a pickle even if it is no known version of NVlabs' modules.")
@click.option("--steps", default="18", show_default=True, metavar="K[,K...]", callback=parse_steps,
              help="Numbers of steps; all are read off one run.")
@click.option("--out", metavar="F.npy",
              help="Where to write; {steps} becomes K.  [default: art_<name>{steps}.npy]")
@click.option("--method", type=click.Choice(["rl", "direct"]), default="rl", show_default=True,
              help="Learn by ART-RL, or take the closed-form optimum of the measured profile.")
@click.option("--rollout", type=click.Choice(["cached", "live"]), default=None,
              help="Learn on interpolated trajectories, or call the denoiser in each rollout.  [default: the preset's]")
@click.option("--preset", type=click.Choice(["default", "paper"]), default="default", show_default=True,
              help="paper: the paper's literal recipe (slow), one run for each number of steps.")
@click.option("--clock", type=click.Choice(["gaussian", "linear", "edm"]), default=None,
              help="Base clock in which to learn; linear is the paper's form.  [default: the preset's]")
@click.option("--iterations", type=click.IntRange(1), default=None,
              help="Iterations of ART-RL.  [default: the preset's]")
@click.option("--trajectories", type=click.IntRange(1), default=None,
              help="Dense trajectories.  [default: the preset's]")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Seed of all randomness.")
@click.option("--device", default="auto", show_default=True, help="Where the denoiser runs: auto, cpu, cuda, ...")
@click.option("--objective", type=click.Choice(["art", "solver", "endpoint", "sde"]), default="art", show_default=True,
              help="Sum of |Q| theta^2, as in the paper; of the local errors of --solver; or of |Q| theta^2 weighted "
                   "by its growth up to where --solver ends; sde: of the steps of the reverse SDE.")
@click.option("--refine", is_flag=True,
              help="Then move the levels to where --solver ends nearest to the exact solution.")
@click.option("--solver", default="heun", show_default=True, metavar="NAME",
              help="Of --objective and --refine: euler, heun, rk4, dpmpp2m, ipndm2, ipndm3 or ipndm.")
@click.option("--resume", is_flag=True, help="Continue a run that was stopped.")
@click.option("--plot", is_flag=True, help="Draw the clock and the grids beside the .npy, as .png.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def main(
    network: str, gnet: Optional[str], guidance: float, class_idx: Optional[int], trust_pickle: bool,
    steps: Tuple[int, ...], out: Optional[str], preset: str, device: str, objective: str, refine: bool, solver: str,
    resume: bool, plot: bool, quiet: bool, **given: Any,
) -> None:
    """Learn a timestep grid for a denoiser and score it against the exact optimum.

    \b
    Examples:
      python tools/train_schedule.py --network=mnist
      python tools/train_schedule.py --network=mnist --steps=2,3,5,7,10,18 --out='art_{steps}.npy' --plot
      python tools/train_schedule.py --network=edm-cifar10-32x32-uncond-vp.pkl --out=art_cifar18.npy
      python tools/train_schedule.py --network=edm2.pkl --gnet=edm2-uncond.pkl --guidance=1.4 --steps=32
    """
    from dataclasses import replace

    from art_edm.grids.plots import check_plotting
    from art_edm.models.loading import load_network
    from art_edm.refining.refine import check_refinable
    from art_edm.runtime.distributed import world
    from art_edm.sampling.solvers import nfe, order_of

    with world(device) as here:
        with here.phase():  # everything that can fail early
            began = time.perf_counter()
            loaded = load_network(network, here.device, gnet, guidance, class_idx, trust_pickle, quiet)
            load_seconds = time.perf_counter() - began
            paths = destinations(out, loaded.name, steps)
            if plot:
                check_plotting()
            config = configure(preset, given)
            if objective == "solver":
                order_of(solver)
                config = replace(config, solver=solver)
            elif objective == "sde":
                if refine:
                    raise click.UsageError("--refine follows a deterministic solver; leave it out with --objective=sde")
                config = replace(config, solver="sde")
            config.check()
            nfe(solver, 1)
            if refine or objective == "endpoint":
                check_refinable(loaded.denoiser, solver)
        job = Job(loaded, load_seconds, resume, plot, quiet, here, solver, objective, refine)
        if preset == "paper":  # the paper learns every number of steps by itself
            for k, path in paths.items():
                one(job, replace(config, train_steps=k), {k: path})
        else:
            one(job, config, paths)


class Job(NamedTuple):
    """What all runs of a command share."""

    network: Any
    load_seconds: float
    resume: bool
    plot: bool
    quiet: bool
    world: Any
    solver: str  # of the two that follow
    objective: str
    refine: bool


def one(job: Job, config: Any, paths: Dict[int, Path]) -> None:
    """One run, its grids, and what it has to say."""
    from art_edm.learning.training import train
    from art_edm.refining.refine_all import start_state
    from art_edm.runtime.errors import NonFiniteOutput, Stopped
    from art_edm.runtime.pieces import Pieces

    network, checkpoint = job.network, next(iter(paths.values())).with_suffix(".ckpt")
    if job.resume and not checkpoint.exists() and not job.quiet:
        click.echo(f"there is no {checkpoint} to resume from; starting at the beginning", err=True)
    result = train(network.denoiser, config, network.identity, checkpoint, job.resume, job.quiet, job.world)
    with job.world.phase():
        grids = grids_of(job, result, paths)
        pieces = Pieces(checkpoint.with_suffix(".ckpt.ends"), network.identity, job.resume, job.world.rank)
    try:
        with pieces:
            told = through_solver(job, config.seed, grids, paths, result, pieces)
    except (NonFiniteOutput, Stopped) as error:
        says_how = "--resume" in str(error)
        kept = "" if says_how else f"; what was learned is in {checkpoint}, continue with --resume"
        raise type(error)(f"{error}{kept}") from None
    with job.world.phase():
        if job.world.rank == 0:
            finish(job, config, result, paths, grids, told)
            states = [refinement_state(path) for path in paths.values()]
            for path in (checkpoint, *states, *map(start_state, states)):
                path.unlink(missing_ok=True)
    with job.world.phase():
        pieces.remove()


def grids_of(job: Job, result: Any, paths: Dict[int, Path]) -> Dict[int, Any]:
    """The learned grids."""
    from art_edm.sampling.solvers import fitted

    grids = {}
    for k in paths:
        try:
            grid = result.learned.grid(k) if result.learned else result.profile.direct(k)
            grids[k] = fitted(job.network.denoiser, grid)
        except ValueError as error:
            reason = str(error).rsplit(";", 1)[0]
            raise ValueError(f"K = {k}: {reason}; use fewer steps; with --resume what was learned is used") from None
    return grids


def refinement_state(path: Path) -> Path:
    """Where the refinement of the grid at `path` keeps its state."""
    return path.with_suffix(".ckpt.refine")  # another run's own state may be called .refine.ckpt


def through_solver(
    job: Job, seed: int, grids: Dict[int, Any], paths: Dict[int, Path], result: Any, pieces: Any
) -> Dict[int, Dict[str, Any]]:
    """Weigh and refine the grids, where asked for, in place; what there is to tell of each K.

    What they cost becomes stages of the `result`; what is found on the way is kept in `pieces`.
    """
    from dataclasses import replace

    from art_edm.refining.endpoint_objective import CHOOSE, end_point_grids
    from art_edm.refining.error_growth import optimum_of
    from art_edm.refining.refine_all import RefineConfig, refined_grids

    told: Dict[int, Dict[str, Any]] = {k: {} for k in grids}
    denoiser, common = job.network.denoiser, (job.quiet, job.world)

    def count(stage: str, began: float, evaluations: int) -> None:
        result.evaluations[stage] = result.evaluations.get(stage, 0) + evaluations
        result.seconds[stage] = result.seconds.get(stage, 0.0) + time.perf_counter() - began + pieces.done()

    if job.objective == "endpoint":
        sigma_of = result.learned.sigma if result.learned else optimum_of(result.profile)
        config = replace(CHOOSE, seed=seed)
        found = end_point_grids(denoiser, sigma_of, grids, job.solver, config, None, count, *common, pieces)
        for k, one in found.items():
            grids[k], told[k]["weighted"] = one.grid, one.record()
    if job.refine:
        states = {k: refinement_state(path) for k, path in paths.items()}
        found = refined_grids(denoiser, grids, job.solver, RefineConfig(seed=seed), count, job.network.identity, states,
                              job.resume, *common, own_clock=job.objective != "solver", pieces=pieces)
        for k, one in found.items():
            grids[k], told[k]["refined"] = one.grid, one.record()
    return told


def finish(
    job: Job, config: Any, result: Any, paths: Dict[int, Path], grids: Dict[int, Any],
    told: Dict[int, Dict[str, Any]],
) -> None:
    """Write the grids and their sidecars and pictures, and show their scores."""
    from art_edm.grids.grid import save_grid
    from art_edm.learning import provenance as report
    from art_edm.learning.plots import plot_run

    network, began, records = job.network, time.perf_counter(), []
    for k, path in paths.items():
        grid = grids[k]
        seconds = {"load": job.load_seconds, **result.seconds, "write": time.perf_counter() - began}
        record = {**report.provenance(network, config, result, grid, seconds), "processes": job.world.size, **told[k]}
        write(save_grid, path, grid, record)
        if job.plot:
            shown = {**report.hand_made(network.denoiser, k), path.stem: grid}
            plot_run(path.with_suffix(".png"), f"{network.name}, K = {k}", shown, result.learned)
        records.append((path, record))
    if not job.quiet:
        for path, record in records:
            click.echo("\n".join(report.table(record)))
            for stage in told[int(record["num_steps"])]:
                apart = record[stage].get("noises_apart")  # they had no part in the choice
                before, after = (record[stage][name] for name in ("error_before", "error_after"))
                if apart:
                    before, after = apart["before"], apart["before" if apart["refuted"] else "after"]
                by = f" by {record[stage]['weight']}" if stage == "weighted" else ""
                of = "on noises held out" if apart or stage == "refined" else "over the noises that choose the weight"
                click.echo(f"end-point error of {job.solver} {of}: {before['mean']:.4g} before, {after['mean']:.4g} "
                           f"+- {after['stderr']:.2g} {stage}{by} (median {after['median']:.4g})")
            drawn = f" and {path.stem}.png" if job.plot else ""
            click.echo(f"wrote {path} and {path.with_suffix('.json').name}{drawn}")
        click.echo(report.costs(records[-1][1], peak_memory()))


def peak_memory() -> Optional[float]:
    """Largest resident size of this process, in GB; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def write(save: Any, path: Path, grid: Any, record: Dict[str, Any]) -> None:
    """Save, or say that the disk is the matter and that nothing old was lost."""
    try:
        save(path, grid, record)
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}; any older file is as it was; make room and run again "
            "with --resume, what was learned is kept"
        ) from None


if __name__ == "__main__":
    main(prog_name="train_schedule.py")
