"""The end-point objective: local errors weighted by their growth on the way to sigma = 0.

Symbols
-------
tau    time of a learned clock, as a fraction
rho    density of steps over tau, 1 for the clock's own
w      (1 + (sigma / sigma_data)^2)^(-1/2): what is left at sigma = 0 of an error made at sigma, for Gaussian data
beta   exponent of the weight: the cost is |Q| w^beta theta^2. With 1 it is the growth of Gaussian data; 0 is ART's own
       objective; below 0 errors at high noise count for more, as they do where paths part
E_k    grown local error of the solver's step k over the clock's grid of P steps: how far it moves the end point
p_k    order of the solver; 1 for the last step, which is Euler's

Two ways to a density. A power of w: the optimum of the weighted cost has the density sqrt(q) w^(beta / 2) over
sigma, the learned clock's times w^(beta / 2). So one learned clock serves every beta, and beta is found by where the
solver ends at this number of steps, over some noises. Measured: with density rho the steps' errors become
E_k rho_k^(-p_k), to leading order, and the end's their sum, signs kept, so that errors which cancel count for nothing.
One measurement of E serves every K; the density is the one of least mean end-point error.

Whichever of the two has the lesser mean end-point error, through the solver itself, is taken; neither where what it
gains may be chance, or where few noises gain what most lose, or most what few lose.
"""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import numpy as np
from scipy.optimize import minimize, minimize_scalar

from art_edm.grids.grid import Grid
from art_edm.measure.profile import Profile
from art_edm.models.denoiser import Denoiser
from art_edm.refining.config import Drawn, EndError, better
from art_edm.refining.noise_sets import teller
from art_edm.refining.solver_jacobian import Travel
from art_edm.runtime.distributed import ALONE, World
from art_edm.runtime.pieces import Pieces
from art_edm.runtime.progress import GracefulStop
from art_edm.sampling.solvers import fitted, nfe, order_of

__all__ = ["Growth", "SLACK", "Weighted", "choose_growth", "measure_growth", "optimum_of", "remaining", "weighted"]

FINE = 8192  # steps of time in the quadrature
COARSE = (-0.8, -0.4, 0.0, 0.4, 0.8, 1.2, 1.6)  # beta; no other minimum was seen in between
FURTHER = 12  # more such steps, where the least is the last
TINY = 1e-300
CLOSER = 6  # more between the neighbours of the least
SLACK = 0.02  # of the mean square that an objective may lose where it gains in the mean
SURE = 3  # standard errors by which the gain of the best of many betas must differ from none
STEPS = 18  # P: about as many as grids have, since E_k rho_k^(-p_k) holds for steps like those measured
KNOTS = 6  # of log rho, a line between each two
SMOOTH = 0.02  # of squared differences between knots, against the logarithm of the error

Sigma = Callable[[np.ndarray], np.ndarray]


class Growth(NamedTuple):
    """The density that the solver's grown errors ask for."""

    log_density: np.ndarray  # log rho at KNOTS even times tau
    evaluations: int
    seconds: float

    def grid(self, sigma_of: Sigma, num_steps: int) -> Grid:
        """The clock's grid of this density."""
        tau = np.linspace(0, 1, FINE + 1)
        return _redistributed(sigma_of, np.exp(np.interp(tau, np.linspace(0, 1, KNOTS), self.log_density)), num_steps)


class Weighted(NamedTuple):
    """The grid that was chosen."""

    grid: Grid
    beta: Optional[float]  # None: the measured density
    error_before: EndError  # of beta = 0
    error_measured: Optional[EndError]  # of the measured density; None where it was not asked for or cannot be used
    error_after: EndError  # of `grid`, over the same noises, which chose it: a little too good; never above in the mean
    tried: Dict[float, float]  # beta -> mean error; infinite where the model does not have the levels
    evaluations: int
    seconds: float
    solver: str
    apart: Optional[Tuple[EndError, EndError]] = None  # of plain and chosen, over the noises of `endpoint.confirm`
    refuted: bool = False  # by those; then `grid` is the clock's own

    def record(self) -> Dict[str, Any]:
        """For a grid's provenance, ready for JSON."""
        tried = [{"beta": beta, "error": error} for beta, error in sorted(self.tried.items()) if error < np.inf]
        measured = None if self.error_measured is None else self.error_measured._asdict()
        weight = f"beta = {self.beta:.3g}" if self.beta else "beta = 0: none is surely better"
        weight = "beta = 0: other noises refute what seemed better" if self.refuted else weight
        apart = self.apart and {
            "before": self.apart[0]._asdict(), "after": self.apart[1]._asdict(), "refuted": self.refuted}
        return {"solver": self.solver, "weight": "their measured growth" if self.beta is None else weight,
                "beta": self.beta, "tried": tried, "evaluations": self.evaluations,
                "seconds": self.seconds, "error_before": self.error_before._asdict(), "error_measured": measured,
                "error_after": self.error_after._asdict(), "noises_apart": apart}


