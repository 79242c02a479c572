"""First light: what a user of a GPU does, part by part, in minutes.

    python -m tests.gpu.first_light --out=DIR [--edm=DIR] [--edm2=DIR] [--parts=a,b] [--limit=480]
    python -m tests.gpu.first_light --out=DIR --device=cpu         # rehearsal: small networks, on a CPU

Every part (see `light_parts`) is a process of its own with a limit of its own, so that none stops another. After each,
DIR/first_light.json has what is known so far; DIR/PART.log what the part's commands said. Exit code 1 if a part failed.
It needs the extra `test`, tqdm for NVlabs' scripts, and checkouts of these: --edm and --edm2, else those of
$ART_EDM_UPSTREAM or third_party/. What needs one that is missing is skipped, with the reason.

Symbols
-------
scale   full: NVlabs' architectures at their official sizes, random weights; small: the same classes, narrow
status  passed, failed, skipped (a reason), or timeout
check   a figure that is held to a bar: name -> [found, bar, whether it is met]
"""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from art_edm.runtime.files import write_json  # noqa: E402
from tests.support.upstream import checkouts  # noqa: E402

# Seconds that a part may take, in the order of running: those that say most about a GPU first.
LIMITS = {
    "tests": 90, "networks": 90, "schedule-mnist": 90, "schedule-songunet56m": 90, "generate-edm": 90, "oom": 60,
    "refine": 120, "fid": 90, "processes": 90, "schedule-edm2xs": 90, "schedule-adm296m": 120, "generate-edm2": 90,
    "interrupt": 90, "fp16": 60,
}
PATIENCE = 10  # with a CPU


def names(context: click.Context, parameter: click.Parameter, text: str) -> List[str]:
    """'a,b' to names of parts."""
    wanted = text.split(",") if text else list(LIMITS)
    for name in wanted:
        if name not in LIMITS:
            raise click.BadParameter(f"found {name!r}, expected some of {','.join(LIMITS)}")
    return [name for name in LIMITS if name in wanted]


@click.command()
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of all results.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--scale", type=click.Choice(["auto", "small", "full"]), default="auto", show_default=True,
              help="auto: small on a CPU.")
@click.option("--edm", type=click.Path(exists=True, path_type=Path), help="Checkout of NVlabs/edm.")
@click.option("--edm2", type=click.Path(exists=True, path_type=Path), help="Checkout of NVlabs/edm2.")
@click.option("--parts", callback=names, default="", metavar="a,b", help=f"Of {', '.join(LIMITS)}.  [default: all]")
@click.option("--limit", default=480, show_default=True, metavar="SECONDS",
              help="For all parts together on a GPU; a CPU has ten times as long, and each part, too.")
def main(out: Path, parts: List[str], limit: int, **given: Any) -> None:
    """Prove the CUDA path in minutes, or rehearse that on a CPU."""
    out.mkdir(parents=True, exist_ok=True)
    settings = settings_of(out.resolve(), **given)
    longer = 1 if settings["device"] == "cuda" else PATIENCE
    limit *= longer
    report: Dict[str, Any] = {"settings": settings, "machine": machine(settings["device"]), "limit": limit, "parts": {}}
    began = time.monotonic()
    for name in parts:
        left = limit - (time.monotonic() - began)
        result = run_part(name, settings, min(left, LIMITS[name] * longer)) if left > 5 else skipped("no time is left")
        report["parts"][name] = result
        report["seconds"] = time.monotonic() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        report["cpu_seconds"] = used.ru_utime + used.ru_stime
        write_json(out / "first_light.json", report)
        click.echo(line(name, result))
    bad = [name for name, result in report["parts"].items() if result["status"] in ("failed", "timeout")]
    click.echo(f"{report['seconds']:.0f} s in all; wrote {out / 'first_light.json'}" + "; failed: " * bool(bad)
               + ", ".join(bad))
    sys.exit(bool(bad))


def settings_of(out: Path, device: str, scale: str, edm: Any, edm2: Any) -> Dict[str, Any]:
    """What every part is given, as JSON."""
    found = checkouts()
    folders = {name: given or (found and found / name) for name, given in (("edm", edm), ("edm2", edm2))}
    small = scale == "small" or (scale == "auto" and device == "cpu")
    return {"out": str(out), "device": device, "scale": "small" if small else "full",
            **{name: str(Path(folder).resolve()) if folder else None for name, folder in folders.items()}}


def machine(device: str) -> Dict[str, Any]:
    """The card by its name, and the versions that decide how fast it is."""
    code = ("import json, torch; c = torch.cuda.is_available(); print(json.dumps({'torch': torch.__version__, "
            "'cuda': torch.version.cuda, 'card': torch.cuda.get_device_name(0) if c else None}))")
    found = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    if device == "cuda" and not found["card"]:
        raise click.ClickException("found no CUDA device, expected one; --device=cpu rehearses on a CPU")
    return {**found, "python": platform.python_version(), "cores": os.cpu_count()}


def skipped(reason: str) -> Dict[str, Any]:
    """The result of a part that did not run."""
    return {"status": "skipped", "reason": reason, "seconds": 0.0}


def run_part(name: str, settings: Dict[str, Any], limit: float) -> Dict[str, Any]:
    """The part in a process group of its own, which is ended with all its children at the limit."""
    result, log = Path(settings["out"], f"{name}.json"), Path(settings["out"], f"{name}.log")
    result.unlink(missing_ok=True)
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}"}
    command = [sys.executable, "-m", "tests.gpu.light_parts", name, json.dumps(settings), str(result)]
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = json.loads(result.read_text()) if result.exists() else {"status": "failed", "reason": tail(log)}
    result.unlink(missing_ok=True)
    if process.returncode == -signal.SIGKILL:
        found = {**found, "status": "timeout", "reason": f"ended after {limit:.0f} s; {tail(log)}"}
    return {**found, "seconds": time.monotonic() - began}


def tail(log: Path) -> str:
    """The last words of a log."""
    return log.read_text(errors="replace")[-400:].strip()


def line(name: str, result: Dict[str, Any]) -> str:
    """One part for the terminal: its checks, or why there are none."""
    checks = [f"{key} {found} ({'' if met else 'NOT '}{bar})" for key, (found, bar, met) in
              result.get("checks", {}).items()]
    reason = [" ".join(result["reason"].split())[-300:]] if "reason" in result else []
    return f"{name:<22}{result['status']:<9}{result['seconds']:>5.0f} s  {'; '.join([*checks, *reason])}"


if __name__ == "__main__":
    main()
