"""Actor and critic: the Gaussian policy (11) and the value function with V(T) = 0.

Symbols (all in the base clock: v = du/dt, q = |Q| rate^2; in the linear clock v = theta, q = |Q|)
-------
features    [..., 4]: time tau = t/T and base-clock fraction s, scaled to [-1, 1]; how close the end is,
            log(1 - s), since networks behave in log sigma there; and log(1 + q) of the sample.
            The critic sees all: samples differ in q far more than the policy's choices do, and what the
            critic does not explain is noise to the actor. The policy sees time and s alone, so that it
            distils without loss; with `state` it sees q as well.
mean        mu(features), the speed the policy prefers; it starts at 1 along the base clock
variance    temperature / max(q, epsilon), equation (11)
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import nn

__all__ = ["Critic", "Policy", "make_features", "sample_action"]

CLOSE = 3e-3  # resolution of log(1 - s)
WIDE = 8.0  # scale of the first layer's start


def make_features(tau: float, s: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Features of a decision: tau scalar in [0, 1], s [B], q [B] -> [B, 4]."""
    close = (1 - s + CLOSE).clamp_min(CLOSE).log() / -3 - 0.5
    return torch.stack([torch.full_like(s, 2 * tau - 1), 2 * s.clamp(0, 1.5) - 1, close, torch.log1p(q)], dim=-1)


class _Tanh(nn.Module):
    """tanh x = 2 sigmoid(2 x) - 1: torch's own tanh takes ten times as long on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(2 * x) * 2 - 1


def _mlp(inputs: int, width: int, generator: torch.Generator) -> nn.Sequential:
    """Two hidden layers of tanh; the last layer starts at zero. Initialised from `generator` alone.

    The first layer starts wide, as random features: a clock must be able to change its pace within a
    twentieth of its run, where an ordinary start needs thousands of steps to get beyond a slow bend.
    """
    net = nn.Sequential(nn.Linear(inputs, width), _Tanh(), nn.Linear(width, width), _Tanh(), nn.Linear(width, 1))
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5 * (WIDE if layer is net[0] else 1)
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)
        net[-1].weight.zero_()
        net[-1].bias.zero_()
    return net


class Policy(nn.Module):
    """Mean speed mu(features) > 0.

    With `arrive` = dtau, mu = (1 - s)/(1 - tau) exp(h net), h = 1 - dtau/(1 - tau): the speed that travels
    what is left in the time that is left, times what the network makes of it. The factor h takes the
    network's say away in the last step, which therefore ends at s = 1 as the last step of every grid
    does. This spares the actor the leap at the end that a base clock with small steps near sigma = 0
    would otherwise ask of it. Without `arrive`, mu = exp(net), and (30) alone makes paths arrive.
    """

    def __init__(
        self, generator: torch.Generator, state: bool = False, arrive: Optional[float] = None, width: int = 48
    ) -> None:
        super().__init__()
        self.inputs, self.arrive = 4 if state else 3, arrive
        self.net = _mlp(self.inputs, width, generator)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features [..., 4] -> mean [...]."""
        log_factor = self.net(features[..., : self.inputs]).squeeze(-1)
        if self.arrive is None:
            return log_factor.exp()
        time_left, left = (1 - features[..., 0]) / 2, (1 - features[..., 1]) / 2
        say = 1 - self.arrive / time_left
        return left.clamp_min(1e-4) / time_left * (say * log_factor).exp()


class Critic(nn.Module):
    """V(features), zero at tau = 1 by construction."""

    def __init__(self, generator: torch.Generator, width: int = 48) -> None:
        super().__init__()
        self.net = _mlp(4, width, generator)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features [..., 4] -> value [...]."""
        remaining = (1 - features[..., 0]) / 2  # 1 - tau
        return remaining * self.net(features).squeeze(-1)


def sample_action(
    mean: torch.Tensor, q: torch.Tensor, temperature: float, epsilon: float, noise: torch.Tensor
) -> torch.Tensor:
    """v ~ N(mean, temperature / max(q, epsilon)), equation (11); all [B], `noise` unit normal."""
    return mean + (temperature / q.clamp_min(epsilon)).sqrt() * noise
