"""For tests of the patched scripts: every version of them, original and patched, and small networks."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import patch_upstream
import pytest
from click.testing import CliRunner

from tests.support.upstream import run_python, upstream

ROOT = Path(__file__).resolve().parents[2]
LOCK = json.loads((ROOT / "third_party" / "upstream.json").read_text())
SCRIPTS = {"edm": "generate.py", "edm2": "generate_images.py"}
VERSIONS = {name: LOCK[name]["scripts"][script] for name, script in SCRIPTS.items()}
COMMITS = {name: [entry["commit"][:7] for entry in versions.values()] for name, versions in VERSIONS.items()}


def originals(name):
    """Commit (7 digits) -> bytes of the unpatched script; those that the checkout has, at least one."""
    checkout = upstream(name)
    found = {}
    for digest, entry in VERSIONS[name].items():
        candidates = [(checkout / SCRIPTS[name]).read_bytes()]  # a checkout may be patched, or be no clone
        inserts = patch_upstream.read_patch(ROOT / "patches" / entry["patch"])
        candidates.append(patch_upstream.remove(candidates[0], inserts))
        for revision in (entry["commit"], "HEAD"):
            git = ["git", "-C", str(checkout), "-c", "safe.directory=*", "show", f"{revision}:{SCRIPTS[name]}"]
            candidates.append(subprocess.run(git, stdout=subprocess.PIPE, stderr=subprocess.PIPE).stdout)
        for data in candidates:
            if hashlib.sha256(data).hexdigest() == digest:
                found[entry["commit"][:7]] = data
    assert found, f"{checkout} has no known version of {SCRIPTS[name]}"
    return found


def script_pairs(name, folder):
    """Commit -> (original, patched) files, made by the tool's own patching."""
    pairs = {}
    for commit, data in originals(name).items():
        for kind in ("original", "patched"):
            (folder / commit / kind).mkdir(parents=True)
            (folder / commit / kind / SCRIPTS[name]).write_bytes(data)
        result = CliRunner().invoke(patch_upstream.main, [str(folder / commit / "patched")])
        assert result.exit_code == 0, result.output
        pairs[commit] = tuple(str(folder / commit / kind / SCRIPTS[name]) for kind in ("original", "patched"))
    return pairs


def of(records, commit, *names):
    """Records of one version; skips a version that the checkout lacks."""
    if f"{commit} {names[0]}" not in records:
        pytest.skip(f"the checkout does not have commit {commit}: a shallow clone, or no clone")
    found = [records[f"{commit} {name}"] for name in names]
    return found[0] if len(found) == 1 else found


def images(folder):
    """The bytes of all pictures in a folder, by name."""
    return [path.read_bytes() for path in sorted(folder.iterdir())]


MAKE_NETWORKS = """
import pickle, sys, torch
name, folder = sys.argv[1:]
def save(file, net, **more):
    torch.manual_seed(len(file))
    for parameter in net.parameters():
        if not parameter.any():  # layers that start at 0 would make the network trivial
            torch.nn.init.normal_(parameter, std=0.3)
    with open(f'{folder}/{file}.pkl', 'wb') as f:
        pickle.dump(dict(ema=net.eval().requires_grad_(False), **more), f)
size = dict(img_resolution=8, img_channels=3, label_dim=4, model_channels=8, channel_mult=[1], num_blocks=1,
            attn_resolutions=[])
torch.manual_seed(0)
if name == 'edm':
    from training import networks
    save('edm', networks.EDMPrecond(model_type='SongUNet', **size))
    for file, kind, model in [('vp', 'VPPrecond', 'SongUNet'), ('ve', 'VEPrecond', 'SongUNet'),
                              ('iddpm', 'iDDPMPrecond', 'DhariwalUNet')]:
        save(file, getattr(networks, kind)(model_type=model, **size))
else:
    from training import encoders, networks_edm2
    encoder = encoders.StandardRGBEncoder()
    save('main', networks_edm2.Precond(logvar_channels=8, **size), encoder=encoder)
    save('guiding', networks_edm2.Precond(logvar_channels=8, **size))
"""


def make_networks(name, folder):
    """Small random networks, saved by upstream's own persistence."""
    run_python(MAKE_NETWORKS, name, folder, path=upstream(name))
