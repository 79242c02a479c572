"""What helps to read a table of images: end points, the floor, ratios and differences; and an ablation's arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks.cifar10 import load_cifar10
from paper import context as laboratory
from paper.context import Lab
from paper.experiments import TABLES
from paper.report import Result, markdown, read_results, save_result, write_report
from paper.run_all import lacking
from paper.tables import ablations
from paper.tables import fid_cells as image_cells
from paper.tables.fid_cells import Bench, Cell
from paper.tables.fid_tables import END_POINTS, _comparisons, ratio
from PIL import Image

from art_edm.grids.grid import edm
from art_edm.metrics.detectors import CallDetector
from art_edm.metrics.frechet import frechet_distance, moments
from art_edm.metrics.panel import Panel
from art_edm.metrics.references import save_reference
from art_edm.metrics.standard_errors import Measurement
from art_edm.runtime.distributed import World
from art_edm.runtime.store import Store
from art_edm.sampling.generate import generate, to_pixels
from tests.support.fid_standin import StandIn

ITEM = replace(TABLES["table4"], solver="euler", steps=(2, 4), num=48, blocks=2, noises=8, floor=6)


@pytest.fixture
def bench(tmp_path):
    """A table of the Gaussian field, 8 x 8 grey pixels, judged by a small detector."""
    (tmp_path / "out").mkdir()
    lab = Lab(Store(tmp_path / "cells"), World(), tmp_path / "out")
    rng = np.random.default_rng(0)
    detector = CallDetector(StandIn(192, 5), "small", "0" * 64, (1, 8, 8), torch.device("cpu"))
    references = {"fid": dict(zip(("mu", "sigma"), moments(rng.normal(1, 2, size=(300, 5)))))}
    panel = Panel(["fid"], {"detector": detector})
    return Bench(ITEM, lab.network("gaussian:0.5"), panel, references, None, lab, lab.work())


def images(bench, grid, solver, num=48):
    return generate(bench.network.denoiser, grid, solver, num, batch=num)


def fid(bench, points):
    found = bench.detector.features(to_pixels(points).reshape(-1, 1, 8, 8)).double().numpy()
    return frechet_distance(*moments(found), *bench.references["fid"].values())


def test_a_cell_is_scored_and_set_against_the_fine_solution_from_the_same_noise(bench):
    grid, fine = edm(4, 0.002, 80), edm(100, 0.002, 80)
    cell = bench.cell(grid)
    assert cell.value.mean == pytest.approx(fid(bench, images(bench, grid, "euler")), rel=1e-8)
    gaps = images(bench, grid, "euler", 8) - images(bench, fine, "heun", 8)
    assert cell.error.rms == pytest.approx(float(gaps.square().mean().sqrt()), rel=1e-6)
    other = images(bench, grid, "euler", 16)[8:] - images(bench, fine, "heun", 8)
    assert cell.error.rms < 0.5 * float(other.square().mean().sqrt())  # other noises would tell nothing


def test_a_second_metric_stands_beside_the_first(bench):
    """FD-DINOv2 of the same images, where a reference carries it."""
    second = CallDetector(StandIn(192, 3), "dinov2", "1" * 64, (1, 8, 8), torch.device("cpu"))
    reference = dict(zip(("mu", "sigma"), moments(np.random.default_rng(1).normal(1, 2, size=(300, 3)))))
    panel = Panel(["fid", "fd_dinov2"], {"detector": bench.detector, "dinov2": second})
    both = replace(bench, panel=panel, references={**bench.references, "fd_dinov2": reference})
    grid = edm(4, 0.002, 80)
    cell, alone = both.cell(grid), bench.cell(grid)
    assert cell.value.mean == pytest.approx(alone.value.mean, rel=1e-12) and alone.others == {}
    found = second.features(to_pixels(images(bench, grid, "euler")).reshape(-1, 1, 8, 8)).double().numpy()
    assert cell.others["fd_dinov2"].mean == pytest.approx(frechet_distance(*moments(found), *reference.values()))
    result = SimpleNamespace(more={}, more_stderr={}, paper={})
    _comparisons({"edm": [cell]}, result)
    assert result.more["FD-DINOv2"] == {"edm": [cell.others["fd_dinov2"].mean]}


@pytest.mark.parametrize("metric, compared", [("fid", ["fid", "fd_dinov2"]), ("is", ["fd_dinov2"])])
def test_tables_7_and_8_have_fd_dinov2_where_the_reference_carries_it(bench, metric, compared, tmp_path, monkeypatch):
    table, files = {"fid": TABLES["table7"], "is": TABLES["table8"]}[metric], tmp_path / "files"
    second = CallDetector(StandIn(192, 3), "dinov2", "1" * 64, (1, 8, 8), torch.device("cpu"))
    monkeypatch.setattr(laboratory, "load_detector", lambda *args, **options: bench.detector)
    monkeypatch.setattr(laboratory, "load_dinov2", lambda *args, **options: second)
    lab, network = replace(bench.lab, networks=files), bench.network
    sets = {name: {"mu": np.zeros(dim), "sigma": np.eye(dim)} for name, dim in (("fid", 5), ("fd_dinov2", 3))}
    files.mkdir()
    save_reference(files / table.reference, sets, 10, {})
    alone = lab.panel(table.metric, table.detector, table.reference, network)
    assert alone.metrics == [metric]  # without DINOv2's weights
    (files / laboratory.DINO).touch()
    panel = lab.panel(table.metric, table.detector, table.reference, network)
    assert panel.metrics == [metric, "fd_dinov2"] and list(lab.references(table.reference, panel)) == compared
    assert list(lab.references(table.reference, alone)) == compared[:-1]


def test_yardsticks_are_the_floor_and_as_many_test_images(bench, monkeypatch):
    pixels = torch.randint(0, 256, (60, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    monkeypatch.setattr(laboratory, "load_mnist", lambda split, data: (pixels if split == "test" else None, None))
    found = bench.yardsticks()
    assert list(found) == ["the network's floor (Heun, 6 steps, NFE 11)", "48 test images"]
    floor, test = found.values()
    assert floor[0] == pytest.approx(fid(bench, images(bench, edm(6, 0.002, 80), "heun")), rel=1e-8)
    spaced = pixels[torch.arange(48) * 60 // 48, None]
    features = bench.detector.features(spaced).double().numpy()
    assert test[0] == pytest.approx(frechet_distance(*moments(features), *bench.references["fid"].values()), rel=1e-8)
    every = bench.detector.features(pixels[:, None]).double().numpy()  # more images have another bias
    assert test[0] != pytest.approx(frechet_distance(*moments(every), *bench.references["fid"].values()), rel=1e-3)
    assert all(stderr > 0 for _, stderr in found.values())
    monkeypatch.setattr(bench.lab, "true_images", lambda name: pytest.fail("computed again"))
    assert bench.yardsticks() == found
    bench.experiment = replace(ITEM, floor=0, reference="x.npz")
    assert bench.yardsticks() == {}


@pytest.fixture
def cifar10(bench, tmp_path):
    """The bench with 40 training and 40 test images of two classes in place of CIFAR-10, 32 x 32 pixels of colour."""
    rng = np.random.default_rng(0)
    for split, name, number in ((s, c, i) for s in ("train", "test") for c in ("cat", "ship") for i in range(20)):
        place = tmp_path / "cifar" / split / name
        place.mkdir(parents=True, exist_ok=True)
        dark = 3 if name == "cat" else 1
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8) // dark).save(place / f"{number:04d}.png")
    lab = replace(bench.lab, cifar10=tmp_path / "cifar")
    item, network = replace(TABLES["table2-small"], num=20), lab.network("cifar10")
    panel = lab.panel("fid", item.detector, item.reference, network)
    return Bench(item, network, panel, lab.references(item.reference, panel), None, lab, lab.work())


def test_cifar10s_images_are_the_reference_and_the_yardstick(cifar10):
    train, test = (load_cifar10(split, str(cifar10.lab.cifar10))[0] for split in ("train", "test"))
    features = lambda images: cifar10.detector.features(images).double().numpy()
    reference = moments(features(train))
    assert cifar10.references["fid"]["mu"] == pytest.approx(reference[0], rel=1e-6)
    assert cifar10.references["fid"]["sigma"] == pytest.approx(reference[1], rel=1e-5, abs=1e-9)
    cifar10.experiment = replace(cifar10.experiment, floor=0)
    ((name, (value, _)),) = cifar10.yardsticks().items()
    assert name == "20 test images"
    assert value == pytest.approx(frechet_distance(*moments(features(test[::2])), *reference), rel=1e-5)
    changed = next((cifar10.lab.cifar10 / "test" / "ship").iterdir())  # other images: nothing kept is taken for them
    Image.new("RGB", (32, 32), (250, 0, 0)).save(changed)
    cifar10.lab._images.clear()
    assert cifar10.yardsticks()[name][0] != pytest.approx(value, rel=1e-3)
    first = frechet_distance(*moments(features(test[:20])), *reference)  # the twin: images of one class alone
    assert abs(first - value) > 0.1 * value


def test_the_small_tables_of_cifar10_ask_for_its_images(cifar10):
    items = [TABLES[name] for name in ("table2-small", "table3-small", "table5-small", "transfer-networks")]
    (need,) = lacking(items, replace(cifar10.lab, cifar10=None))
    assert need[0] == ["table2-small", "table3-small", "table5-small"] and need[1] == "CIFAR-10's images"
    assert lacking(items, cifar10.lab) == []
    assert items[0].paper == TABLES["table2"].paper != items[1].paper
    assert [k for k in items[1].steps] == [2, 3, 5, 7, 12, 30] and len(items[1].paper["edm"]) == 6


def test_the_number_of_evaluations_is_told_beforehand(bench):
    table = [edm(k, 0.002, 80) for k in (2, 4)]
    before = bench.network.denoiser.evaluations
    for grid in table:
        bench.cell(grid)
    bench.experiment = replace(ITEM, reference="x.npz")
    bench.yardsticks()
    assert bench.network.denoiser.evaluations - before == bench.evaluations((2, 4), 1) == bench.work.done


@pytest.mark.parametrize("blocks", [True, False])
def test_a_ratio_and_its_error_when_what_is_shared_cancels(blocks):
    rng = np.random.default_rng(3)
    shared, own = rng.normal(10, 1, size=12), rng.normal(0, 0.01, size=(2, 12))
    one, base = 2 * shared + own[0], shared + own[1]
    if blocks:
        found = ratio(Measurement(one), Measurement(base))
        left = [np.delete(one, j).mean() / np.delete(base, j).mean() for j in range(12)]
    else:
        found = ratio(Measurement([one.mean()], one), Measurement([base.mean()], base))
        left = one / base
    assert found.value == pytest.approx(one.mean() / base.mean(), rel=1e-12)
    assert found.stderr == pytest.approx(np.sqrt(11 / 12 * np.square(left - np.mean(left)).sum()), rel=1e-9)
    apart = ratio(Measurement(one), Measurement(base[::-1])) if blocks else ratio(
        Measurement([one.mean()], one), Measurement([base.mean()], base[::-1]))
    assert apart.stderr > 20 * found.stderr
    assert ratio(Measurement([2.0]), Measurement([4.0])) == (0.5, None, None)


def made():
    """A result with all that helps to read it, as `run_images` makes it."""
    error = image_cells.EndPointError(0.25, 0.0625, 0.25, 0.0625, 0.2)
    cells = {"edm": [Cell(Measurement([6.0], [6.0, 7.0]), 1.0, error)],
             "dpm": [Cell(Measurement([9.0], [9.0, 8.0]), 1.0, error)],
             "art_rl": [Cell(Measurement([4.0], [4.0, 5.0]), 1.0, error)]}
    rows = {name: [cell.value.mean for cell in row] for name, row in cells.items()}
    result = Result("table9", "t", "FID", ["NFE 3"], rows, paper={"edm": [3.0], "art_rl": [1.5]},
                    yardsticks={"floor": [3.5, 0.25]})
    _comparisons(cells, result)
    return result


def test_every_row_is_compared_with_edm(tmp_path):
    result = made()
    assert result.more["edm / art_rl"] == {"here": [1.5], "paper": [2.0]}
    title = "Difference to edm, from the same noise"
    assert result.more[title] == {"dpm": [3.0], "art_rl": [-2.0]}
    assert result.more_stderr[title]["art_rl"] == [0.0]  # moves with edm
    assert result.more_stderr[title]["dpm"] == [pytest.approx(1.0)]  # (2 - 1)/2 (1 + 1), moves against it
    assert result.more[END_POINTS]["dpm"] == [0.25] and result.more_stderr[END_POINTS]["dpm"] == [0.0625]
    text = markdown(result)
    assert "| dpm | 3.0 ± 1.0 |" in text and "| art_rl | -2 |" in text and "| dpm | 0.250 ± 0.062 |" in text
    wide = replace(result, columns=["c"] * 9, rows={name: row * 9 for name, row in result.rows.items()}, paper={},
                   more={title: {name: row * 9 for name, row in result.more[title].items()}},
                   more_stderr={title: {name: row * 9 for name, row in result.more_stderr[title].items()}})
    assert "| c | 3.0 ± 1.0 | -2 |" in markdown(wide)
    save_result(tmp_path, result)
    assert read_results(tmp_path) == [result]
    write_report(tmp_path)
    assert "For comparison: floor 3.50 ± 0.25." in (tmp_path / "README.md").read_text()
    data = json.loads((tmp_path / "table9.json").read_text())
    del data["more_stderr"], data["yardsticks"]  # as a file of an earlier version
    (tmp_path / "table9.json").write_text(json.dumps(data))
    assert read_results(tmp_path)[0].rows == result.rows


def test_iterations_and_evaluations_of_the_two_variances(monkeypatch, tmp_path):
    def scores(network, lab, iterations, **settings):
        fixed = "epsilon" in settings
        return [float("inf"), 1.0] if fixed and iterations < 100 else [1.0 + 1 / iterations]

    monkeypatch.setattr(ablations, "cheap_fields", lambda lab, size: {"a": None})
    monkeypatch.setattr(ablations, "fixed_variance", lambda *args: {"epsilon": 1.0, "temperature": 1.0})
    monkeypatch.setattr(ablations, "_scores", scores)
    result = ablations._variance(TABLES["ablation-variance"], None)
    assert result.rows == {"adaptive": [25], "fixed": [100]}
    evaluations, ends = result.more.values()
    each = 3 * (2 * 80 + 1) * 128  # three at each of the ends and middles of 80 steps, 128 paths
    assert evaluations == {"adaptive": [25 * each], "fixed": [100 * each]}
    assert ends["fixed, 50 iterations"] == [None] and ends["adaptive, 50 iterations"] == [1.02]
    save_result(tmp_path, result)
    assert "| fixed, 50 iterations | – |" in markdown(read_results(tmp_path)[0])
