"""A small detector that is called like NVIDIA's, and EDM's own fid.py run on a CPU with it.

    python tests/fid_standin.py UPSTREAM DETECTOR DIM '[["calc", "--images=..."], ["distance", "moments.npz"]]'

prints one JSON line per command. In memory only, fid.py's device becomes the CPU, its number of features DIM
(0 leaves it), its process group Gloo's, and its detector DETECTOR. With DIM its images are read without workers.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]


class StandIn(torch.nn.Module):
    """uint8 [B, 3, H, W] -> features [B, dim]: fixed random projections of the pixels, bent."""

    def __init__(self, pixels: int, dim: int, classes: int = 5, dtype: torch.dtype = torch.float64):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.register_buffer("project", torch.randn(pixels, dim, generator=rng).to(dtype) / pixels**0.5)
        self.register_buffer("choose", torch.randn(dim, classes, generator=rng).to(dtype))

    def forward(self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        x = images.to(self.project.dtype).flatten(1) / 127.5 - 1
        features = 3 * torch.tanh(x @ self.project) + 1
        return features if return_features else torch.softmax(features @ self.choose, dim=1)


def run_upstream(detector: Path, dim: int, commands: list, threads: int = 1) -> list:
    """EDM's answer to each command; of `calc` the last line that it prints and the number before it is rounded."""
    from tests.support.upstream import upstream

    folder = upstream("edm").parent
    call = [sys.executable, str(Path(__file__)), str(folder), str(detector), str(dim), json.dumps(commands)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}  # where StandIn is found
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    done = subprocess.run(call, capture_output=True, text=True, env=env, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return [json.loads(line) for line in done.stdout.splitlines()]


def save_pickle(path: Path, net: torch.nn.Module) -> Path:
    path.write_bytes(pickle.dumps(net))
    return path


def _prepare(folder: Path, detector: str, dim: int) -> dict:
    """fid.py's names, ready for a CPU."""
    sys.path.insert(0, str(folder / "edm"))
    bar = types.ModuleType("tqdm")
    bar.tqdm = lambda items, **kwargs: items
    sys.modules.setdefault("tqdm", bar)
    import dnnlib
    from torch_utils import distributed

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    distributed.init = lambda: None
    real_open = dnnlib.util.open_url
    dnnlib.util.open_url = lambda url, **kwargs: real_open(detector if "inception" in url else url, **kwargs)
    source = (folder / "edm" / "fid.py").read_text().replace("'cuda'", "'cpu'")
    if dim:
        source = re.sub(r"(feature_dim\s*=\s*)\d+", rf"\g<1>{dim}", source)
        loader = torch.utils.data.DataLoader
        torch.utils.data.DataLoader = lambda data, batch_sampler, **kwargs: loader(data, batch_sampler=batch_sampler)
        torch.multiprocessing.set_start_method = lambda method: None
    names = {"__name__": "upstream_fid"}
    exec(compile(source, "fid.py", "exec"), names)
    return names


def _answer(names: dict, command: list):
    if command[0] == "distance":
        with np.load(command[1]) as data:
            return names["calculate_fid_from_inception_stats"](*(data[k] for k in ("mu1", "cov1", "mu2", "cov2")))
    if command[0] == "names":
        data = names["dataset"].ImageFolderDataset(command[1], max_size=command[2], random_seed=command[3])
        return [data._image_fnames[i] for i in data._raw_idx]
    printed, exact = io.StringIO(), []
    distance = names["calculate_fid_from_inception_stats"]
    names["calculate_fid_from_inception_stats"] = lambda *args: exact.append(distance(*args)) or exact[-1]
    with contextlib.redirect_stdout(printed):
        names["main"](command, standalone_mode=False)
    names["calculate_fid_from_inception_stats"] = distance
    return [*printed.getvalue().splitlines()[-1:], *exact]


if __name__ == "__main__":
    upstream = _prepare(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    for item in json.loads(sys.argv[4]):
        print(json.dumps(_answer(upstream, item)), flush=True)
