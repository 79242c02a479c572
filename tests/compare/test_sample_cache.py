"""Sampling and scoring against closed forms, and that neither batches, processes nor kills change the numbers.

Data N(mean, v I) is carried linearly: slope(x, sigma) = a(sigma)(x - mean), a = sigma / (v + sigma^2), so that every
step multiplies the distance from the mean by a number.
"""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

import art_edm.compare.sample_cache as sample_cache
from art_edm.compare.sample_cache import Samples, Work, end_points, scored
from art_edm.compare.score_grids import Fine, Plan, score
from art_edm.compare.tables import lines
from art_edm.grids.grid import GridError, edm, save_grid
from art_edm.metrics.detectors import Detector
from art_edm.metrics.frechet import frechet_distance, moments
from art_edm.metrics.panel import Panel
from art_edm.models.analytic import GaussianDenoiser
from art_edm.models.latents import decoder_of
from art_edm.models.loading import Network
from art_edm.models.unet import ScoreUNet
from art_edm.runtime.distributed import World
from art_edm.runtime.store import Store
from art_edm.sampling.baselines import Choice, choose_grids
from art_edm.sampling.noise import latents
from art_edm.sampling.solvers import SOLVERS

SHAPE, MEAN, STD = (1, 2, 2), 0.1, 0.1
GRID, TEN = edm(5, 0.002, 80), edm(10, 0.002, 80)


