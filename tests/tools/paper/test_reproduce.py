"""The tables' own arithmetic, against closed forms and independent computations."""

from __future__ import annotations

import io
import json
import math
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks.cifar10 import CLASSES
from paper import context as laboratory
from paper import kept_runs as learned
from paper.context import Lab, address_of
from paper.experiments import TABLES, select
from paper.report import Result, markdown, paper_table, read_results, save_result, write_report
from paper.run_all import lacking
from paper.tables import table1
from paper.tables.ablations import first_below, fixed_variance
from paper.tables.empirical_fields import cifar10_images, empirical
from paper.tables.fid_tables import _fitted, grids_of
from paper.tables.table1 import _measure, limit, noise_free, quantile_means, run_oned, training_steps
from PIL import Image
from scipy.integrate import quad
from scipy.stats import norm

from art_edm.grids.clocks import make_clock
from art_edm.grids.grid import Grid, edm, read_off, resample
from art_edm.learning.config import PRESETS
from art_edm.models.analytic import one_dimensional
from art_edm.runtime.distributed import World
from art_edm.runtime.errors import Stopped
from art_edm.runtime.store import Store
from art_edm.sampling.baselines import hand_made
from art_edm.sampling.solvers import nfe

TINY = PRESETS["default"].changed(iterations=6, batch=16, repeats=4, trajectories=4, points=80, train_steps=6,
                                  distill_paths=32)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setitem(laboratory.PRESETS, "default", TINY)
    (tmp_path / "out").mkdir()
    return Lab(Store(tmp_path / "cells"), World(), tmp_path / "out")


# --- table 1 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 50])
def test_the_limit_has_its_closed_form_error(k):
    # 1 + (tan b - tan a) sin a cos a = cos a cos(a - b) / cos b: the product telescopes
    exact = 1 - math.cos(math.atan(3) / k) ** k
    assert noise_free(limit(k, 3.0)) == pytest.approx(exact, rel=1e-12)
    bent = limit(k, 3.0).values.copy()
    bent[1:-1] *= 1.05
    assert k == 1 or noise_free(Grid(bent)) > exact * 1.001


def test_noise_free_errors_are_the_papers_but_for_its_sampling(lab):
    printed = paper_table("table1")
    grids = {k: hand_made(one_dimensional(), k) for k in printed["steps"]}
    for name in ("uniform", "dpm", "edm"):
        found = [noise_free(grids[k][name]) for k in printed["steps"]]
        gaps = np.subtract(printed["rows"][name], found)
        assert (gaps > 0).all() and (gaps < 0.005).all(), (name, gaps)
    pinned = [noise_free(edm(k, 1e-4, 3.0)) for k in printed["steps"][1:]]
    assert np.abs(np.subtract(printed["rows"]["edm"][1:], pinned)).max() > 0.02  # another rule is distinguished


def test_quantile_means_are_integrals():
    edges = norm.ppf(np.arange(6) / 5)
    exact = [5 * quad(lambda x: x * norm.pdf(x), a, b)[0] for a, b in zip(edges[:-1], edges[1:])]
    assert quantile_means(5) == pytest.approx(exact, abs=1e-10)
    assert not np.allclose(quantile_means(5), norm.ppf((np.arange(5) + 0.5) / 5), atol=1e-2)


def test_w2_from_samples_is_the_noise_free_error_with_more_spread(lab):
    grid = hand_made(one_dimensional(), 5)["uniform"]
    found = _measure(one_dimensional(), grid, 20_000, 4, lab)
    mean, stderr = found[:, 0].mean(), found[:, 0].std(ddof=1) / 2
    assert abs(mean - noise_free(grid)) < 5 * stderr < 0.02
    assert abs(mean - noise_free(limit(5, 3.0))) > 10 * stderr
    assert len(list(lab.store.folder.glob("*.npz"))) == 4
    again = _measure(None, grid, 20_000, 4, lab)  # from the store alone
    assert np.array_equal(found, again)
    assert not np.array_equal(found, _measure(one_dimensional(), grid, 20_000, 4, replace(lab, seed=1)))


