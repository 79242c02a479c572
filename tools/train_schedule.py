"""Learn a timestep grid for a denoiser: a network goes in, a .npy of noise levels comes out."""

from __future__ import annotations

import sys
from typing import Any, Dict, List, Optional

import click

from art_edm.runtime.cli import Command

PRESETS_OWN = "  [default: the preset's]"


GROUPS = {
    "The network": "network gnet guidance class_idx trust_pickle sigma_max sigma_min",
    "The grids": "steps nfe out force plot",
    "How they are learned": "method objective solver refine refine_by detector preset rollout clock iterations "
                            "trajectories seed",
    "The run": "device resume quiet",
}


@click.command(cls=Command, groups=GROUPS)
@click.option("--network", required=True, metavar="NAME|PATH|URL|MODULE:FACTORY",
              help="mnist, cifar10, oned, gaussian:S, a network pickle of EDM or EDM2, a weight file, or a function of "
                   "a module of yours that returns a Denoiser: that runs the module's code.")
@click.option("--gnet", metavar="PATH|URL", help="Guiding network pickle (EDM2); the field is then the guided one.")
@click.option("--guidance", type=float, default=1.0, help="Guidance strength; 1 is none.")
@click.option("--class", "class_idx", type=click.IntRange(0), default=None, metavar="INT",
              help="Class of all images.  [default: random]")
@click.option("--trust-pickle", is_flag=True,
              help="Run the code in a pickle even if it is no known version of NVlabs' modules.")
@click.option("--sigma-max", type=float, default=None, metavar="SIGMA",
              help="First noise level, in units of the data.  [default: 80, or the network's highest if that is lower]")
@click.option("--sigma-min", type=float, default=None, metavar="SIGMA",
              help="Lowest noise level that is measured.  [default: 0.002, or the network's lowest if that is higher]")
@click.option("--steps", metavar="K[,K...]", help="Numbers of steps; all are read off one run.  [default: 18]")
@click.option("--nfe", metavar="N[,N...]",
              help="In place of --steps: evaluations an image may cost. The solver for them is the recommended one, or "
                   "that of --solver, or with --refine the one of least end-point error; the sidecar names it.")
@click.option("--out", metavar="F.npy",
              help="Where to write; {steps} becomes K, and {nfe} N.  [default: art_<network>{steps}.npy, with --nfe "
                   "art_<network>_nfe{nfe}.npy]")
@click.option("--force", is_flag=True, help="Overwrite a grid of other settings.")
@click.option("--method", type=click.Choice(["rl", "direct"]), default="rl",
              help="Learn by ART-RL, or take the closed-form optimum of the measured profile.")
@click.option("--preset", type=click.Choice(["default", "paper"]), default="default",
              help="paper: the paper's literal recipe (slow), one run for each number of steps.")
@click.option("--rollout", type=click.Choice(["cached", "live"]), default=None,
              help=f"Learn on interpolated trajectories, or call the denoiser in each rollout.{PRESETS_OWN}")
@click.option("--clock", type=click.Choice(["gaussian", "linear", "edm"]), default=None,
              help=f"Base clock in which to learn; linear is the paper's form.{PRESETS_OWN}")
@click.option("--iterations", type=click.IntRange(1), default=None, help=f"Iterations of ART-RL.{PRESETS_OWN}")
@click.option("--trajectories", type=click.IntRange(1), default=None,
              help=f"Dense trajectories, at most; a third where those agree.{PRESETS_OWN}")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Seed of all randomness.")
@click.option("--objective", type=click.Choice(["art", "solver", "sde", "endpoint"]), default="art",
              metavar="[art|solver|sde]",
              help="What the clock minimises: |Q| theta^2, as in the paper; the local errors of --solver; sde: of the "
                   "steps of the reverse SDE.")
@click.option("--refine", is_flag=False, flag_value="levels", default=None, metavar="[=levels|weights]",
              type=click.Choice(["levels", "weights"]),
              help="Then move the levels to where --solver ends nearest to the exact solution; weights: those of each "
                   "step, too, for 3 to 10 steps. The sidecar has them, and patched scripts use them.")