class Linear(Detector):
    """Features A p of pixels p, [dim]."""

    def __init__(self, dim=3, classes=0):
        self.name, self.sha256, self.dim, self.classes = "linear", f"linear{dim}", dim, classes
        self.matrix = torch.randn(dim, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
        self.calls = 0

    def features(self, images):
        self.calls += 1
        return images.flatten(1).double() @ self.matrix.T

    def probabilities(self, images):
        return (images.flatten(1).double()[:, :3] / 20).softmax(dim=1)


def gaussian():
    return Network(GaussianDenoiser(MEAN, STD**2, SHAPE), "test", None)


def panel(detector, *metrics, splits=10):
    return Panel(metrics or ["fid"], {"detector": detector}, splits)


def features(what, detector, how, splits=0):
    """FID's accumulator, and with splits the Inception score's; None on processes other than 0."""
    metrics = ["fid", "is"] if splits else ["fid"]
    found = scored(what, panel(detector, *metrics, splits=splits), how)
    return found and {name: groups[0] for name, groups in found.of.items()}


def moments_of(found):
    return tuple(found["fid"].statistics().values())


def moments_as(mu, cov):
    return {"fid": {"mu": mu, "sigma": cov}}


def samples(num=150, first=0, network=None, **options):
    return Samples(network or gaussian(), GRID, "heun", num, first=first, **options)


def work(folder, batch=64, **options):
    return Work(Store(folder), World(), batch, **options)


def gain(grid, solver="heun"):
    """What the solver multiplies the distance from the mean by."""
    a, result = lambda sigma: sigma / (STD**2 + sigma**2), 1.0
    for s, t in zip(grid.values[:-1], grid.values[1:]):
        h = t - s
        result *= 1 + h * a(s) if t == 0 or solver == "euler" else 1 + h / 2 * (a(s) + a(t) * (1 + h * a(s)))
    return result


def expected_images(grid, num, first=0, seed=0, solver="heun"):
    z = latents(seed, range(first, first + num), SHAPE).double()
    return MEAN + gain(grid, solver) * np.sqrt(STD**2 + 80**2) * z


def pixels_of(images):
    return np.floor(np.clip(images.numpy() * 127.5 + 128, 0, 255)).reshape(len(images), -1)


# --- what is kept ------------------------------------------------------------------------------------

ENDS = {
    "euler": 0.06718192504975867, "heun": 0.033923265480297754, "rk4": 0.04989101228293497,
    "dpmpp2m": 0.04723308400697177, "ipndm2": 0.057084605854957546, "ipndm3": 0.05109840333269463,
    "ipndm": 0.04725068397132513, "ab4-sigma": 0.06339139072751972, "deis": 0.0624597873813168,
    "unipc": 0.026589708731624584, "clock": 0.05207202835102146, "clock-denoised": 0.03328801576733567,
}  # of method 2


def test_the_method_is_raised_when_numbers_change():
    """Kept samples carry no version of the code: raise sample_cache._METHOD and correct these together."""
    made = {name: end_points(Samples(gaussian(), TEN, name, 1, first=5), work(None))[0, 0] for name in SOLVERS}
    assert made == pytest.approx(ENDS, rel=1e-9) and sample_cache._METHOD == 2
    assert Samples(gaussian(), TEN, "heun", 1).what["method"] == 2


# --- what is measured --------------------------------------------------------------------------------


def test_features_are_those_of_the_rounded_exact_images(tmp_path):
    found = scored(samples(40, first=7), panel(Linear(), "kid"), work(tmp_path)).of["kid"][0].content()["features"]
    expected = pixels_of(expected_images(GRID, 40, first=7)) @ Linear().matrix.numpy().T
    assert np.allclose(found, expected, rtol=1e-6)
    for twin in ((40, 0), (40, 7, 1), (40, 7, 0, "euler")):  # another block, seed or solver
        assert not np.allclose(found, pixels_of(expected_images(GRID, *twin)) @ Linear().matrix.numpy().T, rtol=1e-6)


def test_fid_against_the_closed_form(tmp_path):
    """The FID of two exact Gaussians, from the gain of a coarse grid; a pixel's rounding adds a variance of 1/12."""
    detector, blocks, num = Linear(), 5, 8000
    a, ones = detector.matrix.numpy(), np.ones(4)
    coarse = 127.5**2 * gain(TEN) ** 2 * (STD**2 + 80**2) + 1 / 12
    reference = a @ (127.5 + 127.5 * 0.2 * ones), a @ a.T * 127.5**2 * 0.15**2
    exact = frechet_distance(a @ (127.5 + 127.5 * MEAN * ones), a @ a.T * coarse, *reference)
    plan = Plan(gaussian(), [Choice("edm", TEN, "rule")], ("heun",), num, blocks, 0, panel(detector),
                moments_as(*reference))
    (row,) = score(plan, work(tmp_path, batch=1000))
    assert abs(row["fid"] - exact) < 4 * row["fid_stderr"] < 0.1 * exact, (row["fid"], exact)
    without_gain = frechet_distance(a @ (127.5 + 127.5 * MEAN * ones), a @ a.T * 127.5**2 * STD**2, *reference)
    assert abs(row["fid"] - without_gain) > 4 * row["fid_stderr"]  # the twin: as if the solver were exact
    direct = [frechet_distance(*moments(pixels_of(expected_images(TEN, num, b * num)) @ a.T), *reference)
              for b in range(blocks)]
    assert row["fid_blocks"] == pytest.approx(direct, rel=1e-6)
    assert row["fid"] == pytest.approx(np.mean(direct), rel=1e-6) and row["fid_min"] == min(row["fid_blocks"])
    assert row["fid_stderr"] == pytest.approx(np.std(direct, ddof=1) / np.sqrt(blocks), rel=1e-4)


def test_inception_score_is_that_of_the_parts(tmp_path):
    detector = Linear(classes=3)
    plan = Plan(gaussian(), [Choice("edm", GRID, "rule")], ("heun",), 60, 2, 0, panel(detector, "is", splits=3))
    (row,) = score(plan, work(tmp_path))
    expected = []
    for block in range(2):
        p = torch.tensor(pixels_of(expected_images(GRID, 60, block * 60))[:, :3] / 20).softmax(dim=1).numpy()
        parts = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in (p[:20], p[20:40], p[40:])]
        expected.append(np.mean(parts))
    assert row["is_blocks"] == pytest.approx(expected, rel=1e-9) and "fid" not in row
    assert row["is"] != pytest.approx(expected[0], rel=1e-6)


