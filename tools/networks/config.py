"""Settings of the trainings of bundled networks; without torch, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, ClassVar, List, Optional, Tuple

from art_edm.runtime.files import sha256_of

__all__ = ["ClassifierConfig", "DataSet", "ScoreConfig", "Settings", "save_every"]


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of `train_score`; a checkpoint of other settings is refused."""

    label: ClassVar[str] = "score network"
    iterations: int = 20_000  # optimizer steps
    batch: int = 128  # images per step
    learning_rate: float = 2e-3  # after warm-up
    warmup: int = 500  # steps of linear warm-up
    sigma_mean: float = -0.5  # mean of log sigma
    sigma_std: float = 1.3  # standard deviation of log sigma
    ema_gamma: float = 16.97  # width of the average: 5 % of the training so far
    bfloat16: bool = True  # run the convolutions in bfloat16 (half the time where the CPU has it)
    seed: int = 0
    flips: bool = False  # show every image as often mirrored
    rate_steps: int = 0  # steps after which the learning rate falls as 1/sqrt(steps); 0: linear to zero instead
    width: int = 64  # channels of the network's fine level
    deep_width: int = 96  # and of its coarse level
    start: str = ""  # SHA-256 of the weight file the training starts from; random weights without

    @property
    def open_ended(self) -> bool:
        """Whether more iterations than once planned go on from a checkpoint: no step depends on their number."""
        return self.rate_steps > 0


@dataclass(frozen=True)
class ClassifierConfig:
    """Settings of `train_classifier`; a checkpoint of other settings is refused."""

    label: ClassVar[str] = "classifier"
    open_ended: ClassVar[bool] = False
    iterations: int = 5616  # optimizer steps (12 epochs of MNIST)
    batch: int = 128  # images per step
    learning_rate: float = 2e-3  # falls to zero as a cosine
    rise: float = 0.0  # share of the steps in which the learning rate rises to it
    momentum: float = 0.0  # of SGD, Nesterov's; 0: AdamW
    weight_decay: float = 0.0
    smoothing: float = 0.0  # share of the label that is spread over all classes
    shift: int = 0  # pixels that an image is moved by at most, and mirrored half of the time; 0: shown as it is
    seed: int = 0


@dataclass(frozen=True)
class DataSet:
    """What differs between the bundled networks."""

    name: str  # of the network; its results are called NAME.pt, NAME.json and NAME.png
    load: Callable[[str, Optional[str]], Tuple[Any, Any]]  # split, --data -> pixels, labels [N]
    data_help: str  # of --data
    note: str  # for the card: what the images are
    score: ScoreConfig
    judge_name: str  # LeNet or ResNet: the classifier whose features judge
    judge_config: ClassifierConfig
    fid: str  # name of the Frechet distance of its features
    expected_accuracy: float
    snapshots: int = 2500

    @property
    def judge_file(self) -> str:
        """Name of the judge's weight file."""
        return f"{self.judge_name.lower()}.pt"

    @property
    def judge(self) -> type:
        """The classifier's class."""
        return getattr(import_module(f"art_edm.models.{self.judge_name.lower()}"), self.judge_name)

    @property
    def results(self) -> List[str]:
        """Names of the files that a training leaves."""
        return [f"{self.name}.pt", self.judge_file, f"{self.name}.json", f"{self.name}.png"]


def save_every(snapshots: int) -> int:
    """Steps between checkpoints: at most 250, and such that every snapshot falls on one."""
    return max(n for n in range(1, 251) if snapshots % n == 0)


@dataclass(frozen=True)
class Settings:
    """The options of the command."""

    data_set: DataSet
    data: Optional[str]
    out: Path
    start: Optional[Path]
    iterations: int
    batch: int
    learning_rate: float
    seed: int
    snapshots: int
    resume: bool
    quiet: bool
    device: str
    floor_samples: int
    floor_steps: int
    snapshot_samples: int

    @property
    def score(self) -> ScoreConfig:
        """Settings of the score network's training."""
        start = "" if self.start is None else sha256_of(self.start / self.data_set.results[0])
        return replace(self.data_set.score, iterations=self.iterations, batch=self.batch, seed=self.seed,
                       learning_rate=self.learning_rate, start=start)

    @property
    def judge(self) -> ClassifierConfig:
        """Settings of the judge's training."""
        return replace(self.data_set.judge_config, seed=self.seed)

    def run(self, name: str) -> Any:
        """Where the training of `name` keeps its state."""
        from networks.loop import Run

        return Run(self.out / f"{name}.ckpt", self.resume, self.quiet, save_every(self.snapshots))

    @property
    def command(self) -> str:
        """The command that gives these results on any computer: all options but folders and how it is shown."""
        hidden = ("data_set", "data", "out", "resume", "quiet", "start")
        words = [f"--{name.replace('_', '-')}={getattr(self, name)}" for name in self.__dataclass_fields__
                 if name not in hidden]
        start = [] if self.start is None else ["--start=DIR"]
        return " ".join([f"python tools/train_{self.data_set.name}.py", *start, *words])
