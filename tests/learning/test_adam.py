"""Adam's step against torch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from art_edm.learning.actor_critic import Moments, adam_step
from art_edm.learning.training import Learner, _descended


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))


def losses(net, steps=40):
    """Gradients of very different size, and falling rates."""
    for i in range(steps):
        rng = torch.Generator().manual_seed(i)
        yield net(torch.randn(16, 3, generator=rng)).square().mean() * 10 ** (i % 5 - 4), 0.05 * (1 - i / 100)


def by_ours(kind):
    learner = Learner(network(), Moments.zero(torch.zeros(26)))
    for loss, rate in losses(learner.net):
        learner = _descended(learner, loss, rate, kind)
    return torch.cat([p.detach().reshape(-1) for p in learner.net.parameters()])


def by_torch(kind, **options):
    net = network()
    optimizer = kind(net.parameters(), lr=1.0, **options)
    for loss, rate in losses(net):
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("own, theirs, other", [
    ("adam", torch.optim.Adam, dict(betas=(0.9, 0.99))), ("sgd", torch.optim.SGD, dict(momentum=0.1)),
])
def test_the_steps_are_those_of_torch(own, theirs, other):
    torch.testing.assert_close(by_ours(own), by_torch(theirs), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(by_ours(own), by_torch(theirs, **other), rtol=1e-2, atol=1e-4)


def test_a_step_leaves_what_it_was_given():
    before = Moments(3, torch.ones(4), torch.ones(4))
    _, after = adam_step(before, torch.full((4,), 2.0))
    assert before.count == 3 and before.mean.tolist() == before.square.tolist() == [1.0] * 4
    assert after.count == 4 and after.mean.tolist() == pytest.approx([1.1] * 4)


@pytest.mark.slow
def test_torchs_compiler_is_not_imported():
    code = ("import sys, torch; from art_edm.learning.actor_critic import Moments, adam_step; "
            "change, _ = adam_step(Moments.zero(torch.ones(2)), torch.ones(2)); "
            "print('torch._dynamo' in sys.modules, (1 - 0.1 * change).tolist())")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("False") and "0.8999" in shown  # the first step of Adam is the rate itself
    theirs = "import sys, torch as t; t.optim.Adam([t.nn.Parameter(t.ones(2))]); print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", theirs], capture_output=True, text=True).stdout.startswith("True")
