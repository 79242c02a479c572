"""tools/patch_upstream.py on stand-ins of the scripts and of their repositories: no checkout is needed."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import subprocess
import sys

import pytest

from art_edm.grids.grid import Grid, save_grid
from tests.support.patched import SCRIPTS

# A stand-in with what a patch needs; written line by line, so that a test can name the lines.
ORIGINAL = """\
import click
import torch

def edm_sampler(
    net, rho=7,
    num_steps=2,
):
    t_steps = torch.tensor([8.0, 4.0])
    t_steps = torch.cat([t_steps, torch.zeros(1)])
    for t in t_steps:
        pass
    return t_steps.tolist(), num_steps

class dist:
    get_rank = lambda: 0

@click.command()
@click.option('--steps', 'num_steps', type=int, default=2)
@click.option('--rho', type=float, default=7)
def main(**sampler_kwargs):
    if dist.get_rank() == 0:
        _ = 'torch.distributed.barrier()'
    print(*edm_sampler(None, **sampler_kwargs))

if __name__ == '__main__':
    main()
"""
PATCH = """\
--- a/SCRIPT
+++ b/SCRIPT
@@ -2,0 +3,4 @@ after the imports
+try:
+    import art_edm.upstream
+except ImportError as missing:
+    raise SystemExit(f'{missing}: install art_edm')
@@ -6,0 +11 @@ in the signature of edm_sampler
+    grid=None, # art_edm
@@ -9,0 +15,3 @@ in edm_sampler, after t_steps
+    if grid is not None:
+        t_steps = art_edm.upstream.grid_levels(grid, net, t_steps)
+        num_steps = len(t_steps) - 1
@@ -16,0 +25 @@ above @click.command()
+@art_edm.upstream.schedule_option
@@ -22,0 +32 @@ once all processes may load the network
+    # art_edm: checked
"""


def by_hand(original):
    """The patched stand-in, by an arithmetic of its own: each line that precedes an insertion names it."""
    lines = original.split("\n")
    for hunk in PATCH.split("@@ -")[1:]:
        head, *body = hunk.strip("\n").split("\n")
        lines[int(head.split(",")[0]) - 1] += "".join(f"\n{text[1:]}" for text in body)
    return "\n".join(lines)


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


SOURCE = {"edm": ORIGINAL, "edm2": ORIGINAL.replace("rho=7", "rho=5")}


@pytest.fixture
def root(tmp_path):
    """A project with the stand-ins' patches and lock file; the tool works in it."""
    root = tmp_path / "project"
    (root / "third_party").mkdir(parents=True)
    (root / "patches").mkdir()
    lock = {}
    for name, script in SCRIPTS.items():
        (root / "patches" / f"{name}.patch").write_text(PATCH.replace("SCRIPT", script))
        entry = {"commit": "c" * 40, "patch": f"{name}.patch", "patched": sha(by_hand(SOURCE[name]))}
        lock[name] = {"url": "", "commit": "", "scripts": {script: {sha(SOURCE[name]): entry}}}
    (root / "third_party" / "upstream.json").write_text(json.dumps(lock))
    return root


@pytest.fixture
def run(root, tool, monkeypatch):
    """Run the tool."""
    monkeypatch.setattr("patch_upstream.ROOT", root)
    return tool("patch_upstream")


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "mine" / "generate.py"
    path.parent.mkdir()
    path.write_text(ORIGINAL)
    return path


def refused(result, *parts, code=2):
    assert result.exit_code == code and isinstance(result.exception, SystemExit), result.output
    message = result.stderr or f"{result.exception}\n"  # of sys.exit(message), which the runner keeps to itself
    assert message.count("\n") == 1 and all(part in message for part in parts), message


# --- a folder ----------------------------------------------------------------------------------------


def test_patch_check_and_revert(run, script):
    script.chmod(0o755)
    for args, code, text, content in [
        (["--check"], 1, "unpatched", ORIGINAL), ([], 0, "patched (version", by_hand(ORIGINAL)),
        ([], 0, "patched (version of commit ccccccc); nothing to do", by_hand(ORIGINAL)),
        (["--check"], 0, "patched", by_hand(ORIGINAL)), (["--revert"], 0, "reverted", ORIGINAL),
        (["--revert"], 0, "unpatched (version of commit ccccccc); nothing to do", ORIGINAL),
    ]:
        result = run(script.parent, *args)
        assert (result.exit_code, script.read_text()) == (code, content) and text in result.stdout, result.output
    assert script.stat().st_mode & 0o777 == 0o755 and os.listdir(script.parent) == ["generate.py"]
    assert by_hand(ORIGINAL).count("\n") == ORIGINAL.count("\n") + 10


