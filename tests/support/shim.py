"""Runs NVlabs' generate.py and generate_images.py, patched or not, on a CPU, and keeps the samples as they are.

The scripts hard-code CUDA and NCCL: here the defaults `device=torch.device('cuda')` become the CPU, and processes
meet by gloo in a file. Nothing else of upstream changes.

    PYTHONPATH=CHECKOUT python tests/support/shim.py SCRIPT ARGUMENTS...      # one command
    run_jobs(checkout, jobs, folder)                                  # from a test: several, in one process

A job is a dict: `script`, and `argv`, or `python`, a snippet that finds the script's module as `script` and its
own record as `record`; `save_grid`, optional, is a .npy that gets the noise levels the sampler used.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path

# --- in the test's process ---------------------------------------------------------------------------


def run_jobs(checkout, jobs, folder, processes=1, timeout=240):
    """Run jobs (name -> job) on a checkout; returns, for every process, name -> record.

    A record has exit_code, output (stdout and stderr), and of the samplers called: samples [N, C, H, W],
    sampler (names), t_steps [K + 1]; under "modules", the names of all modules loaded at the end.
    """
    import torch

    store = tempfile.mkdtemp(dir=folder)
    Path(store, "jobs.json").write_text(json.dumps(jobs))
    running = []
    for rank in range(processes):
        environment = {key: value for key, value in os.environ.items() if key != "ART_EDM_UPSTREAM"}
        environment.update(
            PYTHONPATH=str(checkout), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", RANK=str(rank),
            WORLD_SIZE=str(processes), SHIM_STORE=f"{store}/meeting",
        )
        command = [sys.executable, __file__, "--jobs", f"{store}/jobs.json", f"{store}/result-{rank}.pt"]
        running.append(subprocess.Popen(command, cwd=folder, env=environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        for process in running:
            output = process.communicate(timeout=timeout)[0]
            assert process.returncode == 0, output
    finally:
        for process in running:
            process.kill()
    return [torch.load(f"{store}/result-{rank}.pt", weights_only=True) for rank in range(processes)]


# --- in the process that runs the scripts ------------------------------------------------------------


def prepare():
    """gloo for NCCL, one thread, and a stand-in for tqdm where it is not installed."""
    import torch
    from torch_utils import distributed

    torch.set_num_threads(1)
    torch.cuda.set_device = lambda device: None
    if importlib.util.find_spec("tqdm") is None:
        sys.modules["tqdm"] = types.ModuleType("tqdm")
        sys.modules["tqdm"].tqdm = lambda iterable, **options: iterable

    def init():
        if not torch.distributed.is_initialized():
            if sys.platform == "linux":
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            store = os.environ.get("SHIM_STORE") or tempfile.mktemp()
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=int(os.environ.get("RANK", "0")),
                world_size=int(os.environ.get("WORLD_SIZE", "1")),
            )

    distributed.init = init


def recorded(sampler, record):
    """`sampler`, with what it returns and its local t_steps kept."""

    @functools.wraps(sampler)
    def call(*args, **kwargs):
        def watch(frame, event, result):
            if event == "return" and frame.f_code is sampler.__code__:
                record["t_steps"] = frame.f_locals["t_steps"]

        sys.setprofile(watch)
        try:
            images = sampler(*args, **kwargs)
        finally:
            sys.setprofile(None)
        record["samples"].append(images)
        record["sampler"].append(sampler.__name__)
        return images

    return call


def load(path, record):
    """The script as a module, on the CPU, with its samplers recorded."""
    import torch

    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    replaced = {}
    for name in ("edm_sampler", "ablation_sampler"):
        if hasattr(module, name):
            replaced[getattr(module, name)] = recorded(getattr(module, name), record)
    functions = [value for value in vars(module).values() if isinstance(value, types.FunctionType)]
    callback = command_of(module).callback
    functions += [callback, getattr(callback, "__wrapped__", callback)]
    for function in functions:
        defaults = [torch.device("cpu") if isinstance(value, torch.device) else value
                    for value in function.__defaults__ or ()]
        function.__defaults__ = tuple(replaced.get(value, value) if callable(value) else value for value in defaults)
    for sampler, wrapper in replaced.items():
        setattr(module, sampler.__name__, wrapper)
    return module


def command_of(module):
    """The script's click command."""
    import click

    return next(value for value in vars(module).values() if isinstance(value, click.Command))


def run_job(job):
    """Run one job and return its record."""
    import numpy as np
    import torch

    record = {"samples": [], "sampler": [], "t_steps": None, "exit_code": None}
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            script = load(job["script"], record)
            if "python" in job:
                exec(job["python"], {"script": script, "record": record})
            else:
                command_of(script).main(args=job["argv"], prog_name=Path(job["script"]).name)
        except SystemExit as stop:
            record["exit_code"] = stop.code
        except BaseException:
            record["exit_code"] = "traceback"
            traceback.print_exc()
    if job.get("save_grid"):
        np.save(job["save_grid"], record["t_steps"].to(torch.float64).numpy())
    samples = torch.cat(record["samples"]) if record["samples"] else None
    return {**record, "samples": samples, "output": output.getvalue()}


def main(arguments):
    """See the module's docstring."""
    import torch

    prepare()
    if arguments[0] == "--jobs":
        jobs = json.loads(Path(arguments[1]).read_text())
        records = {name: run_job(job) for name, job in jobs.items()}
        torch.save({**records, "modules": sorted(sys.modules)}, arguments[2])
    else:
        command_of(load(arguments[0], {"samples": [], "sampler": []})).main(
            args=arguments[1:], prog_name=Path(arguments[0]).name)


if __name__ == "__main__":
    sys.path.pop(0)  # the tests' folder: upstream.py is there too
    main(sys.argv[1:])
