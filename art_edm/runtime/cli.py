"""What the command-line tools share: one-line errors with honest exit codes, and the record of a command.

Exit codes: 0 done; 2 something the user gave cannot be used (nothing was written); 1 the work could
not be finished (stopped, no connection, or learning diverged).
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import click

from art_edm import __version__
from art_edm.runtime.errors import NonFiniteOutput, Stopped

__all__ = [
    "TOOLS", "Command", "Group", "LazyGroup", "check_versions", "command_line", "installed", "named", "tool_command",
    "versions",
]

_PACKAGE = Path(__file__).resolve().parents[1]
TOOLS = next((folder / "tools" for folder in (_PACKAGE, _PACKAGE.parent) if (folder / "tools").is_dir()),
             _PACKAGE.parent / "tools")  # within an installed package, or beside the package in a checkout
_SHORT = {"train_schedule": "train", "make_grid": "grid", "patch_upstream": "patch"}


def installed() -> bool:
    """Whether the scripts of tools/ are within the package, so that they are called `art-edm COMMAND`."""
    return TOOLS.parent == _PACKAGE


def tool_command(script: str) -> str:
    """What `art-edm` calls tools/SCRIPT.py."""
    return _SHORT.get(script, script.replace("_", "-"))


def named(text: str) -> str:
    """`text` with the scripts that it names as this machine has them: `art-edm grid` where there is no tools/."""
    if not installed():
        return text
    text = re.sub(r"(torchrun \S.*?) tools/(\w+)\.py", lambda m: f"{m[1]} -m art_edm {tool_command(m[2])}", text)
    return re.sub(r"(?:python )?tools/(\w+)\.py", lambda m: f"art-edm {tool_command(m[1])}", text)


def _show_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        click.echo(f"art_edm {__version__}")
        context.exit()


class _OneLineErrors(click.Command):
    """A command whose errors are one line on stderr, never a traceback; it has --version, and its help shows defaults.

    Args:
        groups: title of a part of the help -> names of its parameters, separated by spaces; the rest comes last.
    """

    def __init__(self, *args: Any, groups: Optional[Dict[str, str]] = None, **kwargs: Any) -> None:
        kwargs["context_settings"] = {"show_default": True, **(kwargs.get("context_settings") or {})}
        super().__init__(*args, **kwargs)
        self.groups = groups or {}
        self.params.append(click.Option(["--version"], is_flag=True, expose_value=False, is_eager=True,
                                        callback=_show_version, help="Show the version and exit."))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options by groups."""
        records = {item.name: item.get_help_record(ctx) for item in self.get_params(ctx)
                   if isinstance(item, click.Option)}
        named_rows = {title: [records.pop(name) for name in names.split()] for title, names in self.groups.items()}
        for title, rows in {**named_rows, "Other options" if self.groups else "Options": records.values()}.items():
            with formatter.section(title):
                formatter.write_dl([row for row in rows if row])
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """As click's own, with the errors this package raises taken as a user's."""
        if installed() and kwargs.get("prog_name"):
            kwargs["prog_name"] = f"art-edm {tool_command(kwargs['prog_name'].rpartition('.')[0])}"
        try:
            result = super().main(*args, standalone_mode=False, **kwargs)
        except (click.Abort, KeyboardInterrupt):
            sys.exit("Aborted")
        except (Stopped, ConnectionError, FloatingPointError) as error:
            if not standalone_mode:
                raise
            sys.exit(" ".join(str(error).split()))
        except (click.ClickException, NonFiniteOutput, ValueError, OSError) as error:
            if not standalone_mode:
                raise
            text = error.format_message() if isinstance(error, click.ClickException) else str(error)
            click.echo(named(f"Error: {' '.join(text.split())}"), err=True)
            sys.exit(2)
        if standalone_mode:
            sys.exit(result if isinstance(result, int) else 0)
        return result

    def parse_args(self, ctx: click.Context, args: List[str]) -> List[str]:
        """As click's own; ~ in --option=~/path is the home, which the shell itself leaves as it is there."""
        parts = [(arg.partition("=") if arg.startswith("--") else ("", "", arg)) for arg in args]
        return super().parse_args(ctx, [
            name + equals + (os.path.expanduser(value) if value.startswith("~/") else value)
            for name, equals, value in parts
        ])

    def invoke(self, ctx: click.Context) -> Any:
        """As click's own, once it is known that torch can be used."""
        check_versions()
        return super().invoke(ctx)

    def get_help(self, ctx: click.Context) -> str:
        """As click's own, with the scripts named as they are here."""
        return named(super().get_help(ctx))


class Command(_OneLineErrors):
    """For `@click.command(cls=Command)`."""


class Group(_OneLineErrors, click.Group):
    """For `@click.group(cls=Group)`."""

    command_class = Command


class LazyGroup(Group):
    """A group whose commands are imported when they are called, so that the list of them does not wait for torch.

    Args:
        lazy: name of a command -> (module:attribute, the line about it in the list).
    """

    def __init__(self, *args: Any, lazy: Dict[str, Tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> List[str]:
        """The names."""
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Optional[click.Command]:
        """The command, imported now."""
        module, _, attribute = self.lazy.get(cmd_name, ("", ""))[0].partition(":")
        return getattr(import_module(module), attribute) if module else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list, without an import."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.lazy.items()])


def check_versions() -> None:
    """Raise a ValueError for a torch before 2.0, or a numpy newer than torch can use, which knows numpy 2 since 2.3."""
    with suppress(PackageNotFoundError):  # installed without a record: torch itself will tell
        torch, numpy = version("torch"), version("numpy")
        number = tuple(map(int, re.findall(r"\d+", torch)[:2]))
        if number < (2, 0):
            raise ValueError(f"found torch {torch}, expected 2.0 or newer: run this where it is; the grid works here, "
                             "too, in the patched scripts")
        if number < (2, 3) and not numpy.startswith(("0.", "1.")):
            raise ValueError(f"found torch {torch} with numpy {numpy}, expected a numpy before 2 with a torch before "
                             "2.3: pip install 'numpy<2'")


def command_line() -> str:
    """The command as it could be typed again, without the interpreter's path."""
    script = Path(sys.argv[0])
    if installed() and script.parent == TOOLS:
        return shlex.join(["art-edm", tool_command(script.stem), *sys.argv[1:]])
    return shlex.join(["python", os.path.relpath(script) if script.exists() else script.name, *sys.argv[1:]])


def versions() -> Dict[str, Any]:
    """Versions that a result may depend on, and the number of threads."""
    import numpy
    import torch

    return {
        "art_edm": __version__, "torch": torch.__version__, "numpy": numpy.__version__,
        "python": platform.python_version(), "threads": torch.get_num_threads(),
    }
