"""Tables of measurements: on the terminal, as Markdown, CSV, JSON and as a plot over NFE.

A row is a dict. `fid` is a mean over blocks, `fid_stderr` its standard error, `fid_min` the least of the blocks,
`fid_blocks` all of them; `is` and `error_rms` alike. `difference` is of the FID to the row that is compared with.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from art_edm.grids.plots import check_plotting
from art_edm.metrics.standard_errors import Measurement, difference
from art_edm.runtime.files import atomic_write, write_json

__all__ = ["FORMATS", "Row", "add_differences", "lines", "markdown", "measured", "plot", "write"]

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
        sign, digits = "+" if key == "difference" else "", _digits(stderr)
        if digits is None:
            return f"{value:{sign}.4g}" + ("" if stderr is None else " +- 0")
        return f"{value:{sign}.{digits}f} +- {stderr:.{digits}f}"

    return show


def _least(row: Row) -> str:
    """The least FID of several blocks."""
    if row.get("fid_min") is None or row["blocks"] == 1:
        return ""
    digits = _digits(row.get("fid_stderr"))
    return f"{row['fid_min']:.4g}" if digits is None else f"{row['fid_min']:.{digits}f}"


COLUMNS = (
    Column("name", _plain("name")), Column("K", _plain("steps")), Column("solver", _plain("solver")),
    Column("NFE", _plain("nfe")), Column("images", lambda row: f"{row['blocks']} x {row['images']}"),
    Column("FID", _number("fid")), Column("min", _least), Column("difference", _number("difference")),
    Column("IS", _number("is")), Column("RMS error", _number("error_rms")), Column("mean error", _number("error_mean")),
    Column("median error", _number("error_median")),
    Column("grid", lambda row: row["origin"] if row.get("origin", "").startswith("resampled") else ""),
)


def measured(key: str, measurement: Measurement) -> Row:
    """The fields of a row that tell a measurement."""
    return {
        key: measurement.mean, f"{key}_min": measurement.minimum, f"{key}_stderr": measurement.stderr,
        f"{key}_stderr_from": measurement.basis, f"{key}_blocks": [float(value) for value in measurement.values],
    }


def add_differences(
    rows: Sequence[Row], fids: Sequence[Measurement], base: Callable[[int], Optional[int]],
    paired: Callable[[int, int], bool],
) -> None:
    """Add to each row its FID less that of row `base(i)`, unless this is itself or None."""
    for i, row in enumerate(rows):
        j = base(i)
        if j is not None and j != i:
            result = difference(fids[i], fids[j], paired(i, j))
            row.update(difference=result.value, difference_stderr=result.stderr, difference_from=result.basis,
                       difference_to=rows[j]["name"])


def _cells(rows: Sequence[Row]) -> List[List[str]]:
    """Titles, then the rows; columns without content are left out."""
    columns = [column for column in COLUMNS if any(column.show(row) for row in rows)]
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
    """FID (else the error, else the IS) over NFE on logarithmic axes with standard errors, a line per name and solver.

    Raises:
        ValueError: matplotlib is missing, or no row has an NFE.
    """
    check_plotting()
    from matplotlib.figure import Figure

    labels = {"fid": "FID", "error_rms": "RMS end-point error", "is": "IS"}
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
