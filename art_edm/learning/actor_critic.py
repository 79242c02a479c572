"""One learning step: temporal differences, updates (29) and the multiplier's (30), as pure functions.

Symbols
-------
gamma       multiplier of the constraint int v dt = T
delta_k     V_{k+1} - V_k + r_k dt, with r of equation (13)
gae_lambda  in [0, 1]: the weight of delta_{k+j} in the advantage of step k is gae_lambda^j; 0 is (29) itself
e           terminal error s_N - 1 of each path
"""

from __future__ import annotations

from typing import NamedTuple, Tuple

import torch

from art_edm.learning.policy import Policy
from art_edm.learning.rollouts import RolloutSettings, Trajectory

__all__ = [
    "Moments", "actor_loss", "adam_step", "advantages", "centre", "critic_loss", "multiplier_step", "rewards",
    "temporal_differences",
]


def rewards(path: Trajectory, settings: RolloutSettings, gamma: float, penalty: float) -> torch.Tensor:
    """r_k dt of equation (13), [N, B]: (-q v^2 + temperature - gamma v) dt.

    The last step also carries the quadratic terminal term -penalty e^2 / 2 (times the horizon), which
    keeps the multiplier from having to do all the work.
    """
    dt = settings.horizon / settings.num_steps
    running = -path.cost + (settings.temperature - gamma * path.action) * dt
    terminal = -penalty * settings.horizon * (path.s[-1] - 1).square() / 2
    return torch.cat([running[:-1], (running[-1] + terminal).unsqueeze(0)])


def temporal_differences(values: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """delta [N, B] from values [N, B] at the start of each step and rewards [N, B]; V(T) = 0."""
    following = torch.cat([values[1:], torch.zeros_like(values[:1])])
    return following - values + reward


def advantages(delta: torch.Tensor, gae_lambda: float) -> torch.Tensor:
    """A_k = delta_k + gae_lambda A_{k+1}, [N, B]."""
    if gae_lambda == 0:
        return delta
    rows = list(delta)
    for k in range(len(rows) - 2, -1, -1):
        rows[k] = rows[k] + gae_lambda * rows[k + 1]
    return torch.stack(rows)


def centre(advantage: torch.Tensor, repeats: int) -> torch.Tensor:
    """Subtract a baseline from advantages [N, B]: at each time, the mean over the rollouts of the same noise.

    Samples differ in what their path costs far more than policies do; a rollout is therefore judged
    against others of its own noise (the set of B / repeats noises is there `repeats` times over), or,
    with one rollout of each, against all. The factor undoes the shrinkage by a rollout's own share where rollouts
    are independent. Of antithetic ones it is R/(R - 1) too much, as what is odd in the exploration, which alone enters
    the gradient, has no part in the mean. Training scales the result to unit variance, where no factor matters.
    """
    steps, batch = advantage.shape
    if repeats == 1:
        return advantage - advantage.mean(dim=1, keepdim=True)
    groups = advantage.reshape(steps, repeats, batch // repeats)
    return (groups - groups.mean(dim=1, keepdim=True)).reshape(steps, batch) * (repeats / (repeats - 1))


def critic_loss(values: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """Scalar whose negative gradient is sum_k dV_k A_k, averaged over paths: the critic's line of (29).

    Args:
        values: what the critic says at the start of each step, [N, B], with its gradient.
    """
    return -(values * advantage.float()).sum(dim=0).mean()


def actor_loss(policy: Policy, path: Trajectory, advantage: torch.Tensor, settings: RolloutSettings) -> torch.Tensor:
    """Scalar whose negative gradient is sum_k dlog pi_k A_k, averaged over paths: the actor's line of (29).

    dlog pi = max(q, epsilon) (v - mu) / temperature dmu.
    """
    mean = policy(path.features.float())  # [N, B]
    score = path.q.clamp_min(settings.epsilon) * (path.action - mean.detach()) / settings.temperature
    return -(mean * (score * advantage).float()).sum(dim=0).mean()


def multiplier_step(gamma: float, path: Trajectory, rate: float, settings: RolloutSettings) -> Tuple[float, float]:
    """gamma + rate (psi_K - T), equation (30), with the mean over paths; returns it and the mean error e."""
    error = float((path.s[-1] - 1).mean())
    return gamma + rate * error * settings.horizon, error


class Moments(NamedTuple):
    """What Adam remembers of the gradients of all weights, as one vector each."""

    count: int  # steps so far
    mean: torch.Tensor  # of g, [W]
    square: torch.Tensor  # of g^2, [W]

    @classmethod
    def zero(cls, weights: torch.Tensor) -> "Moments":
        """Before the first step."""
        return cls(0, torch.zeros(len(weights)), torch.zeros(len(weights)))


def adam_step(moments: Moments, gradient: torch.Tensor) -> Tuple[torch.Tensor, Moments]:
    """Adam (1412.6980), algorithm 1: m / (sqrt v + eps) [W], both corrected for their start at zero, and the moments.

    torch.optim's functional form rounds in another order, which would change every learned grid in its last digits;
    its class imports torch's compiler, 1.2 s.
    """
    count, mean = moments.count + 1, moments.mean.lerp(gradient, 0.1)
    square = moments.square.lerp(gradient.square(), 0.001)
    scale = (square / (1 - 0.999**count)).sqrt().add(1e-8)
    return mean / (1 - 0.9**count) / scale, Moments(count, mean, square)
