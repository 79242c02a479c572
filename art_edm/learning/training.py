"""Algorithm 1: learn the sampling clock of a denoiser. All that changes in a run is in one `State`.

A run measures a profile (dense trajectories, also the oracle that scores it), then learns in rounds. A round starts
in a base clock with the policy at v = 1 and ends by distilling the last trajectories; the learned clock is the next
round's base clock. Since ART does not depend on the coordinate of physical time, a round takes nothing away: the
actor begins again from where it got to. Every iteration draws from a generator seeded by (seed, iteration), and a
checkpoint in the context's store holds everything else, so that a continued run gives the bytes of an uninterrupted
one.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from art_edm.grids.clocks import Clock, ComposedClock, make_clock
from art_edm.learning.actor_critic import (
    Moments,
    actor_loss,
    adam_step,
    advantages,
    centre,
    critic_loss,
    multiplier_step,
    rewards,
    temporal_differences,
)
from art_edm.learning.config import PRESETS, TrainConfig, live
from art_edm.learning.distill import LearnedClock, distill
from art_edm.learning.policy import Critic, Policy
from art_edm.learning.rollouts import (
    CachedEnvironment,
    Environment,
    LiveEnvironment,
    RolloutSettings,
    Trajectory,
    rollout,
)
from art_edm.measure.objectives import measure_objective, set_difference_step
from art_edm.measure.profile import Profile
from art_edm.models.denoiser import Denoiser
from art_edm.runtime.context import Context
from art_edm.runtime.errors import CheckpointMismatch, NonFiniteOutput, Stopped
from art_edm.runtime.memory import few_threads
from art_edm.runtime.progress import GracefulStop, Progress
from art_edm.runtime.store import Content, code_version
from art_edm.sampling.noise import seeded_generator

__all__ = [
    "CHECKPOINT", "CheckpointMismatch", "PRESETS", "TrainConfig", "TrainResult", "live", "rollout_settings", "train",
]

SAVE_SECONDS = 5.0  # between checkpoints; a result never depends on it
CHECKPOINT = {"kind": "checkpoint of ART-RL"}  # its entry in the store, whatever the settings
LEAST_RATE = 0.02  # of the first rate, at the end of a round


@dataclass
class TrainResult:
    """What a run leaves behind."""

    profile: Profile
    learned: Optional[LearnedClock]  # None for the direct method
    terminal_error: Optional[float]  # mean of s_N - 1 over the last trajectories, before rescaling
    evaluations: Dict[str, int]  # of the choice of the difference's `step`, and of the stages `profile` and `rl`
    seconds: Dict[str, float]
    history: List[Dict[str, float]] = field(default_factory=list)


class Learner(NamedTuple):
    """A network and what Adam remembers of its gradients."""

    net: torch.nn.Module
    moments: Moments


@dataclass
class State:
    """All that changes while a run learns."""

    gamma: float
    iteration: int = 0
    round: int = -1
    evaluations: int = 0
    seconds: float = 0.0
    history: List[Dict[str, float]] = field(default_factory=list)
    knots: List[np.ndarray] = field(default_factory=list)  # one learned path per finished round
    paths: List[np.ndarray] = field(default_factory=list)  # s of the last iterations, [N + 1, B] each
    learners: Dict[str, Learner] = field(default_factory=dict)  # policy and critic


_PLAIN = ("gamma", "iteration", "round", "evaluations", "seconds", "history")  # of a State, what JSON holds


def train(
    denoiser: Denoiser, config: TrainConfig, context: Optional[Context] = None,
    on_iteration: Optional[Callable[[int], None]] = None,
) -> TrainResult:
    """Learn the clock of `denoiser`.

    Args:
        context: where the profile and, every few seconds, the state are kept; where they are found there under the
            same identity, the run continues from them. The processes of its world share the network's evaluations,
            all with the same arguments; process 0 learns from cached trajectories, all from live ones, and each
            returns the same result.
        on_iteration: called before each iteration with the number of those that are done.
    Raises:
        Stopped: Ctrl-C or SIGTERM; the state is saved.
        NonFiniteOutput: the denoiser failed at a noise level; what was learned so far is saved.
        CheckpointMismatch: the checkpoint is of other settings, and the context asks to resume.
        ValueError: settings that contradict each other.
    """
    config.check()
    context = context or Context()
    kept = None if config.method == "direct" else _restored(config, context)
    step = 0
    if config.rollout == "live" or not config.recipe.path_differences:
        step = set_difference_step(denoiser, config.seed)
    profile = measure_objective(denoiser, config.objective, context)
    run = _Run(denoiser, config, context, profile, on_iteration)
    if kept is not None:
        run.state = kept
    if config.method == "rl":
        with GracefulStop() as stop:
            run.learn(stop)
    return run.result(step)


class _Run:
    """One run of ART-RL on a profile: the stages that change its state."""

    def __init__(
        self, denoiser: Denoiser, config: TrainConfig, context: Context, profile: Profile,
        on_iteration: Optional[Callable[[int], None]],
    ) -> None:
        self.denoiser, self.config, self.context, self.profile = denoiser, config, context, profile
        self.recipe, self.live, self.on_iteration = config.recipe, config.rollout == "live", on_iteration
        self.state, self.last_save = _fresh_state(config), time.monotonic()
        sigma_data = config.recipe.clock_sigma_data or denoiser.sigma_data
        self.base = make_clock(config.clock, denoiser.sigma_max, sigma_data)

    def learn(self, stop: GracefulStop) -> None:
        """All rounds: of live paths on all processes alike, else on process 0, which tells the others."""
        world = self.context.world
        with few_threads(not self.live):
            if self.live:
                own = self.state.iteration < self.config.iterations  # else, continued, the count is everyone's already
                self._rounds(stop)
                count = torch.tensor([float(self.state.evaluations)], dtype=torch.float64)
                self.state.evaluations = int(world.sum(count)) if own else self.state.evaluations
            else:
                with world.phase():
                    if world.rank == 0:
                        self._rounds(stop)
                self.state = world.share(self.state)
        self.save()

    def _asked(self, stop: GracefulStop) -> bool:
        """Whether to stop; where processes go in step, whether any of them is asked to."""
        world, asked = self.context.world, torch.tensor([float(stop.requested)])
        return bool(world.sum(asked) if self.live else stop.requested)

    def _rounds(self, stop: GracefulStop) -> None:
        """Actor-critic iterations, from wherever the state is."""
        config, state = self.config, self.state
        progress = Progress(config.iterations, "ART-RL", self.context.quiet, state.iteration)
        began, before = time.monotonic() - state.seconds, self.denoiser.evaluations - state.evaluations
        ends = [config.iterations * (r + 1) // self.recipe.rounds for r in range(self.recipe.rounds)]
        while state.iteration < config.iterations:
            current = next(r for r, end in enumerate(ends) if state.iteration < end)
            if current != state.round:
                self._begin_round(current)
            env, settings = self._environment(), rollout_settings(config, self.profile)
            start, end = ([0] + ends)[current], ends[current]
            while state.iteration < end:
                if self.on_iteration is not None:
                    self.on_iteration(state.iteration)
                rate = 1 - (state.iteration - start) / (end - start) if self.recipe.decay else 1.0
                self._iterate(env, settings, max(rate, LEAST_RATE))
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
        state.round, state.learners = current, _fresh_learners(self.config, current)

    def _iterate(self, env: Environment, settings: RolloutSettings, rate: float) -> None:
        """One iteration of Algorithm 1: rollouts, updates (29), multiplier (30)."""
        recipe, state = self.recipe, self.state
        generator = seeded_generator(self.config.seed, state.iteration)
        try:
            path = rollout(env, state.learners["policy"].net, settings, recipe.batch, generator)
        except NonFiniteOutput as error:
            where = self.context.store.folder
            if not self.save() or where is None:
                raise
            raise NonFiniteOutput(f"{error}. What was learned so far is in {where}") from None
        losses = _losses(state, path, settings, self.config)
        for name, base_rate in (("policy", recipe.actor_rate), ("critic", recipe.critic_rate)):
            state.learners[name] = _descended(state.learners[name], losses[name], base_rate * rate, recipe.optimizer)
        state.gamma, error = multiplier_step(state.gamma, path, recipe.multiplier_rate * rate, settings)
        state.iteration += 1
        state.history.append({"error": error, "gamma": state.gamma, "cost": float(path.cost.sum(dim=0).mean())})
        state.paths = (state.paths + [path.s.numpy()])[-math.ceil(recipe.distill_paths / recipe.batch) :]

    def _clock(self) -> Clock:
        clock = self.base
        for knots in self.state.knots:
            clock = ComposedClock(clock, knots)
        return clock

    def _environment(self) -> Environment:
        recipe, profile, unit = self.recipe, self.profile, _unit(self.config, self.profile)
        if not self.live:
            if recipe.policy_inputs == "time" and len(profile.norm) > self.config.trajectories:
                profile = profile.averaged()  # to such a policy, which path jumps when is noise alone
            return CachedEnvironment(profile, self._clock(), unit)
        return LiveEnvironment(self.denoiser, self._clock(), unit, recipe.euler, self.context.world)

    def _paths(self) -> np.ndarray:
        return np.concatenate(self.state.paths, axis=1)[:, -self.recipe.distill_paths :]

    def result(self, step_evaluations: int) -> TrainResult:
        """What the run leaves behind; `step_evaluations` were spent before it."""
        state, profile, paths = self.state, self.profile, self._paths() if self.state.paths else None
        return TrainResult(
            profile=profile,
            learned=None if paths is None else distill(paths, self._clock()),
            terminal_error=None if paths is None else float(paths[-1].mean() - 1),
            evaluations={"step": step_evaluations, "profile": profile.evaluations, "rl": state.evaluations},
            seconds={"profile": profile.seconds, "rl": state.seconds},
            history=state.history,
        )

    def _stop(self, where: str) -> None:
        kept = self.context.store.folder if self.save() else None
        saved = "" if kept is None else f"; saved in {kept}, run the same command again to continue"
        raise Stopped(f"stopped {where}{saved}")

    def save(self) -> bool:
        """Write the checkpoint; False on the processes that write none."""
        if self.context.world.rank > 0:
            return False
        self.context.store.save(CHECKPOINT, _packed(self.state, _identified(self.config, self.context)))
        self.last_save = time.monotonic()
        return True


# ---- pure functions of settings, profile and trajectory ----


def _fresh_state(config: TrainConfig) -> State:
    return State(gamma=config.recipe.multiplier * (config.objective.order + 1) / 2)


def _fresh_learners(config: TrainConfig, current: int) -> Dict[str, Learner]:
    """Actor and critic as round `current` begins."""
    generator, recipe = seeded_generator(config.seed, (1 << 31) + current), config.recipe
    policy = Policy(generator, recipe.policy_inputs, 1 / recipe.train_steps if recipe.arrive else None)
    nets = {"policy": policy, "critic": Critic(generator)}
    return {name: Learner(net, Moments.zero(parameters_to_vector(net.parameters()))) for name, net in nets.items()}


def _unit(config: TrainConfig, profile: Profile) -> float:
    """c^2, the unit of cost; 1 in the paper's form."""
    return profile.optimum / profile.horizon if config.recipe.normalise else 1.0


