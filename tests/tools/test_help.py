"""What every tool says of itself: --help in groups with defaults and examples, --version."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from art_edm import __version__
from art_edm.runtime.cli import Command

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NAMES = sorted(path.stem for path in TOOLS.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_every_tool_has_a_version_and_two_examples(name):
    command = importlib.import_module(name).main
    version = CliRunner().invoke(command, ["--version"])
    assert (version.exit_code, version.output) == (0, f"art_edm {__version__}\n")
    shown = CliRunner().invoke(command, ["--help"])
    assert shown.exit_code == 0 and shown.output.count(f"tools/{name}.py") >= 2


@pytest.mark.parametrize("name", NAMES)
def test_help_does_not_wait_for_torch(name):
    code = ("import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit: print('torch' in sys.modules, 'scipy' in sys.modules)")
    tool = TOOLS / f"{name}.py"
    shown = subprocess.run([sys.executable, "-c", f"import sys; sys.argv[0] = {str(tool)!r}; sys.path[0] = "
                            f"{str(TOOLS)!r}; {code}"], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("Usage: ") and shown.splitlines()[-1] == "False False"


def test_a_list_of_commands_says_of_each_what_it_says_itself():
    command = importlib.import_module("fid").main
    context = click.Context(command)
    assert command.list_commands(context) == ["calc", "compare", "gen", "ref"] and len(command.lazy) == 4
    for name, (_, text) in command.lazy.items():
        assert command.get_command(context, name).get_short_help_str(200) == text
    result = CliRunner().invoke(command, ["score"])
    assert result.exit_code == 2 and "No such command 'score'" in result.output


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
