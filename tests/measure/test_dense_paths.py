"""Profiles of one evaluation per point: D differenced along the path, against closed forms and three evaluations."""

from __future__ import annotations

import math
from typing import Callable, Tuple

import numpy as np
import pytest
import torch

from art_edm.grids.clocks import GaussianClock
from art_edm.measure import dense_paths as profile_module
from art_edm.measure.dense_paths import PathOptions, advance, measure_along, measure_profile, place_points
from art_edm.measure.profile import Profile
from art_edm.models.analytic import EmpiricalDenoiser, GaussianDenoiser, MixtureDenoiser, one_dimensional
from art_edm.models.denoiser import Denoiser
from art_edm.models.nvlabs import NetworkDenoiser
from art_edm.runtime.errors import NonFiniteOutput
from tests.measure.test_profile import SHAPE, anisotropic, draw, exact_norm
from tests.models.test_nvlabs import STD, DiscreteNet

CLOCK = GaussianClock(80.0, 0.5)


def isotropic() -> GaussianDenoiser:
    return GaussianDenoiser(0.0, 0.25, SHAPE)


def mixture() -> MixtureDenoiser:
    return MixtureDenoiser([0.3, 0.3, 0.4], 0.3 * draw(3, *SHAPE), 0.5)


FIELDS = {"isotropic": isotropic, "anisotropic": anisotropic, "one-dimensional": one_dimensional, "mixture": mixture}


def setting(name: str) -> Tuple[Denoiser, torch.Tensor, GaussianClock]:
    model = FIELDS[name]()
    return model, draw(8, *model.img_shape, seed=2), GaussianClock(model.sigma_max, model.sigma_data)


def oracle(name: str) -> Profile:
    """In closed form for Gaussians; of the mixture, from three evaluations at 1200 points."""
    model, z, clock = setting(name)
    if name == "mixture":
        return measure_profile(model, z, clock, 1200)
    sigma = place_points(clock, model.sigma_min, 2000)
    return Profile(clock, sigma, exact_norm(model, z, sigma), 0, 0.0)


def excess(profile: Profile, reference: Profile) -> float:
    """J/J* - 1 of the profile's direct schedule."""
    return reference.cost(profile.direct(4096).values) / reference.optimum - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_schedules_and_optimum_against_the_oracle(name, monkeypatch):
    reference, (model, z, clock) = oracle(name), setting(name)
    coarse, fine = (measure_along(model, z, clock, points) for points in (64, 128))
    assert -1e-9 < excess(coarse, reference) < 1e-5 and excess(fine, reference) < 1e-6
    errors = [abs(p.optimum / reference.optimum - 1) for p in (coarse, fine)]
    assert errors[0] < 5e-4 and errors[1] < 1e-4
    assert fine.state_optimum == pytest.approx(reference.state_optimum, rel=2e-3)
    assert fine.price == pytest.approx(reference.price, abs=2e-5)
    assert excess(measure_profile(model, z, clock, 64), reference) == pytest.approx(0, abs=1e-4)  # the oracle's own
    # Twins: the difference's norm without the division by sigma; a path that goes on with the slope of the step before.
    assert excess(Profile(clock, coarse.sigma, coarse.norm * coarse.sigma, 0, 0.0), reference) > 5e-2
    monkeypatch.setattr(profile_module, "extrapolated", lambda slopes, levels, k: slopes[-1])
    lagging = measure_along(model, z, clock, 64)
    assert abs(lagging.optimum / reference.optimum - 1) > 10 * errors[0]
    assert excess(lagging, reference) > 10 * abs(excess(coarse, reference))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["isotropic", "anisotropic", "mixture"])
def test_curvature_of_each_trajectory(name):
    """Per trajectory, from sigma_max down to where the clock's steps are fine."""
    reference, (model, z, clock) = oracle(name), setting(name)
    sigma = np.geomspace(0.2, 80, 200)
    exact = reference.norms(sigma)
    errors = [np.abs(measure_along(model, z, clock, points).norms(sigma) / exact - 1).max() for points in (64, 128)]
    assert errors[0] < 2e-2 and 3 < errors[0] / errors[1]
    mirrored = measure_along(model, -z.flip(0), clock, 128).norms(sigma)
    assert np.abs(mirrored / exact - 1).max() > 5e-2


