"""Training of the score network: the loss, its minimiser, and resuming to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from networks import score as pretrain
from networks.loop import Run, read_checkpoint
from networks.score import ScoreConfig, score_loss, snapshot_path, stratified_sigma, train_score

from art_edm.models.loading import load_network
from art_edm.models.unet import ScoreUNet
from art_edm.runtime.errors import Stopped

TINY = ScoreConfig(iterations=8, batch=4, warmup=3, width=8, deep_width=12)


def images(seed=0):
    return torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def small_net():
    torch.manual_seed(0)
    net = ScoreUNet(8, sigma_data=0.4, data_mean=-0.2, width=8, deep_width=12, emb=8)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# --- noise levels ------------------------------------------------------------------------------------


def strata(sigma, mean, std):
    """The B-th part of the normal distribution each level lies in."""
    return (torch.special.ndtr((sigma.double().log() - mean) / std) * len(sigma)).floor().long()


def test_each_stratum_is_hit_once():
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert torch.equal(strata(stratified_sigma(64, -0.5, 1.3, rng), -0.5, 1.3), torch.arange(64))
    independent = (-0.5 + 1.3 * torch.randn(64, generator=rng)).exp()  # the twin
    assert len(strata(independent, -0.5, 1.3).unique()) < 55


def test_log_sigma_has_the_mean_and_deviation():
    rng = torch.Generator().manual_seed(1)
    log = torch.cat([stratified_sigma(128, -0.5, 1.3, rng) for _ in range(100)]).double().log()
    assert float(log.mean()) == pytest.approx(-0.5, abs=0.002)
    assert float(log.std()) == pytest.approx(1.3, abs=0.01)


# --- loss --------------------------------------------------------------------------------------------


def independent_loss(net, y, sigma, n, weight_exponent=1.0):
    """The same in terms of F: its target is (y - c_skip x) / c_out, its weight weight c_out^2 = 1."""
    s, d = sigma.reshape(-1, 1, 1, 1), net.sigma_data
    x = y + s * n - net.data_mean
    c_out = s * d / torch.sqrt(s**2 + d**2)
    out = net.network(x / torch.sqrt(s**2 + d**2), sigma.log() / 4)
    target = (y - net.data_mean - d**2 / (s**2 + d**2) * x) / c_out
    return (c_out ** (2 - 2 * weight_exponent) * (out - target) ** 2).mean()


def test_score_loss_is_the_unweighted_loss_of_f():
    net, rng = small_net(), torch.Generator().manual_seed(0)
    y, n = images()[:6], torch.randn(6, 1, 8, 8, generator=rng)
    sigma = stratified_sigma(6, -0.5, 1.3, rng)
    net.requires_grad_(False)
    loss = float(score_loss(net, y, sigma, n))
    assert loss == pytest.approx(float(independent_loss(net, y, sigma, n)), rel=1e-4)
    assert abs(loss / float(independent_loss(net, y, sigma, n, weight_exponent=0)) - 1) > 0.1  # the twin: no weight
    assert abs(loss / float(score_loss(net, y, sigma, -n)) - 1) > 0.01


def test_the_loss_of_the_untrained_network_is_known():
    """F = 0: D is the closed form of N(mean, sigma_data^2) data, whose loss is 1 on such data, whatever sigma."""
    net, rng = ScoreUNet(8, sigma_data=0.4, data_mean=-0.2), torch.Generator().manual_seed(0)
    y = -0.2 + 0.4 * torch.randn(500, 1, 8, 8, generator=rng)
    n = torch.randn(y.shape, generator=rng)
    with torch.no_grad():
        assert float(score_loss(net, y, stratified_sigma(500, -0.5, 1.3, rng), n)) == pytest.approx(1, abs=0.02)


def flat_images(count, rng):
    """Images whose 16 pixels are all the same number of N(0, 0.5^2)."""
    return (0.5 * torch.randn(count, 1, 1, 1, generator=rng)).expand(count, 1, 4, 4).contiguous()


@pytest.mark.slow
def test_training_approaches_the_closed_form(tmp_path, monkeypatch):
    """For flat images D(x; sigma) = mean(x) s^2 / (s^2 + sigma^2 / 16): averaging all pixels, not each for itself."""
    monkeypatch.setattr(pretrain, "ScoreUNet", lambda **build: ScoreUNet(**build, emb=16))
    rng = torch.Generator().manual_seed(0)
    config = ScoreConfig(iterations=200, batch=32, warmup=20, learning_rate=1e-2, bfloat16=False, width=16,
                         deep_width=12)
    trained = train_score(flat_images(500, rng), config, Run(tmp_path / "a.ckpt"))
    y, sigma = flat_images(200, rng), torch.full((200,), 0.5)
    x = y + 0.5 * torch.randn(y.shape, generator=rng)
    exact = x.mean(dim=(1, 2, 3), keepdim=True) * 0.5**2 / (0.5**2 + 0.5**2 / 16)
    untrained = ScoreUNet(4, sigma_data=0.5)
    with torch.no_grad():
        error, before = (float((net(x, sigma) - exact).square().mean()) for net in (trained["ema"], untrained))
    assert error < 0.2 * before  # which the untrained network, the twin, fails


# --- resuming ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    path = tmp_path_factory.mktemp("whole") / "score.ckpt"
    return train_score(images(), TINY, Run(path, save_every=3), snapshot_every=3), path


def stop_at(monkeypatch, iteration, number=signal.SIGTERM):
    """Send a signal in the middle of a step."""
    true = pretrain._step

    def step(*args):
        if args[-1] == iteration:
            os.kill(os.getpid(), number)
        return true(*args)

    monkeypatch.setattr(pretrain, "_step", step)


@pytest.mark.slow
@pytest.mark.parametrize("iteration", [1, 5])
def test_a_resumed_run_is_bit_identical(whole, tmp_path, monkeypatch, iteration):
    path = tmp_path / "score.ckpt"
    stop_at(monkeypatch, iteration)
    with pytest.raises(Stopped, match=rf"stopped after {iteration + 1} of 8 iterations; saved in .*score\.ckpt"):
        train_score(images(), TINY, Run(path, save_every=3), snapshot_every=3)
    monkeypatch.undo()
    resumed = train_score(images(), TINY, Run(path, resume=True, save_every=3), snapshot_every=3)
    assert same(resumed["ema"], whole[0]["ema"]) and resumed["losses"] == whole[0]["losses"]
    states = [torch.load(p, weights_only=True) for p in (path, whole[1])]
    for part in ("net", "ema"):
        assert all(torch.equal(states[0][part][k], v) for k, v in states[1][part].items())
    for mine, other in zip(*(s["optimizer"]["state"].values() for s in states)):
        assert all(torch.equal(mine[k], other[k]) for k in ("step", "exp_avg", "exp_avg_sq"))


def test_a_run_that_forgets_its_optimizer_differs(whole, tmp_path, monkeypatch):
    """The failing twin of the test above."""
    path = tmp_path / "score.ckpt"
    stop_at(monkeypatch, 5)
    with pytest.raises(Stopped):
        train_score(images(), TINY, Run(path))
    monkeypatch.undo()
    state = torch.load(path, weights_only=True)
    state["optimizer"]["state"] = {}
    torch.save(state, path)
    assert not same(train_score(images(), TINY, Run(path, resume=True))["ema"], whole[0]["ema"])


def test_a_finished_run_is_not_repeated(whole, monkeypatch):
    monkeypatch.setattr(pretrain, "_step", None)  # a step would fail
    again = train_score(images(), TINY, Run(whole[1], resume=True))
    assert same(again["ema"], whole[0]["ema"]) and again["losses"] == whole[0]["losses"]
    assert again["seconds"] == whole[0]["seconds"] > 0


def test_losses_are_means_of_their_stretches(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "_step", lambda *args: float(args[-1]))
    losses = train_score(images(), TINY, Run(tmp_path / "a", save_every=3))["losses"]
    assert losses == [1.0, 4.0, 6.5]  # of 0 1 2, 3 4 5 and 6 7


def test_the_seed_counts():
    """In the draws too: with (seed << 32) + iteration the generator would forget it."""
    steps = []
    for seed in (0, 1):
        config = ScoreConfig(iterations=4, batch=4, seed=seed, bfloat16=False)
        net, ema = small_net(), small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        steps.append(pretrain._step(net, ema, optimizer, images(), config, 0))
    assert steps[0] != steps[1]


OPEN = ScoreConfig(iterations=5, batch=4, warmup=3, rate_steps=2, flips=True, width=8, deep_width=12)


def test_a_training_without_an_end_goes_on_to_more_iterations(tmp_path):
    longer = ScoreConfig(**{**vars(OPEN), "iterations": 8})
    whole = train_score(images(), longer, Run(tmp_path / "whole", save_every=3))
    train_score(images(), OPEN, Run(tmp_path / "part", save_every=3))
    resumed = train_score(images(), longer, Run(tmp_path / "part", resume=True, save_every=3))
    assert same(resumed["ema"], whole["ema"]) and len(resumed["losses"]) == 4  # 1-3, 4-5, 6, 7-8
    with pytest.raises(ValueError, match="iterations=8, not 7"):
        train_score(images(), ScoreConfig(**{**vars(OPEN), "iterations": 7}), Run(tmp_path / "part", resume=True))
    linear = ScoreConfig(**{**vars(OPEN), "rate_steps": 0})  # the twin: there every step depends on the last
    assert not linear.open_ended and pretrain._learning_rate(linear, 3) == pytest.approx(2e-3 * (1 - 3 / 5))
    rates = [pretrain._learning_rate(OPEN, it) / 2e-3 for it in range(8)]
    assert rates == pytest.approx([1 / 3, 2 / 3, *((2 / t) ** 0.5 for t in range(3, 9))])


def test_pixels_are_trained_on_as_the_images_they_stand_for(tmp_path):
    pixels = torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    nets = [train_score(data, TINY, Run(tmp_path / "a"))["ema"] for data in (pixels, pixels.float() / 127.5 - 1)]
    assert same(*nets) and not same(nets[0], train_score(255 - pixels, TINY, Run(tmp_path / "a"))["ema"])


def test_half_of_the_images_are_mirrored(monkeypatch):
    """Of images that rise from left to right, half of those shown fall."""
    seen, config = [], ScoreConfig(batch=200, flips=True, bfloat16=False)
    rising = torch.linspace(-1, 1, 8).expand(20, 1, 8, 8)
    monkeypatch.setattr(pretrain, "score_loss", lambda net, y, *rest: seen.append(y) or net(y, torch.ones(200)).sum())
    for flips in (config, ScoreConfig(batch=200, bfloat16=False)):
        net, ema = small_net(), small_net()
        pretrain._step(net, ema, torch.optim.SGD(net.parameters(), lr=0.1), rising, flips, 0)
    mirrored, plain = (int((y[:, 0, 0, 0] > 0).sum()) for y in seen)
    assert 70 < mirrored < 130 and plain == 0


def test_snapshots(whole):
    folder = whole[1].parent
    assert sorted(p.name for p in folder.iterdir()) == ["ema_000003.pt", "ema_000006.pt", "score.ckpt"]
    assert list(whole[0]["snapshots"]) == [3, 6] and whole[0]["snapshots"][3] < whole[0]["snapshots"][6]
    three, six = (load_network(str(snapshot_path(whole[1], iteration))).denoiser for iteration in (3, 6))
    assert six.config == whole[0]["ema"].config and not same(three, six)
    kept = {key: value.half().float() for key, value in whole[0]["ema"].state_dict().items()}
    assert not all(torch.equal(kept[key], value) for key, value in six.state_dict().items())  # two steps before the end


def test_the_average_is_a_power_function(monkeypatch):
    """Weights proportional to t^gamma: of a parameter that is t at step t the average is about (g+1)/(g+2) T."""
    net, ema = small_net(), small_net()
    monkeypatch.setattr(pretrain, "score_loss", lambda net, *a: sum(p.sum() for p in net.parameters()) * 0)

    class Ramp:
        param_groups = [{}]
        step_count = 0

        def zero_grad(self):
            pass

        def step(self):
            self.step_count += 1
            with torch.no_grad():
                for p in net.parameters():
                    p.fill_(self.step_count)

    config, ramp = ScoreConfig(iterations=150, batch=1, ema_gamma=16.97, bfloat16=False), Ramp()
    for it in range(150):
        pretrain._step(net, ema, ramp, images(), config, it)
    assert next(ema.parameters()).flatten()[0].item() / 150 == pytest.approx(17.97 / 18.97, abs=0.004)


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, text", [
    (dict(iterations=9), "iterations=8, not 9"), (dict(seed=1), "seed=0, not 1"),
    (dict(learning_rate=1e-3), "learning_rate=0.002, not 0.001"),
])
def test_a_checkpoint_of_other_settings_is_refused(whole, change, text):
    config = ScoreConfig(**{**vars(TINY), **change})
    with pytest.raises(ValueError, match=f"was trained with {text}; use that or remove the file"):
        train_score(images(), config, Run(whole[1], resume=True))


def test_a_checkpoint_of_other_images_is_refused(whole):
    with pytest.raises(ValueError, match="was trained on images of sigma_data=.*; use those or remove the file"):
        train_score(images() / 2, TINY, Run(whole[1], resume=True))
    with pytest.raises(ValueError, match="was trained on images of img_resolution=8, not 12"):
        train_score(torch.rand(20, 1, 12, 12), TINY, Run(whole[1], resume=True))


@pytest.mark.parametrize("share", [0, 0.05, 0.6])
def test_a_damaged_checkpoint_is_refused(whole, tmp_path, share):
    content = whole[1].read_bytes()
    path = tmp_path / "score.ckpt"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"score\.ckpt is damaged or not a checkpoint .*; remove it to start again"):
        read_checkpoint(path, TINY)


@pytest.mark.parametrize("content", [torch.zeros(3), {"net": {}}, {"config": 3}, [1]])
def test_another_torch_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a")
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "a", TINY)


# --- a real process ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_then_resume_gives_the_same_bytes(whole, tmp_path):
    """A process is sent SIGTERM during a step: it finishes the step, saves and says so."""
    path = tmp_path / "score.ckpt"
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from tests.tools.networks.test_score import TINY, Run, images, pretrain, train_score\n"
        "true, path = pretrain._step, Path(sys.argv[1])\n"
        "def step(*args):\n"
        "    if args[-1] == 4:\n"
        "        path.with_name('ready').touch()\n"
        "        while not path.with_name('sent').exists():\n"
        "            time.sleep(0.02)\n"
        "    return true(*args)\n"
        "pretrain._step = step\n"
        "train_score(images(), TINY, Run(path, save_every=3))\n"
    )
    root = Path(__file__).parents[3]
    places = os.pathsep.join([str(root), str(root / "tools"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", code, str(path)]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not (tmp_path / "ready").exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    (tmp_path / "sent").touch()
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 1 and errors.strip().splitlines()[-1].endswith(
        f"Stopped: score network stopped after 5 of 8 iterations; saved in {path}"
    )
    resumed = train_score(images(), TINY, Run(path, resume=True, save_every=3))
    assert same(resumed["ema"], whole[0]["ema"]) and resumed["losses"] == whole[0]["losses"]
