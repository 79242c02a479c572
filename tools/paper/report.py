"""Results of experiments beside the paper's figures: JSON, CSV, and the report that holds all of a folder.

Symbols
-------
result    one table: a row for each grid (or method), a column for each number of steps (or field)
paper     the figures printed in the paper, for the rows and columns that it has
stderr    one standard deviation of a figure, as estimated; None where it cannot be
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from art_edm.runtime.files import atomic_write, write_json

__all__ = ["Result", "markdown", "paper_table", "read_results", "save_result", "shown", "write_report"]

WIDE = 8  # columns; a table with more is turned
Numbers = Dict[str, List[Optional[float]]]


@dataclass
class Result:
    """One table.

    Attributes:
        name: of its files.
        columns: titles of the columns.
        nfe, steps: of the columns, where they differ by their number of steps.
        rows, stderr, paper: by row; further figures of the same form are in `more`, their errors in `more_stderr`.
        yardsticks: what figures of the same metric are held against, [value, standard error].
        better: "lower" or "higher".
        settings: all that the figures depend on, and what they cost.
        figures: files beside it and what they show.
    """

    name: str
    title: str
    metric: str
    columns: List[str]
    rows: Numbers
    stderr: Numbers = field(default_factory=dict)
    paper: Numbers = field(default_factory=dict)
    more: Dict[str, Numbers] = field(default_factory=dict)
    nfe: List[int] = field(default_factory=list)
    steps: List[int] = field(default_factory=list)
    solver: str = ""
    better: str = "lower"
    kind: str = ""
    settings: Dict[str, Any] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)
    figures: List[List[str]] = field(default_factory=list)  # [file, caption]
    more_stderr: Dict[str, Numbers] = field(default_factory=dict)
    yardsticks: Dict[str, List[Optional[float]]] = field(default_factory=dict)


def paper_table(name: str) -> Dict[str, Any]:
    """What the paper prints: metric, solver, steps, nfe, rows; {} for a table it does not have."""
    data = json.loads((Path(__file__).parent / "paper.json").read_text())
    return data["tables"].get(name, {})


def save_result(folder: Path, result: Result) -> None:
    """Write NAME.json and NAME.csv."""
    write_json(folder / f"{result.name}.json", asdict(result))
    text = _csv(result)
    atomic_write(folder / f"{result.name}.csv", lambda file: file.write(text.encode()))


def read_results(folder: Path) -> List[Result]:
    """All results of a folder, tables first; other files are left alone."""
    found = []
    for path in folder.glob("*.json"):
        try:
            found.append(Result(**json.loads(path.read_text())))
        except (ValueError, TypeError):  # no result of ours
            continue
    return sorted(found, key=lambda result: (not result.name.startswith("table"), result.name))


def _csv(result: Result) -> str:
    """A line for each figure."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["row", "column", "steps", "nfe", "value", "stderr", "paper"])
    for name, values in result.rows.items():
        for i, value in enumerate(values):
            place = [result.steps[i] if result.steps else "", result.nfe[i] if result.nfe else ""]
            beside = [_get(result.stderr, name, i), _get(result.paper, name, i)]
            writer.writerow([name, result.columns[i], *place, *("" if v is None else v for v in [value, *beside])])
    return buffer.getvalue()


def _get(numbers: Numbers, name: str, i: int) -> Optional[float]:
    values = numbers.get(name, [])
    return values[i] if i < len(values) else None


def shown(value: Optional[float], stderr: Optional[float] = None) -> str:
    """A figure in as many digits as make sense, with its standard error."""
    if value is None:
        return "–"
    if not stderr or stderr < 1e-9 * abs(value):
        return f"{value:.4g}"
    digits = max(0, 1 - int(f"{stderr:e}".partition("e")[2]))
    if digits > 6:
        return f"{value:.2g} ± {stderr:.1g}"
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def markdown(result: Result) -> str:
    """The table: each row with the paper's beneath it where it has one; the best of a column in bold.

    With many columns it is turned, a line for each, without the paper's.
    """
    turned, best, rows = len(result.columns) > WIDE, _best(result), []
    for name, values in result.rows.items():
        cells = _cells(result.stderr, name, values)
        rows.append([name, *(f"**{text}**" if best[i] == name else text for i, text in enumerate(cells))])
        if name in result.paper and not turned:
            printed = ("" if value is None else f"*{shown(value)}*" for value in result.paper[name])
            rows.append([f"*{name}, paper*", *printed])
    text = _table(result.columns, rows, turned)
    for title, more in result.more.items():
        errors = result.more_stderr.get(title, {})
        rows = [[name, *_cells(errors, name, values)] for name, values in more.items()]
        text += f"\n{title}:\n\n{_table(result.columns, rows, turned)}"
    return text


