"""The end-point objective: local errors weighted by their growth on the way to sigma = 0.

Symbols
-------
w      (1 + (sigma / sigma_data)^2)^(-1/2): what is left at sigma = 0 of an error made at sigma, for Gaussian data
beta   exponent of the weight: the cost is |Q| w^beta theta^2. With 1 it is the growth of Gaussian data; 0 is ART's own
       objective; below 0 errors at high noise count for more, as they do where paths part
tau    time of a learned clock, as a fraction

The optimum of the weighted cost has the density sqrt(q) w^(beta / 2) over sigma: that of the unweighted one times
w^(beta / 2). So one learned clock serves every beta, and the one number that is not known, how errors grow under the
solver in use at this number of steps, is found by where the solver ends: beta is the one of least mean end-point
error over some noises, or 0 where what it gains over that is within three standard errors of the gains' mean.
"""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from .denoiser import Denoiser
from .distributed import ALONE, World
from .exact_ends import teller
from .grid import Grid
from .profile import Profile
from .progress import GracefulStop
from .refine_state import Drawn, EndError
from .sensitivity import Travel
from .solvers import fitted, nfe

__all__ = ["Weighted", "choose_growth", "optimum_of", "remaining", "weighted"]

FINE = 8192  # steps of time in the quadrature
COARSE = (-0.8, -0.4, 0.0, 0.4, 0.8, 1.2, 1.6)  # beta; no other minimum was seen in between
FURTHER = 4  # more such steps, where the least is the last
CLOSER = 6  # more between the neighbours of the least
SURE = 3  # standard errors by which a gain must differ from none

Sigma = Callable[[np.ndarray], np.ndarray]


class Weighted(NamedTuple):
    """The grid of the beta that was chosen."""

    grid: Grid
    beta: float
    error_before: EndError  # of beta = 0
    error_after: EndError  # of `grid`, over the same noises, which chose it: a little too good; never above in the mean
    tried: Dict[float, float]  # beta -> mean error; infinite where the model does not have the levels
    evaluations: int
    seconds: float
    solver: str

    def record(self) -> Dict[str, Any]:
        """For a grid's provenance, ready for JSON."""
        tried = [{"beta": beta, "error": error} for beta, error in sorted(self.tried.items()) if error < np.inf]
        return {"solver": self.solver, "beta": self.beta, "tried": tried, "evaluations": self.evaluations,
                "seconds": self.seconds, "error_before": self.error_before._asdict(),
                "error_after": self.error_after._asdict()}


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
    factor = remaining(sigma_of(tau), sigma_data) ** (beta / 2)
    passed = np.concatenate([[0.0], np.cumsum((factor[1:] + factor[:-1]) / 2)])
    inner = np.interp(np.arange(1, num_steps) / num_steps, passed / passed[-1], tau)
    return Grid(np.concatenate([sigma_of(np.zeros(1)), sigma_of(inner), [0.0]]))


def choose_growth(
    denoiser: Denoiser, sigma_of: Sigma, plain: Grid, solver: str, noises: Drawn, batch: int, quiet: bool = True,
    world: World = ALONE,
) -> Weighted:
    """The weighted grid that serves `solver` best, with as many steps as `plain`.

    Args:
        sigma_of: the learned clock, noise levels at times [n] in [0, 1].
        plain: the clock's own grid, of beta = 0; it is what is returned where no other is better.
        solver: a name in `solvers.SOLVERS`.
        noises: from `draw_noises`; both parts are used, as one number is all that is fitted to them.
        batch: noises per evaluation.
        world: processes that share the noises; each returns the same.
    Raises:
        Stopped: Ctrl-C or SIGTERM.
        NonFiniteOutput: the denoiser returned NaN or infinity.
        ValueError: an unknown solver, or a grid the model does not support.
    """
    plain = fitted(denoiser, plain)
    steps, began, tried = plain.num_steps, time.perf_counter(), {}  # beta -> error of each noise
    total = nfe(solver, steps) * sum(len(part.latents) for part in noises[:2]) * (len(COARSE) + CLOSER)
    label = f"end-point objective, K = {steps}, images"
    with GracefulStop() as stop, teller(denoiser, label, total, quiet, world, stop) as tell:
        parts = [Travel(denoiser, solver, part, batch, tell, world) for part in noises[:2]]

        def grid(beta: float) -> Grid:
            return fitted(denoiser, weighted(sigma_of, beta, denoiser.sigma_data, steps)) if beta else plain

        def error(beta: float) -> float:
            beta = round(float(beta), 4)
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
    beta = min(tried, key=lambda beta: (error(beta), abs(beta)))
    gain = tried[0.0] - tried[beta]
    if not gain.mean() > SURE * gain.std() / (len(gain) - 1) ** 0.5:
        beta = 0.0
    return Weighted(
        grid(beta), beta, EndError.of(tried[0.0]), EndError.of(tried[beta]), {each: error(each) for each in tried},
        sum(part.evaluations for part in parts), time.perf_counter() - began, solver,
    )


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
