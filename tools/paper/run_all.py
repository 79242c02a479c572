"""All experiments, one after the other: what can run is run, what cannot is listed with where it is had.

Every result is written as soon as it is there, and the report after each: a run that is stopped loses the piece of
work that it is at, and the next one continues with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Callable, Dict, List, Sequence, Tuple

from art_edm.runtime.cli import command_line, versions
from art_edm.runtime.errors import NonFiniteOutput
from paper.context import Lab
from paper.experiments import Experiment
from paper.plots import plot_overview
from paper.report import Result, read_results, save_result, write_report

__all__ = ["lacking", "reproduce"]

Runner = Callable[[Experiment, Lab], Result]
_RUNNERS = {"oned": "table1.run_oned", "images": "fid_tables.run_images",
            "transfer": "transfer.run_transfer", "ablation": "ablations.run_ablation"}
CIFAR10 = ("CIFAR-10's images", "`--cifar10=ARCHIVE_OR_DIR` with JPEGs train/CLASS/NNNN.jpg")


def _runner(kind: str) -> Runner:
    """The function for this kind of experiment; imported late, so that the first table starts at once."""
    module, _, name = _RUNNERS[kind].partition(".")
    return getattr(import_module(f"paper.tables.{module}"), name)


def lacking(experiments: Sequence[Experiment], lab: Lab) -> List[Tuple[List[str], str, str]]:
    """(experiments, what they lack, where it is had), each need once; an experiment without one can run."""
    needs: Dict[Tuple[str, str], List[str]] = {}
    for experiment in experiments:
        images = [CIFAR10] if experiment.reference.startswith("cifar10:") and lab.cifar10 is None else []
        for need in [*lab.lacking(experiment.official), *images]:
            needs.setdefault(need, []).append(experiment.name)
    return [(names, what, where) for (what, where), names in needs.items()]


def reproduce(experiments: Sequence[Experiment], lab: Lab, say: Callable[[str], None]) -> int:
    """Run what can be run; returns how many failed.

    Raises Stopped when asked to stop; what is done is kept.
    """
    needs = lacking(experiments, lab)
    blocked = {name for names, _, _ in needs for name in names}
    listed = [(", ".join(names), f"{what}: {where}") for names, what, where in needs]
    if experiments and not lab.cifar10 and any(item.kind in ("transfer", "ablation") for item in experiments):
        listed.append(("transfer and ablations, in part", f"{CIFAR10[0]}: {CIFAR10[1]}"))
    _announce(experiments, blocked, listed, say)
    failed: Dict[str, str] = {}
    try:
        _run_all([item for item in experiments if item.name not in blocked], lab, listed, failed, say)
    finally:
        if lab.lead:
            _overview(lab)
            write_report(lab.out, listed, failed)
    return len(failed)


def _run_all(
    experiments: Sequence[Experiment], lab: Lab, listed: Sequence[Tuple[str, str]], failed: Dict[str, str],
    say: Callable[[str], None],
) -> None:
    """One after the other; what goes wrong is put into `failed`."""
    for experiment in experiments:
        try:
            with lab.world.phase():
                result = _runner(experiment.kind)(experiment, lab)
        except (ValueError, NonFiniteOutput, ConnectionError, FloatingPointError) as error:
            failed[experiment.name] = " ".join(str(error).split())
            say(f"{experiment.name}: {failed[experiment.name]}")
        else:
            result.kind = experiment.kind
            result.settings.update(command=command_line(), versions=versions())
            _write(result, lab, say)
        if lab.lead:
            write_report(lab.out, listed, failed)


def _announce(
    experiments: Sequence[Experiment], blocked: "set[str]", listed: Sequence[Tuple[str, str]],
    say: Callable[[str], None],
) -> None:
    ready = [item.name for item in experiments if item.name not in blocked]
    say(f"runs now: {', '.join(ready) or 'nothing'}")
    for names, need in listed:
        say(f"not run: {names}\n  lacks {need}")


def _overview(lab: Lab) -> None:
    """Figure 3: all that has been run in this folder."""
    shown = [result for result in read_results(lab.out) if result.nfe and result.kind in ("images", "oned")]
    if shown:
        plot_overview(lab.out / "overview.png", shown)


def _write(result: Result, lab: Lab, say: Callable[[str], None]) -> None:
    if not lab.lead:
        return
    save_result(lab.out, result)
    say(f"{result.name}: {result.title}")
    width = max(map(len, result.rows))
    for name, values in result.rows.items():
        say(f"  {name.ljust(width)}  " + "  ".join("    –   " if v is None else f"{v:8.4g}" for v in values))