def rollout_settings(config: TrainConfig, profile: Profile) -> RolloutSettings:
    """The rollouts' settings; lambda = (rho c)^2 makes the policy's noise rho of its speed at the optimum."""
    recipe, p = config.recipe, config.objective.order
    chosen = recipe.exploration**2 * profile.optimum / profile.horizon
    temperature = (chosen if recipe.temperature is None else recipe.temperature) / _unit(config, profile)
    return RolloutSettings(
        recipe.train_steps, temperature * 2 / (p * (p + 1)),  # near v = 1 the cost curves by q p (p + 1)
        recipe.epsilon, 1.0 if recipe.normalise else profile.horizon, recipe.simpson, recipe.repeats,
        recipe.antithetic and recipe.repeats % 2 == 0, p,
    )


def _losses(state: State, path: Trajectory, settings: RolloutSettings, config: TrainConfig) -> Dict[str, torch.Tensor]:
    """Scalars whose negative gradients are the updates (29) of actor and critic."""
    recipe, (policy, critic) = config.recipe, (state.learners[name].net for name in ("policy", "critic"))
    reward = rewards(path, settings, state.gamma, recipe.penalty)
    features, stride = path.features.float(), recipe.critic_stride
    seen = slice(state.iteration % stride, None, stride)  # the steps that the critic learns at now
    with torch.no_grad():
        values = critic(features)  # [N, B]
    advantage = advantages(temporal_differences(values.double(), reward), recipe.gae_lambda)
    scale = recipe.train_steps if recipe.normalise else 1  # Adam does not care; it keeps losses comparable
    critic_part = critic_loss(critic(features[seen]), advantage[seen]) / scale * stride
    if recipe.baseline:
        advantage = centre(advantage, settings.repeats)
        advantage = advantage / (advantage.std() + 1e-12)
    return {"policy": actor_loss(policy, path, advantage, settings) / scale, "critic": critic_part}


