"""Algorithm 1: learn the sampling clock of a denoiser. All mutable state of a run lives here.

A run measures a profile (dense trajectories, also the oracle that scores it), then learns in rounds. A round starts
in a base clock with the policy at v = 1 and ends by distilling the last trajectories; the learned clock is the next
round's base clock. Since ART does not depend on the coordinate of physical time, a round takes nothing away: the
actor begins again from where it got to. Every iteration draws from a generator seeded by (seed, iteration), and a
checkpoint holds everything else, so that a resumed run gives the bytes of an uninterrupted one.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import torch

from art_edm.grids.clocks import Clock, ComposedClock, make_clock
from art_edm.learning.actor_critic import (
    actor_loss,
    advantages,
    centre,
    critic_loss,
    multiplier_step,
    rewards,
    temporal_differences,
)
from art_edm.learning.adam import Adam, Sgd
from art_edm.learning.checkpoint import State, read_checkpoint, write_checkpoint
from art_edm.learning.config import PRESETS, TrainConfig, live
from art_edm.learning.distill import LearnedClock, distill
from art_edm.learning.policy import Critic, Policy
from art_edm.learning.rollouts import CachedEnvironment, Environment, LiveEnvironment, RolloutSettings, rollout
from art_edm.measure.dense_paths import draws, measure_along, measure_enough, measure_profile
from art_edm.measure.field import NonFiniteOutput, choose_step
from art_edm.measure.local_errors import measure_errors
from art_edm.measure.profile import Profile
from art_edm.measure.sde_errors import ORDERS_SDE, TRACERS, measure_stochastic
from art_edm.models.denoiser import Denoiser
from art_edm.runtime.distributed import ALONE, World
from art_edm.runtime.errors import CheckpointMismatch, Stopped
from art_edm.runtime.memory import few_threads
from art_edm.runtime.progress import GracefulStop, Progress
from art_edm.sampling.noise import seeded_generator
from art_edm.sampling.solvers import nfe, order_of

__all__ = ["CheckpointMismatch", "PRESETS", "TrainConfig", "TrainResult", "live", "train"]

SAVE_SECONDS = 5.0  # between checkpoints; a result never depends on it


@dataclass
class TrainResult:
    """What a run leaves behind."""

    profile: Profile
    learned: Optional[LearnedClock]  # None for the direct method
    terminal_error: Optional[float]  # mean of s_N - 1 over the last trajectories, before rescaling
    evaluations: Dict[str, int]  # of the choice of the difference's `step`, and of the stages `profile` and `rl`
    seconds: Dict[str, float]
    history: List[Dict[str, float]] = field(default_factory=list)


def train(
    denoiser: Denoiser, config: TrainConfig, identity: str = "", checkpoint: Optional[Path] = None,
    resume: bool = False, quiet: bool = True, world: World = ALONE,
) -> TrainResult:
    """Learn the clock of `denoiser`.

    Args:
        identity: what the denoiser is (name and hash); a checkpoint of another one is refused.
        checkpoint: file for the state, rewritten every few seconds; None keeps nothing.
        resume: continue from `checkpoint` where it exists.
        world: processes that share the network's evaluations, all with the same arguments; process 0 learns from
            cached trajectories, all from live ones, and each returns the same result.
    Raises:
        Stopped: Ctrl-C or SIGTERM; the state is saved.
        NonFiniteOutput: the denoiser failed at a noise level; what was learned so far is saved.
        CheckpointMismatch: the checkpoint is of other settings.
        ValueError: settings that contradict each other.
    """
    config.check()
    run = _Run(denoiser, config, identity, checkpoint, quiet, world)
    if resume and checkpoint is not None and world.share(checkpoint.exists()):
        with world.phase():
            run.restore()
    with GracefulStop() as stop:
        try:
            run.measure(stop)
            if config.method == "rl":
                run.learn(stop)
        except NonFiniteOutput as error:
            if run.save():
                raise NonFiniteOutput(f"{error}. What was learned so far is in {checkpoint}") from None
            raise
    return run.result()


class _Run:
    """One run: state, and the stages that change it."""
    def __init__(
        self, denoiser: Denoiser, config: TrainConfig, identity: str, checkpoint: Optional[Path], quiet: bool,
        world: World = ALONE,
    ) -> None:
        self.denoiser, self.config, self.checkpoint, self.quiet = denoiser, config, checkpoint, quiet
        self.world, self.live = world, config.rollout == "live"
        self.settings = {**asdict(config), "network": identity}
        self.order = {None: 1, "sde": ORDERS_SDE["strong"]}.get(config.solver) or order_of(config.solver)
        self.state, self.last_save = State(gamma=config.multiplier * (self.order + 1) / 2), time.monotonic()
        sigma_data = config.clock_sigma_data or denoiser.sigma_data
        self.base = make_clock(config.clock, denoiser.sigma_max, sigma_data)
        self.step_evaluations = self._prepare()
        self.profile_clock = make_clock("gaussian", denoiser.sigma_max, denoiser.sigma_data)

    def _prepare(self) -> int:
        """Choose the step of differences where the network asks for it, as a resumed run does again; what it cost."""
        denoiser, before = self.denoiser, self.denoiser.evaluations
        if denoiser.difference_step is None and (self.config.rollout == "live" or not self.config.shared):
            draw = draws(denoiser, seeded_generator(self.config.seed, (1 << 30) + 1))
            denoiser.difference_step = choose_step(denoiser, *draw(1))
        return denoiser.evaluations - before

    def measure(self, stop: GracefulStop) -> None:
        """The profile: dense trajectories from `seed`."""
        if self.state.profile is not None:
            return
        config = self.config
        draw = draws(self.denoiser, seeded_generator(config.seed, 1 << 30))  # iterations count up from 0
        method, cost = (measure_along, 1) if config.shared else (measure_profile, 3)
        if config.solver == "sde":
            method, cost = measure_stochastic, 1 + TRACERS // 2
        elif config.solver is not None:
            method, cost = partial(measure_errors, solver=config.solver), nfe(config.solver, 2) - 1
        progress = Progress(cost * config.trajectories * config.points, "profile, images", self.quiet)

        def on_step(done: int) -> None:
            progress.update(done)
            if stop.requested:
                progress.close()
                self._stop("while measuring the profile")

        def keep(first: Profile) -> None:
            self.state.first = first
            self.save()

        self.state.profile, self.state.first = measure_enough(
            self.denoiser, draw, self.profile_clock, config.trajectories, config.points, on_step, self.world, method,
            config.tolerance, self.state.first, keep,
        ), None
        progress.close()
        self.save()

    def learn(self, stop: GracefulStop) -> None:
        """All rounds: of live paths on all processes alike, else on process 0, which tells the others."""
        with few_threads(not self.live):
            if self.live:
                own = self.state.iteration < self.config.iterations  # else, resumed, the count is everyone's already
                self._rounds(stop)
                count = torch.tensor([float(self.state.evaluations)], dtype=torch.float64).to(self.world.device)
                self.state.evaluations = int(self.world.sum(count)) if own else self.state.evaluations
            else:
                with self.world.phase():
                    if self.world.rank == 0:
                        self._rounds(stop)
                self.state = self.world.share(self.state)
        self.save()

    def _asked(self, stop: GracefulStop) -> bool:
        """Whether to stop; where processes go in step, whether any of them is asked to."""
        asked = torch.tensor([float(stop.requested)])
        return bool(self.world.sum(asked.to(self.world.device)) if self.live else stop.requested)

    def _rounds(self, stop: GracefulStop) -> None:
        """Actor-critic iterations, from wherever the state is."""
        config, state = self.config, self.state
        progress = Progress(config.iterations, "ART-RL", self.quiet, state.iteration)
        began, before = time.monotonic() - state.seconds, self.denoiser.evaluations - state.evaluations
        ends = [config.iterations * (r + 1) // config.rounds for r in range(config.rounds)]
        while state.iteration < config.iterations:
            current = next(r for r, end in enumerate(ends) if state.iteration < end)
            if current != state.round:
                self._begin_round(current)
            env, settings = self._environment(), self._rollout_settings()
            start, end = ([0] + ends)[current], ends[current]
            while state.iteration < end:
                rate = 1 - (state.iteration - start) / (end - start) if config.decay else 1.0
                self._iterate(env, settings, max(rate, 0.02))
                state.seconds = max(state.seconds, time.monotonic() - began)  # a clock may jump
                state.evaluations = self.denoiser.evaluations - before
                progress.update(state.iteration, f"terminal error {state.history[-1]['error']:+.3f}")
                if self._asked(stop):
                    progress.close()
                    self._stop(f"after {state.iteration} of {config.iterations} iterations")
                if not 0 <= time.monotonic() - self.last_save <= SAVE_SECONDS:
                    self.save()
        progress.close()

    def _begin_round(self, current: int) -> None:
        """Fresh actor and critic; from the second round on, in the clock learned by the one before."""
        state = self.state
        if state.paths:
            state.knots.append(distill(self._paths(), self._clock()).mean)
            state.paths = []
        state.round, state.parts = current, self._fresh_parts(current)

    def _fresh_parts(self, current: int) -> Dict[str, Any]:
        """Actor, critic and their optimizers as a round begins."""
        config = self.config
        generator = seeded_generator(config.seed, (1 << 31) + current)
        policy = Policy(generator, config.sees, 1 / config.train_steps if config.arrive else None)
        parts = {"policy": policy, "critic": Critic(generator)}
        kind = {"adam": Adam, "sgd": Sgd}[config.optimizer]
        return {**parts, **{f"{name}_optimizer": kind(net.parameters()) for name, net in parts.items()}}

    def _iterate(self, env: Environment, settings: RolloutSettings, rate: float) -> None:
        """One iteration of Algorithm 1: rollouts, updates (29), multiplier (30)."""
        config, state = self.config, self.state
        generator = seeded_generator(config.seed, state.iteration)
        policy, critic = state.parts["policy"], state.parts["critic"]
        path = rollout(env, policy, settings, config.batch, generator)
        reward = rewards(path, settings, state.gamma, config.penalty)
        features, stride = path.features.float(), config.critic_stride
        seen = slice(state.iteration % stride, None, stride)  # the steps that the critic learns at now
        with torch.no_grad():
            values = critic(features)  # [N, B]
        advantage = advantages(temporal_differences(values.double(), reward), config.trace)
        scale = config.train_steps if config.normalise else 1  # Adam does not care; it keeps losses comparable
        losses = {"critic": critic_loss(critic(features[seen]), advantage[seen]) / scale * stride}
        if config.baseline:
            advantage = centre(advantage, config.repeats)
            advantage = advantage / (advantage.std() + 1e-12)
        losses["policy"] = actor_loss(policy, path, advantage, settings) / scale
        for name, base_rate in (("policy", config.actor_rate), ("critic", config.critic_rate)):
            optimizer = state.parts[f"{name}_optimizer"]
            optimizer.zero_grad()
            losses[name].backward()
            optimizer.step(base_rate * rate)
        state.gamma, error = multiplier_step(state.gamma, path, config.multiplier_rate * rate, settings)
        state.iteration += 1
        state.history.append({"error": error, "gamma": state.gamma, "cost": float(path.cost.sum(dim=0).mean())})
        keep = -(-config.keep // config.batch)
        state.paths = (state.paths + [path.s.numpy()])[-keep:]

    def _clock(self) -> Clock:
        clock = self.base
        for knots in self.state.knots:
            clock = ComposedClock(clock, knots)
        return clock

    def _unit(self) -> float:
        """c^2, the unit of cost; 1 in the paper's form."""
        profile = self.state.profile
        return profile.optimum / profile.horizon if self.config.normalise else 1.0

    def _environment(self) -> Environment:
        config, profile = self.config, self.state.profile
        if config.rollout == "cached":
            if config.sees == "time" and len(profile.norm) > config.trajectories:
                profile = profile.averaged()  # to such a policy, who of many jumps when is noise alone
            return CachedEnvironment(profile, self._clock(), self._unit())
        return LiveEnvironment(self.denoiser, self._clock(), self._unit(), self.config.euler, self.world)

    def _rollout_settings(self) -> RolloutSettings:
        config, profile = self.config, self.state.profile
        chosen = config.exploration**2 * profile.optimum / profile.horizon
        temperature = (chosen if config.temperature is None else config.temperature) / self._unit()
        horizon = 1.0 if config.normalise else profile.horizon
        antithetic, p = config.antithetic and config.repeats % 2 == 0, self.order
        return RolloutSettings(
            config.train_steps, temperature * 2 / (p * (p + 1)),  # near v = 1 the cost curves by q p (p + 1)
            config.epsilon, horizon, config.simpson, config.repeats, antithetic, p,
        )

    def _paths(self) -> np.ndarray:
        return np.concatenate(self.state.paths, axis=1)[:, -self.config.keep :]

    def result(self) -> TrainResult:
        state, profile, paths = self.state, self.state.profile, self._paths() if self.state.paths else None
        return TrainResult(
            profile=profile,
            learned=None if paths is None else distill(paths, self._clock()),
            terminal_error=None if paths is None else float(paths[-1].mean() - 1),
            evaluations={"step": self.step_evaluations, "profile": profile.evaluations, "rl": state.evaluations},
            seconds={"profile": profile.seconds, "rl": state.seconds},
            history=state.history,
        )

    def _stop(self, where: str) -> None:
        saved = f"; saved in {self.checkpoint}, continue with --resume" if self.save() else ""
        raise Stopped(f"stopped {where}{saved}")

    def save(self) -> bool:
        """Write the checkpoint, if there is to be one."""
        if self.checkpoint is None or self.world.rank > 0:
            return False
        write_checkpoint(self.checkpoint, self.state, self.settings)
        self.last_save = time.monotonic()
        return True

    def restore(self) -> None:
        """Read the checkpoint; settings must agree."""
        self.state, parts = read_checkpoint(self.checkpoint, self.settings, self.profile_clock)
        if self.state.round >= 0:
            self.state.parts = self._fresh_parts(self.state.round)
            for name, part in self.state.parts.items():
                part.load_state_dict(parts[name])
