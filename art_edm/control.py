"""The controlled process: environments in which a sampling clock is tried, and rollouts.

Symbols (s, v, q as in policy.py; cost in units of `unit`, which is c^2 or 1)
-------
tau     sampling clock as a fraction, tau_k = k / N
q       |Q| rate^2 / unit, the running cost's weight: cost of a step = dt v^2 (mean of q over the step)
horizon length of the sampling clock in the units of the rewards: 1 when normalised, T in the paper's form

*Live*: the denoiser is called in every rollout. *Cached*: |Q| is interpolated from dense trajectories,
which the policy cannot change, so that no rollout costs an evaluation. Both see the same process.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np
import torch

from .clock import Clock
from .denoiser import Denoiser
from .field import Surrogate, surrogate
from .policy import Policy, make_features, sample_action
from .profile import Profile, advance

__all__ = ["CachedEnvironment", "Environment", "LiveEnvironment", "RolloutSettings", "Trajectory", "rollout"]

DIVERGED = "lower its rates, or leave --preset=paper and --clock=linear, which are ill-conditioned at large sigma_max"


class Environment:
    """A batch of paths, each at its own fraction s of the base clock."""

    s: torch.Tensor  # [B]

    def __init__(self, clock: Clock, unit: float) -> None:
        self.clock, self.unit = clock, unit

    def reset(self, batch: int, repeats: int, generator: torch.Generator) -> None:
        """Put `batch` paths at sigma_max: batch / repeats different noises, the whole set `repeats` times over."""
        raise TypeError(f"{type(self).__name__} does not define reset()")

    def weight(self) -> torch.Tensor:
        """q at the current points, [B]."""
        raise TypeError(f"{type(self).__name__} does not define weight()")

    def move(self, ds: torch.Tensor) -> None:
        """Advance each path by ds [B]; beyond s = 1 (a policy may overshoot) the path rests at the floor."""
        raise TypeError(f"{type(self).__name__} does not define move()")


class CachedEnvironment(Environment):
    """|Q| interpolated along the M trajectories of a profile."""

    def __init__(self, profile: Profile, clock: Clock, unit: float, resolution: int = 2048) -> None:
        super().__init__(clock, unit)
        s = np.linspace(0, 1, resolution + 1)
        roots = np.sqrt(profile.norms(clock.sigma(s)) / unit) * clock.rate(s)  # [M, resolution + 1]
        self.table = torch.from_numpy(roots)
        self.resolution = resolution

    def reset(self, batch: int, repeats: int, generator: torch.Generator) -> None:
        self.s = torch.zeros(batch, dtype=torch.float64)
        shift = int(torch.randint(len(self.table), (1,), generator=generator))
        rows = (torch.arange(batch // repeats) + shift) % len(self.table)  # every trajectory equally often
        self.offset = rows.repeat(repeats) * (self.resolution + 1)

    def weight(self) -> torch.Tensor:
        position = (self.s * self.resolution).clamp(0, self.resolution - 1e-6)
        left = position.long()
        index = self.offset + left
        return torch.lerp(self.table.take(index), self.table.take(index + 1), position - left).square()

    def move(self, ds: torch.Tensor) -> None:
        self.s = self.s + ds


class LiveEnvironment(Environment):
    """The denoiser evaluated along each rollout: three evaluations per point that is looked at."""

    def __init__(self, denoiser: Denoiser, clock: Clock, unit: float, euler: bool = False) -> None:
        super().__init__(clock, unit)
        self.denoiser, self.euler = denoiser, euler
        self.floor = float(clock.fraction(denoiser.sigma_min))

    def reset(self, batch: int, repeats: int, generator: torch.Generator) -> None:
        shape = (batch // repeats, *self.denoiser.img_shape)
        latents = torch.randn(shape, generator=generator, dtype=torch.float64).repeat(repeats, 1, 1, 1)
        labels = self.denoiser.draw_labels(len(latents) // repeats, generator)
        self.labels = None if labels is None else labels.repeat(repeats, 1)
        self.x = self.denoiser.initial(latents.to(self.denoiser.device), self.clock.sigma_max)
        self.s = torch.zeros(batch, dtype=torch.float64)
        self.point: Optional[Surrogate] = None

    def _sigma(self) -> torch.Tensor:
        """Noise levels [B], never below the denoiser's lowest."""
        levels = self.clock.sigma(self.s.numpy().clip(0, self.floor))
        return self.denoiser.round_sigma(torch.from_numpy(np.maximum(levels, self.denoiser.sigma_min)).to(self.x))

    def _look(self) -> Surrogate:
        if self.point is None:
            self.point = surrogate(self.denoiser, self.x, self._sigma(), self.labels)
        return self.point

    def weight(self) -> torch.Tensor:
        rate = torch.from_numpy(self.clock.rate(self.s.numpy().clip(0, 1)))
        return self._look().norm.cpu().double() * rate.square() / self.unit

    def move(self, ds: torch.Tensor) -> None:
        point, before = self._look(), self._sigma()
        self.s = self.s + ds
        after = self._sigma()
        if self.euler:  # the paper's step along the drift (5)
            slope = (self.x - point.denoised) / before.reshape(-1, 1, 1, 1)
            self.x = self.x + (after - before).reshape(-1, 1, 1, 1) * slope
        else:
            self.x = advance(self.x, point, before, after)
        self.point = None