def _cells(stderr: Numbers, name: str, values: Sequence[Optional[float]]) -> List[str]:
    """A row's figures with their standard errors."""
    return [shown(value, _get(stderr, name, i)) for i, value in enumerate(values)]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], turned: bool) -> str:
    """Lines of Markdown; of a turned table its columns."""
    lines = [["", *columns], *rows]
    lines = [list(line) for line in zip(*lines)] if turned else lines
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def _best(result: Result) -> List[Optional[str]]:
    """The row with the best figure of each column; none where rows do not compete."""
    sign = {"lower": 1, "higher": -1}.get(result.better)
    names: List[Optional[str]] = []
    for i in range(len(result.columns)):
        values = [(sign * row[i], name) for name, row in result.rows.items() if sign and row[i] is not None]
        names.append(min(values)[1] if len(values) > 1 else None)
    return names


def write_report(folder: Path, lacking: Sequence[Tuple[str, str]] = (), failed: Mapping[str, str] = {}) -> None:
    """README.md: every result of the folder with its settings, and what could not be run.

    Args:
        lacking: (experiments, what they need and where it is had).
        failed: experiment -> what went wrong.
    """
    results = read_results(folder)
    parts = ["# The paper's experiments, repeated\n\nOurs beside the paper's (*in italics*; arXiv 2607.02137 v1). "
             "After ±: one standard error. NFE: evaluations of the network for each image.\n"]
    if (folder / "overview.png").exists():
        parts.append("![The metric over NFE](overview.png)\n\n*The metric over NFE of what has been run here, as in "
                     "the paper's Figure 3.*\n")
    parts += [_section(result) for result in results]
    if lacking:
        rows = "".join(f"| {names} | {need} |\n" for names, need in lacking)
        parts.append(f"## Not run\n\n| experiments | what they need |\n|---|---|\n{rows}")
    if failed:
        parts.append("## Failed\n\n" + "".join(f"- {name}: {reason}\n" for name, reason in failed.items()))
    if results:
        parts.append(_times(results))
    text = "\n".join(parts)
    atomic_write(folder / "README.md", lambda file: file.write(text.encode()))


def _times(results: Sequence[Result]) -> str:
    """What each took: all sampling where it is counted, else the last run."""
    taken = {each.name: max(each.settings.get("seconds", 0), each.settings.get("seconds of sampling", 0))
             for each in results}
    listed = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in taken.items())
    return f"## Time\n\n{sum(taken.values()) / 60:,.1f} minutes in all: {listed}.\n"


def _section(result: Result) -> str:
    arrow = {"lower": "; lower is better", "higher": "; higher is better"}.get(result.better, "")
    parts = [f"## {result.name}: {result.title}\n", f"{result.metric}{arrow}.\n", markdown(result)]
    if result.yardsticks:
        parts.append("For comparison: " + "; ".join(
            f"{name} {shown(value, stderr)}" for name, (value, stderr) in result.yardsticks.items()) + ".\n")
    parts += [f"![{caption}]({name})\n\n*{caption}*\n" for name, caption in result.figures]
    if result.notes:
        parts.append("".join(f"- {note}\n" for note in result.notes))
    facts = ", ".join(f"{key} {_plain(value)}" for key, value in result.settings.items() if key != "versions")
    parts.append(f"Settings: {facts}. Data: [{result.name}.json]({result.name}.json), "
                 f"[.csv]({result.name}.csv).\n")
    return "\n".join(parts)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_plain(each)}" for key, each in value.items()) + ")"
    return f"`{value}`" if isinstance(value, str) and " " in value else str(value)
