"""Updates (29) and (30): against double loops, torch's own densities, finite differences and a simulated return."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch

from art_edm.grids.clocks import LinearClock
from art_edm.learning.actor_critic import (
    actor_loss,
    advantages,
    centre,
    critic_loss,
    multiplier_step,
    rewards,
    temporal_differences,
)
from art_edm.learning.policy import POLICY_INPUTS, Critic, Policy, make_features
from art_edm.learning.rollouts import CachedEnvironment, RolloutSettings, Trajectory, rollout
from art_edm.measure.profile import Profile

N, B = 7, 5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(net: torch.nn.Module, std: float = 0.5) -> torch.nn.Module:
    with torch.no_grad():
        net.net[-1].weight.normal_(std=std, generator=generator(5))
        net.net[-1].bias.fill_(0.2)
    return net


def path_of(settings: RolloutSettings) -> Trajectory:
    q = draw(N, B, seed=1).exp()
    q[0] = settings.epsilon / 10  # some weights under the floor
    s = torch.linspace(0, 1, N + 1).double()[:, None] + 0.01 * draw(N + 1, B, seed=2)
    features = torch.stack([make_features(k / N, s[k], q[k]) for k in range(N)])
    action = 1 + 0.3 * draw(N, B, seed=3)
    return Trajectory(s, features, action, q, q * action.square() / N)


SETTINGS = RolloutSettings(num_steps=N, temperature=0.05, epsilon=0.1, horizon=1.0, simpson=True, repeats=1)
PATH = path_of(SETTINGS)


def test_temporal_differences_and_advantages_by_explicit_loops():
    values, reward = draw(N, B, seed=4), draw(N, B, seed=5)
    delta = np.zeros((N, B))
    for k in range(N):
        for b in range(B):
            following = float(values[k + 1, b]) if k + 1 < N else 0.0  # V(T) = 0
            delta[k, b] = following - float(values[k, b]) + float(reward[k, b])
    found = temporal_differences(values, reward)
    np.testing.assert_allclose(found.numpy(), delta, rtol=1e-12, atol=1e-14)
    assert not np.allclose(temporal_differences(-values, reward).numpy(), delta)
    for trace in (0.0, 0.5, 0.99, 1.0):
        expected = np.zeros((N, B))
        for k in range(N):
            for j in range(k, N):
                expected[k] += trace ** (j - k) * delta[j]
        np.testing.assert_allclose(advantages(found, trace).numpy(), expected, rtol=1e-11, atol=1e-13)
    assert not np.allclose(advantages(found, 0.5).numpy(), advantages(found, 0.6).numpy())
    # With the whole trace, values telescope: what remains is the reward to go.
    to_go = torch.flip(torch.cumsum(torch.flip(reward, [0]), dim=0), [0])
    torch.testing.assert_close(advantages(found, 1.0), to_go - values)


def gradients(loss: torch.Tensor, net: torch.nn.Module) -> torch.Tensor:
    net.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()]).double()


@pytest.mark.parametrize("arrive", [None, 1 / N])
@pytest.mark.parametrize("sees", POLICY_INPUTS)
def test_actor_gradient_is_that_of_the_log_density(sees, arrive):
    policy, advantage = randomise(Policy(generator(), sees, arrive), std=0.1), draw(N, B, seed=6)

    def reference(floor: float) -> torch.Tensor:
        scale = (SETTINGS.temperature / PATH.q.clamp_min(floor)).sqrt()
        density = torch.distributions.Normal(policy(PATH.features.float()).double(), scale)
        return gradients(-(density.log_prob(PATH.action) * advantage).sum(dim=0).mean(), policy)

    found = gradients(actor_loss(policy, PATH, advantage, SETTINGS), policy)
    size = float(found.abs().max())
    torch.testing.assert_close(found, reference(SETTINGS.epsilon), rtol=1e-4, atol=1e-5 * size)
    wrong = gradients(actor_loss(policy, PATH, -advantage, SETTINGS), policy)
    assert float((wrong - reference(SETTINGS.epsilon)).abs().max()) > size
    assert float((found - reference(1e-9)).abs().max()) > 1e-3 * size  # epsilon dropped


def test_critic_gradient_against_finite_differences():
    critic, advantage = randomise(Critic(generator())), draw(N, B, seed=7)
    found = gradients(critic_loss(critic(PATH.features.float()), advantage), critic)
    double, h, expected = copy.deepcopy(critic).double(), 1e-5, []
    features = PATH.features.float().double()
    with torch.no_grad():
        for p in double.parameters():
            flat = p.view(-1)
            for i in range(0, len(flat), 37):  # some of each layer
                centre = flat[i].item()
                flat[i] = centre + h
                upper = double(features)
                flat[i] = centre - h
                slope = (upper - double(features)) / (2 * h)  # dV, [N, B]
                flat[i] = centre
                expected.append(float(-(slope * advantage).sum() / B))  # -sum_k dV_k A_k, mean over paths
    chosen, start = [], 0
    for p in critic.parameters():
        chosen.extend(range(start, start + p.numel(), 37))
        start += p.numel()
    size = float(found.abs().max())
    np.testing.assert_allclose(found[chosen].numpy(), expected, rtol=1e-3, atol=2e-6 * size)
    assert np.abs(found[chosen].numpy() + expected).max() > 0.1 * size  # wrong sign


def test_critic_vanishes_at_the_end_and_the_policy_arrives():
    critic, s, q = randomise(Critic(generator())), torch.linspace(0, 1.2, 9).double(), draw(9).exp()
    assert critic(make_features(1.0, s, q).float()).abs().max() == 0
    assert critic(make_features(0.5, s, q).float()).abs().max() > 1e-3
    for steps, sees in itertools.product((4, 64), POLICY_INPUTS):
        policy = randomise(Policy(generator(), sees, 1 / steps))
        last, left = make_features(1 - 1 / steps, s[:7], q[:7]), 1 - s[:7]
        torch.testing.assert_close(policy(last.float()).double(), left * steps, rtol=1e-4, atol=1e-4)
        earlier = policy(make_features(0.25, s[:7], q[:7]).float()).double()
        assert (earlier / (left / 0.75) - 1).abs().max() > 1e-2  # there the network has a say
    along = make_features(0.25, torch.full((3,), 0.25).double(), q[:3]).float()
    for sees, arrive in itertools.product(POLICY_INPUTS, (None, 1 / 8)):  # v = 1 along the base clock before training
        torch.testing.assert_close(Policy(generator(), sees, arrive)(along), torch.ones(3))


def test_baseline_by_explicit_loops():
    advantage = draw(N, 12, seed=8)
    for repeats in (2, 3, 4):
        noises, expected = 12 // repeats, np.zeros((N, 12))
        for k in range(N):
            for b in range(12):  # the mean of the other rollouts of the same noise
                others = [c for c in range(12) if c % noises == b % noises and c != b]
                expected[k, b] = advantage[k, b] - np.mean([float(advantage[k, c]) for c in others])
        np.testing.assert_allclose(centre(advantage, repeats).numpy(), expected, rtol=1e-10, atol=1e-12)
        assert not np.allclose(centre(advantage, repeats).numpy(), expected * (repeats - 1) / repeats)
    alone = centre(advantage, 1)
    assert alone.mean(dim=1).abs().max() < 1e-15
    torch.testing.assert_close(alone - alone[:, :1], advantage - advantage[:, :1])


class Curves(Profile):
    """|Q| = a + 3 s^2 in a linear clock of length 1, of four trajectories."""

    def norms(self, sigma):
        return np.array([[0.5], [1.0], [2.0], [4.0]]) + 3 * (1 - np.clip(sigma, 0, 1)) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("simpson, repeats, sees, arrive", [
    (False, 1, "time", None), (True, 2, "time", 1 / 6), (True, 2, "path", 1 / 6), (True, 2, "state", None),
])
def test_actor_gradient_is_that_of_the_expected_return(simpson, repeats, sees, arrive):
    """The policy-gradient theorem, for the bias of the log-speed, against common random numbers."""
    clock = LinearClock(1.0)
    env = CachedEnvironment(Curves(clock, np.array([1.0, 1e-3]), np.ones((4, 2)), 0, 0.0), clock, 1.0)
    settings, gamma, penalty, h = RolloutSettings(6, 0.05, 0.1, 1.0, simpson, repeats), -1.0, 5.0, 0.02
    policy = Policy(generator(), sees, arrive)
    with torch.no_grad():
        policy.net[-1].weight.normal_(std=0.05, generator=generator(5))
    bias, centre_at = policy.net[-1].bias, 0.1 if arrive is None else 0.6  # far from the best, where nothing is to see
    by_theorem, by_difference = [], []
    for seed in range(24):
        returns = []
        for shift in (h, -h, 0.0):
            with torch.no_grad():
                bias.fill_(centre_at + shift)
            path = rollout(env, policy, settings, 1000, generator(seed))
            reward = rewards(path, settings, gamma, penalty)
            returns.append(float(reward.sum(dim=0).mean()))
        by_difference.append((returns[0] - returns[1]) / (2 * h))
        advantage = advantages(temporal_differences(torch.zeros_like(reward), reward), 1.0)
        policy.zero_grad()
        actor_loss(policy, path, centre(advantage, repeats), settings).backward()
        by_theorem.append(-float(bias.grad))
    found, expected = np.mean(by_theorem), np.mean(by_difference)
    error = np.hypot(np.std(by_theorem), np.std(by_difference)) / 24**0.5
    assert error < 0.05 * abs(expected)  # the comparison means something
    assert abs(found - expected) < 4 * error + 2e-3 * abs(expected)
    assert abs(found / 2 - expected) > 8 * error  # centre() of two rollouts without its factor
    assert abs(-found - expected) > 20 * error


def ended_at(s: float) -> Trajectory:
    empty = torch.zeros(1, B, dtype=torch.float64)
    return Trajectory(torch.tensor([0.0, s]).double()[:, None].expand(2, B), empty, empty, empty, empty)


def test_multiplier_step_by_hand():
    gamma, error = multiplier_step(-2.0, ended_at(1.3), 0.1, SETTINGS._replace(horizon=80.0))
    assert error == pytest.approx(0.3)
    assert gamma == pytest.approx(-2 + 0.1 * 0.3 * 80)
    gamma, error = multiplier_step(-2.0, PATH, 0.1, SETTINGS)
    assert error == pytest.approx(float(PATH.s[-1].mean()) - 1) and gamma == pytest.approx(-2 + 0.1 * error)


def best_speed(gamma: float) -> float:
    """The speed of the greatest reward where q = 1, by trying them."""
    v = torch.linspace(0, 4, 4001).double()[None]
    path = Trajectory(torch.ones(2, 4001), torch.zeros(1), v, torch.ones_like(v), v.square())
    return float(v[0, rewards(path, RolloutSettings(1, 0.0, 0.1, 1.0, True, 1), gamma, 0.0)[0].argmax()])


def test_overshoot_raises_the_multiplier_and_that_slows_the_policy():
    assert best_speed(-2.0) == pytest.approx(1.0, abs=1e-3)  # theta* = -gamma / (2 |Q|)
    assert best_speed(-1.0) == pytest.approx(0.5, abs=1e-3)

    def settle(rate: float) -> float:
        gamma = -2.6  # too fast: ends at 1.3
        for _ in range(60):
            gamma, _ = multiplier_step(gamma, ended_at(best_speed(gamma)), rate, SETTINGS)
        return gamma

    assert settle(0.3) == pytest.approx(-2.0, abs=0.01)
    assert abs(settle(-0.3) + 2.0) > 5  # the wrong sign runs away


def test_no_factor_of_the_baseline_survives_the_scaling():
    """R/(R - 1) is too much for antithetic rollouts; training divides by the standard deviation, which has it, too."""
    advantage, repeats = draw(N, 8, seed=3), 4
    found = centre(advantage, repeats)
    bare = found * (repeats - 1) / repeats
    scaled = lambda x: x / (x.std() + 1e-12)
    torch.testing.assert_close(scaled(found), scaled(bare), rtol=1e-12, atol=0)
    assert not torch.allclose(found, bare)
