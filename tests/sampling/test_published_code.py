"""DEIS-tAB3 and UniPC-3 against their authors' own code, and against what it printed.

The live tests need checkouts of qsh-zh/deis (with JAX) and wl-zhao/UniPC as deis/ and UniPC/ in $ART_EDM_PEERS.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from art_edm.models.analytic import MixtureDenoiser
from art_edm.sampling import multistep
from art_edm.sampling.solvers import SOLVERS, integrate, slope_of

LEVELS = torch.tensor([80.0, 22.0, 5.1, 1.9, 0.7, 0.21, 0.05, 0.002], dtype=torch.float64)
# Weights of h eps, newest first, at commit a30709f, whose quadrature is a left sum of n terms: extrapolated from
# n = 80,000 and 160,000 to none.
DEIS = [
    [1.0], [1.51031317, -0.51031317], [1.65859371, -1.09792561, 0.4393319],
    [2.12682024, -2.02082469, 1.33513246, -0.441128], [1.78151249, -1.44321819, 0.8303031, -0.1685974],
    [1.34536563, -0.49878497, 0.1957458, -0.04232645], [1.19789632, -0.22593331, 0.03118358, -0.00314659],
]


def checkout(name, monkeypatch):
    """The folder of a checkout, importable; else the test is skipped."""
    folder = Path(os.environ.get("ART_EDM_PEERS") or "absent", name)
    if not folder.is_dir():
        pytest.skip(f"needs a checkout of the authors' code as {name}/ in $ART_EDM_PEERS")
    monkeypatch.syspath_prepend(str(folder))
    return folder


def rows(rule, order=4):
    return [rule(LEVELS)(k, min(k + 1, order)).tolist() for k in range(len(LEVELS) - 1)]


def test_the_weights_of_deis_are_those_that_its_authors_code_printed():
    for found, printed in zip(rows(multistep.through_times(multistep.vp_time)), DEIS):
        assert found == pytest.approx(printed, abs=2e-8)
    twin = multistep.through_times(lambda sigma: multistep.vp_time(sigma, 0.1, 19.0))
    assert np.abs(np.array(rows(twin)[6]) - DEIS[6]).max() > 1e-6


@pytest.mark.slow
def test_deis_live(monkeypatch):
    """Their left sum of 10,000 terms is off by up to 5e-4."""
    checkout("deis", monkeypatch)
    jax = pytest.importorskip("jax", reason="qsh-zh/deis needs JAX: pip install jax")
    import jax._src.numpy.lax_numpy as moved
    from jax._src.numpy.util import promote_dtypes_inexact

    monkeypatch.setattr(moved, "_promote_dtypes_inexact", promote_dtypes_inexact, raising=False)  # its older name
    jax.config.update("jax_enable_x64", True)
    import jax_deis
    from jax_deis.multistep import get_ab_eps_coef

    sde = jax_deis.VPSDE(*jax_deis.get_linear_alpha_fns(0.1, 20.0), 1e-3, 1.0)
    theirs = np.array(get_ab_eps_coef(sde, 3, jax.numpy.array(multistep.vp_time(LEVELS).numpy()), 3))
    theirs *= (torch.sqrt(1 + LEVELS[1:] ** 2) / LEVELS.diff()).numpy()[:, None]  # from x / sqrt(1 + sigma^2) to x
    for found, row in zip(rows(multistep.through_times(multistep.vp_time)), theirs):
        np.testing.assert_allclose(found, row[: len(found)], rtol=0, atol=5e-4)


@pytest.mark.parametrize("order, variant, same", [(3, "bh2", True), (3, "bh1", False), (2, "bh2", False)])
def test_unipc_live(monkeypatch, order, variant, same):
    """To the last level above 0 at full order; the step to 0 is tested against diffusers."""
    checkout("UniPC", monkeypatch)
    import uni_pc

    means = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 2, 2)
    model = MixtureDenoiser([0.5, 0.5], means, 0.1)
    x = 80 * torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    process = uni_pc.NoiseScheduleVP("linear", continuous_beta_0=0.1, continuous_beta_1=20.0)

    def noise(scaled, t):
        sigma = process.marginal_std(t[:1]) / process.marginal_alpha(t[:1])
        state = scaled * torch.sqrt(1 + sigma**2)
        return (state - model(state, sigma)) / sigma

    theirs = uni_pc.UniPC(noise, process, variant=variant)
    monkeypatch.setattr(theirs, "get_time_steps", lambda **_: multistep.vp_time(LEVELS))
    end = theirs.sample(x / (1 + LEVELS[0] ** 2).sqrt(), len(LEVELS) - 1, order=order, lower_order_final=False)
    ours = integrate(slope_of(model), x, LEVELS, SOLVERS["unipc"])[0]
    error = float((ours - end * (1 + LEVELS[-1] ** 2).sqrt()).abs().max())
    assert error < 1e-9 if same else error > 1e-4
