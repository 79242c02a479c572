"""The exceptions that several folders share."""

from __future__ import annotations

__all__ = ["CheckpointMismatch", "NonFiniteOutput", "Stopped"]


class CheckpointMismatch(ValueError):
    """The checkpoint was made with other settings, or is none; the message names the difference."""


class Stopped(Exception):
    """Work was asked to stop; everything finished is saved, and the message says how to continue."""


class NonFiniteOutput(RuntimeError):
    """A denoiser returned NaN or infinity; the message names the noise level."""
