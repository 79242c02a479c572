"""The denoiser contract, and the score network's preconditioning recomputed from EDM's formulas."""

from __future__ import annotations

import math
from typing import Optional

import pytest
import torch

from art_edm.models.analytic import EmpiricalDenoiser, GaussianDenoiser, MixtureDenoiser
from art_edm.models.denoiser import Denoiser
from art_edm.models.unet import ScoreUNet
from art_edm.runtime.memory import peak_memory


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(size: int = 8, scale: float = 0.1, **sizes: int) -> ScoreUNet:
    """A network with every parameter moved: as built, the zero layers hide all others."""
    torch.manual_seed(1)
    net = ScoreUNet(size, sigma_data=0.6, data_mean=-0.3, **{"width": 16, "deep_width": 24, "emb": 16, **sizes})
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn_like(p))
    return net


MODELS = {
    "gaussian": lambda: GaussianDenoiser(0.3, 0.5, (1, 8, 8)),
    "mixture": lambda: MixtureDenoiser([1.0, 2.0], draw(2, 1, 8, 8), 0.3),
    "empirical": lambda: EmpiricalDenoiser(draw(12, 1, 8, 8), chunk=5),
    "network": network,
}


@pytest.fixture(params=MODELS)
def model(request) -> Denoiser:
    return MODELS[request.param]()


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 3, 8, 8), (2, 1, 8, 4), (2, 64), (1, 2, 1, 8, 8)])
def test_wrong_shapes_are_errors_that_name_both(model, shape):
    with pytest.raises(ValueError) as caught:
        model(torch.zeros(shape), 1.0)
    assert str(shape) in str(caught.value) and "[B, 1, 8, 8]" in str(caught.value)
    assert model.evaluations == 0


def test_a_noise_level_of_another_batch_is_an_error(model):
    with pytest.raises(ValueError, match="sigma"):
        model(torch.zeros(2, 1, 8, 8), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalar_and_batch_of_noise_levels_agree(model, dtype):
    x = draw(3, 1, 8, 8).to(dtype)
    batch = model(x, torch.full((3,), 0.7, dtype=dtype))
    assert batch.dtype == dtype and batch.shape == x.shape
    for scalar in (torch.tensor(0.7, dtype=dtype), torch.tensor([0.7], dtype=dtype)):
        torch.testing.assert_close(model(x, scalar), batch, rtol=0, atol=0)


def test_a_python_number_is_not_rounded_to_float32():
    model, x = GaussianDenoiser(0.0, 1.0, (1, 8, 8)), draw(3, 1, 8, 8)
    torch.testing.assert_close(model(x, 0.7), x / (1 + 0.7**2), rtol=1e-14, atol=0)
    assert float(model.round_sigma(0.7)) == 0.7


def test_levels_and_images_are_paired(model):
    x, sigma = draw(3, 1, 8, 8), torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    together = model(x, sigma)
    for i in range(3):
        torch.testing.assert_close(together[i], model(x[i : i + 1], sigma[i])[0], rtol=1e-5, atol=1e-6)


def test_evaluations_are_counted_in_images(model):
    for count in (1, 4):
        model(draw(count, 1, 8, 8), 1.0)
    assert model.evaluations == 5


def test_round_sigma_is_the_identity(model):
    sigma = torch.tensor([0.002, 0.123456789, 80.0], dtype=torch.float64)
    assert torch.equal(model.round_sigma(sigma), sigma)


def test_initial_is_float64_noise():
    latents = draw(2, 1, 8, 8).float()
    start = Denoiser(1, 8).initial(latents, 80.0)
    assert start.dtype == torch.float64
    torch.testing.assert_close(start, 80 * latents.double(), rtol=0, atol=0)


def test_attributes_of_the_contract(model):
    assert 0 < model.sigma_min < model.sigma_max and model.sigma_data > 0
    assert (model.img_channels, model.img_resolution, model.img_shape, model.label_dim) == (1, 8, (1, 8, 8), 0)
    assert Denoiser(3, 16, 32).img_shape == (3, 16, 32)


def test_a_subclass_without_denoise_says_so():
    class Unfinished(Denoiser):
        pass

    with pytest.raises(TypeError, match="Unfinished"):
        Unfinished(1, 8)(torch.zeros(1, 1, 8, 8), 1.0)


def precondition(net: ScoreUNet, x: torch.Tensor, sigma: torch.Tensor, noise: Optional[float] = None) -> torch.Tensor:
    """EDM's table 1 for centred data, written with fractions and in float64 outside the network."""
    s, sd, mean = sigma.reshape(-1, 1, 1, 1), net.sigma_data, net.data_mean
    total = s**2 + sd**2
    raw = net.network((x - mean) / total.sqrt(), sigma.log() * (0.25 if noise is None else noise))
    return mean + sd**2 / total * (x - mean) + s * sd / total.sqrt() * raw


@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 80.0])
def test_network_preconditioning(sigma):
    net = network().double()
    x = -0.3 + math.hypot(sigma, 0.6) * draw(3, 1, 8, 8)
    levels = torch.full((3,), sigma, dtype=torch.float64)
    with torch.no_grad():
        found, expected = net(x, levels), precondition(net, x, levels)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
        single = network()(x.float(), levels.float())
        torch.testing.assert_close(single.double(), expected, rtol=2e-5, atol=2e-5)
        if sigma != 1.0:  # log 1 = 0 hides the factor
            wrong = precondition(net, x, levels, noise=0.5)  # twin: another c_noise
            assert float((wrong - expected).abs().max()) > 1e-3 * min(1.0, sigma)
        net.sigma_data *= 1.1  # twin: another sigma_data
        assert float((net(x, levels) - expected).abs().max()) > 1e-6 * min(1.0, sigma)


