"""What all tests share: the markers' meaning, a fixture that calls a tool, and where data outside the project are.

Markers
-------
slow      seconds of a network, or processes that are killed and started again; daily work leaves them out
upstream  runs NVlabs' own code, from $ART_EDM_UPSTREAM or third_party/, else skipped; slow, too
gpu       needs a CUDA device, else skipped
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch

from tests.support.commands import invoke
from tests.support.upstream import checkouts

GPU = pytest.mark.skip(reason="needs a GPU, and this machine has none")
UPSTREAM = pytest.mark.skip(reason="needs edm/ and edm2/ of NVlabs in $ART_EDM_UPSTREAM or third_party/: "
                                   "python tools/patch_upstream.py")
torch.set_num_threads(1)  # tests run side by side; the same number of threads gives the same bits


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Skip what this machine cannot run; NVlabs' code runs in processes of its own, which is slow."""
    for item in items:
        if item.get_closest_marker("upstream"):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(GPU)
        if item.get_closest_marker("upstream") and checkouts() is None:
            item.add_marker(UPSTREAM)


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """`tool("fid")` is tools/fid.py as a function of its arguments, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def load(name):
        command = importlib.import_module(name).main
        return lambda *args, **more: invoke(command, [str(argument) for argument in args], **more)

    return load


@pytest.fixture(scope="session")
def mnist_folder():
    """The folder with MNIST's four files, $ART_EDM_MNIST; skips without it."""
    folder = os.environ.get("ART_EDM_MNIST", "")
    if not os.path.isdir(folder):
        pytest.skip("ART_EDM_MNIST does not name a folder with MNIST's four files")
    return Path(folder)