def test_a_linked_script_stays_a_link(run, script, tmp_path):
    script.rename(tmp_path / "elsewhere.py")
    script.symlink_to(tmp_path / "elsewhere.py")
    assert run(script.parent).exit_code == 0
    assert script.is_symlink() and (tmp_path / "elsewhere.py").read_text() == by_hand(ORIGINAL)


def test_line_ends_of_windows_are_kept(run, script):
    dos = ORIGINAL.replace("\n", "\r\n").encode()
    script.write_bytes(dos)
    assert run(script.parent).exit_code == 0
    assert script.read_bytes() == by_hand(ORIGINAL).replace("\n", "\r\n").encode()
    assert run(script.parent, "--check").exit_code == 0
    assert run(script.parent, "--revert").exit_code == 0 and script.read_bytes() == dos
    script.write_bytes(dos.replace(b"\r\n", b"\n", 1))  # mixed: some editor was at work
    assert run(script.parent, "--check").exit_code == 2


def test_the_patched_stand_in_works(run, script, tmp_path, monkeypatch, capsys):
    save_grid(tmp_path / "g.npy", Grid([5.0, 3.0, 1.0, 0.0]), {})

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(script), run_name="__main__")
        return stop.value.code, capsys.readouterr().out

    before = call()
    assert run(script.parent).exit_code == 0 and call() == before == (0, "[8.0, 4.0, 0.0] 2\n")
    assert call(f"--schedule={tmp_path}/g.npy") == (0, "[5.0, 3.0, 1.0, 0.0] 3\n")
    assert call(f"--schedule={tmp_path}/absent.npy")[0] == 2
    monkeypatch.setitem(sys.modules, "art_edm.upstream", None)  # as where it is not installed
    monkeypatch.delattr("art_edm.upstream")
    code, _ = call()
    assert "install art_edm" in code


# --- what is not known -------------------------------------------------------------------------------


def test_an_unknown_file_is_left_as_it_is_and_the_places_are_printed(run, script):
    changed = "# mine\n" + ORIGINAL.replace("class dist", "# more\n\nclass dist")
    script.write_text(changed)
    result = run(script.parent)
    refused(result, "no version of NVlabs' script known here", "insert the lines above by hand")
    assert script.read_text() == changed
    lines = changed.split("\n")
    for head, *body in (block.split("\n") for block in result.stdout.strip().split("\n\n")):  # from the bottom up
        line = int(head.split(": after line ")[1].split(" (")[0])
        lines[line:line] = body
    assert "\n".join(lines) == "# mine\n" + by_hand(ORIGINAL).replace("class dist", "# more\n\nclass dist")
    assert run(script.parent, "--check").exit_code == 2


@pytest.mark.parametrize("old, new, place", [
    ("edm_sampler(\n", "my_sampler(\n", "in the signature of edm_sampler (line not found)"),
    ("    num_steps=2,\n", "    num_steps=2\n", "in the signature of edm_sampler (line not found)"),
    ("    num_steps=2,\n", "    num_steps=2, **rest\n", "in the signature of edm_sampler (line not found)"),
    ("    for t in", "    if True:\n     for t in", "in edm_sampler, after t_steps (line not found)"),
    ("t_steps = torch", "sigmas = torch", "in edm_sampler, after t_steps (line not found)"),
    ("@click.command", "@mine.command", "above @click.command() (line not found)"),
    ("get_rank() == 0", "is_first()", "once all processes may load the network (line not found)"),
    ("import click\nimport torch\n", "", "after the imports (line not found)"),
])
def test_a_place_that_cannot_be_told_is_given_in_words(run, script, old, new, place):
    script.write_text(ORIGINAL.replace(old, new))
    result = run(script.parent)
    refused(result)
    assert f"{place}, insert:" in result.stdout and "\n+" not in result.stdout


def test_a_file_that_is_no_python_or_names_art_edm(run, script):
    script.write_bytes(b"def (\xff\n")
    result = run(script.parent)
    refused(result, "no version")
    assert result.stdout.count("(line not found), insert:") == 5


