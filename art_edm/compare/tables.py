"""Tables of measurements: on the terminal, as Markdown, CSV, JSON and as a plot over NFE.

A row is a dict. `fid` is a mean over blocks, `fid_stderr` its standard error, `fid_min` the least of the blocks,
`fid_blocks` all of them; every metric alike. `fid_difference` is to the row `difference_to`; `fid_images_paired` and
`fid_images_unpaired` are how many images would make it two standard errors large.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type

from art_edm.grids.plots import check_plotting
from art_edm.metrics.feature_stats import METRICS
from art_edm.metrics.metric import Metric, measure, merged
from art_edm.metrics.standard_errors import Measurement, difference
from art_edm.runtime.files import atomic_write, write_json
from art_edm.runtime.store import Content

__all__ = ["FORMATS", "Row", "add_differences", "add_measurements", "fields", "lines", "markdown", "plot", "write"]

Row = Dict[str, Any]

# Line styles of a plot, one for each solver.
_LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 4)))


class Column(NamedTuple):
    """Title, and what it shows of a row, "" where there is nothing."""

    title: str
    show: Callable[[Row], str]


def _plain(key: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else str(row[key])


def _digits(stderr: Optional[float]) -> Optional[int]:
    """Decimals that show two digits of a standard error; None without one."""
    return max(0, 1 - int(f"{stderr:e}".partition("e")[2])) if stderr else None


def _number(key: str) -> Callable[[Row], str]:
    """A number in as many digits as its standard error has sense for, with that error."""

    def show(row: Row) -> str:
        value, stderr = row.get(key), row.get(f"{key}_stderr")
        if value is None:
            return ""
        sign, digits = "+" if key.endswith("_difference") else "", _digits(stderr)
        if digits is None:
            return f"{value:{sign}.4g}" + ("" if stderr is None else " +- 0")
        return f"{value:{sign}.{digits}f} +- {stderr:.{digits}f}"

    return show


def _least(key: str) -> Callable[[Row], str]:
    """The least of several blocks."""

    def show(row: Row) -> str:
        if row.get(f"{key}_min") is None or row["blocks"] == 1:
            return ""
        digits = _digits(row.get(f"{key}_stderr"))
        return f"{row[f'{key}_min']:.4g}" if digits is None else f"{row[f'{key}_min']:.{digits}f}"

    return show


def _needed(key: str) -> Callable[[Row], str]:
    """Images for which the difference is two standard errors large."""

    def show(row: Row) -> str:
        numbers = {way: row.get(f"{key}_images_{way}") for way in ("paired", "unpaired")}
        return ", ".join(f"{number:,} {way}" for way, number in numbers.items() if number is not None)

    return show


def _of_metric(metric: Type[Metric]) -> List[Column]:
    """The columns of one metric."""
    name, title = metric.name, metric.title
    return [
        Column(title, _number(name)), Column("min", _least(name) if metric.needs_reference else lambda row: ""),
        Column("difference", _number(f"{name}_difference")), Column("images to see it", _needed(name)),
        Column(f"{title} of exact ends", _number(f"{name}_of_exact")),
        Column(f"{title} to exact ends", _number(f"{name}_to_exact")),
    ]


def _columns() -> List[Column]:
    return [
        Column("name", _plain("name")), Column("K", _plain("steps")), Column("solver", _plain("solver")),
        Column("NFE", _plain("nfe")), Column("images", lambda row: f"{row['blocks']} x {row['images']}"),
        *(column for metric in METRICS.values() for column in _of_metric(metric)),
        Column("RMS error", _number("error_rms")), Column("mean", _number("error_mean")),
        Column("median", _number("error_median")), Column("difference to", _plain("difference_to")),
        Column("pairing", lambda row: f"not paired: {row['not_paired']}" if row.get("not_paired") else ""),
        Column("grid", lambda row: row["origin"] if row.get("origin", "").startswith("resampled") else ""),
    ]


def add_measurements(
    row: Row, blocks: Sequence[Dict[str, List[Metric]]], references: Dict[str, Content]
) -> Dict[str, Measurement]:
    """Add every metric of some blocks to a row; the measurements of those that are compared with others."""
    found = {}
    for name in blocks[0]:
        groups = [block[name] for block in blocks]
        found[name] = measure(groups, references.get(name))
        row.update(fields(name, found[name]))
        if len(blocks) == 1:
            row.update({f"{name}_{key}": value for key, value in merged(groups[0]).details().items()})
    return found


def fields(key: str, measurement: Measurement) -> Row:
    """The fields of a row that tell a measurement."""
    return {
        key: measurement.mean, f"{key}_min": measurement.minimum, f"{key}_stderr": measurement.stderr,
        f"{key}_stderr_from": measurement.basis, f"{key}_blocks": [float(value) for value in measurement.values],
    }


def add_differences(
    rows: Sequence[Row], found: Sequence[Dict[str, Measurement]], base: Callable[[int], Optional[int]],
    unpaired: Callable[[int, int], Optional[str]],
) -> None:
    """Add to each row its metrics less those of row `base(i)`, unless this is itself or None.

    Args:
        found: of each row, as `add_measurements` gives them.
        unpaired: why rows i and j are not from the same noise; None if they are.
    """
    for i, row in enumerate(rows):
        j = base(i)
        if j is None or j == i:
            continue
        reason, images = unpaired(i, j), row["images"] * row["blocks"]
        there = rows[j]
        solver = there.get("solver") if row.get("solver") != there.get("solver") else None
        row.update(difference_to=", ".join(filter(None, (there["name"], solver))), not_paired=reason)
        for name, own in found[i].items():
            independent = difference(own, found[j][name], False)
            result = difference(own, found[j][name], True) if reason is None else independent
            row.update({
                f"{name}_difference": result.value, f"{name}_difference_stderr": result.stderr,
                f"{name}_difference_from": result.basis,
                f"{name}_images_paired": None if reason else result.images_needed(images),
                f"{name}_images_unpaired": independent.images_needed(images),
            })


def _cells(rows: Sequence[Row]) -> List[List[str]]:
    """Titles, then the rows; columns without content are left out."""
    columns = [column for column in _columns() if any(column.show(row) for row in rows)]
    return [[column.title for column in columns], *([column.show(row) for column in columns] for row in rows)]


def lines(rows: Sequence[Row]) -> List[str]:
    """The table for a terminal."""
    cells = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in cells]


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    titles, *body = ([text.replace("+-", "±").replace("|", "\\|") for text in row] for row in _cells(rows))
    return "".join(f"| {' | '.join(row)} |\n" for row in [titles, ["---"] * len(titles), *body])


def _csv(rows: Sequence[Row]) -> str:
    """All fields that are one number or text; one column for each that any row has."""
    flat = [{key: value for key, value in row.items() if not isinstance(value, (list, dict))} for row in rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def write(path: Path, rows: Sequence[Row], settings: Row) -> None:
    """Write the table as the file's ending says (see `FORMATS`), atomically; JSON holds `settings`, too."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        write_json(path, {**settings, "rows": [json.loads(json.dumps(row)) for row in rows]})
    elif suffix == ".png":
        plot(path, rows)
    else:
        text = _csv(rows) if suffix == ".csv" else markdown(rows)
        atomic_write(path, lambda file: file.write(text.encode()))