@pytest.mark.slow
def test_table_1_end_to_end(lab):
    result = run_oned(replace(TABLES["table1"], num=2000, steps=(2, 10)), lab)
    assert result.nfe == result.steps == [2, 10] and set(result.paper) == {"uniform", "dpm", "edm", "art_rl"}
    direct = result.more["Noise-free error"]["direct"]
    assert direct == pytest.approx([0.3492, 0.0771], abs=1e-3)  # the continuous optimum's
    for name in ("art_rl", "art_rl_once"):
        assert result.more["Noise-free error"][name] == pytest.approx(direct, abs=0.02)
    assert all((lab.out / name).stat().st_size > 10_000 for name, _ in result.figures)


def test_noise_goes_where_the_network_is(monkeypatch):
    """A GPU's network gets its noise there, and the end points come back; here the device is one without numbers."""
    seen = []
    monkeypatch.setattr(table1, "sample", lambda denoiser, noise, *args, **more: seen.append(noise.device) or
                        torch.zeros(noise.shape, dtype=torch.float64))
    table1._block(SimpleNamespace(device=torch.device("meta")), limit(2, 3.0), 10, 0, 0)
    table1._block(one_dimensional(), limit(2, 3.0), 10, 0, 0)
    assert [device.type for device in seen] == ["meta", "cpu"]


def test_training_steps_have_every_time_of_the_grid():
    assert [training_steps(k) for k in (2, 3, 5, 18, 20, 50, 100)] == [20, 21, 20, 36, 20, 50, 100]


# --- runs that are kept ------------------------------------------------------------------------------