def _descended(learner: Learner, loss: torch.Tensor, rate: float, optimizer: str) -> Learner:
    """The learner after one step of the loss: of Adam, or w <- w - rate g, the steps of (29) as they stand."""
    weights = list(learner.net.parameters())
    gradient = parameters_to_vector(torch.autograd.grad(loss, weights))
    change, moments = adam_step(learner.moments, gradient) if optimizer == "adam" else (gradient, learner.moments)
    with torch.no_grad():
        vector_to_parameters(parameters_to_vector(weights) - rate * change, weights)
    return Learner(learner.net, moments)


# ---- the checkpoint ----


def _identified(config: TrainConfig, context: Context) -> Dict[str, Any]:
    """All that a continued run must find again."""
    return {**config.settings(), "network": context.identity, "version": code_version()}


def _packed(state: State, settings: Dict[str, Any]) -> Content:
    """State and settings as arrays."""
    plain = {name: getattr(state, name) for name in _PLAIN}
    content = {"settings": np.array(json.dumps(settings)), "plain": np.array(json.dumps(plain)),
               "paths": np.array(state.paths)}
    content.update({f"knots.{i}": each for i, each in enumerate(state.knots)})
    for name, (net, moments) in state.learners.items():
        content[f"{name}.weights"] = parameters_to_vector(net.parameters()).detach().numpy()
        content.update({f"{name}.{part}": np.asarray(value) for part, value in zip(Moments._fields, moments)})
    return content


