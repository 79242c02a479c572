"""Train the networks this package ships, on CIFAR-10: the score network and the ResNet that judges it."""

from __future__ import annotations

from typing import Any, Optional, Tuple

from networks.config import ClassifierConfig, DataSet, ScoreConfig
from networks.options import training_command

HELP = """Train the score network and a ResNet on CIFAR-10, and measure them.

    Writes cifar10.pt and resnet.pt (weights, half precision), cifar10.json (how they were made and what they
    reach) and cifar10.png (100 samples). Ctrl-C or SIGTERM saves; --resume continues to the same weights, and
    with a larger --iterations goes on from there.

    \b
    Examples:
      python tools/train_cifar10.py --data=cifar10.tar.xz
      python tools/train_cifar10.py --data=DIR --iterations=160000 --resume
      python tools/train_cifar10.py --data=DIR --iterations=500 --floor-samples=500 --floor-steps=20 --out=runs/quick
    """


def load(split: str, data: Optional[str]) -> Tuple[Any, Any]:
    """Pixels uint8 [N, 3, 32, 32] and labels [N]."""
    from networks.cifar10 import load_cifar10

    return load_cifar10(split, data)


CIFAR10 = DataSet(
    name="cifar10", load=load, judge_name="ResNet", fid="CIFAR-FID", expected_accuracy=0.9, snapshots=1000,
    data_help="Folder or .tar archive of train/CLASS/*.jpg and test/CLASS/*.jpg (or .png); required.",
    note="CIFAR-10 as found in --data; from JPEG files it is slightly lossy",
    score=ScoreConfig(iterations=40_000, batch=64, learning_rate=2e-3, warmup=200, sigma_mean=-1.2, sigma_std=1.2,
                      bfloat16=False, flips=True, rate_steps=3000, width=48, deep_width=96),
    judge_config=ClassifierConfig(iterations=700, batch=500, learning_rate=0.73, rise=0.2, momentum=0.85,
                                  weight_decay=1.3e-3, smoothing=0.2, shift=2),
)
main = training_command(CIFAR10, HELP)

if __name__ == "__main__":
    main(prog_name="train_cifar10.py")
