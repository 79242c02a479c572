"""EDM2's own calculate_metrics.py run on a CPU, its two networks replaced by stand-ins of the same interface.

    python tests/support/edm2_metrics.py EDM2 DETECTOR.pkl DINO.pkl '[["calc", "--images=..."], ["ref", "--data=..."]]'

prints one JSON line per command: of `calc` all metrics before they are rounded, of `prepare FILE.npy` nothing, but
FILE.npy.out.npy is what DINOv2's network is given for those images. In memory only, its device becomes the CPU and its
process group Gloo's.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]


class Dino(torch.nn.Module):
    """Prepared images [B, 3, 224, 224] -> features [B, dim]: fixed projections of 8 x 8 means, bent."""

    def __init__(self, dim: int = 12):
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.register_buffer("project", torch.randn(192, dim, generator=rng, dtype=torch.float64) / 14)

    def forward(self, x: torch.Tensor):
        return 2 * torch.tanh(torch.nn.functional.adaptive_avg_pool2d(x.double(), 8).flatten(1) @ self.project) + 1


def run_edm2(edm2: Path, detector: Path, dino: Path, commands: list) -> list:
    """EDM2's answer to each command."""
    call = [sys.executable, str(Path(__file__)), str(edm2), str(detector), str(dino), json.dumps(commands)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    done = subprocess.run(call, capture_output=True, text=True, env=env, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return [json.loads(line) for line in done.stdout.splitlines()]


def _prepare(folder: Path, detector: str, dino: str) -> dict:
    """The script's names, ready for a CPU."""
    sys.path.insert(0, str(folder))
    bar = types.ModuleType("tqdm")
    bar.tqdm = lambda items, **kwargs: items
    sys.modules.setdefault("tqdm", bar)
    import dnnlib
    from torch_utils import distributed

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    distributed.init = lambda: None
    torch.multiprocessing.set_start_method = lambda method: None
    source = (folder / "calculate_metrics.py").read_text().replace("'cuda'", "'cpu'")
    names = {"__name__": "edm2_metrics"}
    exec(compile(source, "calculate_metrics.py", "exec"), names)

    class InceptionStandIn(names["Detector"]):
        def __init__(self):
            self.model = pickle.loads(Path(detector).read_bytes())
            super().__init__(self.model.project.shape[1])

        def __call__(self, x):
            return self.model(x, return_features=True)

    class DinoStandIn(names["DINOv2Detector"]):  # its own resizing and normalisation
        def __init__(self):
            self.model, self.resize_mode = pickle.loads(Path(dino).read_bytes()), "torch"
            names["Detector"].__init__(self, self.model.project.shape[1])

    for metric, cls in (("fid", InceptionStandIn), ("fd_dinov2", DinoStandIn)):
        names["metric_specs"][metric] = dnnlib.EasyDict(detector_kwargs=dnnlib.EasyDict(class_name=cls))
    return names


def _answer(names: dict, command: list):
    found = []
    if command[0] == "prepare":
        dino = names["get_detector"]("fd_dinov2", verbose=False)
        dino.model.forward = lambda x: found.append(x) or x.flatten(1)[:, :12]
        dino(torch.from_numpy(np.load(command[1])))
        np.save(command[1] + ".out.npy", found[0].numpy())
        del dino.model.forward
        return None
    own = names["calculate_metrics_from_stats"]
    names["calculate_metrics_from_stats"] = lambda *args, **more: found.append(own(*args, **more)) or found[-1]
    with contextlib.redirect_stdout(io.StringIO()):
        names["cmdline"](command, standalone_mode=False)
    names["calculate_metrics_from_stats"] = own
    return found[0] if found else None


if __name__ == "__main__":
    upstream = _prepare(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    for item in json.loads(sys.argv[4]):
        print(json.dumps(_answer(upstream, item)), flush=True)