def _restored(config: TrainConfig, context: Context) -> Optional[State]:
    """The state in the store; None where there is none, or one of other settings and the context does not resume."""
    world, store = context.world, context.store
    with world.phase():
        content = world.share(store.load(CHECKPOINT) if world.rank == 0 and context.identity else None)
        if content is None:
            return None
        made, here = json.loads(str(content["settings"])), json.loads(json.dumps(_identified(config, context)))
        differing = [name for name in here if made.get(name) != here[name]]
        if differing:
            name = differing[0]
            found = f"{store.folder} holds a run with {name}={made.get(name)}, this run has {name}={here[name]}"
            if context.resume:
                raise CheckpointMismatch(f"{found}; use the same settings, another --out, or leave --resume out")
            if not context.quiet:
                print(f"{found}; starting at the beginning", file=sys.stderr)
            return None
    return _unpacked(content, config)


def _unpacked(content: Content, config: TrainConfig) -> State:
    state = State(**json.loads(str(content["plain"])))
    state.paths = list(content["paths"])
    state.knots = [content[f"knots.{i}"] for i in range(sum(name.startswith("knots.") for name in content))]
    if state.round >= 0:
        for name, (net, _) in _fresh_learners(config, state.round).items():
            count, *averages = (content[f"{name}.{part}"] for part in Moments._fields)
            with torch.no_grad():
                vector_to_parameters(torch.from_numpy(content[f"{name}.weights"]), net.parameters())
            state.learners[name] = Learner(net, Moments(int(count), *map(torch.from_numpy, averages)))
    return state
