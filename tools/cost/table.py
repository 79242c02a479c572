"""What `benchmarks` measured, as a table with the bars it is held to; and how long the tools take to start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

__all__ = ["BARS", "ROWS", "start_up", "table"]

BARS = {"share": 1.05, "rl_seconds": 5.0, "J_over_J_star": 1.01, "evaluations": 2048, "help": 1.0, "upstream": 0.2}

ROWS: Dict[str, Dict[str, str]] = {
    "share": {"own_seconds_per_image": "network's own seconds per image", "seconds": "profile stage, seconds",
              "share_wall": "profile stage / network alone", "share_busy": "the same, processor time"},
    "run": {"evaluations": "evaluated images, all K", "profile_seconds": "profile, seconds",
            "rl_seconds": "RL, seconds", "J_over_J_star": "J/J* of the learned clock",
            "optimum_over_J_star": "J/J* of its profile's optimum"},
    "paper": {"evaluations_per_iteration": "paper's recipe: evaluations an iteration",
              "seconds_per_iteration": "paper's recipe: seconds an iteration",
              "budget_all": "paper's budget for these K, evaluations", "ratio": "paper's budget / ours",
              "seconds_at_full_length": "paper's recipe here, one K, seconds"},
    "costs": {"one_more_K_seconds": "one more K, seconds", "twice_pixels": "twice the pixels, time",
              "twice_pixels_network_alone": "twice the pixels, network alone",
              "twice_trajectories": "twice the trajectories, time", "peak_ratio": "memory, 8 times the points"},
    "layouts": {"channels_last": "channels_last, times faster", "compile": "torch.compile, times faster",
                "compile_seconds": "torch.compile, seconds to compile"},
    "start": {"help": "--help beyond importing torch, seconds", "upstream": "patched script gains, seconds"},
    "memory": {"peak_bytes": "peak memory, bytes"},
}


def table(found: Dict[str, Any]) -> List[str]:
    """The figures as lines, each with its bar where it has one."""
    lines = []

    def row(label: str, value: Any, bar: Optional[float] = None) -> None:
        shown = value if isinstance(value, str) else f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
        verdict = "" if bar is None else f"  {'met' if value <= bar else 'MISSED'} (at most {bar:,g})"
        lines.append(f"{label:<46}{shown:>16}{verdict}".rstrip())

    for section, rows in ROWS.items():
        part = found.get(section, {})
        for key, label in rows.items():
            if key in part:
                row(label, part[key], BARS.get("share" if key.startswith("share") else key))
    return lines


def start_up(tool: Path) -> Dict[str, float]:
    """Seconds that --help takes beyond importing torch, and that a patched script gains by importing `upstream`."""
    shown = _imports([str(tool), "--help"])
    torch_alone = shown.get("torch", 0.0)
    patched = _imports(["-c", "import torch, numpy, click, art_edm.upstream"])
    return {"help": sum(shown[name] for name in ("art_edm.runtime.cli", "click") if name in shown) - torch_alone,
            "upstream": patched["art_edm.upstream"]}


def _imports(arguments: List[str]) -> Dict[str, float]:
    """Seconds of each import that a command makes, those within it included."""
    command = [sys.executable, "-X", "importtime", *arguments]
    text = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True).stderr
    rows = (line.split("|") for line in text.splitlines() if line.startswith("import time:") and "[us]" not in line)
    return {name.strip(): int(total) / 1e6 for _, total, name in rows}
