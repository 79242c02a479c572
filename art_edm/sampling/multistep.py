"""Multistep solvers: one evaluation a step, and what earlier steps evaluated.

Symbols
-------
x                  state, [B, C, H, W] float64
sigma, sigma_next  noise levels at the start and the end of a step; h = sigma_next - sigma < 0, r = sigma_next / sigma
slope              f = dx/dsigma = (x - D(x; sigma)) / sigma
denoised           D = x - sigma f
lambda             -log sigma
t                  the learned clock in units of steps, t_k = k; sigma(t) is the monotone cubic (PCHIP) through
                   log(sigma_k + 0.05) over t
past               what a solver keeps of its last steps, oldest first: tuples (level [], kept [B, C, H, W], ...)
L_j                Lagrange's polynomial through the times of the last m values: 1 at that of value j, 0 at the others
w_j                weights of the last m values, newest first; they sum to 1

Every solver here is one of two exact forms of the equation, with a polynomial in some time for what it cannot know:

    x_next = x + int f dsigma                              f through the last m slopes:    x + h sum_j w_j f_j
    x_next = r x + sigma_next int D d(1/sigma)             D through the last m images:    r x + (1 - r) sum_j w_j D_j

The weights are the means of L_j over the step, by dsigma or by d(1/sigma). They depend on the grid alone. As a
function of sigma a slope bends most where the levels lie densest; as a function of the learned clock it bends evenly.

A past is handed from step to step and belongs to the solver that made it. One that lies on a known path is made
by taking the solver's own steps from points of that path, and using of each only `on_path` of the past. With less
past than its order needs a step is of the order it can be; the first is Euler's, whose one error of second order
is what remains of a run that starts without a past on a fine grid. All are differentiable in x, the levels and
the past.
"""

from __future__ import annotations

from typing import Any, Callable, Tuple

import numpy as np
import torch

from art_edm.grids.grid import CLOCK_OFFSET

__all__ = [
    "Past", "Row", "Rule", "Slope", "Step", "clock_denoised", "clock_slopes", "denoised_step",
    "dpmpp2m_row", "even_row", "limited", "on_path", "slopes_step", "through_times", "unipc", "unipc_step", "vp_time",
]

# Slope(x [B, C, H, W], sigma []) -> dx/dsigma [B, C, H, W]
Slope = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Past = Tuple[Tuple[torch.Tensor, ...], ...]
# Step(slope, x, sigma, sigma_next, past, weights) -> (x_next, past); `weights(m)` are those of the last m values
Step = Callable[[Slope, torch.Tensor, torch.Tensor, torch.Tensor, Past, Any], Tuple[torch.Tensor, Past]]
Row = Callable[[int, int], Any]  # row(k, m) -> weights [m] of step k
Rule = Callable[[torch.Tensor], Row]  # of levels [K + 1], float64 on the CPU

EVEN = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


# --- steps -------------------------------------------------------------------------------------------


def slopes_step(
    slope: Slope, x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, past: Past, weights: Any
) -> Tuple[torch.Tensor, Past]:
    """x + h sum_j w_j f_j."""
    known = (*past, (sigma, slope(x, sigma)))
    return x + (sigma_next - sigma) * _mean(weights(len(known)), known), known


def denoised_step(
    slope: Slope, x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, past: Past, weights: Any
) -> Tuple[torch.Tensor, Past]:
    """r x + (1 - r) sum_j w_j D_j."""
    known = (*past, (sigma, x - sigma * slope(x, sigma)))
    target = _mean(weights(len(known)), known)
    return target + sigma_next / sigma * (x - target), known


def unipc_step(
    slope: Slope, x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, past: Past, weights: Any
) -> Tuple[torch.Tensor, Past]:
    """UniPC (2302.04867): the step before is taken again with the image D that its end gave, then UniP's step."""
    predict, correct = weights(len(past) + 1)
    known = (*past, (sigma, x - sigma * slope(x, sigma), x))
    if past:
        above, _, before = past[-1]
        target = _mean(correct, known)
        x = target + sigma / above * (before - target)
        known = (*past, (sigma, known[-1][1], x))
    target = _mean(predict, known)
    return target + sigma_next / sigma * (x - target), known