def test_a_kept_run_gives_the_same_grids_and_is_not_done_again(lab, monkeypatch):
    network = lab.network("gaussian:0.5")
    first = lab.run(network, rounds=2)
    monkeypatch.setattr(learned, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    again = lab.run(network, rounds=2)
    assert first.grid(7) == again.grid(7) and again.profile.optimum == first.profile.optimum
    assert again.evaluations == first.evaluations and len(again.history["cost"]) == 6
    monkeypatch.undo()
    monkeypatch.setitem(laboratory.PRESETS, "default", TINY)
    direct = learned.train(network.denoiser, TINY.changed(rounds=2))
    assert first.grid(7) == direct.learned.grid(7)
    assert lab.run(network, seed=5, rounds=2).grid(7) != first.grid(7)


def test_a_stopped_run_leaves_its_checkpoint_and_ends_with_the_same_bytes(lab, monkeypatch):
    network, whole = lab.network("gaussian:0.5"), lab.run(lab.network("gaussian:0.5"))
    other = replace(lab, store=Store(lab.out / "other"))

    class Stop:
        requested = property(lambda self: network.denoiser.evaluations > before + 200)
        __enter__, __exit__ = (lambda self: self), (lambda self, *args: None)

    before = network.denoiser.evaluations
    from art_edm.learning import training

    monkeypatch.setattr(training, "GracefulStop", Stop)
    with pytest.raises(Stopped):
        other.run(network, rollout="live", iterations=3, batch=4, train_steps=4)
    assert list(other.store.folder.glob("*.unfinished"))
    monkeypatch.undo()
    monkeypatch.setitem(laboratory.PRESETS, "default", TINY)
    settings = dict(rollout="live", iterations=3, batch=4, train_steps=4)
    continued, straight = other.run(network, **settings), lab.run(network, **settings)
    assert continued.grid(9) == straight.grid(9) != whole.grid(9)
    assert not list(other.store.folder.glob("*.unfinished"))


def test_a_foreign_grid_keeps_its_interior(lab):
    class Narrow:
        sigma_limits = (0.02, 79.0)

    values = edm(6, 0.002, 80).values
    fitted = _fitted(Grid(values), Narrow)
    assert fitted.values[0] == 79 and fitted.values[-2] == 0.02 and np.array_equal(fitted.values[1:5], values[1:5])


def test_table_5_resamples_by_either_rule(lab):
    """Read off the clock at half the steps, every second level is kept to the bit; the paper's rule moves it."""
    run = SimpleNamespace(grid=lambda k: edm(k, 0.002, 80))
    denoiser = lab.network("gaussian:0.5").denoiser
    item = replace(TABLES["table5-mnist"], steps=(9,))
    found = {rule: grids_of(item, denoiser, run, rule)["art_rl"][9] for rule in ("paper", "clock")}
    assert found == {"paper": resample(edm(18, 0.002, 80), 9), "clock": read_off(edm(18, 0.002, 80), 9)}
    assert found["clock"].values[1] == edm(18, 0.002, 80).values[2] != found["paper"].values[1]
    assert grids_of(item, denoiser, run) == grids_of(item, denoiser, run, "paper")


# --- ablations ---------------------------------------------------------------------------------------


def test_a_fixed_variance_is_the_same_everywhere(lab):
    network = lab.network("gaussian:0.5")
    settings = fixed_variance(network, lab, "edm", 0.25)
    profile = lab.run(network, method="direct", trajectories=8, points=48).profile
    clock, unit = make_clock("edm", 80.0, 0.5), profile.optimum / profile.horizon
    s = np.linspace(0, 1, 500)
    q = profile.norms(clock.sigma(s)) * np.square(clock.rate(s)) / unit
    variance = settings["temperature"] / unit / np.maximum(q, settings["epsilon"])
    assert np.ptp(variance) == 0
    assert (variance * q).mean() == pytest.approx(0.25**2, rel=0.02)  # costs what the adaptive one costs
    assert np.ptp(settings["temperature"] / unit / np.maximum(q, 0.1)) > 0.1  # with the usual floor it is not


def test_first_budget_that_stays_below():
    assert first_below({10: [1.2], 20: [1.0, 1.08], 40: [1.3], 80: [1.01], 160: [1.05]}) == 80
    assert first_below({10: [1.2], 20: [1.06]}) is None


def test_cifar_images_from_archive_and_folder(tmp_path):
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "c.tar.xz", "w:xz") as archive:
        for label in CLASSES:
            for i in (2, 0, 1):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "PNG")
                info = tarfile.TarInfo(f"train/{label}/{i:04d}.png")
                info.size = len(buffer.getvalue())
                archive.addfile(info, io.BytesIO(buffer.getvalue()))
    with tarfile.open(tmp_path / "c.tar.xz") as archive:
        archive.extractall(tmp_path / "d")
    images = cifar10_images(tmp_path / "c.tar.xz", 20)
    pixels = np.asarray(Image.open(tmp_path / "d" / "train" / "cat" / "0001.png"))
    assert images.shape == (20, 3, 32, 32)
    assert np.array_equal(np.rint((images[7].permute(1, 2, 0).numpy() + 1) * 127.5), pixels)
    assert torch.equal(images, cifar10_images(tmp_path / "d", 20))
    assert empirical("a", images, "cpu").sha256 != empirical("a", images.flip(0), "cpu").sha256
    with pytest.raises(ValueError, match="found 30 images of 10 classes.*expected 4 of each.*--cifar10"):
        cifar10_images(tmp_path / "c.tar.xz", 40)


# --- selection, needs and the report -----------------------------------------------------------------


def test_names_patterns_and_figures_choose_experiments():
    names = lambda *given: [item.name for item in select(given)]
    assert names() == list(TABLES)
    assert names("table4") == ["table4"] and names("table4*") == ["table4", "table4-euler", "table4-heun"]
    assert names("table6") == ["table6-afhqv2", "table6-ffhq", "table6-imagenet64"]
    assert names("figure10", "table1") == ["table1", "table5", "table5-small", "table5-mnist"]
    assert names("figure8") == ["table1"]
    with pytest.raises(ValueError, match="found 'table9', expected some of table1"):
        select(["table9"])


