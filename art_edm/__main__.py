"""`art-edm COMMAND ...`, or `python -m art_edm COMMAND ...`: the scripts of tools/, wherever they are installed."""

from __future__ import annotations

import ast
import runpy
import sys
from typing import Dict

import click

from art_edm.runtime.cli import TOOLS, tool_command

__all__ = ["main"]


def scripts() -> Dict[str, str]:
    """Command -> path of its script."""
    return {tool_command(path.stem): str(path) for path in sorted(TOOLS.glob("*.py"))}


def listing() -> str:
    """What `art-edm` alone shows: a line for each command."""
    lines = ["Usage: art-edm COMMAND [OPTIONS]...", "", "Commands (each has --help):"]
    for name, path in scripts().items():
        with open(path, encoding="utf-8") as file:
            summary = (ast.get_docstring(ast.parse(file.read())) or "").partition("\n")[0]
        lines.append(f"  {name:<14}{summary}")
    return "\n".join(lines)


def main() -> None:
    """Run the script of the command that comes first, with the arguments that follow it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    known = scripts()
    if name in ("--help", "-h"):
        click.echo(listing())
    elif name not in known:
        click.echo(f"Error: found the command {name!r}, expected one of {', '.join(known)}", err=True)
        sys.exit(2)
    else:
        sys.argv[:2] = [known[name]]
        sys.path.insert(0, str(TOOLS))  # as Python does for a script: its own packages stand beside it
        try:
            runpy.run_path(known[name], run_name="__main__")
        except KeyboardInterrupt:  # in the imports; later ones are the tool's
            sys.exit("Aborted")


if __name__ == "__main__":
    main()
