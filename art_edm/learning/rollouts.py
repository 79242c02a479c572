"""The controlled process: environments in which a sampling clock is tried, and rollouts.

Symbols (s, v, q as in policy.py; cost in units of `unit`, which is c^2 or 1)
-------
tau     sampling clock as a fraction, tau_k = k / N
q       |Q| rate^2 / unit, the running cost's weight: cost of a step = dt v^2 (mean of q over the step);
        for a solver of order p, C_p rate^(p + 1) / unit, and the cost has v^(p + 1)
horizon length of the sampling clock in the units of the rewards: 1 when normalised, T in the paper's form

*Live*: the denoiser is called in every rollout. *Cached*: |Q| is interpolated from dense trajectories,
which the policy cannot change, so that no rollout costs an evaluation. Both see the same process.
"""

from __future__ import annotations

from typing import Callable, Dict, List, NamedTuple, Optional

import numpy as np
import torch

from art_edm.grids.clocks import Clock
from art_edm.learning.policy import LEAST_LEFT, Policy, make_features, sample_action
from art_edm.measure.dense_paths import advance
from art_edm.measure.field import Surrogate, surrogate
from art_edm.measure.profile import Profile
from art_edm.models.denoiser import Denoiser
from art_edm.models.evaluate import FiniteCheck
from art_edm.runtime.distributed import ALONE, World
from art_edm.runtime.errors import NonFiniteOutput

__all__ = ["CachedEnvironment", "Environment", "LiveEnvironment", "RolloutSettings", "Trajectory", "rollout"]

DIVERGED = "lower its rates, or leave --preset=paper and --clock=linear, which are ill-conditioned at large sigma_max"


class Environment:
    """A batch of paths, each at its own fraction s of the base clock."""

    s: np.ndarray  # [B]

    def __init__(self, clock: Clock, unit: float) -> None:
        self.clock, self.unit = clock, unit

    def reset(self, batch: int, repeats: int, generator: torch.Generator) -> None:
        """Put `batch` paths at sigma_max: batch / repeats different noises, the whole set `repeats` times over."""
        raise TypeError(f"{type(self).__name__} does not define reset()")

    def weight(self) -> np.ndarray:
        """q at the current points, [B]."""
        raise TypeError(f"{type(self).__name__} does not define weight()")

    def move(self, ds: np.ndarray) -> None:
        """Advance each path by ds [B]; beyond s = 1 (a policy may overshoot) the path rests at the floor."""
        raise TypeError(f"{type(self).__name__} does not define move()")