def test_a_fork_that_was_patched_by_hand_is_recognised(run, script):
    script.write_text(by_hand(ORIGINAL) + "# mine\n")
    for options in ([], ["--check"]):
        result = run(script.parent, *options)
        assert result.exit_code == 0 and "patched by hand, all lines of art_edm are there" in result.output
        assert ", insert:" not in result.output  # twice would be wrong
    refused(run(script.parent, "--revert"), "it names art_edm already", "remove the lines that name art_edm")
    assert script.read_text().endswith("# mine\n")
    older = (by_hand(ORIGINAL) + "# mine\n").replace("grid=None", "grid=()")  # twin: lines of another version
    script.write_text(older)
    result = run(script.parent)
    refused(result, "it names art_edm already", "which it lacks")
    assert result.stdout.count(", insert:") == 1 and "in the signature of edm_sampler" in result.stdout
    assert "git checkout" not in result.output and script.read_text() == older
    assert run(script.parent, "--check").exit_code == 2


@pytest.mark.parametrize("old, new, part", [
    ("+    grid=None", "+    grid=1", "does not fit third_party/upstream.json"),
    ("+    grid=None", "-    grid=None", "found a line that inserts nothing"),
    ("@@ -2,0", "@@ -2,1", "found a line that inserts nothing"),
    ("+try:", " try:", "found a line that inserts nothing"),
])
def test_an_altered_patch_is_not_applied(run, root, script, old, new, part):
    path = root / "patches" / "edm.patch"
    path.write_text(path.read_text().replace(old, new))
    refused(run(script.parent), part)
    assert script.read_text() == ORIGINAL


def test_wrong_use(run, script, tmp_path):
    refused(run(tmp_path), "found no generate.py or generate_images.py", "give a checkout")
    refused(run(script.parent, "--check", "--revert"), "give one")
    refused(run(script.parent, "--repo=edm"), "leave them out")
    refused(run("--from=elsewhere"), "add --repo=edm")
    assert script.read_text() == ORIGINAL


# --- checkouts ---------------------------------------------------------------------------------------


@pytest.fixture
def repositories(root, tmp_path, monkeypatch):
    """Two repositories whose pinned commit is not the newest; the lock file points at them."""
    path = root / "third_party" / "upstream.json"
    lock = json.loads(path.read_text())
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=false"]
    for name, script in SCRIPTS.items():
        folder = tmp_path / f"far {name}"
        folder.mkdir()
        git = lambda *args, folder=folder: subprocess.run(
            ["git", "-C", str(folder), *identity, *args], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        git("init", "--quiet")
        for text in (SOURCE[name], "newer\n"):
            (folder / script).write_text(text)
            git("add", ".")
            git("commit", "--quiet", "-m", "x")
        lock[name].update(url=str(folder), commit=git("rev-parse", "HEAD~1"))
    path.write_text(json.dumps(lock))
    return lock


def test_without_a_folder_it_fetches_and_patches_both(run, root, repositories):
    assert run("--check").exit_code == 1 and "no checkout" in run("--check").stdout
    result = run()
    assert result.exit_code == 0, result.output
    for name, script in SCRIPTS.items():
        tree = root / "third_party" / name
        assert (tree / script).read_text() == by_hand(SOURCE[name])
        head = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], stdout=subprocess.PIPE, text=True).stdout
        assert head.strip() == repositories[name]["commit"]
    assert sorted(os.listdir(root / "third_party")) == ["edm", "edm2", "upstream.json"]
    assert run("--check").exit_code == 0 and run().stdout.count("nothing to do") == 2
    assert run("--revert", "--repo=edm2").exit_code == 0
    assert run("--check").exit_code == 1 and run("--check", "--repo=edm").exit_code == 0
    (root / "third_party" / "edm" / "generate.py").write_text("mine\n")
    assert run("--check").exit_code == 2
    refused(run(), "edm/generate.py is no version")
    assert run("--check", "--repo=edm2").exit_code == 0  # the other one was patched all the same


def test_another_address(run, root, repositories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far edm").rename(tmp_path / "mirror")
    result = run("--repo=edm")
    refused(result, "could not fetch commit", "--repo=edm --from=URL|PATH", code=1)
    assert os.listdir(root / "third_party") == ["upstream.json"]
    assert run("--repo=edm", "--from=mirror").exit_code == 0
    assert (root / "third_party" / "edm" / "generate.py").read_text() == by_hand(ORIGINAL)
    assert "there already" in run("--repo=edm", "--from=mirror").stdout


def test_a_repository_without_the_commit_and_a_machine_without_git(run, root, repositories, tmp_path, monkeypatch):
    refused(run("--repo=edm", f"--from={tmp_path / 'far edm2'}"), "could not fetch commit", code=1)
    monkeypatch.setattr("shutil.which", lambda name: None)
    refused(run("--repo=edm"), "found no git; install it, or unpack commit")
    assert os.listdir(root / "third_party") == ["upstream.json"]
