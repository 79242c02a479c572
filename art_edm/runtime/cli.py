"""What the command-line tools share: one-line errors with honest exit codes, and the record of a command.

Exit codes: 0 done; 2 something the user gave cannot be used (nothing was written); 1 the work could
not be finished (stopped, no connection, or learning diverged).
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any, Dict

import click

from art_edm.runtime.errors import NonFiniteOutput, Stopped

__all__ = ["Command", "Group", "command_line", "versions"]


class _OneLineErrors(click.Command):
    """A command whose errors are one line on stderr, never a traceback."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """As click's own, with the errors this package raises taken as a user's."""
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
            click.echo(f"Error: {' '.join(text.split())}", err=True)
            sys.exit(2)
        if standalone_mode:
            sys.exit(result if isinstance(result, int) else 0)
        return result


class Command(_OneLineErrors):
    """For `@click.command(cls=Command)`."""


class Group(_OneLineErrors, click.Group):
    """For `@click.group(cls=Group)`."""


def command_line() -> str:
    """The command as it could be typed again, without the interpreter's path."""
    script = Path(sys.argv[0])
    return shlex.join(["python", os.path.relpath(script) if script.exists() else script.name, *sys.argv[1:]])


def versions() -> Dict[str, Any]:
    """Versions that a result may depend on, and the number of threads."""
    import numpy
    import torch

    from art_edm import __version__

    return {
        "art_edm": __version__, "torch": torch.__version__, "numpy": numpy.__version__,
        "python": platform.python_version(), "threads": torch.get_num_threads(),
    }
