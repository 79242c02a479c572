"""The patches: they only insert, git and our own code apply them alike, none of NVlabs' lines is in them."""

from __future__ import annotations

import hashlib
import re
import subprocess

import patch_upstream as tool
import pytest
from click.testing import CliRunner

from tests.support.patched import COMMITS, LOCK, ROOT, SCRIPTS, VERSIONS, originals
from tests.support.upstream import upstream

ENTRIES = [(name, digest, entry) for name in SCRIPTS for digest, entry in VERSIONS[name].items()]
EACH = pytest.mark.parametrize("name, digest, entry", ENTRIES, ids=[entry["patch"] for _, _, entry in ENTRIES])


def patch_of(entry):
    return ROOT / "patches" / entry["patch"]


def original(name, entry):
    """The unpatched script of one version; skips if the checkout lacks it."""
    found = originals(name)
    if entry["commit"][:7] not in found:
        pytest.skip(f"the checkout does not have commit {entry['commit'][:7]}: a shallow clone, or no clone")
    return found[entry["commit"][:7]]


def only_inserts(text):
    """Whether a patch has nothing but file names, heads of hunks without old lines, and lines to insert."""
    names, rest = text.splitlines()[:2], text.splitlines()[2:]
    heads = [re.fullmatch(r"@@ -\d+,0 \+\d+(,\d+)? @@ .+", line) for line in rest]
    return names[0].startswith("--- a/") and names[1].startswith("+++ b/") and heads[0] and all(
        head or line.startswith("+") for head, line in zip(heads, rest))


def test_every_patch_is_in_the_lock_file():
    assert sorted(path.name for path in (ROOT / "patches").glob("*.patch")) == sorted(e["patch"] for _, _, e in ENTRIES)
    assert (len(COMMITS["edm"]), len(COMMITS["edm2"])) == (2, 3)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) and re.fullmatch("[0-9a-f]{40}", entry["commit"])
               and entry["commit"][:7] in entry["patch"] for _, digest, entry in ENTRIES)


@EACH
def test_a_patch_only_inserts(name, digest, entry):
    text = patch_of(entry).read_text()
    assert only_inserts(text) and len(tool.read_patch(patch_of(entry))) == {"edm": 7, "edm2": 5}[name]
    assert not only_inserts(text.replace("\n+    grid", "\n-    grid")) and not only_inserts(text.replace("\n+", "\n "))
    assert all("art_edm" in b"\n".join(item.lines).decode() for item in tool.read_patch(patch_of(entry)))


@pytest.mark.upstream
@EACH
def test_git_and_our_own_code_apply_it_alike(name, digest, entry, tmp_path):
    data = original(name, entry)
    script = tmp_path / SCRIPTS[name]
    script.write_bytes(data)
    ours = tool.insert(data, tool.read_patch(patch_of(entry)))
    assert hashlib.sha256(data).hexdigest() == digest and hashlib.sha256(ours).hexdigest() == entry["patched"]
    git = ["git", "-c", "core.autocrlf=false", "apply", "--unidiff-zero", str(patch_of(entry))]
    subprocess.run(git, cwd=tmp_path, check=True)
    assert script.read_bytes() == ours != data
    subprocess.run([*git, "-R"], cwd=tmp_path, check=True)
    assert script.read_bytes() == data == tool.remove(ours, tool.read_patch(patch_of(entry)))


@pytest.mark.upstream
@EACH
def test_none_of_nvlabs_lines_is_in_it(name, digest, entry):
    theirs = {line.strip() for data in originals(name).values() for line in data.decode().splitlines()}
    for path in upstream(name).rglob("*.py"):
        if path.name not in SCRIPTS.values():  # these may be patched
            theirs |= {line.strip() for line in path.read_text(encoding="utf-8").splitlines()}
    inserted = {line.decode().strip() for item in tool.read_patch(patch_of(entry)) for line in item.lines}
    trivial = {"", "try:"}
    assert not (inserted - trivial) & theirs and len(inserted) > 10
    assert "t_steps = torch.cat([t_steps, torch.zeros_like(t_steps[:1])]) # t_N = 0" in theirs  # they were read


@pytest.mark.upstream
@EACH
def test_the_tool_finds_the_places_of_the_patch_by_itself(name, digest, entry):
    source = original(name, entry).decode()
    for item in tool.read_patch(patch_of(entry)):
        assert tool.find_place(item.place, source) == item.after
        assert tool.find_place(item.place, "# one line more\n" + source) == item.after + 1


@pytest.mark.upstream
@EACH
def test_inserting_at_the_printed_places_patches_a_changed_file(name, digest, entry, tmp_path):
    data = original(name, entry)

    def change(text):
        return "# mine\n\n" + text.replace("\nclass Stacked", "\nMINE = 1\n\nclass Stacked")

    script = tmp_path / SCRIPTS[name]
    script.write_text(change(data.decode()))
    result = CliRunner().invoke(tool.main, [str(tmp_path)])
    assert result.exit_code == 2 and script.read_text() == change(data.decode()) != data.decode()
    lines = script.read_text().split("\n")
    for block in result.stdout.strip().split("\n\n"):
        head, *body = block.split("\n")
        line = int(re.search(r": after line (\d+) \(.+\), insert:$", head).group(1))
        lines[line:line] = body
    newest = next(iter(VERSIONS[name].values()))  # whose lines are printed; they are the same for all
    patched = tool.insert(data, tool.read_patch(patch_of(entry))).decode()
    assert "\n".join(lines) == change(patched) and newest["patch"].startswith(name)


def test_the_pinned_commits_are_the_ones_of_the_checkouts():
    assert LOCK["edm"]["commit"].startswith("008a4e5") and LOCK["edm2"]["commit"].startswith("4bf8162")
    assert {LOCK[name]["url"] for name in SCRIPTS} == {f"https://github.com/NVlabs/{name}" for name in SCRIPTS}