class RolloutSettings(NamedTuple):
    """What a rollout needs to know of the training configuration."""

    num_steps: int  # N
    temperature: float  # lambda, in units of `unit`
    epsilon: float  # floor of q in the policy's variance
    horizon: float  # length of the sampling clock
    simpson: bool  # weigh a step by Simpson's rule rather than by q where it starts
    repeats: int  # rollouts of each noise


class Trajectory(NamedTuple):
    """A batch of rollouts; N steps, B paths."""

    s: torch.Tensor  # base-clock fraction, [N + 1, B]
    features: torch.Tensor  # [N, B, 4]
    action: torch.Tensor  # v, [N, B]
    q: torch.Tensor  # where each step starts, [N, B]
    cost: torch.Tensor  # int q v^2 dt of each step, [N, B]


def rollout(
    env: Environment, policy: Policy, settings: RolloutSettings, batch: int, generator: torch.Generator
) -> Trajectory:
    """Travel `batch` paths under the policy, equations (10)-(12) in discrete time.

    Raises a FloatingPointError if the policy has diverged.

    Simpson's rule over the step sees what the start of the step hides: with the left endpoint alone the
    policy learns to leap over the costly region from a cheap point before it.
    """
    env.reset(batch, settings.repeats, generator)
    dtau = 1 / settings.num_steps
    noises = torch.randn((settings.num_steps, batch), generator=generator, dtype=torch.float64)
    rows = {name: [] for name in ("features", "action", "q", "cost")}
    path = [env.s]
    q = env.weight()
    for k in range(settings.num_steps):
        features = make_features(k * dtau, env.s, q)
        with torch.no_grad():
            mean = policy(features.float()).double()
        if not mean.isfinite().all():
            raise FloatingPointError(f"the policy's speed is not finite at step {k}: learning diverged; {DIVERGED}")
        action = sample_action(mean, q, settings.temperature, settings.epsilon, noises[k])
        start, more = q, k + 1 < settings.num_steps
        if settings.simpson:
            env.move(action * dtau / 2)
            middle = env.weight()
            env.move(action * dtau / 2)
            q = env.weight()
            average = (start + 4 * middle + q) / 6
        else:
            env.move(action * dtau)
            q = env.weight() if more else q
            average = start
        cost = average * action.square() * dtau * settings.horizon
        for name, value in zip(rows, (features, action, start, cost)):
            rows[name].append(value)
        path.append(env.s)
    return Trajectory(s=torch.stack(path), **{name: torch.stack(values) for name, values in rows.items()})
