"""Multistep solvers: one evaluation a step, and what earlier steps evaluated; right on any grid, even or not.

Symbols
-------
x                  state, [B, C, H, W] float64
sigma, sigma_next  noise levels at the start and the end of a step; h = sigma_next - sigma < 0
slope              dx/dsigma = (x - D(x; sigma)) / sigma
denoised           D = x - sigma slope
lambda             -log sigma, the time of DPM-Solver++
past               what a solver keeps of its last steps, oldest first, at most 3: pairs (level [], kept [B, C, H, W]),
                   where `kept` is the slope for iPNDM and the denoised image for DPM-Solver++

A past is handed from step to step and belongs to the solver that made it. One that lies on a known path is made
by taking the solver's own steps from points of that path, and using of each only the past it returns. With less
past than its order needs a step is of the order it can be; the first is Euler's, whose one error of second order
is what remains of a run that starts without a past on a fine grid. All are differentiable in x, the levels and
the past.
"""

from __future__ import annotations

from functools import partial
from typing import Callable, List, Sequence, Tuple

import torch

__all__ = [
    "MULTISTEP", "Past", "Slope", "Step", "adams_weights", "dpmpp2m_step", "ipndm2_step", "ipndm3_step", "ipndm_step",
]

# Slope(x [B, C, H, W], sigma []) -> dx/dsigma [B, C, H, W]
Slope = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Past = Tuple[Tuple[torch.Tensor, torch.Tensor], ...]
Step = Callable[[Slope, torch.Tensor, torch.Tensor, torch.Tensor, Past], Tuple[torch.Tensor, Past]]


def dpmpp2m_step(
    slope: Slope, x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, past: Past = ()
) -> Tuple[torch.Tensor, Past]:
    """DPM-Solver++(2M), algorithm 2 of 2211.01095: second order; sigma_next > 0.

    x_next = (sigma_next / sigma) x + (1 - sigma_next / sigma) Dbar,  Dbar = D + (D - D_last) / (2 r),
    with r = h_last / h, the last step over this one in lambda: Dbar is D at the middle of the step, by a line
    through the last two.
    """
    denoised = x - sigma * slope(x, sigma)  # [B, C, H, W]
    target = denoised
    if past:
        sigma_last, denoised_last = past[-1]
        ratio = torch.log(sigma_last / sigma) / torch.log(sigma / sigma_next)  # []
        target = denoised + (denoised - denoised_last) / (2 * ratio)
    return target + sigma_next / sigma * (x - target), ((sigma, denoised),)


def _ipndm(
    order: int, slope: Slope, x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, past: Past = ()
) -> Tuple[torch.Tensor, Past]:
    """iPNDM (2204.13902) of an order up to 4: Adams-Bashforth in sigma, x + h sum_j w_j slope_j.

    The weights are those of the levels as they lie; iPNDM's own are those of an even grid.
    """
    known = (*past[max(len(past) - order + 1, 0):], (sigma, slope(x, sigma)))  # at most `order`, oldest first
    weights = adams_weights([level for level, _ in known], sigma_next)
    mean = sum(weight * kept for weight, (_, kept) in zip(weights, known))  # [B, C, H, W]
    return x + (sigma_next - sigma) * mean, known[max(len(known) - order + 1, 0):]


def adams_weights(levels: Sequence[torch.Tensor], sigma_next: torch.Tensor) -> List[torch.Tensor]:
    """Adams-Bashforth's weights: the mean over a step of the polynomial through values at `levels`.

    Args:
        levels: distinct levels [], oldest first; the last one is where the step starts.
        sigma_next: where it ends.
    Returns:
        A weight [] for each level; they sum to 1. On an even grid (1), (-1, 3) / 2, (5, -16, 23) / 12,
        (-9, 37, -59, 55) / 24.
    """
    sigma = levels[-1]
    nodes = [(level - sigma) / (sigma_next - sigma) for level in levels]  # 0 at the start, 1 at the end
    weights = []
    for j, node in enumerate(nodes):
        powers = [torch.ones_like(node)]  # coefficients of prod_i (t - t_i) / (t_j - t_i), of t^0 first
        for i, other in enumerate(nodes):
            if i != j:
                below, above = [*powers, torch.zeros_like(node)], [torch.zeros_like(node), *powers]
                powers = [(high - other * low) / (node - other) for low, high in zip(below, above)]
        weights.append(sum(power / (n + 1) for n, power in enumerate(powers)))
    return weights


ipndm2_step: Step = partial(_ipndm, 2)
ipndm3_step: Step = partial(_ipndm, 3)
ipndm_step: Step = partial(_ipndm, 4)

MULTISTEP = {"dpmpp2m": dpmpp2m_step, "ipndm2": ipndm2_step, "ipndm3": ipndm3_step, "ipndm": ipndm_step}
