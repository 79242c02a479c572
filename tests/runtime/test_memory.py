"""Batches from memory and backing off: against closed forms and the allocator's own errors."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from art_edm.measure.field import rms
from art_edm.models.denoiser import Denoiser
from art_edm.models.evaluate import batch_for
from art_edm.models.loading import load_network
from art_edm.runtime import memory as devices
from art_edm.runtime.errors import NonFiniteOutput, Stopped
from art_edm.runtime.memory import NoMemory, agree, free_memory, out_of_memory, peak_memory, with_back_off

MIB = 1 << 20


class Greedy(Denoiser):
    """Takes `images` MiB for each image and `fixed` MiB besides, and no more of the machine than that."""

    def __init__(self, images: int = 2, fixed: int = 3, fits: int = 10**9, label_dim: int = 0) -> None:
        super().__init__(1, 4)
        self.images, self.fixed, self.fits, self.label_dim, self.asked = images, fixed, fits, label_dim, []

    def denoise(self, x, sigma, class_labels):
        self.asked.append((len(x), None if class_labels is None else len(class_labels)))
        if len(x) > self.fits:
            torch.empty(1 << 60, dtype=torch.uint8)  # the allocator's own error
        held = [torch.zeros(size * MIB, dtype=torch.uint8) for size in (self.fixed, len(x) * self.images)]
        assert len(held) == 2
        return x / 2


def torch_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


# --- what is in use ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_peak_counts_what_lives_at_once():
    def keep():
        a = torch.zeros(MIB)  # 4 MiB
        b = a + 1  # 8
        return b

    def drop():
        a = torch.zeros(MIB)
        a = None  # noqa: F841
        b = torch.zeros(MIB)
        return b.view(-1)[:10]

    assert peak_memory(keep, "cpu") == 8 * MIB
    assert peak_memory(drop, "cpu") == 4 * MIB  # one after the other; the sum would be 8


def test_views_and_writes_in_place_take_nothing():
    before = torch.zeros(MIB)

    def work():
        before.add_(1)
        half = before[: MIB // 2].view(2, -1).t()
        torch.mul(half, 2, out=half)
        return [half, half]

    assert peak_memory(work, "cpu") == 0
    assert peak_memory(lambda: before[: MIB // 2] + 1, "cpu") == 2 * MIB  # the twin that does


def test_a_view_keeps_its_storage_alive():
    def work():
        kept = torch.zeros(MIB)[:1]  # all 4 MiB stay
        more = torch.zeros(MIB)
        return kept, more

    assert peak_memory(work, "cpu") == 8 * MIB


def test_the_peak_of_a_network_does_not_shrink_with_a_second_run():
    net = load_network("mnist").denoiser
    x, sigma = torch.zeros(2, 1, 28, 28), torch.ones(2)
    with torch.inference_mode():
        first, second = (peak_memory(lambda: net.denoise(x, sigma, None), "cpu") for _ in range(2))
    # At the least the two inputs of the last block's concatenation, and their result: 4 x 64 channels of 14 x 14.
    assert first == second and 4 * 64 * 14 * 14 * 4 * 2 < first < 20 * 64 * 14 * 14 * 4 * 2


def test_free_memory_of_the_cpu_is_what_linux_calls_available(monkeypatch):
    text = "MemTotal:       100 kB\nMemAvailable:    37 kB\n"
    monkeypatch.setattr("builtins.open", lambda *a, **k: __import__("io").StringIO(text))
    assert free_memory("cpu") == 37 * 1024
    monkeypatch.setattr("builtins.open", lambda *a, **k: __import__("io").StringIO("MemTotal: 100 kB\n"))
    monkeypatch.setattr(devices.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}.__getitem__)
    assert free_memory("cpu") == 4096 * 5


def test_free_memory_of_a_gpu_counts_what_the_allocator_keeps(monkeypatch):
    fake = dict(mem_get_info=lambda d: (100, 900), memory_reserved=lambda d: 70, memory_allocated=lambda d: 30)
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert free_memory("cuda:3") == 140


# --- batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("free, batch", [
    (2 * (3 + 2 * 8), 8), (2 * (3 + 2 * 15), 8), (2 * (3 + 2 * 16), 16), (2 * (3 + 2 * 2), 2), (2, 1), (10**6, 32),
])
def test_the_batch_is_the_largest_power_of_two_that_fits(free, batch):
    # share = 1/2 of `free` MiB holds 3 + 2 B MiB and some bytes for x, sigma and the result
    net = Greedy()
    assert batch_for(net, largest=40, free=free * MIB + 4096 * 40) == batch
    assert net.asked[-1] == (batch, None) and net.evaluations == 0  # tried, and not counted


def test_labels_are_as_many_as_images():
    net = Greedy(label_dim=3)
    batch_for(net, largest=4, free=100 * MIB)
    assert net.asked == [(1, 1), (1, 1), (2, 2), (4, 4)]


def test_the_batch_backs_off_where_the_trial_fails():
    net = Greedy(fits=5)
    assert batch_for(net, largest=64, free=10**12) == 4
    assert [count for count, _ in net.asked] == [1, 1, 2, 64, 32, 16, 8, 4]


def test_one_image_that_does_not_fit_is_an_error_in_one_line():
    with pytest.raises(NoMemory, match=r"^found [\d.]+ GB free on cpu, expected room for one image \(.*allocate.*\); "
                                       "stop what else runs there, or choose another --device$"):
        batch_for(Greedy(fits=0))
    assert issubclass(NoMemory, Stopped)  # known to other processes, and shown without a traceback


def test_a_network_that_fails_otherwise_is_not_asked_again():
    class Broken(Greedy):
        def denoise(self, x, sigma, class_labels):
            self.asked.append(len(x))
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    net = Broken()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        batch_for(net)
    assert net.asked == [1]


@pytest.mark.parametrize("error, known", [
    (torch_error(), True), (MemoryError(), True), (torch.cuda.OutOfMemoryError("CUDA out of memory."), True),
    (RuntimeError("CUDA error: out of memory"), True), (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False), (ValueError("out of memory"), False),
])
def test_which_errors_are_of_memory(error, known):
    assert out_of_memory(error) is known


@pytest.mark.parametrize("device, emptied", [("cpu", 0), ("cuda", 3)])
def test_back_off_halves_from_the_beginning_and_lets_go_first(device, emptied, monkeypatch):
    import weakref

    held, calls, cache = [], [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cache.append([ref() for ref in held]))

    def work(batch):
        calls.append(batch)
        large = torch.zeros(3)
        held.append(weakref.ref(large))
        if batch > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return f"done with {batch}"

    assert with_back_off(work, 24, device) == "done with 3"
    assert calls == [24, 12, 6, 3]
    assert len(cache) == emptied and all(tensor is None for seen in cache for tensor in seen)


def test_nothing_is_caught_that_is_no_matter_of_memory():
    calls = []

    def work(batch):
        calls.append(batch)
        raise NonFiniteOutput("nan")

    with pytest.raises(NonFiniteOutput):
        with_back_off(work, 8)
    assert calls == [8]


@pytest.mark.parametrize("mine, others, least", [(8, (16, 64), 8), (64, (32, 1), 1), (4, (), 4), (33, (64,), 32)])
def test_processes_agree_on_the_least(mine, others, least):
    def total(tensor):
        for other in others:
            tensor[int(math.log2(other))] += 1
        return tensor

    assert agree(mine, SimpleNamespace(device=torch.device("cpu"), sum=total)) == least


def test_the_batch_changes_the_result_by_rounding_only():
    net = load_network("mnist").denoiser
    x = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = net(x, 0.5)
        parts = torch.cat([net(part, 0.5) for part in x.split(4)])
    assert float((rms(whole - parts) / rms(whole)).max()) < 1e-6
