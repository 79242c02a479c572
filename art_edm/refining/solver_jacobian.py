"""How far a sampler ends from the exact solution, and how each noise level of its grid moves that end.

Symbols
-------
x_K          where the solver ends, on a grid sigma_0 > ... > sigma_K = 0; x_ref where the exact path ends
residual     r = x_K - x_ref, [M, C, H, W] over M noises
error        RMS of r over pixels, [M], in units of x
J            d x_K / d sigma_j, j = 1..K-1, by forward differences through the solver itself
gram, pull   J^T J and J^T r per noise and pixel, [M, K-1, K-1] and [M, K-1]: all that a least-squares step needs
E_k          how far the exact path's end moves by the local error of the solver's step k, [M, C, H, W]

Moving sigma_j leaves the steps that end above it as they are (but for one, where a solver's weights come from the
clock), and the first slope of the first step that it changes. So a difference starts from what the undisturbed run
stored there, which halves its cost; it needs neither autograd nor memory that grows with
the network, and serves every solver, guided or not.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch

from art_edm.measure.field import full_precision, rms
from art_edm.models.denoiser import Denoiser
from art_edm.runtime.distributed import ALONE, World
from art_edm.runtime.pieces import Pieces
from art_edm.sampling.multistep import on_path
from art_edm.sampling.solvers import SOLVERS, Past, Slope, integrate, slope_of

__all__ = ["Noises", "Run", "Travel", "solve_ends"]

Tell = Callable[[], None]


class Noises(NamedTuple):
    """Noises and where their exact paths end."""

    latents: torch.Tensor  # unit normal [M, C, H, W]
    labels: Optional[torch.Tensor]  # one-hot [M, label_dim]
    ends: torch.Tensor  # x_ref [M, C, H, W] float64

    def part(self, where: slice) -> "Noises":
        """Some of them."""
        return Noises(self.latents[where], None if self.labels is None else self.labels[where], self.ends[where])

    def to(self, device: torch.device) -> "Noises":
        """The same on another device."""
        return Noises(*(None if tensor is None else tensor.to(device) for tensor in self))


class _Start(NamedTuple):
    """What a run knows as a step begins."""

    x: torch.Tensor  # [B, C, H, W]
    past: Past
    slope: torch.Tensor  # dx/dsigma at x, [B, C, H, W]


class Run(NamedTuple):
    """One run of the sampler over this process's share of the noises."""

    levels: np.ndarray  # [K + 1]
    errors: np.ndarray  # [M], of all noises, on every process
    starts: List[List[_Start]]  # [K] for each batch of the share
    ends: List[torch.Tensor]  # x_K [B, C, H, W] for each batch of the share


def _silent() -> None:
    """Tell nobody."""


class _Recorder:
    """A slope that keeps the first value of the step under way."""

    def __init__(self, slope: Slope) -> None:
        self.slope, self.first = slope, None

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        value = self.slope(x, sigma)
        if self.first is None:
            self.first = value
        return value


class _Replay:
    """A slope whose first value is known already."""

    def __init__(self, slope: Slope, first: torch.Tensor) -> None:
        self.slope, self.first = slope, first

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if self.first is None:
            return self.slope(x, sigma)
        value, self.first = self.first, None
        return value


