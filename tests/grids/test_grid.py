"""Grids: rules against closed forms, resampling, refusal of everything that is no grid, files."""

from __future__ import annotations

import copy
import errno
import io
import math
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from art_edm.grids import grid as grids
from art_edm.grids.grid import (
    RULES,
    Grid,
    GridError,
    check_distinct,
    check_grid_destination,
    check_range,
    dpm,
    dpm_unpinned,
    edm,
    edm_unpinned,
    load_grid,
    load_provenance,
    read_off,
    resample,
    save_grid,
    uniform,
)

# Ratios between neighbours well above rounding, so that interpolated levels stay apart.
RATIOS = st.lists(st.floats(1.01, 30.0), min_size=1, max_size=20)


def grid_of(ratios, start=80.0) -> Grid:
    return Grid(np.append(start / np.cumprod([1.0, *ratios]), 0.0))


# --- the type ----------------------------------------------------------------------------------------


def test_values_are_kept_and_cannot_be_changed():
    source = np.array([3.0, 1.0, 0.0])
    grid = Grid(source)
    source[0] = 99
    assert grid.values.tolist() == [3.0, 1.0, 0.0] and grid.values.dtype == np.float64
    assert (grid.num_steps, grid.sigma_max, len(grid)) == (2, 3.0, 3)
    with pytest.raises(ValueError):
        grid.values[0] = 1
    with pytest.raises(ValueError):
        grid.values.setflags(write=True)
    with pytest.raises(AttributeError):
        grid.values = source


def test_equality_hash_copies_and_repr():
    grid = edm(18, 0.002, 80)
    for other in (Grid(grid.values), copy.deepcopy(grid), pickle.loads(pickle.dumps(grid))):
        assert other == grid and hash(other) == hash(grid) and not other.values.flags.writeable
    assert grid != edm(17, 0.002, 80) and grid != grid.values.tolist()
    assert repr(grid) == "Grid(80, 57.586, 40.7856, ..., 0.002, 0; K=18)"
    assert math.copysign(1, Grid([1.0, -0.0]).values[-1]) == 1


def test_other_float_types_are_cast():
    assert Grid(np.array([2, 0.1, 0], np.float32)).values[1] == float(np.float32(0.1))
    assert Grid(np.array([2, 1, 0], ">f8")) == Grid([2.0, 1.0, 0.0])


BAD_VALUES = {
    "nan": ([3.0, 2.0, math.nan, 0.0], "found nan at index 2"),
    "inf": ([math.inf, 2.0, 0.0], "found inf at index 0"),
    "negative": ([3.0, -1.0, 0.0], "found -1 at index 1"),
    "ascending": ([0.0, 1.0, 3.0], "values ascend; expected noise levels from sigma_max down to 0"),
    "ascending in one place": ([3.0, 1.0, 2.0, 0.0], "2 at index 2"),
    "duplicates": ([3.0, 2.0, 2.0, 0.0], "found 2 twice, at steps 1 and 2"),
    "no final 0": ([3.0, 2.0, 0.002], "found 0.002 at the end, index 2; expected exactly 0"),
    "zero before the end": ([3.0, 0.0, 0.0], "found 0 at index 1; expected 0 only at the end"),
    "only zeros": ([0.0, 0.0], "found 0 at index 0"),
    "one value": ([0.0], "found 1 value"),
    "no value": (np.zeros(0), "found 0 value"),
    "scalar": (np.float64(3), "found shape ()"),
    "two dimensions": ([[3.0, 0.0]], "found shape (1, 2)"),
    "rows of uneven length": ([[3.0, 0.0], [1.0]], "uneven length"),
    "integers": (np.array([3, 2, 0]), "type int64"),
    "booleans": (np.array([True, False]), "type bool"),
    "complex": (np.array([3, 0], complex), "type complex128"),
    "objects": (np.array([3.0, 0.0], object), "type object"),
    "text": (["3", "0"], "type <U1"),
}