def test_every_table_of_the_paper_has_an_experiment_that_fits_it():
    data = json.loads((Path(laboratory.__file__).with_name("paper.json")).read_text())
    for name, printed in data["tables"].items():
        item = TABLES[name]
        assert (item.solver, list(item.steps)) == (printed["solver"], printed["steps"]), name
        assert [nfe(item.solver, k) for k in item.steps] == printed["nfe"], name
        assert set(printed["rows"]) == set(item.grids), name
        assert all(len(row) == len(item.steps) for row in printed["rows"].values())


def test_what_is_lacking_comes_with_its_address(lab):
    needs = {what: (names, where) for names, what, where in lacking(list(TABLES.values()), lab)}
    names, where = needs["edm-cifar10-32x32-cond-vp.pkl"]
    assert "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-cond-vp.pkl" in where
    assert {"table2", "table3", "table5", "table6-ffhq", "table7"} <= set(names) and "table4" not in names
    assert address_of("img512.pkl") == "https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/img512.pkl"
    assert address_of("ffhq-64x64.npz") == "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/ffhq-64x64.npz"
    assert "a GPU" in needs and "a GPU" not in [what for _, what, _ in lacking([TABLES["table4"]], lab)]
    forced = replace(lab, forced=True)
    assert "a GPU" not in [what for _, what, _ in lacking(list(TABLES.values()), forced)]


def small_result(**changes):
    given = dict(name="table9", title="a title", metric="FID", columns=["NFE 3", "NFE 5"],
                 rows={"edm": [2.0, 1.5], "art_rl": [1.0, 1.75]}, stderr={"edm": [0.1, 0.02], "art_rl": [0.031, None]},
                 paper={"edm": [3.0, 2.5]}, nfe=[3, 5], steps=[2, 3], solver="heun")
    return Result(**{**given, **changes})


def test_files_of_a_result(tmp_path):
    save_result(tmp_path, small_result())
    data = json.loads((tmp_path / "table9.json").read_text())
    assert data["nfe"] == [3, 5] and data["rows"]["art_rl"] == [1.0, 1.75] and data["paper"] == {"edm": [3.0, 2.5]}
    assert (tmp_path / "table9.csv").read_text().splitlines()[1:] == [
        "edm,NFE 3,2,3,2.0,0.1,3.0", "edm,NFE 5,3,5,1.5,0.02,2.5", "art_rl,NFE 3,2,3,1.0,0.031,",
        "art_rl,NFE 5,3,5,1.75,,"]
    (tmp_path / "other.json").write_text('{"a": 1}')
    assert read_results(tmp_path) == [small_result()]


def test_the_report_marks_the_best_and_what_is_lacking(tmp_path):
    text = markdown(small_result())
    assert "| edm | 2.00 ± 0.10 | **1.500 ± 0.020** |" in text and "| art_rl | **1.000 ± 0.031** | 1.75 |" in text
    assert "| *edm, paper* | *3* | *2.5* |" in text
    assert "**2.00 ± 0.10**" in markdown(small_result(better="higher"))
    rows = {"edm": [2.0] * 9, "b": [1.0] * 9}
    many = small_result(columns=[f"c{i}" for i in range(9)], rows=rows, stderr={}, paper={})
    assert "| c8 | 2 | **1** |" in markdown(many)
    save_result(tmp_path, small_result())
    write_report(tmp_path, [("table2", "x.pkl: `curl`")], {"table3": "went wrong"})
    report = (tmp_path / "README.md").read_text()
    for text in ("## table9: a title", "| table2 | x.pkl: `curl` |", "- table3: went wrong"):
        assert text in report


def test_a_folder_of_mnist_that_is_named_must_be_there(tool, monkeypatch):
    run = tool("reproduce")
    refused = run("table1", "--list", "--mnist=nowhere")
    assert refused.exit_code == 2 and "found no folder nowhere, expected one with MNIST's" in refused.output
    monkeypatch.setenv("ART_EDM_MNIST", "nowhere")  # of other work, perhaps
    assert run("table1", "--list").exit_code == 0
