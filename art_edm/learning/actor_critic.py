"""One learning step: temporal differences, updates (29) and the multiplier's (30), as pure functions.

Symbols
-------
gamma     multiplier of the constraint int v dt = T
delta_k   V_{k+1} - V_k + r_k dt, with r of equation (13)
trace     lambda_gae in [0, 1]: the weight of delta_{k+j} in the advantage of step k is trace^j; 0 is (29) itself
e         terminal error s_N - 1 of each path
"""

from __future__ import annotations

from typing import Tuple

import torch

from art_edm.learning.policy import Policy
from art_edm.learning.rollouts import RolloutSettings, Trajectory

__all__ = ["actor_loss", "advantages", "centre", "critic_loss", "multiplier_step", "rewards", "temporal_differences"]


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


def advantages(delta: torch.Tensor, trace: float) -> torch.Tensor:
    """A_k = delta_k + trace A_{k+1}, [N, B]."""
    if trace == 0:
        return delta
    rows = list(delta)
    for k in range(len(rows) - 2, -1, -1):
        rows[k] = rows[k] + trace * rows[k + 1]
    return torch.stack(rows)


def centre(advantage: torch.Tensor, repeats: int) -> torch.Tensor:
    """Subtract a baseline from advantages [N, B]: at each time, the mean over the rollouts of the same noise.

    Samples differ in what their path costs far more than policies do; a rollout is therefore judged
    against others of its own noise (the set of B / repeats noises is there `repeats` times over), or,
    with one rollout of each, against all. The factor undoes the shrinkage by a rollout's own share.
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