@click.option("--refine-by", type=click.Choice(["error", "features"]), default="error",
              help="What is near: RMS end-point error, or the Frechet distance between features of ends and of exact "
                   "ends, from the same noises.")
@click.option("--detector", metavar="NAME|PT", default=None,
              help="Of --refine-by=features: lenet, cifar10, inception, or a classifier trained here.  [default: "
                   "lenet for grey 28 x 28 images, else inception]")
@click.option("--solver", default=None, metavar="NAME",
              help="Of --refine, --objective=solver and --nfe: euler, heun, rk4, ...  [default: heun, of weights "
                   "clock; chosen by --nfe]")
@click.option("--device", default="auto", help="Where the denoiser runs: auto, cpu, cuda, ...")
@click.option("--resume", is_flag=True, help="Refuse unfinished work of other settings; a run that was stopped "
                                             "continues without it, too.")
@click.option("--plot", is_flag=True, help="Draw the clock and the grids beside the .npy, as .png.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def main(network: str, steps: Optional[str], nfe: Optional[str], out: Optional[str], **given: Any) -> None:
    """Learn a timestep grid for a denoiser and score it against the exact optimum.

    \b
    Examples:
      python tools/train_schedule.py --network=mnist
      python tools/train_schedule.py --network=mnist --steps=2,3,5,7,10,18 --out='art_{steps}.npy' --plot
      python tools/train_schedule.py --network=mnist --nfe=6 --refine
      python tools/train_schedule.py --network=mnist --steps=5 --refine=weights
      python tools/train_schedule.py --network=edm-cifar10-32x32-uncond-vp.pkl --out=art_cifar18.npy
      python tools/train_schedule.py --network=edm2.pkl --gnet=edm2-uncond.pkl --guidance=1.4 --steps=32
    """
    from art_edm.models.loading import local_copy
    from art_edm.schedule import ScheduleOptions, learn_schedule, parse_steps

    steps, nfe = (None if text is None else parse_steps(text, option)
                  for text, option in ((steps, "--steps"), (nfe, "--nfe")))
    pattern = out if out is not None else f"art_{{network}}{'{steps}' if nfe is None else '_nfe{nfe}'}.npy"
    given["refine"] = given["refine"] or False
    learned = learn_schedule(network, steps, ScheduleOptions(nfe=nfe, **given), pattern)
    if not given["quiet"]:
        click.echo("\n".join(summary(list(learned.values()), given)))
        for option, address in (("network", network), ("gnet", given["gnet"] or "")):
            copy = local_copy(address)
            if copy:
                click.echo(f"upstream's script takes this copy of the {option}, with no second download: {copy}")


def summary(learned: List[Any], given: Dict[str, Any]) -> List[str]:
    """Lines about the grids; what they cost after the last, or after each where they are of runs of their own."""
    from art_edm.learning.provenance import choice, costs, table

    lines: List[str] = []
    for grid, record, path in learned:
        lines += choice(record, given["solver"] is not None) + table(record)
        if "refined" in record:
            before, after = record["refined"]["error_before"], record["refined"]["error_after"]
            with_weights = " with the weights" if "weights" in record else ""
            if "distances" in record["refined"]:
                distances = record["refined"]["distances"]
                lines.append(f"distance of features on validation noises: {distances['before']:.4g} before, "
                             f"{distances['after']:.4g} refined")
            lines.append(f"end-point error of {record['solver']} on validation noises: {before['mean']:.4g} before, "
                         f"{after['mean']:.4g} +- {after['mean_stderr']:.2g} refined{with_weights} (median "
                         f"{after['median']:.4g})")
        lines.append(f"wrote {path} and {path.with_suffix('.json').name}" + f" and {path.stem}.png" * given["plot"])
        if given["preset"] == "paper" or grid is learned[-1].grid:
            lines.append(costs(record, peak_memory()))
    return lines


def peak_memory() -> Optional[float]:
    """Largest resident size of this process, in GB; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


if __name__ == "__main__":
    main(prog_name="train_schedule.py")