def on_path(past: Past, x: torch.Tensor) -> Past:
    """The past of a step that began at x on a known path: a state that it keeps is x, not x corrected."""
    return (*past[:-1], (*past[-1][:2], x)) if past and len(past[-1]) > 2 else past


def _mean(weights: torch.Tensor, known: Past) -> torch.Tensor:
    """sum_j w_j of the newest values, [B, C, H, W]; CPU weights [m] go with values on any device."""
    return sum(weight * value[1] for weight, value in zip(weights, known[::-1]))


# --- weights -----------------------------------------------------------------------------------------


def limited(rule: Rule, values: int, last: int) -> Rule:
    """A rule that takes at most `values` values in a step, and `last` in the step to sigma = 0."""

    def of(sigma: torch.Tensor) -> Row:
        row = rule(sigma)
        return lambda k, m: row(k, min(m, values if sigma[k + 1] else last))

    return of


def even_row(sigma: torch.Tensor) -> Row:
    """Adams-Bashforth's weights of an even grid, whatever the grid: iPNDM (2204.13902)."""
    return lambda k, m: torch.tensor(EVEN[m], dtype=torch.float64)


def dpmpp2m_row(sigma: torch.Tensor) -> Row:
    """DPM-Solver++(2M), algorithm 2 of 2211.01095: D at the middle of the step in lambda, by a line through the last
    two: w = (1 + 1 / (2 q), -1 / (2 q)), q the last step over this one in lambda."""

    def row(k: int, m: int) -> torch.Tensor:
        if m == 1:
            return sigma.new_ones(1)
        half = torch.log(sigma[k] / sigma[k + 1]) / torch.log(sigma[k - 1] / sigma[k]) / 2
        return torch.stack([1 + half, -half])

    return row


def through_times(time: Callable[[torch.Tensor], torch.Tensor]) -> Rule:
    """Weights of slopes through which a polynomial in time(sigma) is laid: Adams-Bashforth for the time sigma."""

    def of(sigma: torch.Tensor) -> Row:
        def row(k: int, m: int) -> torch.Tensor:
            inside = sigma[k] + _NODES * (sigma[k + 1] - sigma[k])
            return _lagrange_means(time(sigma[k - m + 1 : k + 1]).flip(0), time(inside), _MASS)

        return row

    return of