def remaining(sigma: np.ndarray, sigma_data: float) -> np.ndarray:
    """w = (1 + (sigma / sigma_data)^2)^(-1/2), for levels of any shape.

    For Gaussian data of standard deviation s the exact path is x = x_0 sqrt(1 + (sigma / s)^2), so that an error
    shrinks by just w on the way to 0.
    """
    return 1 / np.hypot(1, np.asarray(sigma, np.float64) / sigma_data)


def optimum_of(profile: Profile) -> Sigma:
    """The optimal clock of a profile: noise levels at times tau."""
    tau, levels = np.linspace(0, 1, FINE + 1), profile.direct(FINE).values
    return lambda at: np.interp(at, tau, levels)


def weighted(sigma_of: Sigma, beta: float, sigma_data: float, num_steps: int) -> Grid:
    """The grid of K = num_steps that a clock of density rho gives with the density rho w^(beta / 2).

    Args:
        sigma_of: noise levels of the clock at times tau, from sigma_max at 0 to 0 at 1.
    """
    tau = np.linspace(0, 1, FINE + 1)
    return _redistributed(sigma_of, remaining(sigma_of(tau), sigma_data) ** (beta / 2), num_steps)


def _redistributed(sigma_of: Sigma, rho: np.ndarray, num_steps: int) -> Grid:
    """The clock's levels where the integral of rho [FINE + 1] over tau has gone an even part of its way."""
    passed = np.concatenate([[0.0], np.cumsum((rho[1:] + rho[:-1]) / 2)])
    inner = np.interp(np.arange(1, num_steps) / num_steps, passed / passed[-1], np.linspace(0, 1, FINE + 1))
    return Grid(np.concatenate([sigma_of(np.zeros(1)), sigma_of(inner), [0.0]]))


def measure_growth(
    denoiser: Denoiser, sigma_of: Sigma, solver: str, noises: Drawn, batch: int, quiet: bool = True,
    world: World = ALONE, pieces: Optional[Pieces] = None,
) -> Growth:
    """The density of steps that the solver's grown local errors ask for; one serves every number of steps.

    Arguments and errors as for `choose_growth`. About M P (P + 12) evaluations, P = 18, for M noises; P is less where
    the model has no levels for so many steps.
    """
    began, (levels, middles) = time.perf_counter(), _finest(denoiser, sigma_of)
    steps, count = len(middles), sum(len(part.latents) for part in noises[:2])
    total = count * (steps * (steps + 10) + nfe(solver, steps))
    label = "growth of errors, images"
    with GracefulStop() as stop, teller(denoiser, label, total, quiet, world, stop, pieces) as tell:
        parts = [Travel(denoiser, solver, part, batch, tell, world, pieces) for part in noises[:2]]
        gram = np.concatenate([part.grown(levels, middles) for part in parts])
    orders = np.full(steps, float(order_of(solver)))
    orders[-1] = 1.0
    evaluations = sum(part.evaluations for part in parts)
    return Growth(_density(gram, orders), evaluations, time.perf_counter() - began)


def _finest(denoiser: Denoiser, sigma_of: Sigma) -> Tuple[np.ndarray, np.ndarray]:
    """The clock's grid of at most P steps that the model has levels for, [n + 1], and the middles of its steps, [n]."""
    for steps in range(STEPS, 1, -1):
        sigma = sigma_of(np.linspace(0, 1, 2 * steps + 1))
        try:
            return fitted(denoiser, Grid(np.append(sigma[:-1:2], 0.0))).values, sigma[1::2]
        except ValueError:
            continue
    raise ValueError(f"found a network whose lowest noise level is {denoiser.sigma_limits[0]:.6g}, too high for two "
                     "steps of the learned clock; use --objective=art")


