"""How a denoiser is evaluated: batches that fit into memory, and a check that does not keep a GPU waiting.

Symbols
-------
batch   images per evaluation, a power of two, so that small changes of the free memory change no rounding
read    a value that Python takes from a GPU; the host waits until all that was queued before it is done
"""

from __future__ import annotations

from typing import Any, List, Optional, Tuple, Union

import torch

from art_edm.models.denoiser import Denoiser
from art_edm.runtime.errors import NonFiniteOutput
from art_edm.runtime.memory import Device, _power_below, agree, free_memory, peak_memory, with_back_off

__all__ = ["FiniteCheck", "batch_for", "profile_batch"]

Level = Union[float, torch.Tensor]

SHARE = 0.5  # of the free memory: the other half is for what lies around the network, and for fragments
LARGEST = 64  # images; beyond it a GPU gains nothing more


def batch_for(
    denoiser: Denoiser, largest: int = LARGEST, share: float = SHARE, free: Optional[int] = None
) -> int:
    """Images per evaluation, a power of two: as many as fit into `share` of the free memory, at most `largest`.

    The need is measured on one image and on two, and the result tried, uncounted; where the trial fails it is halved.

    Args:
        free: bytes; by default `free_memory` of the denoiser's device.
    Raises:
        NoMemory: not even one image fits.
    """
    device = denoiser.device

    @torch.inference_mode()
    def trial(count: int) -> int:
        x = torch.zeros(count, *denoiser.img_shape, dtype=torch.float64, device=device)
        labels = denoiser.draw_labels(count, torch.Generator().manual_seed(0))
        denoiser.denoise(x, x.new_ones(count), labels)
        return count

    with_back_off(trial, 1, device)  # what is made once, at the first call, is no part of the need
    one, two = (with_back_off(lambda _, n=n: peak_memory(lambda: trial(n), device), 1, device) for n in (1, 2))
    image = max(two - one, 1)
    room = int((free_memory(device) if free is None else free) * share) - (one - image)
    batch = min(_power_below(room // image), _power_below(largest))
    return with_back_off(trial, batch, device)


def profile_batch(denoiser: Denoiser, trajectories: int, least: int, world: Any) -> int:
    """Images per evaluation of a profile: an eighth of its trajectories, so that up to 8 GPUs have some each.

    Every process takes the same, whatever their number; a CPU gains nothing from more than `least`.
    """
    if denoiser.device.type == "cpu":
        return least
    with world.phase():
        batch = batch_for(denoiser, max(least, trajectories // 8))
    return agree(batch, world)


# ---- finite ----


class FiniteCheck:
    """Watches what a denoiser returns along a path, and reads it once, at the path's end, where a read costs.

    On a CPU, where it costs nothing, a bad value is an error at once.
    """

    def __init__(self, device: Device, deferred: Optional[bool] = None) -> None:
        self.deferred = torch.device(device).type != "cpu" if deferred is None else deferred
        self._seen: List[Tuple[torch.Tensor, Level]] = []

    def see(self, denoised: torch.Tensor, sigma: Level) -> torch.Tensor:
        """`denoised` [B, C, H, W] at the noise level `sigma`, a number or a tensor of one or B; returned as it is."""
        self._seen.append((denoised.isfinite().flatten(1).all(dim=1), sigma))  # [B]
        if not self.deferred:
            self.settle()
        return denoised

    def settle(self) -> None:
        """Raise a NonFiniteOutput that names the first level at which an image was not finite."""
        seen, self._seen = self._seen, []
        if not seen:
            return
        finite = torch.stack([each.all() for each, _ in seen]).tolist()  # the one read
        for fine, (each, sigma) in zip(finite, seen):
            if not fine:
                level = float(torch.as_tensor(sigma).reshape(-1).expand(len(each))[~each.to(_device_of(sigma))][0])
                raise NonFiniteOutput(
                    f"the network returned NaN or infinity at sigma = {level:.6g} for {int((~each).sum())} of "
                    f"{len(each)} images; expected finite images; check the weight file, or its range of noise levels"
                )


def _device_of(sigma: Level) -> torch.device:
    return sigma.device if isinstance(sigma, torch.Tensor) else torch.device("cpu")
