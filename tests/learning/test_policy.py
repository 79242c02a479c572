"""What a policy sees: the plan of one that sees time alone, and which features each kind depends on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from art_edm.grids.clocks import LinearClock
from art_edm.learning.policy import POLICY_INPUTS, Critic, Policy, make_features
from art_edm.learning.rollouts import CachedEnvironment, RolloutSettings, Trajectory, rollout
from art_edm.measure.profile import Profile

N, B = 16, 12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lively(kind: type = Policy, sees: str = "time", arrive: float = 1 / N) -> Policy:
    """A policy that depends on all that it sees."""
    policy = kind(generator(3), sees, arrive)
    with torch.no_grad():
        policy.net[-1].weight.normal_(std=0.1, generator=generator(4))
    return policy


class Planless(Policy):
    """A policy that is asked at every step."""

    def plan(self, num_steps):
        return None


class Shifted(Policy):
    """Twin: its plan is one step late."""

    def plan(self, num_steps):
        return np.roll(super().plan(num_steps), 1)


def random_s() -> torch.Tensor:
    """Beyond both ends, too: a noisy path may step back at once, and may overshoot."""
    return 3 * torch.rand(50, generator=generator(), dtype=torch.float64) - 1


def test_the_plan_is_the_mean_at_every_point_of_a_path():
    policy, s = lively().double(), random_s()
    plan = Policy.plan(policy.float(), N)
    policy.double()
    assert s.min() < 0 and s.max() > 1.5
    for k in range(N):
        features = make_features(k / N, s, s.exp())
        left = (1 - s.clamp(0, 1.5)).clamp_min(1e-4)
        with torch.no_grad():
            mean = policy(features)
        np.testing.assert_allclose(mean, left * plan[k], rtol=3e-5)  # the plan is computed in float32
        assert k == N - 1 or not np.allclose(mean, left * plan[k + 1], rtol=1e-3)
    assert plan[-1] == pytest.approx(N, rel=1e-6)  # in the last step the network has no say
    assert np.abs(plan[:-1] * (1 - np.arange(N - 1) / N) - 1).max() > 0.05  # elsewhere it has


@pytest.mark.parametrize("sees", POLICY_INPUTS)
def test_what_each_kind_sees(sees):
    policy, s = lively(sees=sees), torch.full((5,), 0.3).double()
    q = torch.ones(5).double()
    factor = lambda tau, s, q: policy(make_features(tau, s, q).float()) / (1 - s)
    here = factor(0.25, s, q)
    assert not torch.allclose(factor(0.3, s, q) * 0.7 / 0.75, here, rtol=1e-3)
    assert torch.allclose(factor(0.25, s + 0.1, q), here, rtol=1e-5) == (sees == "time")
    assert torch.allclose(factor(0.25, s, q * 3), here, rtol=1e-5) == (sees != "state")
    critic = Critic(generator())
    with torch.no_grad():
        critic.net[-1].weight.normal_(std=0.1, generator=generator(4))
    points = (0.25, s, q), (0.25, s + 0.1, q), (0.25, s, 3 * q)
    values = [critic(make_features(*at).float())[0].item() for at in points]
    assert np.ptp(values) > 1e-3 and len(set(values)) == 3  # the critic sees all


def test_only_time_alone_that_arrives_has_a_plan():
    kinds = list(itertools.product(POLICY_INPUTS, (None, 1 / N)))
    assert [kind for kind in kinds if Policy(generator(), *kind).plan(N) is not None] == [("time", 1 / N)]


def travel(kind: type, precision: torch.dtype = torch.float32) -> Trajectory:
    """Rollouts over |Q| = (1, 2, 4) (0.1 + 3 (1 - sigma)^2), in the precision of the policy."""
    clock = LinearClock(1.0)
    sigma = np.linspace(1, 1e-3, 100)
    profile = Profile(clock, sigma, np.array([[1.0], [2.0], [4.0]]) * (0.1 + 3 * (1 - sigma) ** 2), 0, 0.0)
    env = CachedEnvironment(profile, clock, 1.0)
    how = RolloutSettings(N, 0.1, 0.1, 1.0, simpson=True, repeats=2)
    return rollout(env, lively(kind).to(precision), how, B, generator(7))


def test_rollouts_by_the_plan_are_those_by_the_policy_itself(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # both in float64, to tell rounding from error
    planned, asked, late = (travel(kind, torch.float64) for kind in (Policy, Planless, Shifted))
    assert planned.s.min() < 0 and planned.s.max() > 1  # paths beyond both ends, where 1 - s is bounded
    for name, found, expected, twin in zip(Trajectory._fields, planned, asked, late):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        assert not torch.allclose(twin, expected, rtol=1e-3), name


def test_in_float32_they_agree_to_its_rounding(monkeypatch):
    by_plan = travel(Policy)
    asked = []
    real = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, features: asked.append(len(features)) or real(self, features))
    travel(Policy)
    assert len(asked) == 1  # all steps in one evaluation of the network
    asked.clear()
    by_policy = travel(Planless)
    assert len(asked) == N
    torch.testing.assert_close(by_plan.s, by_policy.s, rtol=1e-4, atol=1e-5)
