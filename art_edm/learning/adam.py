"""Adam and plain gradient steps for networks of a few thousand weights.

torch.optim would do, but making one of its optimizers imports torch's compiler: 1.2 s, a quarter of the time
that learning takes. All weights of a network are one vector here, so that a step is a handful of operations.
"""

from __future__ import annotations

from typing import Any, Dict, List

import torch

__all__ = ["Adam", "Sgd"]


class Sgd:
    """w <- w - rate g: the steps of (29) as they stand."""

    def __init__(self, parameters: Any) -> None:
        self.parameters: List[torch.Tensor] = list(parameters)
        self.sizes = [p.numel() for p in self.parameters]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step along the gradients that are there; the rate is given each time, since it decays."""
        gradient = torch.cat([p.grad.reshape(-1) for p in self.parameters])
        for p, change in zip(self.parameters, self.direction(gradient).split(self.sizes)):
            p.sub_(rate * change.reshape(p.shape))

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """What is subtracted, in units of the rate; [number of weights]."""
        return gradient

    def state_dict(self) -> Dict[str, Any]:
        """All that a step depends on, besides the weights."""
        return {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""


class Adam(Sgd):
    """Adam (1412.6980), algorithm 1: m and v average g and g^2, w <- w - rate m / (sqrt v + eps)."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.count = 0
        self.mean, self.square = (torch.zeros(sum(self.sizes)) for _ in range(2))

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """m / (sqrt v + eps), both corrected for their start at zero."""
        self.count += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.lerp_(gradient.square(), 0.001)
        scale = (self.square / (1 - 0.999**self.count)).sqrt_().add_(1e-8)
        return self.mean / (1 - 0.9**self.count) / scale

    def state_dict(self) -> Dict[str, Any]:
        """Both averages and the number of steps."""
        return {"count": self.count, "mean": self.mean.clone(), "square": self.square.clone()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.count = int(state["count"])
        self.mean, self.square = state["mean"].clone(), state["square"].clone()
