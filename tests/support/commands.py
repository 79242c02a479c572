"""Calling a click command in this process."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

from click.testing import CliRunner


def invoke(command, args, **more):
    """What a command says and how it ends; click 8.1, the last for Python 3.9, must be asked to keep stderr apart."""
    if "mix_stderr" not in inspect.signature(CliRunner).parameters:
        return CliRunner().invoke(command, args, **more)
    result = CliRunner(mix_stderr=False).invoke(command, args, **more)
    return SimpleNamespace(output=result.stdout + result.stderr, stdout=result.stdout, stderr=result.stderr,
                           exit_code=result.exit_code, exception=result.exception)
