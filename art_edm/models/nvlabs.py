"""Networks of NVlabs/edm and edm2 behind the one contract, with EDM2's guidance.

Symbols
-------
net, gnet   main and guiding network: net(x, sigma, class_labels[, force_fp32=...]) -> D(x; sigma)
guidance    w in D = D_gnet + w (D_net - D_gnet); 1 leaves gnet out
u           the noise levels that a discrete-noise network (iDDPMPrecond) was trained at, descending

An EDM network tells its range of noise levels and rounds to those it supports; an EDM2 network has
neither, and is used from 0.002 to 80 as its own sampler does.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Dict, Optional, Tuple

import torch

from art_edm.models.denoiser import Denoiser

__all__ = ["AdapterError", "NetworkDenoiser"]

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # the samplers' own defaults, of both repositories
SIGMA_DATA = 0.5  # theirs, too; only a VP, VE or iDDPM network does not tell it


class AdapterError(ValueError):
    """Networks or options that do not fit each other; the message is one line."""


class NetworkDenoiser(Denoiser):
    """A pretrained network, guided or not, as a `Denoiser`.

    Args:
        net: the main network, of any preconditioning of EDM or EDM2.
        gnet: the guiding network; needed if guidance is not 1.
        guidance: w; the field that ART measures and samples is then the guided one.
        class_idx: the class of all images; None draws one for each.
        fp32: run in float32 even if the network was made for float16, as differences of D need. A network whose
            forward has no force_fp32 (upstream's samplers never pass it) has its use_fp16 switched off.

    `sigma_limits` are those the network itself supports, (0, inf) where it does not tell; the grid is learned
    from 0.002 to 80 at most.
    """

    difference_step: Optional[float] = None  # depends on how the network sees its noise level

    def __init__(
        self, net: torch.nn.Module, gnet: Optional[torch.nn.Module] = None, guidance: float = 1.0,
        class_idx: Optional[int] = None, fp32: bool = True,
    ) -> None:
        super().__init__(int(net.img_channels), int(net.img_resolution))
        self.net, self.gnet, self.guidance, self.fp32 = net, gnet if guidance != 1 else None, float(guidance), fp32
        self.label_dim, self.class_idx = int(net.label_dim), class_idx
        self._limits = (float(getattr(net, "sigma_min", 0)), float(getattr(net, "sigma_max", float("inf"))))
        ends = [max(SIGMA_MIN, self._limits[0]), min(SIGMA_MAX, self._limits[1])]
        self.sigma_min, self.sigma_max = self.round_sigma(torch.tensor(ends, dtype=torch.float64)).tolist()
        self.sigma_data = float(getattr(net, "sigma_data", SIGMA_DATA))
        self.networks = 1 if self.gnet is None else 2
        self._options = [_precision(each, fp32) for each in (self.net, self.gnet) if each is not None]
        _check(self, gnet)

    @property
    def sigma_limits(self) -> Tuple[float, float]:
        """Lowest and highest level the network supports."""
        return self._limits

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: Optional[torch.Tensor]) -> torch.Tensor:
        """D(x; sigma), guided as EDM2's sampler does."""
        # One level for all images is passed once, as upstream's samplers do: the same bits, and one embedding.
        level = sigma[:1] if sigma.stride(0) == 0 else sigma
        with torch.autocast(x.device.type, enabled=False) if self.fp32 else nullcontext():
            main = self.net(x, level, class_labels, **self._options[0]).to(x.dtype)
            if self.gnet is None:
                return main
            guide = self.gnet(x, level, class_labels, **self._options[1]).to(x.dtype)
        return guide.lerp(main, self.guidance)

    def trial(self, name: str) -> None:
        """One uncounted evaluation, so that a network that cannot run says so before any work.

        Raises an AdapterError that names the network.
        """
        x = torch.zeros(1, *self.img_shape, device=self.device)
        labels = self.draw_labels(1, torch.Generator().manual_seed(0))
        try:
            with torch.inference_mode():
                out = self.denoise(x, torch.ones(1, device=self.device), labels)
        except Exception as error:  # whatever a foreign network raises
            reason = " ".join(str(error).split())[:200]
            kind = type(error).__name__
            raise AdapterError(f"{name} cannot be evaluated ({kind}: {reason}); check the file") from None
        if out.shape != x.shape or not out.isfinite().all():
            found = f"shape {tuple(out.shape)}" if out.shape != x.shape else "NaN or infinity"
            raise AdapterError(f"{name} returned {found} for one image of noise 1, expected finite {tuple(x.shape)}")

    def round_sigma(self, sigma: "float | torch.Tensor") -> torch.Tensor:
        """The nearest noise level the network supports; EDM2's support all."""
        sigma = super().round_sigma(sigma)
        return self.net.round_sigma(sigma) if hasattr(self.net, "round_sigma") else sigma

    def neighbours(self, sigma: torch.Tensor, step: float) -> Tuple[torch.Tensor, torch.Tensor]:
        """Levels above and below for a difference; of a discrete-noise network, ones it was trained at."""
        above, below = super().neighbours(sigma, step)
        if not hasattr(self.net, "u"):
            return above, below
        u = self.net.u.to(sigma)  # [M + 1]
        u = u[u > 0]
        here = _nearest(u, sigma)
        # At least one level away, where 1 % would round to the same one; at an end the difference is one-sided.
        higher = torch.minimum(_nearest(u, above), here - 1).clamp(min=0)
        lower = torch.maximum(_nearest(u, below), here + 1).clamp(max=len(u) - 1)
        return u[higher], u[lower]


def _precision(net: torch.nn.Module, fp32: bool) -> Dict[str, bool]:
    """The option that makes `net` compute in float32, or none, and then its own switch is set."""
    try:
        takes = "force_fp32" in inspect.signature(net.forward).parameters
    except (TypeError, ValueError):
        takes = False
    if not takes and fp32 and getattr(net, "use_fp16", False) is True:
        net.use_fp16 = False
    return {"force_fp32": fp32} if takes else {}


def _nearest(u: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Index of the level of u [M] nearest to each of sigma [B]."""
    return (u[None] - sigma[:, None]).abs().argmin(dim=1)


def _check(denoiser: NetworkDenoiser, gnet: Optional[torch.nn.Module]) -> None:
    """Raise an AdapterError for networks or options that do not fit."""
    guidance, label_dim, class_idx = denoiser.guidance, denoiser.label_dim, denoiser.class_idx
    if not -float("inf") < guidance < float("inf"):
        raise AdapterError(f"found guidance {guidance}, expected a finite number; change --guidance")
    if guidance != 1 and gnet is None:
        raise AdapterError(f"found guidance {guidance:g} without a guiding network; add --gnet")
    if guidance == 1 and gnet is not None:
        raise AdapterError("found a guiding network and guidance 1, which leaves it out; add --guidance or omit --gnet")
    if class_idx is not None and not 0 <= class_idx < label_dim:
        known = f"classes 0 to {label_dim - 1}" if label_dim else "no classes: it is unconditional"
        raise AdapterError(f"found class {class_idx}, but the network has {known}; change or omit --class")
    if gnet is None:
        return
    shape = (int(gnet.img_channels), int(gnet.img_resolution), int(gnet.img_resolution))
    if shape != denoiser.img_shape:
        raise AdapterError(f"found a guiding network for images {shape}, expected {denoiser.img_shape} as of --network")
    if int(gnet.label_dim) not in (0, label_dim):
        raise AdapterError(
            f"found a guiding network of {int(gnet.label_dim)} classes, expected none or {label_dim} as of --network"
        )