def test_reference_error_against_the_exact_flow(tmp_path):
    """Both end points are multiples of the noise: r = |g - g_fine| sqrt(v + 80^2) RMS(z)."""
    choices, fine = [Choice("edm", GRID, "rule"), Choice("ten", TEN, "rule")], Fine(16, 60, "rk4")
    plan = Plan(gaussian(), choices, ("heun", "euler"), 50, 2, 0, fine=fine)
    rows = score(plan, work(tmp_path))
    z = np.concatenate([latents(0, range(b * 50, b * 50 + 16), SHAPE).double().flatten(1).numpy() for b in range(2)])
    r = np.sqrt(np.square(z).mean(axis=1))  # [32]
    fine_point = end_points(plan.samples(plan.fine_grid, "rk4", 0, 16), work(tmp_path))[0, 0]
    fine_gain = (fine_point - MEAN) / z[0, 0] / np.sqrt(STD**2 + 80**2)
    assert fine_gain == pytest.approx(STD / np.sqrt(STD**2 + 80**2), rel=1e-3)  # the exact flow's
    for row in rows:
        scale = abs(gain(edm(row["steps"], 0.002, 80), row["solver"]) - fine_gain) * np.sqrt(STD**2 + 80**2)
        assert row["error_rms"] == pytest.approx(scale * np.sqrt(np.square(r).mean()), rel=1e-7)
        assert row["error_mean"] == pytest.approx(scale * r.mean(), rel=1e-7)
        assert row["error_median"] == pytest.approx(scale * np.median(r), rel=1e-7)
        stderr = np.square(r).std(ddof=1) / np.sqrt(32) / 2 / np.sqrt(np.square(r).mean())
        assert row["error_rms_stderr"] == pytest.approx(scale * stderr, rel=1e-6)
    assert len({row["error_rms"] for row in rows}) == 4 and rows[1]["error_rms"] < rows[0]["error_rms"]


# --- batches and processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_feature_distance_to_the_exact_ends_of_the_same_noises(tmp_path):
    """Against features of the closed form's images; zero for the fine solution itself."""
    fine, fine_grid = Fine(40, 60, "heun"), edm(60, 0.002, 80)
    choices = [Choice("edm", GRID, "rule"), Choice("ten", TEN, "rule"), Choice("fine", fine_grid, "rule")]
    detector, reference = Linear(), (np.zeros(3), np.eye(3))
    plan = Plan(gaussian(), choices, ("heun",), 50, 2, 0, panel(detector), moments_as(*reference), fine)
    rows = score(plan, work(tmp_path))
    both = lambda grid: np.concatenate([expected_images(grid, 40, b * 50).numpy() for b in range(2)])
    seen = lambda grid: pixels_of(torch.from_numpy(both(grid))) @ detector.matrix.numpy().T
    exact = moments(seen(fine_grid))
    blocks = [frechet_distance(*moments(part), *reference) for part in np.split(seen(fine_grid), 2)]
    for row, choice in zip(rows, choices):
        assert row["fid_to_exact"] == pytest.approx(frechet_distance(*moments(seen(choice.grid)), *exact), rel=1e-6,
                                                    abs=1e-7)
        assert row["fid_of_exact"] == pytest.approx(np.mean(blocks), rel=1e-9)  # as the samples' own: block by block
        assert row["fid_of_exact"] != pytest.approx(frechet_distance(*exact, *reference), rel=1e-6)
    assert rows[0]["fid_to_exact"] > 4 * rows[0]["fid_to_exact_stderr"] > 0 and rows[2]["fid_to_exact"] < 1e-7
    other = moments(pixels_of(expected_images(fine_grid, 80, 200)) @ detector.matrix.numpy().T)
    assert frechet_distance(*other, *exact) > 1  # the twin: ends of other noises are far from these
    assert "FID to exact ends" in lines(rows)[0] and "FID of exact ends" in lines(rows)[0]
    without = score(replace(plan, references={}), work(tmp_path))  # no data set is needed
    assert without[0]["fid_to_exact"] == rows[0]["fid_to_exact"] and "fid" not in without[0]
    calls = detector.calls
    assert score(plan, work(tmp_path))[1]["fid_to_exact"] == rows[1]["fid_to_exact"] and detector.calls == calls


class OneOf(World):
    """Process `rank` of several that run one after the other, the last rank first."""

    def phase(self):
        return nullcontext()

    def check(self):
        pass


def by_processes(folder, size, what, detector, batch):
    for rank in reversed(range(size)):
        content = features(what, detector, Work(Store(folder), OneOf(rank, size), batch), splits=2)
        assert (content is None) == (rank > 0)
    return content