@pytest.mark.parametrize(("values", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_everything_else_is_refused_in_one_line(values, message):
    with pytest.raises(GridError) as error:
        Grid(values)
    assert message in str(error.value) and "expected" in str(error.value) and "\n" not in str(error.value)


@given(st.lists(st.floats(width=32) | st.sampled_from([0.0, 1.0, 2.0, 80.0]), max_size=6), st.booleans())
def test_a_list_is_a_grid_or_refused(values, tidy):
    values = sorted(values, reverse=True) + [0.0] if tidy else values
    valid = (
        len(values) >= 2 and all(map(math.isfinite, values)) and values[-1] == 0
        and all(values[i] > values[i + 1] for i in range(len(values) - 1))
    )
    if valid:
        assert Grid(values).values.tolist() == values
    else:
        with pytest.raises(GridError):
            Grid(values)


# --- rules -------------------------------------------------------------------------------------------


def edm_by_torch(num_steps, sigma_min, sigma_max, rho, intervals):
    """The rho rule in torch float64, as the EDM sampler computes it when `intervals` = num_steps - 1."""
    step = torch.arange(num_steps, dtype=torch.float64)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return ((top + step / intervals * (bottom - top)) ** rho).numpy()


@pytest.mark.parametrize(
    ("sigma_min", "sigma_max", "rho"), [(0.002, 80, 7), (0.002, 80.0, 7.0), (1e-4, 3, 5), (0.01, 50, 1.7)]
)
def test_edm_has_the_bits_of_torch(sigma_min, sigma_max, rho):
    for num_steps in (*range(2, 65), 256, 1000):
        values = edm(num_steps, sigma_min, sigma_max, rho).values
        assert values[-1] == 0 and len(values) == num_steps + 1
        assert values[:-1].tobytes() == edm_by_torch(num_steps, sigma_min, sigma_max, rho, num_steps - 1).tobytes()
        # twin: the denominator off by one misses sigma_min
        assert not np.allclose(values[:-1], edm_by_torch(num_steps, sigma_min, sigma_max, rho, num_steps), rtol=1e-3)


def test_edm_at_two_steps_spends_one_on_sigma_min():
    np.testing.assert_allclose(edm(2, 0.002, 80).values, [80, 0.002, 0], rtol=1e-13)
    np.testing.assert_allclose(edm_unpinned(2, 80).values, [80, 80 / 2**7, 0], rtol=1e-15)


def test_closed_forms():
    assert uniform(4, 80).values.tolist() == [80, 60, 40, 20, 0]
    np.testing.assert_allclose(dpm(3, 0.01, 100).values, [100, 1, 0.01, 0], rtol=1e-14)
    np.testing.assert_allclose(dpm_unpinned(4, 0.01, 100).values, [100, 10, 1, 0.1, 0], rtol=1e-14)
    np.testing.assert_allclose(edm_unpinned(4, 16, 2).values, [16, 9, 4, 1, 0], rtol=1e-15)
    roots = edm(10, 0.002, 80, 3).values[:-1] ** (1 / 3)
    np.testing.assert_allclose(np.diff(roots), np.full(9, roots[1] - roots[0]), rtol=1e-12)


@given(
    st.integers(1, 300), st.floats(1e-4, 0.1), st.floats(1.0, 200.0), st.floats(1.5, 12.0), st.sampled_from(list(RULES))
)
@settings(deadline=None)
def test_every_rule_makes_a_grid_with_exact_ends(num_steps, sigma_min, sigma_max, rho, name):
    grid = RULES[name](num_steps, sigma_min, sigma_max, rho)
    assert grid.num_steps == num_steps and grid.values[-1] == 0
    assert grid.sigma_max == pytest.approx(sigma_max, rel=1e-13 if name == "edm" else 0, abs=0)
    if name in ("dpm", "edm") and num_steps > 1:
        # the edm rule reaches sigma_min^(1/rho) as a difference of numbers as large as sigma_max^(1/rho)
        rounding = 4 * rho * 2**-52 * (sigma_max / sigma_min) ** (1 / rho)
        assert grid.values[-2] == pytest.approx(sigma_min, rel=rounding if name == "edm" else 0, abs=0)


@pytest.mark.parametrize("name", RULES)
def test_one_step(name):
    assert RULES[name](1, 0.002, 80, 7).values.tolist() == [80.0, 0.0]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True, "4", None, 10**12])
def test_bad_number_of_steps(name, num_steps):
    with pytest.raises(GridError, match="expected a whole number from 1"):
        RULES[name](num_steps, 0.002, 80, 7)