class Law(Denoiser):
    """D = 3/sigma, whatever x: its slope is -3/sigma^2, so that |Q| = 3/sigma^3."""

    def denoise(self, x, sigma, class_labels):
        return (3 / sigma).reshape(-1, 1, 1, 1).expand(x.shape)


def test_geometric_midpoints_and_ends_are_exact_for_the_law_far_above_the_data():
    points = 24
    levels = place_points(CLOCK, 0.002, points)
    profile = measure_along(Law(1, 3), draw(2, *SHAPE), CLOCK, points)
    assert profile.sigma[0] == 80 and profile.sigma[-1] == 0.002 and len(profile.sigma) == points + 1
    np.testing.assert_allclose(profile.sigma[1:-1], np.sqrt(levels[1:] * levels[:-1]), rtol=1e-12)
    np.testing.assert_allclose(profile.norm, np.tile(3 / profile.sigma**3, (2, 1)), rtol=1e-9)
    # Twins: the same slopes at arithmetic midpoints; ends that repeat their neighbours.
    arithmetic = (levels[1:] + levels[:-1]) / 2
    slope = 3 / (levels[1:] * levels[:-1])
    assert (slope / arithmetic * arithmetic**3 / 3).min() > 1.001
    assert abs(profile.norm[0, 1] * 80**3 / 3 - 1) > 0.05 and abs(profile.norm[0, -2] * 0.002**3 / 3 - 1) > 0.05


def test_ends_without_curvature_or_neighbours_are_held():
    """An empirical posterior that has settled has |Q| = 0; two levels have one interval."""
    line = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(-1, 1, 1, 1) * torch.ones(SHAPE).double()
    model, z = EmpiricalDenoiser(line), draw(6, *SHAPE)
    clock = GaussianClock(80.0, model.sigma_data)
    profile, reference = measure_along(model, z, clock, 200), measure_profile(model, z, clock, 200)
    assert (reference.norm[:, -1] == 0).all() and (profile.norm[:, -3:] == 0).all()
    assert np.isfinite(profile.norm).all() and profile.norm[:, 0].min() > 0
    assert profile.optimum == pytest.approx(reference.optimum, rel=5e-3)
    with np.errstate(invalid="ignore"):
        assert np.isnan(np.log(profile.norm[:, -2].mean() / profile.norm[:, -3].mean()))  # the power is not defined
    two = measure_along(isotropic(), z, CLOCK, 2)
    assert two.sigma.tolist() == [80.0, pytest.approx(0.16**0.5), 0.002]
    assert two.norm.shape == (6, 3) and (two.norm == two.norm[:, :1]).all() and two.norm.min() > 0


