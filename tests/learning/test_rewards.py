"""Actions (11) and rewards (13): by hand, by quadrature, and in another base clock."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss

from art_edm.learning.actor_critic import rewards
from art_edm.learning.policy import sample_action
from art_edm.learning.rollouts import RolloutSettings, Trajectory


def settings(steps: int, temperature: float, horizon: float) -> RolloutSettings:
    return RolloutSettings(steps, temperature, 0.1, horizon, simpson=True, repeats=1)


def test_policy_does_not_depend_on_the_base_clock():
    """N(mu, lambda / (|Q| rate^2)) for v is N(rate mu, lambda / |Q|) for theta = rate v."""
    norm, rate, noise = np.random.default_rng(0).standard_normal((3, 50))
    norm, rate, mu = np.abs(norm) + 0.2, np.abs(rate) + 0.5, np.ones(50)
    theta = rate * sample_action(mu, norm * rate**2, 0.1, 0.0, noise)
    np.testing.assert_allclose(theta, sample_action(rate * mu, norm, 0.1, 0.0, noise), rtol=1e-12)
    assert not np.allclose(theta, rate * sample_action(mu, norm, 0.1, 0.0, noise), rtol=1e-2)
    held = sample_action(mu, np.full(50, 1e-9), 0.1, 0.5, noise)
    np.testing.assert_allclose(held, mu + (0.1 / 0.5) ** 0.5 * noise, rtol=1e-12)  # |Q| replaced by max(|Q|, epsilon)


def step_path(action: np.ndarray, q: np.ndarray, dt: float) -> Trajectory:
    """One step from s = 0 that arrives."""
    action, q = torch.from_numpy(action), torch.from_numpy(q)
    s = torch.stack([torch.zeros_like(action), torch.ones_like(action)])
    return Trajectory(s, torch.zeros(1, len(action), 5), action[None], q[None], (q * action.square() * dt)[None])


def test_compensated_reward_is_free_of_the_policys_variance():
    """E[-q v^2 + temperature] = -q mu^2 over v ~ N(mu, temperature / q), by Gauss-Hermite quadrature."""
    nodes, weights = hermegauss(5)
    weights = torch.from_numpy(weights / weights.sum())
    temperature, dt = 0.3, 0.5
    for mu, q in ((1.0, 0.2), (0.4, 7.0)):
        weight = np.full_like(nodes, q)
        action = sample_action(np.full_like(nodes, mu), weight, temperature, 0.1, nodes)
        path = step_path(action, weight, dt)
        how = settings(1, temperature, dt)
        expected = -q * mu**2 * dt
        assert float(rewards(path, how, 0.0, 0.0)[0] @ weights) == pytest.approx(expected, rel=1e-12)
        without = float(-path.cost[0] @ weights)
        assert without == pytest.approx(expected - temperature * dt, rel=1e-12)
        with_gamma = float(rewards(path, how, -2.0, 0.0)[0] @ weights)
        assert with_gamma == pytest.approx(expected + 2 * mu * dt, rel=1e-12)


def test_rewards_by_hand():
    s = torch.tensor([[0.0, 0.0], [0.4, 0.6], [0.9, 1.2]], dtype=torch.float64)
    action = torch.tensor([[0.8, 1.2], [1.0, 1.2]], dtype=torch.float64)
    cost = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64)
    path = Trajectory(s, torch.zeros(2, 2, 5), action, torch.ones(2, 2), cost)
    found = rewards(path, settings(2, 0.05, 4.0), gamma=-1.5, penalty=20.0)
    dt = 2.0
    expected = np.array([
        [-0.1 + (0.05 + 1.5 * 0.8) * dt, -0.2 + (0.05 + 1.5 * 1.2) * dt],
        [-0.3 + (0.05 + 1.5 * 1.0) * dt - 20 * 4 * 0.1**2 / 2, -0.4 + (0.05 + 1.5 * 1.2) * dt - 20 * 4 * 0.2**2 / 2],
    ])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert not np.allclose(rewards(path, settings(2, 0.05, 4.0), 1.5, 20.0).numpy(), expected)
