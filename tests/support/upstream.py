"""For tests against NVlabs' own code: where its checkouts are, and running a snippet inside one.

The checkouts are $ART_EDM_UPSTREAM/edm and /edm2, or third_party/edm and /edm2; tests that need them are marked
`upstream`, and skipped without them (tests/conftest.py).
Upstream's modules never enter the process of the tests.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def checkouts():
    """The folder with edm/ and edm2/, or None."""
    folder = Path(os.environ.get("ART_EDM_UPSTREAM") or ROOT / "third_party")
    return folder if all((folder / name / "torch_utils").is_dir() for name in ("edm", "edm2")) else None


def upstream(name):
    """The checkout of `name` (edm or edm2); the test that asks must be marked."""
    assert checkouts(), "a test that needs NVlabs' code lacks the mark: @pytest.mark.upstream"
    return checkouts() / name


def export(name, commit, folder):
    """The tree of `commit` of a checkout, unpacked into `folder`, which is returned; skip if it lacks the commit."""
    git = ["git", "-C", str(upstream(name)), "-c", "safe.directory=*"]
    result = subprocess.run([*git, "archive", "--format=tar", commit], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if result.returncode:
        pytest.skip(f"the checkout of {name} does not have commit {commit[:7]}: a shallow clone, or no clone")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(result.stdout)) as tar:
        tar.extractall(folder)
    return folder


def run_python(snippet, *args, path=None, cwd=None, env=None, check=True):
    """Run a Python snippet in a process of its own, with `path` importable; returns the completed process."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ART_EDM_UPSTREAM")}
    environment.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", **(env or {}))
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [sys.executable, "-c", snippet, *map(str, args)], cwd=cwd or path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=300,
    )
    assert not check or result.returncode == 0, result.stderr
    return result