def vp_time(sigma: torch.Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> torch.Tensor:
    """The time of the variance-preserving SDE with a linear beta, sigma^2 + 1 = exp(beta_min t + (beta_max - beta_min)
    t^2 / 2): that of DEIS-tAB (2204.13902)."""
    slope = beta_max - beta_min
    return (torch.sqrt(beta_min**2 + 2 * slope * torch.log1p(sigma**2)) - beta_min) / slope


def clock_slopes(sigma: torch.Tensor) -> Row:
    """Weights of slopes that are polynomials in the learned clock: w_j = int L_j(t) sigma'(t) dt / h."""
    inside = _clock(sigma)

    def row(k: int, m: int) -> torch.Tensor:
        return _lagrange_means(-torch.arange(m, dtype=sigma.dtype), _NODES, _MASS * inside(k)[1])

    return row


def clock_denoised(sigma: torch.Tensor) -> Row:
    """Weights of images D that are polynomials in the learned clock: w_j = int L_j(t) d(1/sigma(t)) / (1/sigma_next -
    1/sigma). For sigma_next = 0 all mass is at the end: w_j = L_j(t_next)."""
    inside = _clock(sigma)

    def row(k: int, m: int) -> torch.Tensor:
        times = -torch.arange(m, dtype=sigma.dtype)
        if sigma[k + 1] == 0:
            return _lagrange_means(times, sigma.new_ones(1), sigma.new_ones(1))
        level, rate = inside(k)
        return _lagrange_means(times, _NODES, _MASS * rate / level**2)

    return row


def unipc(order: int) -> Rule:
    """Weights of UniPC's B_2(h) variant: (UniP's [m], UniC's [m'] of the step before, None for the first).

    Orders are those of its authors and of diffusers: as much as the past allows, and falling to 1 towards sigma = 0.
    """

    def of(sigma: torch.Tensor) -> Row:
        steps, to_zero = len(sigma) - 1, sigma[-1] == 0

        def limit(k: int, m: int) -> int:
            return min(m, order, steps - k) if to_zero else min(m, order)

        def row(k: int, m: int) -> Any:
            correct = _unipc_row(sigma, k - 1, limit(k - 1, m - 1), corrector=True) if m > 1 else None
            return _unipc_row(sigma, k, limit(k, m), corrector=False), correct

        return row

    return of


def _unipc_row(sigma: torch.Tensor, k: int, order: int, corrector: bool) -> torch.Tensor:
    """Weights of UniP_order at step k [order], or of UniC_order [order + 1], whose newest value is that at the end.

    With g_n = n! phi_{n+1}(-h) / phi_1(-h), h the step in lambda, the values at the places r_i = (lambda_i - lambda_k)
    / h other than 0 get a_i / r_i, where sum_i r_i^(n-1) a_i = g_n; the value at 0 gets the rest. Two values, by the
    paper's choice, have a = 1/2.
    """
    if order == 1 and not corrector:
        return sigma.new_ones(1)
    near = -torch.log(sigma[k - order + 1 : k + 2])  # lambda, ascending: the past, here, the end
    h = near[-1] - near[-2]
    places = (near - near[-2]) / h
    others = torch.cat([places[:-2].flip(0), places[-1:]] if corrector else [places[:-2].flip(0)])  # [order (- 1)]
    if len(others) == 1:
        part = sigma.new_full((1,), 0.5)
    else:
        moments, phi, factorial = [], torch.expm1(-h) / -h - 1, 1
        for n in range(1, len(others) + 1):
            moments.append(phi * factorial / torch.expm1(-h))
            factorial *= n + 1
            phi = phi / -h - 1 / factorial
        powers = torch.stack([others**n for n in range(len(others))])
        part = torch.linalg.solve(powers, torch.stack(moments))
    ratio = part / others
    here = 1 - ratio.sum().reshape(1)
    return torch.cat([ratio[-1:], here, ratio[:-1]] if corrector else [here, ratio])


# --- quadrature and the clock --------------------------------------------------------------------------


def _quadrature(panels: int = 21, nodes: int = 12) -> Tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights on [0, 1]: Gauss-Legendre in panels that halve towards 1, where 1/sigma may rise steeply."""
    edges = np.append(1 - 0.5 ** np.arange(panels), 1.0)
    place, weight = np.polynomial.legendre.leggauss(nodes)
    width = np.diff(edges)[:, None]
    inside = edges[:-1, None] + width * (place + 1) / 2
    return torch.from_numpy(inside.ravel()), torch.from_numpy((width * weight / 2).ravel())


_NODES, _MASS = _quadrature()  # [Q] each


def _lagrange_means(times: torch.Tensor, at: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Means of L_j through `times` [m] over the points `at` [Q] with their mass [Q]: [m], summing to 1."""
    rows = []
    for j in range(len(times)):
        others = torch.cat([times[:j], times[j + 1 :]])
        rows.append(((at[:, None] - others) / (times[j] - others)).prod(dim=1))  # [Q]
    return torch.stack(rows) @ mass / mass.sum()


def _clock(sigma: torch.Tensor) -> Callable[[int], Tuple[torch.Tensor, torch.Tensor]]:
    """Of step k: sigma(t) and sigma'(t) at the nodes, [Q] each; scipy's PchipInterpolator, differentiable in sigma."""
    height = torch.log(sigma + CLOCK_OFFSET)  # [K + 1], strictly falling
    secant = height.diff()
    if len(secant) == 1:
        slopes = secant.repeat(2)
    else:
        inner = 2 * secant[:-1] * secant[1:] / (secant[:-1] + secant[1:])
        ends = [((3 * a - b) / 2).clamp(max=0).reshape(1) for a, b in (secant[[0, 1]], secant[[-1, -2]])]
        slopes = torch.cat([ends[0], inner, ends[1]])
    s = _NODES

    def inside(k: int) -> Tuple[torch.Tensor, torch.Tensor]:
        a, b, gap = slopes[k], slopes[k + 1], secant[k]
        c2, c3 = 3 * gap - 2 * a - b, a + b - 2 * gap
        shifted = torch.exp(height[k] + s * (a + s * (c2 + s * c3)))
        return shifted - CLOCK_OFFSET, shifted * (a + s * (2 * c2 + 3 * s * c3))

    return inside