@pytest.mark.parametrize("dim", [3, 300])
def test_moments_do_not_depend_on_batches_or_processes(tmp_path, dim):
    detector = Linear(dim, classes=3)
    whole = features(samples(), detector, work(tmp_path / "whole", 1000), splits=2)
    mu, cov = moments_of(whole)
    for size, batch in ((1, 7), (1, 64), (2, 7), (3, 64), (3, 7)):
        found = by_processes(tmp_path / f"{size} {batch}", size, samples(), detector, batch)
        assert np.allclose(moments_of(found)[0], mu, rtol=1e-9, atol=0)
        assert np.abs(moments_of(found)[1] - cov).max() <= 1e-9 * np.abs(cov).max()
        assert found["is"].result() == pytest.approx(whole["is"].result(), rel=1e-9)
    other = moments_of(features(samples(first=1), detector, work(tmp_path / "twin"), splits=2))
    assert np.abs(other[1] - cov).max() > 1e-4 * np.abs(cov).max()  # the twin: one image is another


def test_a_float32_network_is_equal_up_to_a_few_pixels(tmp_path):
    """Its rounding depends on the batch, 1e-7 of the values: now and then a pixel falls to the other side of a half."""
    torch.manual_seed(0)
    net = ScoreUNet(img_resolution=8, sigma_data=0.5, width=8, deep_width=12, emb=8).eval().requires_grad_(False)
    plan = Samples(Network(net, "tiny", None), GRID, "heun", 40)
    points = [end_points(plan, work(tmp_path / str(batch), batch)) for batch in (7, 40)]
    assert np.abs(points[0] - points[1]).max() < 1e-5 * np.abs(points[0]).max()


def test_processes_that_do_not_share_the_folder_are_told(tmp_path):
    features(samples(), Linear(), Work(Store(tmp_path / "b"), OneOf(1, 2), 7))
    with pytest.raises(ValueError, match="not all processes' images in .*a; expected a folder that all"):
        features(samples(), Linear(), Work(Store(tmp_path / "a"), OneOf(0, 2), 7))


# --- choices -----------------------------------------------------------------------------------------


