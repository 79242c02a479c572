"""What every tool says of itself: --help in groups with defaults and examples, --version."""

from __future__ import annotations

import importlib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from art_edm import __version__
from art_edm.runtime.cli import Command

NAMES = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "tools").glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_every_tool_has_a_version_and_two_examples(name):
    command = importlib.import_module(name).main
    version = CliRunner().invoke(command, ["--version"])
    assert (version.exit_code, version.output) == (0, f"art_edm {__version__}\n")
    shown = CliRunner().invoke(command, ["--help"])
    assert shown.exit_code == 0 and shown.output.count(f"tools/{name}.py") >= 2


def example(groups):
    @click.command(cls=Command, groups=groups)
    @click.option("--steps", default=18, metavar="K", help="Steps.")
    @click.option("--out", help="A file.")
    @click.option("--quiet", is_flag=True, help="Say nothing.")
    def main(**given):
        """Do it."""
    return main


def test_help_is_in_groups_with_defaults():
    shown = CliRunner().invoke(example({"Work": "steps", "Results": "out"}), ["--help"], terminal_width=80).output
    parts = shown.split("\n\n")
    assert [part.split()[0].strip(":") for part in parts[2:]] == ["Work", "Results", "Other"]
    assert parts[2] == "Work:\n  --steps K  Steps.  [default: 18]" and parts[3] == "Results:\n  --out TEXT  A file."
    assert all(f"  {name} " in parts[4] for name in ("--quiet", "--version", "--help"))


@pytest.mark.parametrize("groups", [{"Work": "stepz"}, {"Work": "steps", "More": "steps"}])
def test_a_group_of_what_is_no_option_or_twice_is_a_mistake(groups):
    assert isinstance(CliRunner().invoke(example(groups), ["--help"]).exception, KeyError)