class CachedEnvironment(Environment):
    """|Q| interpolated along the M trajectories of a profile; in numpy, which is the faster for arrays this small."""

    def __init__(self, profile: Profile, clock: Clock, unit: float, resolution: int = 2048) -> None:
        super().__init__(clock, unit)
        s = np.linspace(0, 1, resolution + 1)
        self.power = profile.order + 1
        norms = profile.norms(clock.sigma(s)) / unit
        root = np.sqrt(norms) if self.power == 2 else norms ** (1 / self.power)
        self.table = root * clock.rate(s)  # [M, resolution + 1]
        self.flat, self.rise = self.table.ravel(), np.diff(self.table, append=0).ravel()
        self.resolution = resolution

    def reset(self, batch: int, repeats: int, generator: torch.Generator) -> None:
        self.s = np.zeros(batch)
        shift = int(torch.randint(len(self.table), (1,), generator=generator))
        rows = (np.arange(batch // repeats) + shift) % len(self.table)  # every trajectory equally often
        self.offset = np.tile(rows, repeats) * (self.resolution + 1)

    def weight(self) -> np.ndarray:
        position = np.minimum(np.maximum(self.s * self.resolution, 0), self.resolution - 1e-6)  # np.clip is slower
        left = position.astype(np.int64)
        index = self.offset + left
        root = self.flat.take(index) + self.rise.take(index) * (position - left)
        return np.square(root) if self.power == 2 else root**self.power

    def move(self, ds: np.ndarray) -> None:
        self.s = self.s + ds


class LiveEnvironment(Environment):
    """The denoiser evaluated along each rollout: three evaluations per point.

    Several processes have the paths `mine`, by noise; each sees q of all, so that all do the same with it.
    """

    def __init__(
        self, denoiser: Denoiser, clock: Clock, unit: float, euler: bool = False, world: World = ALONE
    ) -> None:
        super().__init__(clock, unit)
        self.denoiser, self.euler, self.world = denoiser, euler, world

    def reset(self, batch: int, repeats: int, generator: torch.Generator) -> None:
        noises = batch // repeats
        share = np.arange(self.world.rank, noises, self.world.size)[:, None]
        self.mine = (share + noises * np.arange(repeats)).ravel()  # paths of this process, those of a noise together
        self.repeats = repeats
        latents = torch.randn((noises, *self.denoiser.img_shape), generator=generator, dtype=torch.float64)
        labels = self.denoiser.draw_labels(noises, generator)
        self.labels = None if labels is None else labels[self.mine % noises]
        self.x = self.denoiser.initial(latents[self.mine % noises].to(self.denoiser.device), self.clock.sigma_max)
        self.s = np.zeros(batch)
        self.sigma = self._sigma()
        self.point: Optional[Surrogate] = None

    def _sigma(self) -> torch.Tensor:
        """Noise levels of this process's paths, never below the denoiser's lowest."""
        levels = self.clock.sigma(self.s[self.mine].clip(0, 1))
        return self.denoiser.round_sigma(torch.from_numpy(np.maximum(levels, self.denoiser.sigma_min)).to(self.x))

    def _look(self) -> Surrogate:
        if self.point is None:  # noise by noise, so that the number of processes changes no rounding
            parts, check = [], FiniteCheck(self.x.device)
            for a in range(0, len(self.x), self.repeats):
                b = a + self.repeats
                labels = None if self.labels is None else self.labels[a:b]
                parts.append(surrogate(self.denoiser, self.x[a:b], self.sigma[a:b], labels, see=check.see))
            check.settle()
            self.point = Surrogate(*(torch.cat(each) for each in zip(*parts)))
        return self.point

    def weight(self) -> np.ndarray:
        norms, failed = torch.zeros(len(self.s), dtype=torch.float64), None
        try:
            if len(self.mine):
                norms[self.mine] = self._look().norm.cpu().double()
        except NonFiniteOutput as error:  # known to all by the sum, so that none waits
            norms[self.mine], failed = float("nan"), error
        norms = self.world.sum(norms)
        if norms.isnan().any():
            level = float(self.clock.sigma(self.s[int(norms.isnan().nonzero()[0])].clip(0, 1)))
            found = f"another process's network returned NaN or infinity near sigma = {level:.6g}"
            raise failed or NonFiniteOutput(found)
        return norms.numpy() * np.square(self.clock.rate(self.s.clip(0, 1))) / self.unit

    def move(self, ds: np.ndarray) -> None:
        if not len(self.mine):  # more processes than noises
            self.s = self.s + ds
            return
        point, before = self._look(), self.sigma
        self.s = self.s + ds
        after = self.sigma = self._sigma()
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
    antithetic: bool = False  # half of the repeats explore in the opposite direction
    order: int = 1  # p: the cost is q v^(p + 1)


class Trajectory(NamedTuple):
    """A batch of rollouts; N steps, B paths."""

    s: torch.Tensor  # base-clock fraction, [N + 1, B]
    features: torch.Tensor  # [N, B, 5]
    action: torch.Tensor  # v, [N, B]
    q: torch.Tensor  # where each step starts, [N, B]
    cost: torch.Tensor  # int q v^2 dt of each step, [N, B]


def rollout(
    env: Environment, policy: Policy, settings: RolloutSettings, batch: int, generator: torch.Generator
) -> Trajectory:
    """Travel `batch` paths under the policy, equations (10)-(12) in discrete time.

    Raises a FloatingPointError if the policy has diverged.

    Simpson's rule over the step sees what the start of the step hides: with the left endpoint alone the
    policy learns to leap over the costly region from a cheap point before it. Antithetic rollouts go through the same
    noise with opposite exploration: what is even in it, most of a return's noise near the optimum, cancels.
    """
    env.reset(batch, settings.repeats, generator)
    dtau = 1 / settings.num_steps
    noises = torch.randn((settings.num_steps, batch), generator=generator, dtype=torch.float64).numpy()
    if settings.antithetic:
        noises[:, batch // 2 :] = -noises[:, : batch // 2]
    mean_of = _mean_of(policy, settings.num_steps)
    rows: Dict[str, List[np.ndarray]] = {name: [] for name in ("action", "q", "cost")}
    path = [env.s]
    q = env.weight()
    for k in range(settings.num_steps):
        mean = mean_of(k, env.s, q)
        if not np.isfinite(mean).all():
            raise FloatingPointError(f"the policy's speed is not finite at step {k}: learning diverged; {DIVERGED}")
        action = sample_action(mean, q, settings.temperature, settings.epsilon, noises[k])
        start, more = q, k + 1 < settings.num_steps
        if settings.simpson:
            env.move(action * (dtau / 2))
            middle = env.weight()
            env.move(action * (dtau / 2))
            q = env.weight()
            average = (start + 4 * middle + q) / 6
        else:
            env.move(action * dtau)
            q = env.weight() if more else q
            average = start
        power = np.square(action) if settings.order == 1 else np.abs(action) ** (settings.order + 1)
        for name, value in zip(rows, (action, start, average * power * (dtau * settings.horizon))):
            rows[name].append(value)
        path.append(env.s)
    s, stacked = np.stack(path), {name: torch.from_numpy(np.stack(values)) for name, values in rows.items()}
    tau = torch.arange(settings.num_steps, dtype=torch.float64)[:, None] / settings.num_steps
    features = make_features(tau, torch.from_numpy(s[:-1]), stacked["q"])
    return Trajectory(s=torch.from_numpy(s), features=features, **stacked)


def _mean_of(policy: Policy, num_steps: int) -> Callable[[int, np.ndarray, np.ndarray], np.ndarray]:
    """The policy's mean as a function of step, s [B] and q [B]."""
    plan = policy.plan(num_steps)
    if plan is not None:
        return lambda k, s, q: np.minimum(np.maximum(1 - s, LEAST_LEFT), 1) * plan[k]  # it may start with a step back

    @torch.no_grad()
    def mean(k: int, s: np.ndarray, q: np.ndarray) -> np.ndarray:
        return policy(make_features(k / num_steps, torch.from_numpy(s), torch.from_numpy(q)).float()).double().numpy()

    return mean