FORMATS = (".json", ".csv", ".md", ".png")


def plot(path: Path, rows: Sequence[Row]) -> None:
    """The first metric with a reference (else the error, else the IS) over NFE; a line per name and solver.

    Raises:
        ValueError: matplotlib is missing, or no row has an NFE.
    """
    check_plotting()
    from matplotlib.figure import Figure

    by_metric = {metric.name: metric.title for metric in sorted(METRICS.values(), key=lambda m: not m.needs_reference)}
    labels = {**by_metric, "error_rms": "RMS end-point error"}
    key = next((key for key in labels if any(row.get(key) is not None for row in rows)), "fid")
    series: Dict[Tuple[str, str], List[Row]] = {}
    for row in rows:
        if row.get("nfe") is not None and row.get(key) is not None:
            series.setdefault((row["name"], row.get("solver") or ""), []).append(row)
    if not series:
        raise ValueError(f"found no NFE to draw {path} over; name the folders NAME@NFE=DIR")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    names, solvers = (list(dict.fromkeys(part)) for part in zip(*series))
    for (name, solver), points in series.items():
        points = sorted(points, key=lambda row: row["nfe"])
        axes.errorbar(
            [row["nfe"] for row in points], [row[key] for row in points],
            [row.get(f"{key}_stderr") or 0 for row in points],
            color=f"C{names.index(name) % 10}", linestyle=_LINES[solvers.index(solver) % len(_LINES)], marker="o",
            markersize=4, capsize=3, label=f"{name}, {solver}" if len(solvers) > 1 else name,
        )
    ticks = sorted({row["nfe"] for points in series.values() for row in points})
    axes.set(xlabel="NFE", ylabel=labels[key], xscale="log", yscale="log")
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.legend()
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=150))
