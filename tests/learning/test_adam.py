"""The two optimizers against torch's own."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from art_edm.learning.adam import Adam, Sgd


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))


def train(net, step, zero, steps=40, first=0):
    """Falling rates, gradients of very different size; returns all weights."""
    for i in range(first, first + steps):
        rng = torch.Generator().manual_seed(i)
        zero()
        (net(torch.randn(16, 3, generator=rng)).square().mean() * 10 ** (i % 5 - 4)).backward()
        step(0.05 * (1 - i / 100))
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def by_torch(kind, net, **options):
    optimizer = kind(net.parameters(), lr=1.0, **options)

    def step(rate):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()

    return train(net, step, optimizer.zero_grad)


@pytest.mark.parametrize("own, theirs", [(Adam, torch.optim.Adam), (Sgd, torch.optim.SGD)])
def test_the_steps_are_those_of_torch(own, theirs):
    net, twin = network(), network()
    optimizer = own(net.parameters())
    weights = train(net, optimizer.step, optimizer.zero_grad)
    torch.testing.assert_close(weights, by_torch(theirs, twin), rtol=1e-4, atol=1e-6)
    other = {Adam: dict(betas=(0.9, 0.99)), Sgd: dict(momentum=0.1)}[own]
    assert not torch.allclose(weights, by_torch(theirs, network(), **other), rtol=1e-2, atol=1e-4)


def test_adam_goes_on_from_its_state():
    net = network()
    optimizer = Adam(net.parameters())
    train(net, optimizer.step, optimizer.zero_grad, 20)
    state, stopped = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net)
    whole = train(net, optimizer.step, optimizer.zero_grad, 20, first=20)
    for start, same in ((state, True), (None, False)):
        again = copy.deepcopy(stopped)
        resumed = Adam(again.parameters())
        if start:
            resumed.load_state_dict(start)
        weights = train(again, resumed.step, resumed.zero_grad, 20, first=20)
        assert torch.equal(weights, whole) == same


def test_torchs_compiler_is_not_imported():
    code = ("import sys, torch; from art_edm.learning.adam import Adam; p = torch.nn.Parameter(torch.ones(2)); "
            "o = Adam([p]); p.sum().backward(); o.step(0.1); print('torch._dynamo' in sys.modules, p.tolist())")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("False") and "0.8999" in shown  # the first step of Adam is the rate itself
    theirs = code.replace("art_edm.learning.adam", "torch.optim").replace("o.step(0.1)", "o.step()")
    assert subprocess.run([sys.executable, "-c", theirs], capture_output=True, text=True).stdout.startswith("True")