class Vae:
    """Stands for an encoder of EDM2: pixels are blocks of 8 x 8 of the first three latents."""

    def realise(self):
        return self

    def init(self, device):
        if self.missing:
            raise ModuleNotFoundError("no", name=self.missing)

    def decode(self, latents):
        assert latents.dtype == torch.float32 and len(latents) <= 8
        pixels = ((latents[:, :3] + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8)
        return pixels.repeat_interleave(8, 2).repeat_interleave(8, 3)

    missing = None


def test_weights_of_a_sidecar_are_sampled_and_compared_to_the_first_solver(tmp_path):
    """Rows (w): every step multiplies the distance from the mean by 1 + w h sigma / (v + sigma^2)."""
    rows = [[0.9 + 0.01 * k] for k in range(TEN.num_steps)]
    save_grid(tmp_path / "w.npy", TEN, {"weights": rows})
    choices = choose_grids(["edm", str(tmp_path / "w.npy")], [10], gaussian().denoiser)
    assert [choice.weights() is None for choice in choices] == [True, False]
    reference = moments_as(np.zeros(3), np.eye(3))
    plan = Plan(gaussian(), choices, ("euler", "weights"), 60, 2, 0, panel(Linear()), reference, Fine(16))
    assert [(choice.name, solver) for choice, solver in plan.cells] == [
        ("edm", "euler"), ("w", "euler"), ("w", "weights")]
    made = end_points(plan.samples(choices[1], "weights", 1, 20), work(tmp_path))
    factor = 1.0
    for (weight,), sigma, after in zip(rows, TEN.values[:-1], TEN.values[1:]):
        factor *= 1 + weight * (after - sigma) * sigma / (STD**2 + sigma**2)
    z = latents(0, range(60, 80), SHAPE).double().flatten(1).numpy()
    assert made == pytest.approx(MEAN + factor * np.sqrt(STD**2 + 80**2) * z, rel=1e-9)
    assert abs(gain(TEN, "euler") / factor - 1) > 0.01  # the twin
    table = score(plan, work(tmp_path))
    assert [row["nfe"] for row in table] == [10, 10, 10] and table[0]["fid"] == table[1]["fid"] != table[2]["fid"]
    assert table[2]["fid_difference"] == pytest.approx(table[2]["fid"] - table[0]["fid"], rel=1e-9)
    save_grid(tmp_path / "other.npy", GRID, {})
    (tmp_path / "w.npy").write_bytes((tmp_path / "other.npy").read_bytes())
    with pytest.raises(GridError, match="the provenance of another file"):
        choose_grids([str(tmp_path / "w.npy")], [GRID.num_steps], gaussian().denoiser)[0].weights()


def test_latents_are_decoded_before_a_detector_sees_them(tmp_path):
    network = Network(GaussianDenoiser(MEAN, STD**2, (4, 1, 1)), "edm2", None, {}, Vae())
    decode, detector = decoder_of(network), Linear()
    detector.matrix = torch.randn(3, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = Plan(network, [Choice("edm", GRID, "rule")], decode=decode, panel=panel(detector), num=30)
    assert plan.image_shape == (3, 8, 8)
    what = plan.samples(plan.choices[0], "heun", 0)
    found = scored(what, panel(detector, "kid"), work(tmp_path), 1, decode).of["kid"][0]
    z = latents(0, range(30), (4, 1, 1)).double()
    exact = MEAN + gain(GRID) * np.sqrt(STD**2 + 80**2) * z
    pixels = Vae().decode(exact[:8].float()).flatten(1).double()
    assert np.allclose(found.content()["features"][:8], pixels @ detector.matrix.T, rtol=1e-6)
    assert decoder_of(gaussian()) is None
    for encoder, text in ((None, "edm2 makes latents of 4x1x1 and has no decoder, .*use fid.py compare"),
                          (Vae(), "edm2 makes latents, and decoding them needs diffusers; pip install diffusers")):
        Vae.missing = "diffusers"
        with pytest.raises(ValueError, match=text):
            decoder_of(network._replace(encoder=encoder))
    Vae.missing = None


def test_differences_are_to_the_first_grid_of_the_same_steps_and_solver(tmp_path):
    choices = choose_grids(["edm", "dpm"], [5, 10], gaussian().denoiser)
    reference = np.zeros(3), np.eye(3)
    plan = Plan(gaussian(), choices, ("heun", "euler"), 60, 2, 0, panel(Linear()), moments_as(*reference))
    rows = score(plan, work(tmp_path))
    by_key = {(row["name"], row["steps"], row["solver"]): row for row in rows}
    assert len(by_key) == 8
    for (name, steps, solver), row in by_key.items():
        base = by_key["edm", steps, solver]
        if name == "edm":
            assert "fid_difference" not in row
            continue
        values = np.subtract(row["fid_blocks"], base["fid_blocks"])
        assert row["fid_difference"] == pytest.approx(values.mean())
        assert row["fid_difference_stderr"] == pytest.approx(abs(values[0] - values[1]) / 2)
        assert row["fid_difference_from"] == "paired over 2 blocks" and row["difference_to"] == "edm"


def test_solvers_are_compared_on_the_first_grid_at_equal_evaluations(tmp_path):
    choices = choose_grids(["edm", "dpm"], [3, 5], gaussian().denoiser)
    plan = Plan(gaussian(), choices, ("dpmpp2m", "euler", "heun"), 60, 2, 0, panel(Linear()),
                moments_as(np.zeros(3), np.eye(3)))
    rows = {(row["name"], row["steps"], row["solver"]): row for row in score(plan, work(tmp_path))}
    found = {key: row.get("difference_to") for key, row in rows.items()}
    assert found == {
        **{("edm", k, "dpmpp2m"): None for k in (3, 5)}, **{("edm", k, "euler"): "edm, dpmpp2m" for k in (3, 5)},
        ("edm", 3, "heun"): "edm, dpmpp2m", ("edm", 5, "heun"): None,  # 5 and 9 evaluations
        **{("dpm", k, solver): "edm" for k in (3, 5) for solver in plan.solvers}}
    heun, base = rows["edm", 3, "heun"], rows["edm", 5, "dpmpp2m"]
    assert heun["nfe"] == base["nfe"] == 5
    assert heun["fid_difference"] == pytest.approx(np.subtract(heun["fid_blocks"], base["fid_blocks"]).mean())
