"""Actor and critic: the Gaussian policy (11) and the value function with V(T) = 0.

Symbols (all in the base clock: v = du/dt, q = |Q| rate^2; in the linear clock v = theta, q = |Q|)
-------
features    [..., 5]: time tau = t/T, and how close its end is, log(1 - tau), since networks behave in log
            sigma there; the same of the base-clock fraction s; and log(1 + q) of the sample.
            The critic sees all: samples differ in q far more than the policy's choices do, and what the
            critic does not explain is noise to the actor. What the policy sees is chosen by name: `time`
            alone, so that it distils without loss and is the same for all samples; `path`, s as well;
            `state`, q as well, as in the paper.
mean        mu(features), the speed the policy prefers; it starts at 1 along the base clock
variance    temperature / max(q, epsilon), equation (11)
"""

from __future__ import annotations

from typing import Optional, Union

import numpy as np
import torch
from torch import nn

__all__ = ["Critic", "Policy", "POLICY_INPUTS", "make_features", "sample_action"]

POLICY_INPUTS = {"time": 2, "path": 4, "state": 5}  # features that the policy's network is given

LEAST_LEFT = 1e-4  # what is at least left of a path, so that its speed stays positive
LOG_RESOLUTION = 3e-3  # resolution of log(1 - s)
FIRST_SCALE = {2: 60.0}  # scale of the first layer's start, by its inputs: a function of time alone takes more detail
FIRST_WIDTH = {2: 192}  # and costs one evaluation for all paths
TABLE = 1.0  # how much faster than the network's weights the table of the steps is learned


def make_features(tau: Union[float, torch.Tensor], s: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Features of decisions: tau in [0, 1], a number or as s; s [...], q [...] -> [..., 5]."""
    time = torch.as_tensor(tau, dtype=s.dtype).expand(s.shape)
    pairs = [part for u in (time, s) for part in (2 * u.clamp(0, 1.5) - 1, _close(u))]
    return torch.stack([*pairs, torch.log1p(q)], dim=-1)


def _close(u: torch.Tensor) -> torch.Tensor:
    return (1 - u + LOG_RESOLUTION).clamp_min(LOG_RESOLUTION).log() / -3 - 0.5


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
                bound = layer.in_features**-0.5 * (FIRST_SCALE.get(inputs, 8.0) if layer is net[0] else 1)
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

    Where time is all that it sees, a number for each step is added to the network's output: |Q| of a trained
    network wavers within a few steps (on MNIST, above sigma = 10), which the network is too smooth to follow.
    """

    def __init__(
        self, generator: torch.Generator, inputs: str = "time", arrive: Optional[float] = None
    ) -> None:
        super().__init__()
        self.inputs, self.arrive, width = inputs, arrive, POLICY_INPUTS[inputs]
        self.net = _mlp(width, FIRST_WIDTH.get(width, 48), generator)
        has_table = inputs == "time" and arrive is not None
        self.table = nn.Parameter(torch.zeros(round(1 / arrive))) if has_table else None  # [N]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features [..., B, 5], of one time along B -> mean [..., B]."""
        seen = features[..., : POLICY_INPUTS[self.inputs]]
        if self.inputs == "time":
            seen = seen[..., :1, :]  # all B decisions are at the same time
        log_factor = self.net(seen).squeeze(-1)
        if self.table is not None:
            step = ((seen[..., 0] + 1) / 2 * len(self.table)).round().long()  # k = tau N
            log_factor = log_factor + TABLE * self.table[step]
        if self.arrive is None:
            return log_factor.exp().expand(features.shape[:-1])
        time_left, left = (1 - features[..., 0]) / 2, (1 - features[..., 2]) / 2
        say = 1 - self.arrive / time_left
        return left.clamp_min(LEAST_LEFT) / time_left * (say * log_factor).exp()

    @torch.no_grad()
    def plan(self, num_steps: int) -> Optional[np.ndarray]:
        """All that the network has to say, [N], where it sees the time alone: mean = (1 - s) plan[k].

        None where it sees more, or where paths need not arrive.
        """
        if self.inputs != "time" or self.arrive is None:
            return None
        tau = torch.arange(num_steps, dtype=torch.float64) / num_steps
        at_start = make_features(tau, torch.zeros_like(tau), torch.zeros_like(tau))[:, None]  # [N, 1, 5]
        return self(at_start.float()).squeeze(1).double().numpy()


class Critic(nn.Module):
    """V(features), zero at tau = 1 by construction."""

    def __init__(self, generator: torch.Generator, width: int = 24) -> None:
        super().__init__()
        self.net = _mlp(5, width, generator)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features [..., 5] -> value [...]."""
        remaining = (1 - features[..., 0]) / 2  # 1 - tau
        return remaining * self.net(features).squeeze(-1)


def sample_action(
    mean: np.ndarray, q: np.ndarray, temperature: float, epsilon: float, noise: np.ndarray
) -> np.ndarray:
    """v ~ N(mean, temperature / max(q, epsilon)), equation (11); all [B], `noise` unit normal."""
    return mean + np.sqrt(temperature / np.maximum(q, epsilon)) * noise