def test_network_at_small_noise_returns_its_input():
    net, x = network().double(), draw(3, 1, 8, 8)
    with torch.no_grad():
        errors = [float((net(x, 10.0**-k) - x).abs().max()) for k in (2, 4, 6)]
    assert errors[0] < 0.1 and errors[1] < 1e-3 and errors[2] < 1e-5
    assert errors[0] > 1e-4  # the network does act


def test_untrained_network_is_the_gaussian_denoiser():
    """Its last layer is zero as built, so D = mean + sigma_data^2 / (sigma^2 + sigma_data^2) (x - mean)."""
    net = ScoreUNet(8, sigma_data=0.6, data_mean=-0.3, width=16, deep_width=24, emb=16).double()
    exact, x = GaussianDenoiser(-0.3, 0.36, (1, 8, 8)), draw(4, 1, 8, 8)
    sigma = torch.tensor([0.01, 0.3, 2.0, 70.0], dtype=torch.float64)
    torch.testing.assert_close(net(x, sigma).detach(), exact(x, sigma), rtol=1e-13, atol=1e-14)


def test_network_output_depends_on_every_parameter():
    net = network()
    net(draw(2, 1, 8, 8).float(), torch.tensor([0.3, 3.0])).square().sum().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert idle == []


def test_network_size_and_rebuilding():
    net = ScoreUNet()
    assert net.img_shape == (1, 28, 28)
    assert sum(p.numel() for p in net.parameters()) < 1_000_000
    moved = network()
    twin = ScoreUNet(**moved.config)
    twin.load_state_dict(moved.state_dict())
    x = draw(2, 1, 8, 8)
    assert torch.equal(twin(x, 0.5), moved(x, 0.5))
    with pytest.raises(ValueError, match="multiple of 4"):
        ScoreUNet(img_resolution=30)


def test_network_under_autocast_keeps_float32_parameters_and_result():
    net, x = network(), draw(2, 1, 8, 8).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = net(x, 0.5)
    assert rough.dtype == torch.float32
    error = float((rough - net(x, 0.5)).detach().abs().max())
    assert 0 < error < 0.1  # the convolutions did run in bfloat16


def test_labels_take_memory_for_what_is_drawn_alone():
    """A pickle may say 60,000 classes: a matrix of all of them would take 14 GB."""
    class Labelled(Denoiser):
        label_dim = 3000

    def drawn():
        return Labelled(1, 4).draw_labels(2, torch.Generator().manual_seed(0))

    index = torch.randint(3000, (2,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn(), torch.eye(3000)[index]) and drawn().dtype == torch.float32
    assert peak_memory(drawn, "cpu") < 100_000 < peak_memory(lambda: torch.eye(3000)[index], "cpu")
