"""Measure what a grid costs, and print it beside the bars it is held to: evaluations, seconds, memory, J/J*."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

import click

from art_edm.runtime.cli import Command

SECTIONS = ("start", "share", "run", "paper", "costs", "layouts")


def parse_size(context: click.Context, parameter: click.Parameter, text: str) -> Tuple[int, int]:
    """'256x256' to trajectories and points."""
    try:
        trajectories, points = (int(part) for part in text.split("x"))
    except ValueError:
        trajectories = points = 0
    if trajectories < 1 or points < 3:
        raise click.BadParameter(f"found {text!r}, expected trajectories x points, such as 256x256")
    return trajectories, points


def parse_steps(context: click.Context, parameter: click.Parameter, text: str) -> Tuple[int, ...]:
    """'18' or '2,3,5' to numbers of steps."""
    try:
        steps = tuple(int(part) for part in text.split(","))
    except ValueError:
        steps = (0,)
    if min(steps) < 1:
        raise click.BadParameter(f"found {text!r}, expected whole numbers from 1, such as 18 or 2,3,5")
    return steps


def parse_sections(context: click.Context, parameter: click.Parameter, text: Optional[str]) -> Tuple[str, ...]:
    """'share,run' to the names of what is measured."""
    names = tuple(text.split(",")) if text else SECTIONS[:-1]
    unknown = next((name for name in names if name not in SECTIONS), None)
    if unknown is not None:
        raise click.BadParameter(f"found {unknown!r}, expected some of {','.join(SECTIONS)}")
    return names


@click.command(cls=Command, groups={
    "What is measured": "network only compiled trust_pickle",
    "Size": "steps share_size reference_size batch paper_iterations", "Running": "device", "Results": "out quiet",
})
@click.option("--network", default="mnist", metavar="NAME|PATH|URL",
              help="As for train_schedule.py, or songunet56m, adm296m, edm2xs: official sizes, random weights.")
@click.option("--only", callback=parse_sections, metavar="NAME[,NAME...]",
              help=f"Of {', '.join(SECTIONS)}.  [default: all but layouts]")
@click.option("--steps", default="2,3,5,7,10,18", callback=parse_steps, metavar="K[,K...]",
              help="Numbers of steps that the paper's budget is counted for.")
@click.option("--share", "share_size", default="16x24", callback=parse_size, metavar="MxP",
              help="Trajectories x points of the profile that is timed beside the network.")
@click.option("--batch", type=click.IntRange(1), default=None, metavar="N",
              help="Images per evaluation in it.  [default: 8 on a CPU, else from the free memory]")
@click.option("--reference", "reference_size", default="256x256", callback=parse_size,
              metavar="MxP", help="Trajectories x points of the profile that J/J* is taken on, 3 M P evaluations.")
@click.option("--paper-iterations", type=click.IntRange(1), default=20, metavar="N",
              help="How many of the paper's 5,000 iterations are timed.")
@click.option("--compile", "compiled", is_flag=True, help="Also try torch.compile in layouts; takes minutes.")
@click.option("--device", default="auto", help="auto, cpu, cuda, ...")
@click.option("--trust-pickle", is_flag=True, help="Run the code in a pickle even if it is not known.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="benchmark.json",
              help="Where all figures go, as JSON.")
@click.option("--quiet", is_flag=True, help="Print no table.")
def main(
    network: str, only: Tuple[str, ...], device: str, trust_pickle: bool, out: Path, quiet: bool, **given: Any
) -> None:
    """Measure what a grid costs.

    \b
    Examples:
      python tools/benchmark.py                                          # the bundled network; minutes
      python tools/benchmark.py --network=songunet56m --device=cuda      # CIFAR-10's size, random weights
      python tools/benchmark.py --network=songunet56m --only=share --share=8x6
    """
    from cost.networks import benchmark_network
    from cost.table import table

    from art_edm.runtime.cli import command_line, versions
    from art_edm.runtime.distributed import resolve_device
    from art_edm.runtime.files import check_destination, write_json

    check_destination(out)
    loaded = benchmark_network(network, resolve_device(device), trust=trust_pickle)
    parameters = sum(value.numel() for value in loaded.denoiser.parameters())
    found: Dict[str, Any] = {"network": loaded.name, "details": loaded.details, "parameters": parameters,
                             "device": card(loaded.denoiser.device), "command": command_line(), "versions": versions()}
    for name, measure in sections(loaded.denoiser, given).items():
        if name in only:
            found[name] = measure()
    found["memory"] = memory(loaded.denoiser.device)
    if "run" in found and "paper" in found:
        found["paper"]["ratio"] = found["paper"]["budget_all"] / found["run"]["evaluations"]
    write_json(out, found)
    if not quiet:
        click.echo(f"{loaded.name}, {parameters / 1e6:.1f} M parameters, on {found['device']}")
        click.echo("\n".join(table(found)))
        click.echo(f"wrote {out}")


def sections(denoiser: Any, given: Dict[str, Any]) -> Dict[str, Callable[[], Dict[str, Any]]]:
    """What is measured, by name, in the order of measuring."""
    from cost import measure as benchmarks
    from cost.table import start_up

    from art_edm.learning.training import PRESETS
    from art_edm.models.evaluate import batch_for

    cpu = denoiser.device.type == "cpu"
    batch = given["batch"] or (8 if cpu else batch_for(denoiser))
    default, results = PRESETS["default"], []

    def run() -> Dict[str, Any]:
        profile = benchmarks.reference(denoiser, *given["reference_size"], batch=max(batch, 32))
        result, cost = benchmarks.run(denoiser, default, profile)
        results.append(result)
        return {"reference": list(given["reference_size"]), **cost}

    def costs() -> Dict[str, Any]:
        if not results:  # one more K needs a learned clock; any will do
            from art_edm.models.loading import load_network

            results.append(benchmarks.run(load_network("oned").denoiser, default, None)[0])
        return benchmarks.costs(results[0], denoiser.device)

    return {
        "start": lambda: start_up(Path(__file__).with_name("train_schedule.py")),
        "share": lambda: benchmarks.profile_share(denoiser, *given["share_size"], batch=batch),
        "run": run,
        "paper": lambda: benchmarks.paper(denoiser, given["steps"], given["paper_iterations"]),
        "costs": costs,
        "layouts": lambda: benchmarks.layouts(denoiser, batch, given["compiled"]),
    }


def card(device: Any) -> str:
    """The name of the GPU, or of the device."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} thread(s)"


def memory(device: Any) -> Dict[str, int]:
    """Most bytes in use so far: of the GPU, else of this process."""
    import resource
    import sys

    import torch

    if device.type == "cuda":
        return {"peak_bytes": torch.cuda.max_memory_allocated(device)}
    scale = 1 if sys.platform == "darwin" else 1024
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}


if __name__ == "__main__":
    main(prog_name="benchmark.py")
