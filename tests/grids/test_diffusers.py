"""Grids in the samplers of diffusers and k-diffusion: end points against our own solvers', on an exact denoiser."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch

from art_edm.grids.diffusers import SCHEDULERS, use_grid
from art_edm.grids.grid import Grid
from art_edm.models.analytic import MixtureDenoiser
from art_edm.sampling.solvers import SOLVERS, integrate, sample, slope_of

EDM_GRID = Grid([80.0, 31.7, 9.2, 4.1, 2.2, 1.3, 0.61, 0.22, 0.07, 0.011, 0.0])  # no rule's
VP_GRID = Grid([14.1, 6.3, 3.8, 2.7, 1.4, 0.96, 0.65, 0.4, 0.15, 0.04, 0.0])
VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # Stable Diffusion's levels
FLOAT32 = 2e-6  # relative; measured: 1e-7 to 2e-7


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'art_edm[diffusers]'")


@pytest.fixture(scope="module")
def denoiser():
    means = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return MixtureDenoiser([0.5, 0.3, 0.2], means, [0.1, 0.2, 0.3])


LATENTS = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def edm_path(scheduler, denoiser, prediction=1.0):
    """A loop over the scheduler's steps with a network in EDM's formulation that knows the denoiser, [4, 1, 2, 2]."""
    x, data = (LATENTS * float(scheduler.sigmas[0])).to(torch.float32), scheduler.config.sigma_data
    for t in scheduler.timesteps:
        sigma = torch.exp(4 * t.to(torch.float64))  # all that the network is given
        noisy = scheduler.scale_model_input(x, t).to(torch.float64) * (sigma**2 + data**2).sqrt()
        skip, out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
        output = (denoiser(noisy, sigma) - skip * noisy) / out * prediction
        x = scheduler.step(output.to(torch.float32), t, x).prev_sample
    return x


def vp_path(scheduler, denoiser, scaled_state=False):
    """As `edm_path` for a network of the discrete, variance-preserving kind that predicts the noise."""
    kept = scheduler.alphas_cumprod.to(torch.float64).numpy()
    trained = np.log(np.sqrt((1 - kept) / kept))
    start = float(scheduler.sigmas[0])
    x = (LATENTS * start / (math.sqrt(1 + start**2) if scaled_state else 1)).to(torch.float32)
    for t in scheduler.timesteps:
        sigma = math.exp(np.interp(float(t), np.arange(len(trained)), trained))
        noisy = scheduler.scale_model_input(x, t).to(torch.float64) * math.sqrt(1 + sigma**2)
        noise = (noisy - denoiser(noisy, sigma)) / sigma
        x = scheduler.step(noise.to(torch.float32), t, x).prev_sample
    return x


def distance(x, reference):
    return float((x - reference).abs().max() / reference.abs().max())


EDM_CASES = {
    "euler": ("EDMEulerScheduler", {}, "euler"),
    "euler, exponential rule": ("EDMEulerScheduler", {"sigma_schedule": "exponential", "sigma_data": 1.0}, "euler"),
    "2M": ("EDMDPMSolverMultistepScheduler", {}, "dpmpp2m"),
    "2M without a lower order": ("EDMDPMSolverMultistepScheduler", {"lower_order_final": False}, "dpmpp2m"),
    "order 1": ("EDMDPMSolverMultistepScheduler", {"solver_order": 1}, "euler"),
}


@pytest.mark.parametrize(("name", "options", "solver"), EDM_CASES.values(), ids=EDM_CASES)
def test_edm_schedulers(diffusers, denoiser, name, options, solver):
    scheduler = use_grid(getattr(diffusers, name)(**options), EDM_GRID)
    reference = sample(denoiser, LATENTS, EDM_GRID, solver=solver)
    for _ in range(2):  # a second run starts anew
        scheduler.set_timesteps(10, device="cpu")
        assert torch.equal(scheduler.sigmas, torch.tensor(EDM_GRID.values, dtype=torch.float32))
        assert distance(edm_path(scheduler, denoiser), reference) < FLOAT32

    plain = getattr(diffusers, name)(**options)
    plain.set_timesteps(10)
    assert distance(edm_path(plain, denoiser), reference) > 1e-3  # its own rule is another grid
    scheduler.set_timesteps(10)
    assert distance(edm_path(scheduler, denoiser, prediction=1.01), reference) > 10 * FLOAT32  # a small error shows


VP_CASES = {
    "euler": ("EulerDiscreteScheduler", {}, "euler", False),
    "euler, Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "euler", False),
    "heun": ("HeunDiscreteScheduler", {}, "heun", False),
    "2M": ("DPMSolverMultistepScheduler", {}, "dpmpp2m", True),
    "2M, Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpmpp2m", True),
}


@pytest.mark.parametrize(("name", "options", "solver", "scaled_state"), VP_CASES.values(), ids=VP_CASES)
def test_schedulers_of_discrete_networks(diffusers, denoiser, name, options, solver, scaled_state):
    make = getattr(diffusers, name)
    scheduler = use_grid(make(**VP, **options), VP_GRID)
    scheduler.set_timesteps(10)
    reference = sample(denoiser, LATENTS, VP_GRID, solver=solver)
    assert distance(vp_path(scheduler, denoiser, scaled_state), reference) < FLOAT32

    moved = VP_GRID.values.copy()
    moved[5] *= 1.1
    use_grid(scheduler, Grid(moved)).set_timesteps(10)
    assert distance(vp_path(scheduler, denoiser, scaled_state), reference) > 10 * FLOAT32


def test_euler_of_a_continuous_network(diffusers):
    """As for video models: EDM's timesteps, and levels far beyond those of the discrete table."""
    scheduler = diffusers.EulerDiscreteScheduler(
        **VP, prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0,
        use_karras_sigmas=True)
    use_grid(scheduler, Grid([700.0, 20.0, 0.002, 0.0])).set_timesteps(3)
    expected = [math.log(s) / 4 for s in (700.0, 20.0, 0.002)]
    assert scheduler.timesteps.tolist() == pytest.approx(expected, rel=1e-6)
    assert scheduler.sigmas.tolist() == pytest.approx([700.0, 20.0, 0.002, 0.0], rel=1e-6)


