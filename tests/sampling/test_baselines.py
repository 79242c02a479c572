"""Rules as a comparison takes them: a rule with more steps than the network has levels does as upstream does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from art_edm.grids.grid import GridError, edm, save_grid
from art_edm.models.analytic import GaussianDenoiser
from art_edm.sampling.baselines import choose_grids
from art_edm.sampling.solvers import sample

LEVELS = torch.from_numpy(np.geomspace(80, 0.01, 40))


class Discrete(GaussianDenoiser):
    """Gaussian data, known at 40 noise levels."""

    def round_sigma(self, sigma):
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        return LEVELS[(LEVELS.log() - sigma.reshape(-1, 1).log()).abs().argmin(dim=1)].reshape(sigma.shape)


NET = Discrete(0.0, 0.25, (1, 2, 2), sigma_min=0.01)


def test_a_rule_with_equal_levels_samples_as_upstreams_loop():
    """Upstream's loop takes every step, those between equal levels too, and moves nowhere in them."""
    (chosen,) = choose_grids(["edm"], [60], NET)
    levels = torch.cat([NET.round_sigma(torch.tensor(edm(60, 0.01, 80).values[:-1])), torch.zeros(1)]).double()
    latents = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = NET.initial(latents, float(levels[0]))
    for sigma, after in zip(levels[:-1], levels[1:]):
        x = x + (after - sigma) * (x - NET(x, sigma)) / sigma
    distinct = len(set(levels.tolist())) - 1
    assert chosen.grid.num_steps == distinct < 60
    assert chosen.note == f"edm in 60 steps has {distinct} noise levels of this network: sampled in as many steps"
    torch.testing.assert_close(sample(NET, latents, chosen.grid, "euler"), x, rtol=1e-12, atol=1e-12)


def test_a_rule_of_distinct_levels_has_no_note():
    (chosen,) = choose_grids(["edm"], [8], NET)
    assert (chosen.grid.num_steps, chosen.note) == (8, "")


def test_a_file_with_equal_levels_is_refused(tmp_path):
    """The twin: what a user wrote down is not changed."""
    save_grid(tmp_path / "g.npy", edm(60, 0.01, 80), {})
    with pytest.raises(GridError, match="same noise level"):
        choose_grids([str(tmp_path / "g.npy")], [60], NET)
