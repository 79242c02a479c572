"""Nothing is lost when sampling is stopped or killed, and what comes out in the end is the same."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from art_edm.compare.sample_cache import Work
from art_edm.runtime.errors import Stopped
from art_edm.runtime.store import Store
from tests.compare.test_sample_cache import Linear, OneOf, features, gaussian, moments_of, samples, work


class Stop:
    """Asks to stop at the n-th look."""

    def __init__(self, looks):
        self.looks = looks

    @property
    def requested(self):
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("dim", [3, 300])
def test_a_stop_loses_one_batch_and_changes_no_byte(tmp_path, dim):
    whole = features(samples(), Linear(dim), work(tmp_path / "whole", 16))
    network = gaussian()
    for looks in (0, 8, 20):  # 5 steps and one look after each batch
        with pytest.raises(Stopped, match="run the same command again"):
            features(samples(network=network), Linear(dim), work(tmp_path / "s", 16, stop=Stop(looks)))
    found = features(samples(network=network), Linear(dim), work(tmp_path / "s", 16))
    found, whole = found["fid"].content(), whole["fid"].content()
    assert all(found[key].tobytes() == whole[key].tobytes() for key in whole)
    assert network.denoiser.evaluations <= (150 + 3 * 16) * 9
    assert len(list((tmp_path / "s").iterdir())) == 1  # no part is left
    features(samples(network=network), Linear(dim), work(tmp_path / "s"))
    assert network.denoiser.evaluations <= (150 + 3 * 16) * 9  # nothing is made again


def test_parts_of_three_processes_are_continued_by_one_and_by_two(tmp_path):
    whole = moments_of(features(samples(), Linear(300), work(tmp_path / "whole")))
    for size in (1, 2):
        network, folder = gaussian(), tmp_path / str(size)
        for rank, looks in ((0, 13), (1, 7), (2, 13)):
            with pytest.raises(Stopped):
                three = Work(Store(folder), OneOf(rank, 3), 16, stop=Stop(looks))
                features(samples(network=network), Linear(300), three)
        made = network.denoiser.evaluations
        for rank in reversed(range(size)):
            content = features(samples(network=network), Linear(300), Work(Store(folder), OneOf(rank, size), 16))
        assert np.abs(moments_of(content)[1] - whole[1]).max() <= 1e-9 * np.abs(whole[1]).max()
        assert network.denoiser.evaluations - made == (150 - 5 * 16) * 9  # 2 + 1 + 2 batches were kept
        assert len(list(folder.iterdir())) == 1


def test_a_part_that_overlaps_counts_once(tmp_path):
    """A run killed after it took over another's part, before that was removed."""
    whole = features(samples(), Linear(300), work(tmp_path / "whole"))
    with pytest.raises(Stopped):
        features(samples(), Linear(300), work(tmp_path / "s", stop=Stop(7)))
    (part,) = (tmp_path / "s").iterdir()
    (tmp_path / "s" / part.name.replace("part-0", "part-1")).write_bytes(part.read_bytes())
    found = features(samples(), Linear(300), work(tmp_path / "s"))
    assert np.allclose(moments_of(found)[1], moments_of(whole)[1], rtol=1e-9)


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("art_edm.runtime.store.atomic_write", full)
    with pytest.raises(Stopped, match="cannot write to .*No space left on device.*run the same command again"):
        features(samples(), Linear(), work(tmp_path))


DRIVER = """
import json, os, signal, sys
import tests.compare.test_sample_cache as t

def run(folder, kill, out):
    network, made = t.gaussian(), 0
    whole = network.denoiser.denoise
    def denoise(x, sigma, labels):
        nonlocal made
        made += 1
        if made == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(f"{out}.log", "a") as log:
            log.write(f"{len(x)} ")
        return whole(x, sigma, labels)
    network.denoiser.denoise = denoise
    choices = t.choose_grids(["edm", "uniform"], [3, 5], network.denoiser)
    moments = t.np.zeros(3), t.np.eye(3)
    plan = t.Plan(network, choices, ("heun", "euler"), 40, 2, 0, t.panel(t.Linear()), t.moments_as(*moments),
                  fine=t.Fine(8, 10))
    rows = t.score(plan, t.work(folder, 16, save_every=0))
    with open(out, "w") as file:
        json.dump([{key: value for key, value in row.items() if key != "seconds"} for row in rows], file)

for folder, kill, out in json.loads(sys.argv[1]):  # each in a process of its own, forked before torch has computed
    pid = os.fork()
    if pid == 0:
        run(folder, kill, out)
        os._exit(0)
    print(-os.WTERMSIG(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.slow
def test_killed_three_times_it_ends_alike_and_redoes_no_cell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [("a", 0, "whole"), ("b", 3, "killed"), ("b", 60, "killed"), ("b", 90, "killed"), ("b", 0, "killed"),
            ("b", 1, "again")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", DRIVER, json.dumps(runs)], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)
    assert list(map(int, result.stdout.split())) == [0, *[-signal.SIGKILL] * 3, 0, 0], result.stderr
    whole, killed, again = (json.loads(Path(name).read_text()) for name in ("whole", "killed", "again"))
    assert killed == whole == again and len(whole) == 8
    assert not Path("again.log").exists()  # nothing was left to evaluate
    evaluated, spent = (sum(map(int, Path(f"{name}.log").read_text().split())) for name in ("whole", "killed"))
    assert 0 < spent - evaluated <= 3 * 16 * 19  # of each kill at most one batch of the dearest solution