def _density(gram: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """log rho at the knots, of least mean error: mean over noises of sqrt(sum_jk G_jk rho_j^-p_j rho_k^-p_k)."""
    middle = (np.arange(len(orders)) + 0.5) / len(orders)

    def objective(knots: np.ndarray) -> float:
        log_rho = np.interp(middle, np.linspace(0, 1, KNOTS), knots)
        scale = np.exp(-orders * (log_rho - np.log(np.exp(log_rho).mean())))
        error = np.sqrt(np.maximum(np.einsum("mjk,j,k->m", gram, scale, scale), 0)).mean()
        return float(np.log(error + TINY) + SMOOTH * np.square(np.diff(knots)).sum())

    found = minimize(objective, np.zeros(KNOTS), method="BFGS").x
    return found - found.mean()


def choose_growth(
    denoiser: Denoiser, sigma_of: Sigma, plain: Grid, solver: str, noises: Drawn, batch: int, quiet: bool = True,
    world: World = ALONE, growth: Optional[Growth] = None, pieces: Optional[Pieces] = None,
) -> Weighted:
    """The weighted grid that serves `solver` best, with as many steps as `plain`.

    Args:
        sigma_of: the learned clock, noise levels at times [n] in [0, 1].
        plain: the clock's own grid, of beta = 0; it is what is returned where no other is better.
        solver: a name in `solvers.SOLVERS`.
        noises: from `draw_noises`; both parts are used, as few numbers are fitted to them.
        batch: noises per evaluation.
        world: processes that share the noises; each returns the same.
        growth: from `measure_growth` with the same clock and solver; None leaves the powers of w alone.
        pieces: where errors of each batch are kept and found.
    Raises:
        Stopped: Ctrl-C or SIGTERM.
        NonFiniteOutput: the denoiser returned NaN or infinity.
        ValueError: an unknown solver, or a grid the model does not support.
    """
    plain = fitted(denoiser, plain)
    steps, began, tried = plain.num_steps, time.perf_counter(), {}  # beta, or None for the measured -> error by noise
    runs = len(COARSE) + CLOSER + (growth is not None)
    total = nfe(solver, steps) * sum(len(part.latents) for part in noises[:2]) * runs
    label = f"end-point objective, K = {steps}, images"
    with GracefulStop() as stop, teller(denoiser, label, total, quiet, world, stop, pieces) as tell:
        parts = [Travel(denoiser, solver, part, batch, tell, world, pieces) for part in noises[:2]]

        def grid(beta: Optional[float]) -> Grid:
            if beta is None:
                return fitted(denoiser, growth.grid(sigma_of, steps))
            return fitted(denoiser, weighted(sigma_of, beta, denoiser.sigma_data, steps)) if beta else plain

        def error(beta: Optional[float]) -> float:
            beta = beta if beta is None else round(float(beta), 4)
            if beta not in tried:
                try:
                    levels = grid(beta).values
                except ValueError:  # two levels become one that the model knows
                    tried[beta] = np.array([np.inf])
                else:
                    tried[beta] = np.concatenate([part.run(levels, keep=False).errors for part in parts])
            return float(tried[beta].mean())

        error(0.0)
        if steps > 1:
            _search(error)
        best = min((beta for beta in tried if better(tried[0.0], tried[beta], SLACK)), key=error, default=0.0)
        best = best if _surely(tried[0.0] - tried[best]) else 0.0
        if growth is not None and steps > 1 and error(None) < error(best) and better(tried[0.0], tried[None], SLACK):
            best = None
    ends = {beta: EndError.of(errors) if len(errors) > 1 else None for beta, errors in tried.items()}
    return Weighted(
        grid(best), best, ends[0.0], ends.get(None), ends[best],
        {beta: error(beta) for beta in tried if beta is not None},
        sum(part.evaluations for part in parts), time.perf_counter() - began, solver,
    )


def _surely(gain: np.ndarray) -> bool:
    """Whether the mean of gains [M] is more than chance: beta is the best of many."""
    return bool(gain.mean() > SURE * gain.std() / (len(gain) - 1) ** 0.5)


def _search(error: Callable[[float], float]) -> None:
    """Ask for the errors of a coarse row of betas, longer where it ends too early, and of some about the least."""
    betas, step = list(COARSE), COARSE[1] - COARSE[0]
    for _ in range(FURTHER):
        best = min(betas, key=error)
        if best == betas[-1]:
            betas.append(round(best + step, 4))
        elif best == betas[0]:
            betas.insert(0, round(best - step, 4))
        else:
            break
    best = min(betas, key=error)
    minimize_scalar(error, bounds=(best - step, best + step), method="bounded", options={"maxiter": CLOSER})
