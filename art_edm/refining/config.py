"""Settings of a refinement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Tuple

__all__ = ["RefineConfig"]


@dataclass(frozen=True)
class RefineConfig:
    """Settings of a refinement; noises are taken in batches of the context's size."""

    seed: int = 0
    noises: int = 32  # M, over which the error is minimised
    validation: int = 96  # other noises, which decide when it ends and whether a grid may be returned
    fine_steps: int = 40  # of the reference solution
    fine_solver: str = "rk4"
    iterations: int = 12
    cheap_iterations: int = 40  # in all, while they took fewer than `cheap_evaluations`
    cheap_evaluations: int = 50_000
    step: float = 0.005  # of differences, relative to the smaller gap beside a level
    damping: float = 1.0  # of the first step, relative to the curvature
    tolerance: float = 1e-3  # two iterations in a row that gain less, relatively, end it
    patience: int = 3  # so many iterations without a gain on the validation noises end it
    weights: bool = False  # the weights of each step are moved, too
    free: int = 4  # newest slopes of a step whose weights are moved
    ridges: Tuple[float, ...] = (0.0,)  # rho of the weights, one after the other

    @classmethod
    def of_weights(cls, **changed: Any) -> "RefineConfig":
        """For levels and weights in few steps: their errors are large, and exact paths need not be as fine."""
        return cls(**{"weights": True, "fine_solver": "clock", "fine_steps": 50, "noises": 48, "validation": 64,
                      "damping": 0.01, "iterations": 9, "cheap_iterations": 9, **changed})

    def judged_by(self, detector: Any) -> "RefineConfig":
        """For the features of a detector, if there is one: a distribution needs more noises than a mean."""
        return replace(self, noises=64, validation=192) if detector else self
