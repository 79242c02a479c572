"""Runs of ART-RL that are kept: what a run leaves behind, as an entry of the store.

Symbols
-------
run      (network, settings): its profile, its learned clock and its history
history  of each iteration the mean cost of its rollouts, in units of c^2, and the mean terminal error
paths    every iteration's distilled clock scored: J/J* over iterations, where asked for
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np

from art_edm.grids.clocks import Clock, ComposedClock, GaussianClock, make_clock
from art_edm.grids.grid import Grid
from art_edm.learning.config import TrainConfig
from art_edm.learning.distill import LearnedClock
from art_edm.learning.training import TrainResult, train
from art_edm.measure.profile import Profile
from art_edm.models.loading import Network
from art_edm.runtime.context import Context
from art_edm.runtime.distributed import World
from art_edm.runtime.store import Store, key_of

__all__ = ["Run", "learn"]

_METHOD = 6  # raised whenever the same settings would give other numbers


class Run(NamedTuple):
    """What a finished run is asked for later."""

    profile: Profile
    learned: Optional[LearnedClock]  # None for the direct method
    terminal_error: float
    evaluations: Dict[str, int]
    seconds: Dict[str, float]
    history: Dict[str, np.ndarray]  # cost, error, gamma: [iterations]

    def grid(self, num_steps: int) -> Grid:
        """The learned clock (of the direct method, the optimum) read off at K = num_steps."""
        return self.learned.grid(num_steps) if self.learned else self.profile.direct(num_steps)


def learn(network: Network, config: TrainConfig, store: Store, world: World, quiet: bool = True) -> Run:
    """The run, from the store or made now by all processes; the same on every one, and whatever their number.

    A run that was stopped, or killed, continues from its last checkpoint.

    Raises:
        Stopped, NonFiniteOutput, FloatingPointError, ValueError: as `train`.
    """
    what = {"kind": "run", "method": _METHOD, "network": network.sha256 or network.name, "details": network.details,
            "settings": config.settings()}
    if network.sha256 is None:  # a closed form: its data are in its name, its range of levels is not
        what["range"] = [network.denoiser.sigma_min, network.denoiser.sigma_max]
    with world.phase():  # all look before any writes
        content = store.load(what)
    if not world.share(content is not None):
        unfinished = Store(store.folder / f"{key_of(what)}.unfinished")
        result = train(network.denoiser, config, Context(world, unfinished, quiet, network.identity))
        with world.phase():
            if world.rank == 0:
                content = _content(result)
                store.save(what, content)
                unfinished.remove()
    with world.phase():
        content = store.load(what) if content is None else content
        if content is None:
            raise ValueError(f"found no finished run in {store.folder}; expected a folder that all processes share")
    return _run(content)


def _content(result: TrainResult) -> Dict[str, np.ndarray]:
    """All of a result as arrays."""
    profile = result.profile
    content = {
        "sigma": profile.sigma, "norm": profile.norm, "order": np.int64(profile.order),
        "profile_clock": _base(profile.clock),
        "terminal_error": np.float64(result.terminal_error or 0.0),
    }
    for name in ("evaluations", "seconds"):
        for stage, value in getattr(result, name).items():
            content[f"{name}.{stage}"] = np.asarray(value)
    for name in (result.history or [{}])[0]:
        content[f"history.{name}"] = np.array([row[name] for row in result.history])
    if result.learned is not None:
        knots, clock = _unfold(result.learned.clock)
        content.update(mean=result.learned.mean, spread=result.learned.spread, theta=result.learned.theta,
                       base=_base(clock), rounds=np.int64(len(knots)))
        content.update({f"knots.{i}": each for i, each in enumerate(knots)})
    return content


def _unfold(clock: Clock) -> "tuple[List[np.ndarray], Clock]":
    """The learned paths of earlier rounds, the first one first, and the base clock."""
    knots: List[np.ndarray] = []
    while isinstance(clock, ComposedClock):
        knots, clock = [clock.knots, *knots], clock.base
    return knots, clock


def _base(clock: Clock) -> np.ndarray:
    sigma_data = clock.sigma_data if isinstance(clock, GaussianClock) else 1.0
    return np.array([clock.name, repr(clock.sigma_max), repr(sigma_data)])


def _clock(base: np.ndarray) -> Clock:
    name, sigma_max, sigma_data = (str(part) for part in base)
    return make_clock(name, float(sigma_max), float(sigma_data))


def _run(content: Dict[str, np.ndarray]) -> Run:
    named: Dict[str, Dict[str, Any]] = {"evaluations": {}, "seconds": {}, "history": {}}
    for key, value in content.items():
        kind, dot, name = key.partition(".")
        if dot and kind in named:
            named[kind][name] = value if kind == "history" else value.item()
    profile = Profile(_clock(content["profile_clock"]), content["sigma"], content["norm"],
                      named["evaluations"]["profile"], named["seconds"]["profile"], int(content["order"]))
    learned = None
    if "mean" in content:
        clock = _clock(content["base"])
        for i in range(int(content["rounds"])):
            clock = ComposedClock(clock, content[f"knots.{i}"])
        learned = LearnedClock(clock, content["mean"], content["spread"], content["theta"])
    return Run(profile, learned, float(content["terminal_error"]), **named)