def test_a_deep_copy_and_its_original_are_apart(diffusers):
    first = use_grid(diffusers.EDMEulerScheduler(), EDM_GRID)
    first.set_timesteps(10)
    second = copy.deepcopy(first)
    second.sigmas = second.timesteps = None
    second.set_timesteps(10)
    assert torch.equal(second.sigmas, first.sigmas) and second.sigmas is not first.sigmas
    use_grid(second, Grid([40.0, 2.0, 0.0])).set_timesteps()
    assert second.sigmas.tolist() == [40.0, 2.0, 0.0] and len(first.sigmas) == 11


def test_a_pipelines_first_noise_is_of_the_grids_first_level(diffusers):
    for name in SCHEDULERS[:2]:
        scheduler = use_grid(getattr(diffusers, name)(), Grid([40.0, 2.0, 0.0]))
        assert float(scheduler.init_noise_sigma) == pytest.approx(math.hypot(40, 1))
    for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler"):
        scheduler = use_grid(getattr(diffusers, name)(**VP), VP_GRID)
        scheduler.set_timesteps(10)
        assert float(scheduler.init_noise_sigma) == pytest.approx(14.1)


def test_what_does_not_fit_is_refused(diffusers):
    scheduler = use_grid(diffusers.EDMEulerScheduler(), EDM_GRID)
    with pytest.raises(ValueError, match="num_inference_steps = 50, expected 10"):
        scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match="found DDIMScheduler, expected one of EDMEulerScheduler"):
        use_grid(diffusers.DDIMScheduler(), EDM_GRID)
    with pytest.raises(ValueError, match="found object, expected one of"):
        use_grid(object(), EDM_GRID)
    with pytest.raises(ValueError, match="final_sigmas_type = 'sigma_min', expected 'zero'"):
        use_grid(diffusers.EDMDPMSolverMultistepScheduler(final_sigmas_type="sigma_min"), EDM_GRID)
    with pytest.raises(ValueError, match="flow matching"):
        use_grid(diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"), VP_GRID)
    with pytest.raises(ValueError, match="from 80 to 0.011, expected none outside the network's levels, 14.61"):
        use_grid(diffusers.HeunDiscreteScheduler(**VP), EDM_GRID)
    with pytest.raises(ValueError, match="steps 1 and 2 .* are the same noise level in float32"):
        use_grid(diffusers.EDMEulerScheduler(), Grid([80.0, 1.0 + 1e-9, 1.0, 0.0]))
    with pytest.raises(ValueError, match="steps 1 and 2 .* are the same noise level in float32"):
        use_grid(diffusers.EDMEulerScheduler(), Grid([80.0, 1e-60, 0.0]))


@pytest.mark.parametrize("make, options", [
    ("EulerDiscreteScheduler", {}),  # predicts the noise, and so has a table, whatever timestep_type says
    ("HeunDiscreteScheduler", {"from": "EulerDiscreteScheduler", "prediction_type": "v_prediction"}),
])
def test_an_option_for_other_networks_leaves_the_range_check_on(diffusers, make, options):
    options = {**VP, "timestep_type": "continuous", **options}
    source = options.pop("from", make)
    scheduler = getattr(diffusers, make).from_config(getattr(diffusers, source)(**options).config)
    assert scheduler.config["timestep_type"] == "continuous"
    with pytest.raises(ValueError, match="from 80 to 0.011, expected none outside the network's levels, 14.61"):
        use_grid(scheduler, EDM_GRID)
    use_grid(scheduler, VP_GRID)


@pytest.mark.parametrize("make, algorithm", [
    ("DPMSolverMultistepScheduler", "dpmsolver"), ("DPMSolverMultistepScheduler", "sde-dpmsolver"),
    ("DPMSolverMultistepScheduler", "dpmsolver++"), ("EDMDPMSolverMultistepScheduler", "sde-dpmsolver++"),
])
def test_advice_is_accepted_by_diffusers(diffusers, make, algorithm):
    kind, options = getattr(diffusers, make), {"algorithm_type": algorithm, "final_sigmas_type": "sigma_min"}
    scheduler = kind(**options) if make.startswith("EDM") else kind(**VP, **options)
    with pytest.raises(ValueError, match="final_sigmas_type = 'sigma_min', expected 'zero'") as caught:
        use_grid(scheduler, VP_GRID)
    advice = re.search(r"from_config\(\.\.\., (.*)\)", str(caught.value))[1]
    use_grid(kind.from_config(scheduler.config, **eval(f"dict({advice})")), VP_GRID)
    if not algorithm.endswith("++"):  # twin: without the algorithm diffusers refuses
        with pytest.raises(ValueError, match="not supported"):
            kind.from_config(scheduler.config, final_sigmas_type="zero")


def test_levels_that_the_scheduler_clips_are_refused(diffusers):
    clipped = diffusers.DPMSolverMultistepScheduler(**VP, lambda_min_clipped=-math.log(10))
    with pytest.raises(ValueError, match="from 14.1 to 0.04, expected none outside the network's levels, 9.9"):
        use_grid(clipped, VP_GRID)
    use_grid(clipped, Grid(VP_GRID.values[1:]))


def test_levels_of_one_timestep_are_refused(diffusers):
    close = Grid([10.0 * (1 + 2e-7), 10.0, 1.0, 0.0])
    for scheduler in (diffusers.DPMSolverMultistepScheduler(**VP), diffusers.EulerDiscreteScheduler(**VP)):
        with pytest.raises(ValueError, match="steps 0 and 1 .* have one timestep in float32"):
            use_grid(scheduler, close)
            scheduler.set_timesteps(3)


# --- k-diffusion ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samplers():
    return pytest.importorskip("k_diffusion.sampling", reason="k-diffusion is not installed: pip install k-diffusion")


@pytest.mark.parametrize(("name", "solver"), [
    ("sample_euler", "euler"), ("sample_heun", "heun"), ("sample_dpmpp_2m", "dpmpp2m"),
])
def test_k_diffusion(samplers, denoiser, name, solver):
    sigmas = torch.tensor(EDM_GRID.values)
    x = getattr(samplers, name)(denoiser, LATENTS * sigmas[0], sigmas, disable=True)
    assert distance(x, sample(denoiser, LATENTS, EDM_GRID, solver=solver)) < 1e-12
    others = {"euler", "heun", "dpmpp2m"} - {solver}
    assert min(distance(x, sample(denoiser, LATENTS, EDM_GRID, solver=other)) for other in others) > 1e-3


def test_k_diffusions_linear_multistep_has_the_weights_of_the_uneven_levels(samplers, denoiser):
    sigmas = torch.tensor(EDM_GRID.values[:-1])
    x = samplers.sample_lms(denoiser, LATENTS * sigmas[0], sigmas, disable=True)
    lower = SOLVERS["ab4-sigma"]._replace(past=2)
    ours, lower = (integrate(slope_of(denoiser), LATENTS * sigmas[0], sigmas, each)[0] for each in ("ab4-sigma", lower))
    assert distance(x, ours) < 1e-10 and distance(x, lower) > 1e-4
