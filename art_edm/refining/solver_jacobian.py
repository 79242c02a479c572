"""How far a sampler ends from the exact solution, and how each noise level of its grid moves that end.

Symbols
-------
x_K       where the solver ends, on a grid sigma_0 > ... > sigma_K = 0; x_ref where the exact path ends
residual  r = x_K - x_ref, [M, C, H, W] over M noises
error     RMS of r over pixels, [M], in units of x
w_kj      weight of slope f_{k-j} in step k, where the weights are free too (see `sampling.weighted`)
J         d x_K / d sigma_j, j = 1..K-1, and then d x_K / d w_kj, P in all, by forward differences through the solver
jtj, jtr  J^T J and J^T r per noise and pixel, [M, P, P] and [M, P]: all that a least-squares step needs

Levels stay on the CPU, where the host may read them without waiting for a GPU.

Moving sigma_j leaves the steps that end above it as they are (but for one, where a solver's weights come from the
clock), and the first slope of the first step that it changes. So a difference starts from what the undisturbed run
stored there, which halves its cost; it needs neither autograd nor memory that grows with the network, and serves
every solver, guided or not. A weight of step k moves what follows that step: K - 1 - k evaluations, none for the last.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import torch

from art_edm.measure.field import rms
from art_edm.metrics.end_point import better
from art_edm.models.evaluate import FiniteCheck
from art_edm.refining import levenberg_marquardt
from art_edm.refining.stage import Stage
from art_edm.runtime.precision import full_precision
from art_edm.sampling.solvers import SOLVERS, Past, Slope, Solver, integrate, slope_of
from art_edm.sampling.weighted import weighted

__all__ = ["Kept", "Move", "Noises", "Place", "Run", "Scheme", "SolverRuns", "solve_ends"]

Place = Tuple[int, int]  # (k, j) of a weight


class Scheme(NamedTuple):
    """What decides where a sampler goes: levels, and a table of weights where it has its own."""

    levels: np.ndarray  # [K + 1]
    weights: Optional[np.ndarray] = None  # [K, K]


class Noises(NamedTuple):
    """Noises and where their exact paths end."""

    latents: torch.Tensor  # unit normal [M, C, H, W]
    labels: Optional[torch.Tensor]  # one-hot [M, label_dim]
    ends: torch.Tensor  # x_ref [M, C, H, W] float64

    def part(self, where: slice) -> "Noises":
        """Some of them."""
        return Noises(self.latents[where], None if self.labels is None else self.labels[where], self.ends[where])

    def digest(self) -> str:
        """SHA-256 of all of it."""
        digest = hashlib.sha256()
        for tensor in self:
            if tensor is not None:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


class _Start(NamedTuple):
    """What a run knows as a step begins."""

    x: torch.Tensor  # [B, C, H, W]
    past: Past
    slope: torch.Tensor  # dx/dsigma at x, [B, C, H, W]


class Kept(NamedTuple):
    """What a run of one batch leaves for its derivatives."""

    starts: List[_Start]  # [K]
    end: torch.Tensor  # x_K [B, C, H, W]


class Run(NamedTuple):
    """One run of the sampler over the noises; each process has all of its numbers."""

    scheme: Scheme
    errors: np.ndarray  # [M], whose mean is minimised
    figures: np.ndarray  # [M, n]: the RMS end-point error, and what else `errors` come from
    kept: Dict[int, Kept]  # first noise of a batch that was run just now -> what it left


class Move(NamedTuple):
    """One number of a scheme moved."""

    scheme: Scheme
    first: int  # step, from which on all is solved again
    size: float


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


class SolverRuns:
    """Runs of one solver from the same noises, on any grid; a scheme with weights replaces the solver by its own.

    The processes share out whole batches, so that their number changes no rounding; each gets the figures of all.

    Args:
        stage: keeps and finds the errors and derivatives of each batch; its context has the size of batches.
    """

    def __init__(self, solver: str, noises: Noises, stage: Stage) -> None:
        self.solver, self.noises, self.stage = solver, noises, stage
        self.world, self.batch = stage.context.world, stage.context.batch
        self.evaluations, self.width = 0, 1  # of all processes; n, numbers of a noise in `Run.figures`
        self._digests: Dict[int, str] = {}

    def _share(self) -> List[slice]:
        """The batches of this process."""
        count, batch, world = len(self.noises.latents), self.batch, self.world
        return [slice(a, min(a + batch, count)) for a in range(world.rank * batch, count, world.size * batch)]

    def _slope(self, part: slice, check: FiniteCheck) -> Slope:
        labels = self.noises.labels
        return slope_of(self.stage.denoiser, None if labels is None else labels[part], check)

    def _what(self, kind: str, scheme: Scheme, part: slice, **more: Any) -> Dict[str, Any]:
        """All that decides the rows of a batch."""
        if part.start not in self._digests:
            self._digests[part.start] = self.noises.part(part).digest()
        if scheme.weights is not None:
            more["weights"] = scheme.weights.tolist()
        return {"kind": kind, "solver": self.solver, "levels": scheme.levels.tolist(),
                "noises": self._digests[part.start], **more}

    def _entry(self, scheme: Scheme) -> Solver:
        return SOLVERS[self.solver] if scheme.weights is None else weighted(scheme.weights)

    def _initial(self, part: slice, levels: np.ndarray) -> torch.Tensor:
        return self.stage.denoiser.initial(self.noises.latents[part], float(levels[0])).to(torch.float64)

    def _sum(self, rows: torch.Tensor, before: int) -> np.ndarray:
        """Rows [M, n] of all processes; adds up their evaluations."""
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        rows[-1, 0] = self.stage.evaluations - before
        rows = self.world.sum(rows).numpy()
        self.evaluations += int(rows[-1, 0])
        return rows[:-1]

    @torch.no_grad()
    def run(self, scheme: Scheme, keep: bool = True) -> Run:
        """Take every noise through a scheme; without `keep` for the errors alone, in little memory."""
        before, rows = self.stage.evaluations, torch.zeros(len(self.noises.latents), self.width, dtype=torch.float64)
        kept: Dict[int, Kept] = {}

        def figures_of(part: slice) -> torch.Tensor:
            batch = self._recorded(part, scheme)
            if keep:
                kept[part.start] = batch
            return self._figures(batch.end, part)

        with self.world.phase(), full_precision():
            for part in self._share():
                what = self._what("errors", scheme, part)
                found = self.stage.find(what)
                rows[part] = self.stage.make(what, partial(figures_of, part)) if found is None else found
        figures = self._sum(rows, before)
        return Run(scheme, self._errors(figures), figures, kept)

    def _figures(self, end: torch.Tensor, part: slice) -> torch.Tensor:
        """Of a batch that ends there, [B, n]."""
        return rms(end - self.noises.ends[part])[:, None]

    def _errors(self, figures: np.ndarray) -> np.ndarray:
        """[M] of the figures [M, n] of all noises."""
        return figures[:, 0]

    @staticmethod
    def better(before: Run, after: Run) -> bool:
        """As `better` of their errors."""
        return better(before.errors, after.errors)

    def model(self, run: Run, to_p: np.ndarray, step: float, places: Tuple[Place, ...]) -> Tuple[np.ndarray, ...]:
        """As `levenberg_marquardt.model`, of the mean error in p, for `to_p` = d (levels, weights) / d p."""
        return levenberg_marquardt.model(run.errors, *self.derivatives(run, step, places), to_p, bool(places))

    def _recorded(self, part: slice, scheme: Scheme) -> Kept:
        """A batch from the first level to the last, and what each step began with."""
        x, check = self._initial(part, scheme.levels), FiniteCheck(self.noises.ends.device)
        kept, past, slope = [], (), self._slope(part, check)
        sigma, entry = torch.tensor(scheme.levels), self._entry(scheme)
        for k in range(len(sigma) - 1):
            recorder, start = _Recorder(slope), (x, past)
            x, past = integrate(recorder, x, sigma, entry, past, steps=[k])
            kept.append(_Start(*start, recorder.first))
        check.settle()
        return Kept(kept, x)

    @torch.no_grad()
    def derivatives(self, run: Run, step: float, places: Tuple[Place, ...] = ()) -> Tuple[np.ndarray, np.ndarray]:
        """jtj and jtr of a run, [M, P, P] and [M, P], P = K - 1 + len(places).

        Args:
            step: of the differences, as a fraction of the smaller of the two gaps beside a level; of a weight as it is.
            places: (k, j) of the weights that are free.
        """
        count = len(run.scheme.levels) - 2 + len(places)
        full = self._derived(run, step, places, count * (count + 1))
        return full[:, : count * count].reshape(-1, count, count), full[:, count * count :]

    def _derived(self, run: Run, step: float, places: Tuple[Place, ...], width: int) -> np.ndarray:
        """What `_products` gives, of all noises: [M, width]."""
        before = self.stage.evaluations
        rows = torch.zeros(len(self.noises.latents), width, dtype=torch.float64)
        more = {"places": places} if places else {}
        with self.world.phase(), full_precision():
            for part in self._share():
                what = self._what("derivatives", run.scheme, part, step=step, **more)
                found = self.stage.find(what)
                if found is None:  # a run that was itself found is done again for it, and not counted twice
                    kept = run.kept.get(part.start) or self._recorded(part, run.scheme)
                    moves = self._moves(run.scheme, step, places)
                    found = self.stage.make(what, partial(self._products, moves, part, kept))
                rows[part] = found
        return self._sum(rows, before)

    def _moves(self, scheme: Scheme, step: float, places: Tuple[Place, ...]) -> Iterator[Move]:
        """Each inner level moved up, then each free weight."""
        levels, weights, reach = scheme.levels, scheme.weights, self._entry(scheme).reach
        gaps = -np.diff(levels)
        for j in range(1, len(levels) - 1):
            moved = levels.copy()
            moved[j] += step * min(gaps[j - 1], gaps[j])
            first = max(j - 1 - reach, 0)  # the first step that the move changes
            yield Move(Scheme(moved, weights), first, moved[j] - levels[j])
        for k, j in places:
            moved = weights.copy()
            moved[k, j] += step
            yield Move(Scheme(levels, moved), k, moved[k, j] - weights[k, j])

    def _moved(self, moves: Iterator[Move], part: slice, kept: Kept) -> Iterator[Tuple[torch.Tensor, float]]:
        """Where a batch ends after each move, all that follows it solved again; and the move's size."""
        check = FiniteCheck(self.noises.ends.device)
        slope, steps = self._slope(part, check), len(kept.starts)
        for scheme, first, size in moves:
            start, sigma = kept.starts[first], torch.tensor(scheme.levels)
            x, _ = integrate(_Replay(slope, start.slope), start.x, sigma, self._entry(scheme), start.past,
                             steps=range(first, steps))
            yield x, size
            self.stage.tell()
        check.settle()

    def _products(self, moves: Iterator[Move], part: slice, kept: Kept) -> torch.Tensor:
        """jtj and jtr of a batch side by side, [B, P (P + 1)]."""
        columns = [(x - kept.end).flatten(1) / size for x, size in self._moved(moves, part, kept)]
        residual = (kept.end - self.noises.ends[part]).flatten(1)  # [B, d]
        J = torch.stack(columns, dim=1)  # [B, P, d]
        jtj = J @ J.transpose(1, 2) / residual.shape[1]
        jtr = (J @ residual[:, :, None])[:, :, 0] / residual.shape[1]
        return torch.cat([jtj.flatten(1), jtr], dim=1)


@torch.no_grad()
def solve_ends(
    solver: str, latents: torch.Tensor, labels: Optional[torch.Tensor], levels: np.ndarray, stage: Stage
) -> Tuple[Noises, int]:
    """Where the paths of `latents` end, by `solver` on fine `levels`, and the evaluations of all processes."""
    zero = torch.zeros(latents.shape, dtype=torch.float64, device=latents.device)
    runs, ends = SolverRuns(solver, Noises(latents, labels, zero), stage), zero.clone()

    def ends_of(part: slice) -> torch.Tensor:
        check = FiniteCheck(zero.device)
        slope, x = runs._slope(part, check), runs._initial(part, levels)
        x, _ = integrate(slope, x, torch.tensor(levels), solver, on_step=lambda *_: stage.tell())
        check.settle()
        return x

    before, world = stage.evaluations, stage.context.world
    with world.phase(), full_precision():
        for part in runs._share():
            what = runs._what("ends", Scheme(levels), part)
            found = stage.find(what)
            ends[part] = (stage.make(what, partial(ends_of, part)) if found is None else found).to(ends)
    count = world.sum(torch.tensor([float(stage.evaluations - before)], dtype=torch.float64))
    return Noises(latents, labels, world.sum(ends)), int(count)