@pytest.mark.parametrize(("sigma_min", "sigma_max", "rho", "message"), [
    (0.0, 80, 7, "sigma_min = 0"), (-1, 80, 7, "sigma_min = -1"), (math.nan, 80, 7, "sigma_min = nan"),
    (80, 80, 7, "sigma_min = 80, expected less than"), (90, 80, 7, "sigma_min = 90"),
    (0.1, math.inf, 7, "sigma_max = inf"),
    (0.1, 80, 0, "rho = 0"), (0.1, 80, -7, "rho = -7"), (0.1, 80, math.nan, "rho = nan"), (0.1, 80, 1e-4, "overflows"),
])
def test_bad_parameters(sigma_min, sigma_max, rho, message):
    with pytest.raises(GridError, match=message):
        edm(4, sigma_min, sigma_max, rho)


# --- resampling --------------------------------------------------------------------------------------


def test_resampling_worked_by_hand():
    grid = Grid([81.0, 9.0, 1.0, 0.0])  # N = 3 -> N' = 4: positions 0, 2/3, 4/3, 2
    expected = [81, 81 ** (1 / 3) * 9 ** (2 / 3), 9 ** (2 / 3), 1, 0]
    np.testing.assert_allclose(resample(grid, 4).values, expected, rtol=1e-14)
    linear = [81, 81 / 3 + 9 * 2 / 3, 9 * 2 / 3 + 1 / 3, 1, 0]  # twin: linear in sigma, not in its logarithm
    assert not np.allclose(resample(grid, 4).values, linear, rtol=0.1)
    assert resample(grid, 1).values.tolist() == [81.0, 0.0]
    assert resample(grid, 2).values.tolist() == [81.0, 1.0, 0.0]


@given(RATIOS, st.integers(2, 60))
def test_resampling_is_piecewise_linear_in_log_sigma(ratios, num_steps):
    grid = grid_of(ratios)
    new, old = resample(grid, num_steps), grid.values[:-1]
    at = np.linspace(0, len(old) - 1, num_steps)
    np.testing.assert_allclose(np.log(new.values[:-1]), np.interp(at, np.arange(len(old)), np.log(old)), atol=1e-10)
    assert new.num_steps == num_steps
    assert (new.values[0], new.values[-2], new.values[-1]) == (old[0], old[-1], 0.0)


@given(RATIOS, st.integers(1, 6))
def test_a_refined_grid_holds_the_old_one_and_leads_back_to_it(ratios, times):
    grid = grid_of(ratios)
    fine = resample(grid, times * (grid.num_steps - 1) + 1)
    np.testing.assert_allclose(fine.values[:-1:times], grid.values[:-1], rtol=1e-13)
    np.testing.assert_allclose(resample(fine, grid.num_steps).values, grid.values, rtol=1e-12)
    assert resample(grid, grid.num_steps) == grid


def test_dpm_is_closed_under_resampling_and_edm_is_not():
    np.testing.assert_allclose(resample(dpm(18, 0.002, 80), 7).values, dpm(7, 0.002, 80).values, rtol=1e-12)
    # the bend of the edm rule is not quite that of its chords
    assert not np.allclose(resample(edm(18, 0.002, 80), 7).values, edm(7, 0.002, 80).values, rtol=1e-3)


def test_one_step_cannot_be_resampled_to_more():
    assert resample(Grid([80.0, 0.0]), 1) == Grid([80.0, 0.0])
    with pytest.raises(GridError, match="found a grid of 1 step"):
        resample(Grid([80.0, 0.0]), 5)
    for num_steps in (0, -3, 2.5):
        with pytest.raises(GridError, match="num_steps"):
            resample(edm(4, 0.002, 80), num_steps)


# --- reading off the clock ---------------------------------------------------------------------------


def test_a_closed_form_clock_is_read_off():
    """log(sigma + 0.05) linear in t: the interpolation is exact."""
    levels = lambda k: (80.05 * (0.05 / 80.05) ** (np.arange(k + 1) / k) - 0.05)
    grid = Grid(np.append(levels(6)[:-1], 0.0))
    for k in (1, 2, 4, 5, 7, 12, 50):
        np.testing.assert_allclose(read_off(grid, k).values[:-1], levels(k)[:-1], rtol=1e-10)
        assert read_off(grid, k).num_steps == k and read_off(grid, k).sigma_max == grid.sigma_max
    assert not np.allclose(resample(grid, 4).values[:-1], levels(4)[:-1], rtol=0.1)  # the paper's rule, another clock