# --- what it costs and sees ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 3, 64])
def test_one_evaluation_per_point(batch):
    model, z, seen = anisotropic(), draw(7, *SHAPE), []
    model(z, 1.0)  # what came before is not the profile's
    profile = measure_along(model, z, CLOCK, 6, PathOptions(None, batch, seen.append))
    assert profile.evaluations == 7 * 6 == seen[-1] == model.evaluations - 7
    assert seen == sorted(set(seen)) and len(seen) == 6 * -(-7 // batch)
    assert measure_profile(model, z, CLOCK, points=6).evaluations == 3 * 7 * 6


def test_batches_change_nothing():
    model, z = anisotropic(), draw(5, *SHAPE)
    one, two = (measure_along(model, z, CLOCK, 6, options=PathOptions(batch=b)).norm for b in (64, 2))
    np.testing.assert_allclose(one, two, rtol=1e-12)
    assert not np.allclose(one[:2], two[2:4], rtol=1e-3)


class TwoClasses(Denoiser):
    """Class k is N(0, (0.2 + k)^2)."""

    label_dim = 2

    def denoise(self, x, sigma, class_labels):
        variance = (0.2 + class_labels.argmax(1).double()).square().reshape(-1, 1, 1, 1)
        return variance / (variance + sigma.reshape(-1, 1, 1, 1).square()) * x


@pytest.mark.parametrize("batch", [1, 64])
def test_each_trajectory_has_its_own_label(batch):
    z, labels = draw(2, *SHAPE), torch.eye(2)
    profile, swapped = (
        measure_along(TwoClasses(1, 3), z, CLOCK, 128, PathOptions(each, batch)) for each in (labels, labels.flip(0))
    )
    middle = profile.sigma[(profile.sigma > 0.3) & (profile.sigma < 50)]
    size = z.square().mean(dim=(1, 2, 3)).sqrt().numpy()
    for row, std in enumerate((0.2, 1.2)):
        scale = 80 / math.hypot(80, std)  # a network starts from pure noise, not from the marginal
        exact = scale * size[row] * std**2 / (std**2 + middle**2) ** 1.5
        np.testing.assert_allclose(profile.norms(middle)[row], exact, rtol=1e-2)
        assert np.median(np.abs(swapped.norms(middle)[row] / exact - 1)) > 0.5


class Recording(DiscreteNet):
    """Remembers the noise levels it is given, as given."""

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        self.calls.append(float(sigma[0]))
        return super(DiscreteNet, self).forward(x, self.round_sigma(sigma), class_labels, force_fp32)


class Unrounded(NetworkDenoiser):
    """Twin: asks a discrete network for any level."""

    def round_sigma(self, sigma):
        return sigma


def test_a_discrete_network_is_asked_for_each_of_its_levels_once():
    def measured(kind: type) -> Tuple[Profile, list, float]:
        net = Recording()
        net.calls.clear()
        denoiser = kind(net)
        profile = measure_along(denoiser, draw(2, 1, 4, 4), GaussianClock(denoiser.sigma_max, STD), 200)
        levels = [call for call in net.calls if not isinstance(call, tuple)]
        seen = profile.sigma[1:-1]
        seen = seen[(seen > 0.1) & (seen < 50)]
        size = draw(2, 1, 4, 4).square().mean(dim=(1, 2, 3)).sqrt().numpy()[:, None]
        exact = size * STD**2 / (STD**2 + seen**2) ** 1.5
        return profile, levels, float(np.abs(profile.norms(seen) / exact - 1).max())

    profile, levels, error = measured(NetworkDenoiser)
    assert set(levels) <= set(Recording().u.double().tolist())
    assert len(levels) == len(set(levels)) < 60 and levels == sorted(levels, reverse=True)
    assert profile.evaluations == 2 * len(levels) and len(profile.sigma) == len(levels) + 1
    assert error < 0.05
    _, levels, error = measured(Unrounded)
    assert len(levels) == 200 and error > 0.5


class Broken(GaussianDenoiser):
    """NaN below a noise level."""

    def denoise(self, x, sigma, class_labels):
        return torch.where(sigma.reshape(-1, 1, 1, 1) < 0.5, math.nan, super().denoise(x, sigma, class_labels))


def test_a_network_that_fails_is_named_by_its_level():
    first = next(level for level in place_points(CLOCK, 0.002, 40) if level < 0.5)
    with pytest.raises(NonFiniteOutput, match=f"sigma = {first:.6g} for 3 of 3 images".replace(".", r"\.")):
        measure_along(Broken(0.0, 0.25, SHAPE), draw(3, *SHAPE), CLOCK, 40)
    sound = Broken(0.0, 0.25, SHAPE, sigma_min=0.6)
    assert np.isfinite(measure_along(sound, draw(3, *SHAPE), CLOCK, 40).norm).all()


# --- the path it follows -------------------------------------------------------------------------------


class Last(GaussianDenoiser):
    """Remembers the last images it was shown."""

    def denoise(self, x, sigma, class_labels):
        self.last = x.clone()
        return super().denoise(x, sigma, class_labels)


def test_the_path_is_of_third_order_because_of_the_slope(monkeypatch):
    z = draw(3, *SHAPE, seed=4)

    def end_error(points: int, step: Callable) -> float:
        model = Last(draw(*SHAPE), 0.02 + draw(*SHAPE, seed=1).square(), SHAPE)
        monkeypatch.setattr(profile_module, "advance", step)
        measure_along(model, z, GaussianClock(80.0, model.sigma_data), points)
        return float((model.last - model.initial(z, model.sigma_min)).abs().max())

    def flat(x, point, sigma, target):
        return advance(x, point._replace(slope=torch.zeros_like(x)), sigma, target)

    order, twin = (math.log2(end_error(64, step) / end_error(128, step)) for step in (advance, flat))
    assert 2.7 < order < 4.2
    assert 0.7 < twin < 1.3
    assert end_error(128, advance) < 0.1 * end_error(128, flat)
