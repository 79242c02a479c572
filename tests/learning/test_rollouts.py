"""Environments and rollouts: cached against live, cost against the profile, Simpson's rule, the floor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from art_edm.grids.clocks import EdmClock, GaussianClock, LinearClock
from art_edm.learning.policy import Policy
from art_edm.learning.rollouts import CachedEnvironment, LiveEnvironment, RolloutSettings, Trajectory, rollout
from art_edm.measure.dense_paths import measure_profile
from art_edm.measure.field import DIFFERENCE_STEP
from art_edm.measure.profile import Profile
from art_edm.models.analytic import GaussianDenoiser, one_dimensional

SHAPE = (1, 3, 3)
BATCH = 6


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def anisotropic(kind: type = GaussianDenoiser) -> GaussianDenoiser:
    return kind(draw(*SHAPE), 0.02 + draw(*SHAPE, seed=1).square(), SHAPE)


LATENTS = draw(BATCH, *SHAPE, seed=2)


@pytest.fixture(scope="module")
def profile() -> Profile:
    model = anisotropic()
    return measure_profile(model, LATENTS, GaussianClock(80.0, model.sigma_data), points=200)


class FixedLive(LiveEnvironment):
    """Live, from given latents: takes nothing from the generator."""

    latents = LATENTS

    def reset(self, batch, repeats, generator):
        super().reset(batch, repeats, torch.Generator())
        self.x = self.denoiser.initial(self.latents, self.clock.sigma_max)


class FixedCached(CachedEnvironment):
    """Cached, path i on trajectory i: takes nothing from the generator."""

    def reset(self, batch, repeats, generator):
        super().reset(batch, repeats, torch.Generator())
        self.offset = np.arange(batch) * (self.resolution + 1)


class Speeds(torch.nn.Module):
    """A policy of given speeds, one for each step."""

    def __init__(self, speeds) -> None:
        super().__init__()
        self.speeds, self.k = list(speeds), 0

    def forward(self, features):
        self.k += 1
        return torch.full(features.shape[:-1], self.speeds[self.k - 1], dtype=torch.float64)

    def plan(self, num_steps):
        return None


def settings(
    steps: int, temperature: float = 0.0, horizon: float = 1.0, simpson: bool = True, epsilon: float = 0.1,
    repeats: int = 1,
):
    return RolloutSettings(steps, temperature, epsilon, horizon, simpson, repeats)


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lively(sees: str, arrive: bool, steps: int) -> Policy:
    """A policy that depends on all its features."""
    policy = Policy(generator(3), sees, 1 / steps if arrive else None)
    with torch.no_grad():
        policy.net[-1].weight.normal_(std=0.05, generator=generator(4))
    return policy


def costs(path: Trajectory) -> np.ndarray:
    return path.cost.sum(dim=0).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("simpson", [True, False])
@pytest.mark.parametrize("sees, arrive", [("state", False), ("path", True), ("time", True)])
def test_cached_and_live_rollouts_are_the_same_process(profile, sees, arrive, simpson):
    model, clock, steps = anisotropic(), GaussianClock(80.0, 1.0), 64
    unit = profile.optimum / 80
    how = settings(steps, temperature=0.15**2, simpson=simpson)
    live, cached, other = (
        rollout(env, lively(sees, arrive, steps), how, BATCH, generator(seed))
        for env, seed in (
            (FixedLive(model, clock, unit), 7), (FixedCached(profile, clock, unit), 7),
            (FixedCached(profile, clock, unit), 8),
        )
    )
    # The path's integrator (order 2 in steps of 1/64) and the table's interpolation leave a third of a per cent.
    np.testing.assert_allclose(costs(cached), costs(live), rtol=3e-3)
    np.testing.assert_allclose(cached.s[1:], live.s[1:], rtol=5e-3)
    np.testing.assert_allclose(cached.q, live.q, rtol=2e-2)
    assert np.abs(costs(other) / costs(live) - 1).max() > 1e-2  # other noises
    swapped = FixedLive(model, clock, unit)
    swapped.latents = LATENTS.flip(0)
    swapped = rollout(swapped, lively(sees, arrive, steps), how, BATCH, generator())
    assert np.abs(costs(swapped) / costs(cached) - 1).max() > 2e-2  # other paths


def test_cached_paths_use_every_trajectory_equally(profile):
    env = CachedEnvironment(profile, profile.clock, 1.0)
    seen = set()
    for seed in range(20):
        env.reset(5 * BATCH, 1, generator(seed))
        rows = env.offset // (env.resolution + 1)
        assert np.bincount(rows).tolist() == [5] * BATCH
        seen.add(int(rows[0]))
    assert len(seen) > 1  # a batch smaller than M does not always see the same ones


def test_repeated_noises(profile):
    """Path i and path i + batch / repeats are of one noise, cached and live."""
    cached = CachedEnvironment(profile, profile.clock, 1.0)
    cached.reset(12, 3, generator())
    live = LiveEnvironment(anisotropic(), profile.clock, 1.0)
    live.reset(12, 3, generator())
    for noise in (cached.offset, live.x.numpy()[np.argsort(live.mine)]):
        assert len(noise) == 12 and (noise[:4] == noise[4:8]).all() and (noise[:4] == noise[8:]).all()
        assert len(np.unique(noise, axis=0)) == 4  # and not all alike


def test_live_paths_start_at_the_exact_marginal():
    model = anisotropic()
    env = LiveEnvironment(model, GaussianClock(80.0, 1.0), 1.0)
    env.reset(4000, 1, generator())
    scale = (model.variance + 80.0**2).sqrt()
    z = (env.x - model.mean) / scale
    assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1) < 0.02
    first = env.x.clone()
    env.reset(4000, 1, generator())
    assert torch.equal(first, env.x)
    env.reset(4000, 1, generator(8))
    assert not torch.equal(first, env.x)


@pytest.mark.slow
@pytest.mark.parametrize("clock", [GaussianClock(80.0, 0.6), EdmClock(80.0), GaussianClock(80.0, 5.0)])
def test_cost_of_unit_speed_is_the_profiles(profile, clock):
    schedule = clock.sigma(np.linspace(0, 1, 8193))
    expected = profile.cost(schedule)
    for unit, horizon in ((profile.optimum / 80, 1.0), (1.0, 80.0)):
        env = CachedEnvironment(profile, clock, unit)
        for policy in (Policy(generator()), Policy(generator(), arrive=1 / 512)):  # mu = 1 before training
            path = rollout(env, policy, settings(512, horizon=horizon), BATCH, generator())
            found = costs(path).mean() * unit * 80 / horizon
            assert found == pytest.approx(expected, rel=2e-3)
            assert (path.s[-1] - 1).abs().max() < 1e-5
        doubled = rollout(env, Speeds([2.0] * 512), settings(512, horizon=horizon), BATCH, generator())
        assert costs(doubled).mean() * unit * 80 / horizon > 1.2 * expected


def test_normalised_cost_is_j_over_the_optimum(profile):
    """In units of c^2 and T, the cost of the direct schedule is 1."""
    clock, steps = profile.clock, 256
    s = clock.fraction(profile.direct(steps).values)
    env = CachedEnvironment(profile, clock, profile.optimum / 80)
    path = rollout(env, Speeds(np.diff(s) * steps), settings(steps), BATCH, generator())
    assert costs(path).mean() == pytest.approx(1, rel=2e-3)


def test_simpson_sees_the_leap_that_the_left_end_point_hides():
    model = one_dimensional()
    profile = measure_profile(model, draw(BATCH, 1, 1, 1), GaussianClock(3.0, 1.0), points=60)

    def left_cost(shares):
        """Of the grid with these shares, in closed form: |Q| is proportional to (1 + sigma^2)^(-3/2)."""
        steps = np.exp(shares) / np.exp(shares).sum() * 3
        sigma = 3 - np.concatenate([[0], np.cumsum(steps[:-1])])
        return np.sum((1 + sigma**2) ** -1.5 * steps**2)

    best = np.exp(minimize(left_cost, np.zeros(5), method="Nelder-Mead", options={"maxiter": 4000}).x)
    leap, direct = np.append(3 - 3 * np.cumsum(np.append(0, best[:-1])) / best.sum(), 0), profile.direct(5).values
    env = CachedEnvironment(profile, LinearClock(3.0), 1.0)
    costs_of = {}
    for simpson in (False, True):
        for name, grid in (("leap", leap), ("direct", direct)):
            speeds = Speeds(-np.diff(grid) / 3 * 5)
            path = rollout(env, speeds, settings(5, horizon=3.0, simpson=simpson), BATCH, generator())
            costs_of[name, simpson] = costs(path).mean()
    assert costs_of["leap", True] == pytest.approx(profile.cost(leap), rel=0.05)
    assert costs_of["direct", True] == pytest.approx(profile.cost(direct), rel=0.05)
    assert costs_of["leap", True] > 1.1 * costs_of["direct", True]
    # By the left end point, the worse grid is the better one, and better than any can be.
    assert costs_of["leap", False] < costs_of["direct", False] < profile.optimum


class Flat(EdmClock):
    """A clock that forgets its rate."""

    def rate(self, s):
        return np.ones_like(np.asarray(s, np.float64))


@pytest.mark.slow
def test_cost_does_not_depend_on_the_base_clock(profile):
    steps = 1024
    values = EdmClock(80.0).sigma(np.linspace(0, 1, steps + 1))  # one psi(t), in several clocks

    def cost(clock):
        env = CachedEnvironment(profile, clock, 1.0, resolution=8192)
        speeds = np.diff(clock.fraction(values)) * steps
        return costs(rollout(env, Speeds(speeds), settings(steps, horizon=80.0), BATCH, generator()))

    expected = cost(GaussianClock(80.0, 0.5))
    assert expected.mean() == pytest.approx(profile.cost(values), rel=2e-3)
    for clock in (EdmClock(80.0), GaussianClock(80.0, 3.0), EdmClock(80.0, rho=4.0), LinearClock(80.0)):
        np.testing.assert_allclose(cost(clock), expected, rtol=3e-3)
    assert abs(cost(Flat(80.0)).mean() / expected.mean() - 1) > 0.5


class Recorder(GaussianDenoiser):
    """A Gaussian that remembers the noise levels it was asked for."""

    def denoise(self, x, sigma, class_labels):
        self.__dict__.setdefault("seen", []).extend(sigma.tolist())
        return super().denoise(x, sigma, class_labels)


@pytest.mark.parametrize("simpson, euler", [(True, False), (False, True)])
@pytest.mark.parametrize("clock", [GaussianClock(80.0, 0.5), LinearClock(80.0), EdmClock(80.0)], ids=lambda c: c.name)
def test_never_evaluates_below_the_lowest_noise_level(clock, simpson, euler):
    model = anisotropic(Recorder)
    env = LiveEnvironment(model, clock, 1.0, euler)
    how = settings(8, temperature=1e-3, simpson=simpson, epsilon=1.0)
    path = rollout(env, Speeds([2.0] * 8), how, BATCH, generator())  # arrives twice as far as it should
    assert (path.s[-1] > 1.5).all() and (path.s[4] > 0.9).all()
    lowest = model.sigma_min * (1 - DIFFERENCE_STEP)  # the lower point of the central difference
    assert min(model.seen) == pytest.approx(lowest, rel=1e-9)
    assert max(model.seen) == pytest.approx(80 * (1 + DIFFERENCE_STEP), rel=1e-9)
    assert all(values.isfinite().all() for values in path)
    assert clock.sigma(path.s[-1].numpy()).max() == 0  # what would have been asked for without the floor
    looks = 17 if simpson else 8
    assert model.evaluations == len(model.seen) == 3 * BATCH * looks


def test_rests_at_the_floor(profile):
    model, clock = anisotropic(), GaussianClock(80.0, 0.5)
    live, cached = FixedLive(model, clock, 1.0), FixedCached(profile, clock, 1.0)
    for env in (live, cached):
        env.reset(BATCH, 1, generator())
        for _ in range(200):
            env.move(np.full(BATCH, 1 / 200))
        at_end = env.weight()
        env.move(np.full(BATCH, 0.3))
        np.testing.assert_allclose(env.weight(), at_end, rtol=1e-4)
    np.testing.assert_allclose(live.weight(), cached.weight(), rtol=5e-3)
    exact = model.variance * LATENTS / (model.variance + model.sigma_min**2) ** 1.5
    expected = exact.flatten(1).square().mean(dim=1).sqrt() * float(clock.rate(1.0)) ** 2
    np.testing.assert_allclose(live.weight(), expected.numpy(), rtol=5e-3)


@pytest.mark.parametrize("sees", ["time", "path"])
def test_a_policy_that_has_diverged_is_blamed_and_not_the_denoiser(profile, sees):
    policy = lively(sees, True, 8)
    env = FixedCached(profile, GaussianClock(80.0, 1.0), 1.0)
    assert rollout(env, policy, settings(8), BATCH, generator()).cost.isfinite().all()
    with torch.no_grad():
        policy.net[-1].bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite at step 0: learning diverged; lower its rates"):
        rollout(env, policy, settings(8), BATCH, generator())
