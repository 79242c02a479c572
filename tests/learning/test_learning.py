"""What Algorithm 1 learns: recovery from wrong base clocks, in cached and live rollouts, by every kind of policy."""

from __future__ import annotations

from typing import Optional

import numpy as np
import pytest
import torch

from art_edm.grids.clocks import Clock, GaussianClock, make_clock
from art_edm.learning.training import PRESETS, TrainResult, train
from art_edm.models.analytic import GaussianDenoiser, one_dimensional
from art_edm.models.nvlabs import NetworkDenoiser

SHORT = PRESETS["default"].changed(
    iterations=12, batch=8, repeats=2, train_steps=16, trajectories=4, points=8, distill_paths=32, rounds=2,
)
LIVE = SHORT.changed(rollout="live", iterations=6, train_steps=8)


def gaussian() -> GaussianDenoiser:
    return GaussianDenoiser(0.0, 0.25, (1, 2, 2))


def relative_cost(result: TrainResult, clock: Optional[Clock] = None) -> float:
    """J / J* of the learned clock, or of another."""
    sigma = (clock or result.learned).sigma(np.linspace(0, 1, 4097))
    return result.profile.cost(sigma) / result.profile.optimum


@pytest.mark.slow
@pytest.mark.parametrize("clock, factor", [("gaussian", 3.0), ("edm", None)])
def test_learns_from_a_wrong_base_clock(clock, factor):
    model = gaussian()
    config = PRESETS["default"].changed(clock=clock, clock_sigma_data=factor and 0.5 * factor, iterations=300, batch=64,
        train_steps=32,
    )
    result = train(model, config)
    base = make_clock(clock, 80.0, 0.5 * (factor or 1))
    assert relative_cost(result, base) > 1.3
    assert 1 - 1e-6 <= relative_cost(result) <= 1.05
    assert abs(result.terminal_error) < 0.02
    exact = GaussianClock(80.0, 0.5)
    assert relative_cost(result, exact) == pytest.approx(1, abs=1e-3)  # the oracle's own score
    assert result.evaluations == {"step": 0, "profile": 8 * config.points, "rl": 0}  # a third is enough
    assert len(result.history) == 300
    idle = train(model, config.changed(actor_rate=0.0, iterations=20))
    assert relative_cost(idle) > 1.3


@pytest.mark.slow
def test_learns_in_live_rollouts():
    model = gaussian()
    config = LIVE.changed(clock_sigma_data=1.5, iterations=40, batch=16, train_steps=16, points=40, distill_paths=128)
    result = train(model, config)
    assert relative_cost(result, GaussianClock(80.0, 1.5)) > 1.4
    assert relative_cost(result) < 1.25
    assert result.evaluations["rl"] == 40 * 16 * 3 * (2 * 16 + 1)
    assert model.evaluations == result.evaluations["rl"] + result.evaluations["profile"]
    assert relative_cost(train(model, config.changed(actor_rate=0.0, iterations=5))) > 1.3


def test_paper_preset_runs():
    """18 points on each path, three evaluations at each."""
    model = one_dimensional()
    result = train(model, PRESETS["paper"].changed(iterations=5, trajectories=4, points=8))
    assert result.evaluations["rl"] == 5 * 18 * 3
    assert result.learned.mean.shape == (19,) and (np.diff(result.learned.mean) > 0).all()
    assert result.learned.clock.name == "linear" and len(result.history) == 5
    assert result.learned.grid(18).sigma_max == 3.0
    paper = PRESETS["paper"]  # the literal recipe: plain differences, one path, raw physical time
    recipe = paper.recipe
    assert (recipe.gae_lambda, recipe.batch, paper.iterations, recipe.temperature) == (0.0, 1, 5000, 0.1)
    assert not (recipe.normalise or recipe.baseline or recipe.simpson or recipe.arrive)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", ["path", "state"])
def test_policies_that_see_more_learn_as_well(inputs):
    """`state` distils with a loss of its own, and is noisier: it is only asked to come most of the way."""
    model, config = gaussian(), PRESETS["default"].changed(
        policy_inputs=inputs, clock_sigma_data=1.5, iterations=200, batch=64, train_steps=32,
    )
    start, found = relative_cost(train(model, config.changed(actor_rate=0.0, iterations=2))), train(model, config)
    assert start > 1.4
    assert 1 - 1e-6 <= relative_cost(found) < 1.06
    assert abs(found.terminal_error) < 0.02


class Net(torch.nn.Module):
    """The exact denoiser of N(0, 0.5^2) data, in float32."""

    img_channels, img_resolution, label_dim = 1, 2, 0

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        return 0.25 / (0.25 + sigma.float().reshape(-1, 1, 1, 1).square()) * x.float()


@pytest.mark.parametrize("config, asked", [
    (SHORT, False), (SHORT.changed(method="direct"), False), (LIVE, True),
    (SHORT.changed(path_differences=False), True),
])
def test_the_step_is_chosen_where_it_is_used(config, asked):
    """A difference from level to level has none; one about a point has. 42 evaluations: two steps, seven levels."""
    denoiser = NetworkDenoiser(Net())
    assert denoiser.difference_step is None
    result = train(denoiser, config)
    assert denoiser.difference_step == (0.01 if asked else None)
    assert result.evaluations["step"] == (2 * 7 * 3 if asked else 0)
    assert denoiser.evaluations == sum(result.evaluations.values())
    assert result.evaluations["profile"] == 4 * 8 * (1 if config.recipe.path_differences else 3)


def test_one_evaluation_per_point_finds_the_optimum_of_three():
    """Direct schedules of both kinds of profile, at the default's sizes, against the closed form."""
    exact = GaussianClock(80.0, 0.5)
    config = PRESETS["default"].changed(method="direct")

    def loss(**changes) -> float:
        """J/J* - 1 of the exact optimum by the run's own profile, and of its schedule in the exact clock."""
        profile = train(gaussian(), config.changed(**changes)).profile
        speeds = np.diff(exact.fraction(profile.direct(1024).values)) * 1024
        return float(np.square(speeds).mean() - 1)  # in the exact clock q is constant: J/J* is the mean of v^2

    assert 0 <= loss() < 2e-4 and 0 <= loss(path_differences=False) < 2e-5
    assert loss(points=20) > 2e-3
    assert train(gaussian(), config.changed(tolerance=0.0)).evaluations["profile"] == 24 * 85
