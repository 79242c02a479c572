"""Networks with labels: what works through a solver gives each noise its own label, from the exact end to the grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from art_edm.learning.config import TrainConfig
from art_edm.learning.training import train
from art_edm.measure.field import rms
from art_edm.models.analytic import GaussianDenoiser
from art_edm.models.denoiser import Denoiser
from art_edm.refining.noise_sets import draw_noises
from art_edm.refining.refine import refine
from art_edm.sampling.solvers import sample
from tests.support.refine_fields import SHORT, TOP, art, pairs

SCALES = (0.2, 0.5, 1.5)


class Classes(Denoiser):
    """Gaussian data whose standard deviation is that of the class; `turn` gives each class the next one's."""

    label_dim, sigma_min, sigma_max = 3, 0.002, TOP

    def __init__(self, turn: int = 0) -> None:
        super().__init__(1, 2)
        self.turn = turn

    def denoise(self, x, sigma, class_labels):
        scale = class_labels.to(x) @ torch.tensor(SCALES, dtype=x.dtype).roll(-self.turn)
        variance = scale.square().reshape(-1, 1, 1, 1)
        return x * variance / (variance + sigma.to(x).reshape(-1, 1, 1, 1).square())


def alone(scale: float) -> GaussianDenoiser:
    """One of the classes, as a model without labels."""
    model = GaussianDenoiser(0.0, scale**2, (1, 2, 2), sigma_max=TOP)
    model.initial = lambda latents, sigma: latents * sigma  # not an exact draw, but noise, as of `Classes`
    model.sigma_data = 0.5
    return model


def test_exact_ends_are_those_of_the_labels():
    model = Classes()
    drawn = draw_noises(model, SHORT, TOP, pairs())
    for part in drawn[:2]:
        assert part.labels.sum(dim=1).eq(1).all()
        errors = {}
        for turn in (0, 1):  # the twin has the labels of others
            scales = torch.tensor(SCALES, dtype=torch.float64).roll(-turn)
            scale = (part.labels.double() @ scales).reshape(-1, 1, 1, 1)
            exact = part.latents * TOP * scale / (scale.square() + TOP**2).sqrt()
            errors[turn] = float((part.ends - exact).abs().max())
        assert errors[0] < 2e-3 and errors[1] > 0.1
    assert len(torch.unique(torch.cat([part.labels for part in drawn[:2]]), dim=0)) == 3


def test_refined_with_the_labels_of_the_noises():
    model, given = Classes(), art(4)
    drawn = draw_noises(model, SHORT, TOP, pairs())
    own = train(model, TrainConfig(method="direct", solver="heun")).profile.direct(4)
    result = refine(model, given, "heun", SHORT, pairs(), drawn, {"own": own})
    latents, labels, ends = drawn.validation
    for grid, figures in ((given, result.error_before), (result.grid, result.error_after)):
        error = lambda labels: float(rms(sample(model, latents, grid, "heun", labels) - ends).mean())
        assert figures.mean == pytest.approx(error(labels), rel=1e-9)
        assert figures.mean != pytest.approx(error(labels.roll(1, dims=1)), rel=0.1)  # the twin
    assert result.error_after.mean < result.error_before.mean


@pytest.mark.slow
@pytest.mark.parametrize("index", range(3))
def test_one_class_is_as_a_model_of_it(index):
    """With the class fixed, every grid is that of the same data without labels, and of no other class."""
    model, given = Classes(), art(4)
    model.class_idx = index

    def grids(one):
        refined = refine(one, given, "euler", SHORT, pairs()).grid
        clock = train(one, TrainConfig(method="direct", solver="sde")).profile.direct(4)
        return refined.values, clock.values

    labelled, tolerances = grids(model), (1e-3, 0.25)  # the last clock is measured with other noise on the way
    for other, scale in enumerate(SCALES):
        same = [np.allclose(a, b, rtol=rtol) for a, b, rtol in zip(labelled, grids(alone(scale)), tolerances)]
        assert all(same) if other == index else not any(same)