@given(st.lists(st.floats(1.01, 8.0), min_size=2, max_size=8), st.integers(1, 6), st.integers(1, 60))
@settings(deadline=None)
def test_levels_in_common_are_kept_to_the_bit(ratios, times, num_steps):
    grid = grid_of(ratios)
    assert read_off(grid, grid.num_steps) == resample(grid, grid.num_steps) == grid
    fine = read_off(grid, times * grid.num_steps)
    assert np.array_equal(fine.values[::times], grid.values)
    assert read_off(fine, grid.num_steps) == grid
    both = read_off(grid, num_steps).values
    for k in range(num_steps + 1):
        if k * grid.num_steps % num_steps == 0:
            assert both[k] == grid.values[k * grid.num_steps // num_steps]


def test_half_the_steps_are_every_second_level():
    grid = edm(18, 0.002, 80)
    assert np.array_equal(read_off(grid, 9).values, grid.values[::2])
    assert not np.array_equal(resample(grid, 9).values, grid.values[::2])


def test_a_finer_grid_goes_below_the_last_level_which_a_network_may_refuse():
    grid = Grid([80.0, 3.0, 0.002, 0.0])
    fine = read_off(grid, 12)
    assert 0 < fine.values[-2] < fine.values[-4] < 0.002 == fine.values[8]
    check_range(grid, 0.001, 80.0)
    with pytest.raises(GridError, match="step 11 is at sigma = .*below the network's sigma_min = 0.001; .*fewer steps"):
        check_range(fine, 0.001, 80.0)


def test_discrete_levels_that_fall_together_are_named():
    fine = read_off(edm(5, 1.0, 80), 20)
    check_distinct(fine, fine.values)
    with pytest.raises(GridError, match="are the same noise level, 2, after rounding"):
        check_distinct(fine, np.round(fine.values))


def test_what_cannot_be_read_off():
    with pytest.raises(GridError, match="found a grid of 1 step"):
        read_off(Grid([80.0, 0.0]), 5)
    assert read_off(Grid([80.0, 0.0]), 1) == Grid([80.0, 0.0])
    assert read_off(edm(4, 0.002, 80), 1).values.tolist() == [edm(4, 0.002, 80).sigma_max, 0.0]
    for num_steps in (0, -3, 2.5):
        with pytest.raises(GridError, match="num_steps"):
            read_off(edm(4, 0.002, 80), num_steps)


# --- files -------------------------------------------------------------------------------------------


def test_a_saved_grid_comes_back_to_the_bit(tmp_path):
    path, grid = tmp_path / "g.npy", edm(18, 0.002, 80)
    save_grid(path, grid, {"rule": "edm", "num_steps": 18})
    assert load_grid(path) == grid
    assert np.load(path, allow_pickle=False).tobytes() == grid.values.tobytes()
    assert {**load_provenance(path), "npy_sha256": 0} == {"rule": "edm", "num_steps": 18, "npy_sha256": 0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.json", "g.npy"]


def test_provenance_missing_stale_or_damaged(tmp_path):
    path = tmp_path / "g.npy"
    save_grid(path, edm(4, 0.002, 80), {})
    np.save(path, edm(5, 0.002, 80).values)  # the grid is replaced by other means
    with pytest.raises(GridError, match="found the provenance of another file"):
        load_provenance(path)
    for damaged in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000):
        (tmp_path / "g.json").write_bytes(damaged)
        with pytest.raises(GridError, match="found no readable JSON object"):
            load_provenance(path)
    (tmp_path / "g.json").unlink()
    assert load_provenance(path) == {}


def test_bad_destinations_are_found_before_the_work(tmp_path):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    for name, message in (("g.txt", "ends in .npy"), ("no/g.npy", "there is no folder"), ("config.npy", "config.json")):
        with pytest.raises(ValueError, match=message):
            check_grid_destination(tmp_path / name)
    save_grid(tmp_path / "g.npy", edm(4, 0.002, 80), {})
    assert check_grid_destination(tmp_path / "g.npy") == tmp_path / "g.npy"
    with pytest.raises(GridError, match="ends in .npy"):
        save_grid(tmp_path / "g.txt", edm(4, 0.002, 80), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "g.json", "g.npy"]


class Payload:
    """Unpickling it makes a folder: the trace of code that ran."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def npy(array, **kwargs) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **kwargs)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["object array", "bare pickle"])
def test_nothing_is_unpickled(tmp_path, kind):
    path, trace = tmp_path / "g.npy", tmp_path / "trace"
    payload = np.array([Payload(trace), 0.0], object)
    path.write_bytes(npy(payload, allow_pickle=True) if kind == "object array" else pickle.dumps(Payload(trace)))
    with pytest.raises(GridError, match="expected"):
        load_grid(path)
    assert not trace.exists()
    np.load(path, allow_pickle=True)  # twin: the payload is live
    assert trace.exists()


@pytest.mark.parametrize("kind", [kind for kind in BAD_VALUES if kind != "rows of uneven length"])  # no array has those
def test_files_of_bad_values(tmp_path, kind):
    (values, message), path = BAD_VALUES[kind], tmp_path / "g.npy"
    path.write_bytes(npy(np.asarray(values), allow_pickle=True))
    expected = "Object arrays cannot be loaded" if "object" in message else message
    with pytest.raises(GridError) as error:
        load_grid(path)
    assert str(error.value).startswith(f"{path}: ") and expected in str(error.value) and "\n" not in str(error.value)


def deep_header(text):
    """A .npy whose header is this text, deep enough to break a parser's recursion."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def test_files_that_are_no_npy(tmp_path):
    good = npy(edm(18, 0.002, 80).values)
    archive = io.BytesIO()
    np.savez(archive, a=[1.0])
    contents = {
        b"": "an empty file", b"80 40 0\n": "a file of unknown kind", archive.getvalue(): "a zip archive",
        good[:-1]: "damaged", good[:40]: "damaged", good[:6]: "damaged", good[:3]: "a file of unknown kind",
        good.replace(b"(19,)", b"(99,)"): "damaged",
        **{deep_header(text): "damaged" for text in ("-" * 9000 + "1", "(" * 9000, "[" * 150 + "]" * 150)},
    }
    for content, message in contents.items():
        (tmp_path / "g.npy").write_bytes(content)
        with pytest.raises(GridError, match=message):
            load_grid(tmp_path / "g.npy")
    for missing in (tmp_path / "none.npy", tmp_path):
        with pytest.raises(GridError, match="found no readable file"):
            load_grid(missing)


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
@pytest.mark.filterwarnings("ignore")  # numpy warns of headers it has to repair
def test_damaged_bytes_never_escape_as_another_error(tmp_path_factory, place, noise):
    content = bytearray(npy(edm(18, 0.002, 80).values))
    place %= len(content)
    content[place:place + len(noise)] = noise
    path = tmp_path_factory.mktemp("fuzz") / "g.npy"
    path.write_bytes(content)
    try:
        assert load_grid(path).values[-1] == 0
    except GridError as error:
        assert "\n" not in str(error)


def no_space(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("method", ["write", "flush"])  # a buffered file notices only when it is flushed
def test_a_full_disk_leaves_both_old_files(tmp_path, monkeypatch, method):
    full_disk = type("FullDisk", (io.BytesIO,), {method: no_space})
    path = tmp_path / "g.npy"
    save_grid(path, edm(4, 0.002, 80), {"rule": "old"})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real, calls = os.fdopen, []

    def fdopen(handle, mode):
        calls.append(handle)
        if len(calls) == fails_at:
            os.close(handle)
            return full_disk()
        return real(handle, mode)

    monkeypatch.setattr("art_edm.runtime.files.os.fdopen", fdopen)
    for fails_at in (1, 2):  # while the .npy is written, or the sidecar
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            save_grid(path, edm(5, 0.002, 80), {"rule": "new"})
        assert len(calls) == fails_at
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_grid(path, edm(5, 0.002, 80), {"score": math.nan})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_crash_between_the_two_files_is_found_out(tmp_path, monkeypatch):
    path, real, done = tmp_path / "g.npy", os.replace, []
    save_grid(path, edm(4, 0.002, 80), {"rule": "old"})

    def replace(part, target):
        if done:
            raise KeyboardInterrupt
        done.append(target)
        real(part, target)

    monkeypatch.setattr("art_edm.runtime.files.os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_grid(path, edm(5, 0.002, 80), {"rule": "new"})
    assert load_grid(path) == edm(4, 0.002, 80)
    with pytest.raises(GridError, match="another file"):
        load_provenance(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.json", "g.npy"]


def test_the_rules_are_listed_under_their_names():
    assert list(RULES) == ["uniform", "dpm", "edm", "edm-unpinned", "dpm-unpinned"]
    assert all(callable(getattr(grids, name.replace("-", "_"))) for name in RULES)
