"""Train the networks this package ships, on MNIST: the score network and the LeNet that judges it."""

from __future__ import annotations

from typing import Any, Optional, Tuple

from networks.config import ClassifierConfig, DataSet, ScoreConfig
from networks.options import training_command

HELP = """Train the score network and LeNet on MNIST, and measure them.

    Writes mnist.pt and lenet.pt (weights, half precision), mnist.json (how they were made and what they
    reach) and mnist.png (100 digits). Ctrl-C or SIGTERM saves; --resume continues to the same weights.

    \b
    Examples:
      python tools/train_mnist.py
      python tools/train_mnist.py --data=DIR --resume
      python tools/train_mnist.py --iterations=500 --floor-samples=500 --floor-steps=20 --out=runs/quick
    """


def load(split: str, data: Optional[str]) -> Tuple[Any, Any]:
    """Pixels uint8 [N, 1, 28, 28] and labels [N]."""
    from art_edm.metrics.mnist import load_mnist

    pixels, labels = load_mnist(split, data)
    return pixels.unsqueeze(1), labels


MNIST = DataSet(
    name="mnist", load=load, score=ScoreConfig(), judge_name="LeNet", judge_config=ClassifierConfig(), fid="LeNet-FID",
    data_help="Folder with the four MNIST files; downloaded and kept by default.", note="MNIST",
    expected_accuracy=0.99,
)
main = training_command(MNIST, HELP)

if __name__ == "__main__":
    main(prog_name="train_mnist.py")
