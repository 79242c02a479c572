"""Settings of a training run, and the presets.

The defaults are this project's recipe; `paper` is the paper's literal one (arXiv 2607.02137).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Dict, Optional

from art_edm.measure.objectives import Objective

__all__ = ["PRESETS", "Recipe", "TrainConfig", "live"]


@dataclass(frozen=True)
class Recipe:
    """What a preset decides; the defaults are the `default` preset's."""

    tolerance: float = 0.002  # a third will do if J/J* is no further off; where paths jump, many of few points; 0: all
    path_differences: bool = True  # difference D from level to level, M P evaluations; False: about each level, 3 M P
    clock_sigma_data: Optional[float] = None  # of the Gaussian clock; None: the denoiser's own
    rounds: int = 2  # times to start again from the learned clock
    batch: int = 192  # rollouts per iteration: each of the trajectories `repeats` times
    repeats: int = 8  # of which so many of each noise; their mean is the baseline
    antithetic: bool = True  # half of them explore in the opposite direction
    train_steps: int = 128  # N, steps of a rollout; finer than the deployed K
    exploration: float = 0.25  # rho: relative noise of the policy at the optimum
    temperature: Optional[float] = None  # lambda of (11) in the units of |Q|; None: (rho c)^2
    epsilon: float = 0.1  # floor of q in the policy's variance, in units of c^2 (of |Q| when not normalised)
    normalise: bool = True  # measure cost in units of c^2 and time in units of T
    gae_lambda: float = 1.0  # weight of later temporal differences; 0: (29) itself, below 1 the critic's error biases
    baseline: bool = True  # subtract the mean advantage of each time and noise, scale to unit variance
    simpson: bool = True  # weigh a step by Simpson's rule; False: by q at its start
    euler: bool = False  # live paths follow Euler steps of (5)
    policy_inputs: str = "time"  # of the policy's network: time; path: s, too; state: q of the sample, too
    arrive: bool = True  # the policy's mean speed is relative to the one that arrives in time
    penalty: float = 20.0  # quadratic terminal term
    multiplier: float = -2.0  # gamma at the start; -2 c is its value at the optimum, -(p + 1) c of order p
    multiplier_rate: float = 0.3  # step of (30)
    actor_rate: float = 6e-3
    critic_rate: float = 1e-2
    critic_stride: int = 8  # the critic learns at every so many steps in turn; all their values are used
    optimizer: str = "adam"  # adam; sgd: the plain steps of (29)
    decay: bool = True  # steps shrink linearly within a round
    distill_paths: int = 9600  # M of the distillation: the last trajectories averaged, here of 50 iterations


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the defaults are the `default` preset."""

    method: str = "rl"  # rl, or direct: the closed-form optimum of the profile
    rollout: str = "cached"  # cached: |Q| from the dense trajectories; live: the denoiser in every rollout
    preset: str = "default"  # where `recipe` and the other values came from
    seed: int = 0  # of all randomness
    solver: Optional[str] = None  # measure a solver's local errors C_p in place of |Q|; sde: those of the reverse SDE
    trajectories: int = 24  # M, dense trajectories of the profile, at most
    points: int = 85  # P, noise levels on each
    clock: str = "gaussian"  # base clock: gaussian, linear (the paper's form), edm
    iterations: int = 250  # over all rounds
    recipe: Recipe = field(default_factory=Recipe)

    def changed(self, **settings: Any) -> "TrainConfig":
        """With other values; those of the recipe are given by their names, too.

        Raises a TypeError for an unknown name.
        """
        own = {item.name for item in fields(self)}
        recipe = {name: settings.pop(name) for name in set(settings) - own}
        changed = replace(self, **settings)
        return replace(changed, recipe=replace(changed.recipe, **recipe))

    def settings(self) -> Dict[str, Any]:
        """All values by name, the recipe's among them."""
        own = asdict(self)
        return {**{name: value for name, value in own.items() if name != "recipe"}, **own["recipe"]}

    @property
    def objective(self) -> Objective:
        """What is measured before anything is learned."""
        recipe = self.recipe
        return Objective(
            self.solver, self.trajectories, self.points, recipe.tolerance, recipe.path_differences, self.seed
        )

    def check(self) -> None:
        """Raise a ValueError for settings that contradict each other."""
        recipe = self.recipe
        if recipe.batch % recipe.repeats or (recipe.baseline and recipe.batch == 1):
            found = f"batch is {recipe.batch} with repeats = {recipe.repeats}, baseline = {recipe.baseline}"
            raise ValueError(f"{found}; expected a multiple of repeats, and at least 2 for a baseline")
        if self.solver is not None and self.rollout == "live":
            expected = "expected cached ones, as live rollouts measure |Q| alone; leave --rollout=live out"
            raise ValueError(f"found live rollouts for the errors of {self.solver}, {expected}")


_DEFAULT = TrainConfig()
PRESETS: Dict[str, TrainConfig] = {
    "default": _DEFAULT,
    # The paper's literal recipe: raw physical time, one live trajectory per iteration, TD(0), fixed lambda.
    # Its number of steps is the deployed K (train_steps is set to it by the caller). Adam, because the plain
    # steps of (29) overflow within a few iterations in raw time on a network with sigma_max = 80.
    "paper": _DEFAULT.changed(
        preset="paper", rollout="live", tolerance=0.0, clock="linear", rounds=1, iterations=5000, batch=1,
        repeats=1, antithetic=False, train_steps=18, temperature=0.1, epsilon=1e-3, normalise=False, gae_lambda=0.0,
        baseline=False, simpson=False, euler=True, policy_inputs="state", arrive=False, penalty=0.0, multiplier=0.0,
        multiplier_rate=1e-4, actor_rate=1e-3, critic_rate=1e-3, critic_stride=1, decay=False, distill_paths=100,
    ),
}


def live(config: TrainConfig) -> TrainConfig:
    """`config` with the sizes that suit rollouts which cost evaluations: 3 (2 N + 1) per path and iteration."""
    sizes = dict(batch=8, repeats=4, train_steps=48, iterations=100, actor_rate=1e-2, critic_stride=1,
                 distill_paths=256)
    return config.changed(rollout="live", **sizes)