class Travel:
    """Runs of one solver from the same noises, on any grid.

    Args:
        batch: noises per evaluation. The processes share out whole batches, so that their number changes no rounding.
        tell: called between pieces of work; it may raise to end it.
        world: processes that share the noises; each gets the figures of all.
        pieces: where figures of each batch are kept and found; runs that are kept whole, and derivatives, are not.
    """

    def __init__(
        self, denoiser: Denoiser, solver: str, noises: Noises, batch: int, tell: Tell = _silent, world: World = ALONE,
        pieces: Optional[Pieces] = None,
    ) -> None:
        self.denoiser, self.solver, self.noises, self.batch = denoiser, solver, noises, batch
        self.tell, self.world, self.pieces = tell, world, pieces
        self.evaluations = 0  # of all processes
        self._digests: Dict[int, str] = {}

    def _share(self) -> List[slice]:
        count, batch = len(self.noises.latents), self.batch
        return [slice(a, min(a + batch, count)) for a in range(self.world.rank * batch, count, self.world.size * batch)]

    def _slope(self, part: slice) -> Slope:
        labels = self.noises.labels
        return slope_of(self.denoiser, None if labels is None else labels[part])

    def spent(self) -> int:
        """Evaluations of this process so far."""
        return self.denoiser.evaluations if self.pieces is None else self.pieces.spent(self.denoiser)

    def piece(self, what: List[Any], part: slice, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `work` gives for a batch, or gave before; on the denoiser's device."""
        if self.pieces is None:
            return work()
        if part.start not in self._digests:
            digest = hashlib.sha256()
            for tensor in self.noises.part(part):
                if tensor is not None:
                    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.cpu().numpy().tobytes())
            self._digests[part.start] = digest.hexdigest()
        return self.pieces.get(self.denoiser, [self.solver, self._digests[part.start], *what], work)

    def _sum(self, rows: torch.Tensor, before: int) -> np.ndarray:
        """Rows [M, n] of all processes; adds up their evaluations."""
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        rows[-1, 0] = self.spent() - before
        rows = self.world.sum(rows.to(self.world.device)).cpu().numpy()
        self.evaluations += int(rows[-1, 0])
        return rows[:-1]

    @torch.no_grad()
    def run(self, levels: np.ndarray, keep: bool = True) -> Run:
        """Take every noise over the levels [K + 1]; without `keep` for the errors alone, in little memory."""
        before, errors = self.spent(), torch.zeros(len(self.noises.latents), 1, dtype=torch.float64)
        starts, ends = [], []

        def of(part: slice) -> torch.Tensor:
            x = self.denoiser.initial(self.noises.latents[part], float(levels[0])).to(torch.float64)
            x, kept = self._recorded(self._slope(part), x, torch.tensor(levels, device=x.device))
            if keep:
                starts.append(kept)
                ends.append(x)
            return rms(x - self.noises.ends[part])

        with self.world.phase(), full_precision():
            for part in self._share():
                found = of(part) if keep else self.piece(["errors", levels.tolist()], part, partial(of, part))
                errors[part, 0] = found.cpu()
                self.tell()
        return Run(levels, self._sum(errors, before)[:, 0], starts, ends)

    def _recorded(self, slope: Slope, x: torch.Tensor, sigma: torch.Tensor) -> Tuple[torch.Tensor, List[_Start]]:
        kept, past = [], ()
        for k in range(len(sigma) - 1):
            recorder, start = _Recorder(slope), (x, past)
            x, past = integrate(recorder, x, sigma, self.solver, past, steps=[k])
            kept.append(_Start(*start, recorder.first))
        return x, kept

    @torch.no_grad()
    def derivatives(self, run: Run, step: float) -> Tuple[np.ndarray, np.ndarray]:
        """Gram matrices J^T J and pulls J^T r of a run, [M, K-1, K-1] and [M, K-1].

        Args:
            step: of the differences, as a fraction of the smaller of the two gaps beside a level.
        """
        inner, before = len(run.levels) - 2, self.spent()
        rows = torch.zeros(len(self.noises.latents), inner * (inner + 1), dtype=torch.float64)
        with self.world.phase(), full_precision():
            for part, starts, end in zip(self._share(), run.starts, run.ends):
                columns = self._columns(run.levels, self._slope(part), starts, end, step)  # [B, K-1, d]
                residual = (end - self.noises.ends[part]).flatten(1)  # [B, d]
                gram = columns @ columns.transpose(1, 2) / residual.shape[1]
                pull = (columns @ residual[:, :, None])[:, :, 0] / residual.shape[1]
                rows[part] = torch.cat([gram.flatten(1), pull], dim=1).cpu()
        full = self._sum(rows, before)
        return full[:, : inner * inner].reshape(-1, inner, inner), full[:, inner * inner :]

    def _columns(
        self, levels: np.ndarray, slope: Slope, starts: List[_Start], end: torch.Tensor, step: float
    ) -> torch.Tensor:
        """J of a batch, [B, K-1, d]: each level moved up, and all that follows solved again."""
        columns, gaps = [], -np.diff(levels)
        for j in range(1, len(levels) - 1):
            moved = levels.copy()
            moved[j] += step * min(gaps[j - 1], gaps[j])
            first = max(j - 1 - SOLVERS[self.solver].reach, 0)  # the first step that the move changes
            start, sigma = starts[first], torch.tensor(moved, device=end.device)
            steps = range(first, len(levels) - 1)
            x, _ = integrate(_Replay(slope, start.slope), start.x, sigma, self.solver, start.past, steps=steps)
            columns.append((x - end).flatten(1) / (moved[j] - levels[j]))
            self.tell()
        return torch.stack(columns, dim=1)

    @torch.no_grad()
    def grown(self, levels: np.ndarray, middles: np.ndarray) -> np.ndarray:
        """Products E_j^T E_k per pixel of the grown local errors of the solver's steps over `levels`, [M, K, K].

        Every step starts on the exact path, and so does what multistep solvers remember. What a step leaves is an error
        that grows or shrinks from level to level as Heun's steps from beside the path part from those on it.
        M K (K + 10) evaluations, and the solver's own.

        Args:
            levels: [K + 1], descending to 0.
            middles: [K], one between each two levels: the exact path is solved in two steps of RK4, and the last in
                one more, to a sixth of the middle, so that the step to 0, which is Euler's, is short.
        """
        count, before = len(levels) - 1, self.spent()
        rows = torch.zeros(len(self.noises.latents), count * count, dtype=torch.float64)
        what = ["grown", levels.tolist(), middles.tolist()]

        def of(part: slice) -> torch.Tensor:
            x = self.denoiser.initial(self.noises.latents[part], float(levels[0])).to(torch.float64)
            errors = self._grown(self._slope(part), x, levels, middles)
            return (errors @ errors.transpose(1, 2) / errors.shape[2]).flatten(1)

        with self.world.phase(), full_precision():
            for part in self._share():
                rows[part] = self.piece(what, part, partial(of, part)).cpu()
        return self._sum(rows, before).reshape(-1, count, count)

    def _grown(self, slope: Slope, x: torch.Tensor, levels: np.ndarray, middles: np.ndarray) -> torch.Tensor:
        """E of a batch, [B, K, d]."""
        errors, past = [], ()
        grid = torch.tensor(levels, device=x.device, dtype=x.dtype)
        for k, (a, middle, b) in enumerate(zip(levels, middles, levels[1:])):
            last = [] if b else [max(middle / 6, min(self.denoiser.sigma_limits[0], middle / 2))]
            fine, once, twice = (torch.tensor(each, device=x.device, dtype=x.dtype) for each in (
                [a, middle, *last, b], [a, b], [a, middle, b]))
            grow = once if b else twice  # a step to 0 is Euler's and shows no growth
            exact, _ = integrate(slope, x, fine, "rk4")
            end, past = integrate(slope, x, grid, self.solver, past, steps=[k])
            past = on_path(past, x)
            beside = [integrate(slope, x + error, grow, "heun")[0] for error in errors]
            on = integrate(slope, x, grow, "heun")[0] if errors else x
            errors, x = [*(each - on for each in beside), end - exact], exact
            self.tell()
        return torch.stack(errors, dim=1).flatten(2)


@torch.no_grad()
def solve_ends(
    denoiser: Denoiser, latents: torch.Tensor, labels: Optional[torch.Tensor], levels: np.ndarray, solver: str,
    batch: int, tell: Tell = _silent, world: World = ALONE, pieces: Optional[Pieces] = None,
) -> Tuple[Noises, int]:
    """Where the paths of `latents` end, by `solver` on fine `levels`, and the evaluations of all processes."""
    zero = torch.zeros(latents.shape, dtype=torch.float64, device=latents.device)
    travel = Travel(denoiser, solver, Noises(latents, labels, zero), batch, tell, world, pieces)
    before, ends = travel.spent(), zero.clone()

    def of(part: slice) -> torch.Tensor:
        x = denoiser.initial(latents[part], float(levels[0])).to(torch.float64)
        sigma = torch.tensor(levels, device=x.device)
        return integrate(travel._slope(part), x, sigma, solver, on_step=lambda *_: tell())[0]

    with world.phase(), full_precision():
        for part in travel._share():
            ends[part] = travel.piece(["ends", levels.tolist()], part, partial(of, part))
    count = world.sum(torch.tensor([float(travel.spent() - before)]).to(world.device))
    return Noises(latents, labels, world.sum(ends)), int(count)
