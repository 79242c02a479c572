"""What a caller switched on is off inside, for every kind of device, and on again afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from art_edm.runtime.precision import full_precision, without_autocast

NEWER = """
import sys, torch
from art_edm.runtime.precision import full_precision
backends, guard = torch.backends, full_precision
state = lambda: [owner.fp32_precision for owner in (backends, backends.cuda.matmul, backends.cudnn.conv)]
exec(sys.argv[1])
before = state()
with guard():
    inside = state()[1:]
print(before == state(), inside, before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="a torch without the newer switches")
@pytest.mark.parametrize("host", [
    "backends.cuda.matmul.fp32_precision = 'tf32'", "backends.fp32_precision = 'tf32'",
    "backends.cuda.matmul.fp32_precision = backends.cudnn.conv.fp32_precision = 'tf32'",
    "backends.cudnn.fp32_precision = 'tf32'; backends.cuda.matmul.fp32_precision = 'ieee'",
])
def test_full_precision_after_the_newer_switches(host):
    """In a process of its own, as torch forbids mixing them; without the guard TF32 is on."""
    show = lambda code: subprocess.run([sys.executable, "-c", NEWER, code], capture_output=True, text=True)
    found = show(host)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("True ['ieee', 'ieee']"), found.stdout
    assert "tf32" in show(f"{host}; import contextlib; guard = contextlib.nullcontext").stdout.split("]")[0]


@pytest.mark.parametrize("kind", ["cpu", "xpu", "mps"])
@pytest.mark.parametrize("guard", [full_precision, without_autocast])
def test_autocast_of_any_device_is_off(guard, kind):
    enabled = torch.is_autocast_cpu_enabled if kind == "cpu" else lambda: torch.is_autocast_enabled(kind)
    try:
        on = torch.autocast(kind, dtype=torch.bfloat16, enabled=True)
    except (RuntimeError, AttributeError):
        pytest.skip(f"this torch has no autocast for {kind}")
    with on:
        if not enabled():
            pytest.skip(f"this torch has no autocast for {kind} on this machine")
        with guard():
            assert not enabled()
        assert enabled()


@pytest.mark.parametrize("error", [RuntimeError, AttributeError])  # of newer and of older versions
def test_a_kind_of_device_that_this_torch_lacks_is_left_out(error, monkeypatch):
    real = torch.autocast

    def lacking(kind, **options):
        if kind == "xpu":
            raise error("no xpu")
        return real(kind, **options)

    monkeypatch.setattr(torch, "autocast", lacking)
    with real("cpu", dtype=torch.bfloat16), full_precision():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
