"""Patch NVlabs' sampling scripts so that they take a grid, and fetch the scripts."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import click

from art_edm.runtime.cli import Command, installed, named
from art_edm.runtime.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"edm": "generate.py", "edm2": "generate_images.py"}
EXIT = {"patched": 0, "patched by hand": 0, "unpatched": 1, "unknown": 2}  # of --check


class Insertion(NamedTuple):
    """Lines to insert after line `after` of the original; `place` says where that is in words."""

    after: int
    place: str
    lines: List[bytes]


def read_patch(path: Path) -> List[Insertion]:
    """The insertions of a zero-context patch; raises a ValueError if it does anything but insert."""
    insertions: List[Insertion] = []
    for line in path.read_bytes().splitlines()[2:]:  # after the two file names
        head = re.fullmatch(rb"@@ -(\d+),0 \+\d+(?:,\d+)? @@ (.+)", line)
        if head:
            insertions.append(Insertion(int(head.group(1)), head.group(2).decode(), []))
        elif line.startswith(b"+") and insertions:
            insertions[-1].lines.append(line[1:])
        else:
            raise ValueError(f"{path}: found a line that inserts nothing, {line!r}; restore the file")
    return insertions


def insert(data: bytes, insertions: List[Insertion]) -> bytes:
    """`data` with the lines inserted."""
    lines = data.split(b"\n")
    for item in reversed(insertions):  # from the bottom, so that the numbers stay right
        lines[item.after:item.after] = item.lines
    return b"\n".join(lines)


def remove(data: bytes, insertions: List[Insertion]) -> bytes:
    """`data` without the inserted lines."""
    lines = data.split(b"\n")
    for item in insertions:  # what stood above is gone already
        del lines[item.after:item.after + len(item.lines)]
    return b"\n".join(lines)


# --- a script and its state --------------------------------------------------------------------------


class Script(NamedTuple):
    """A script on disk: `data` with plain line ends, and what the lock file knows of it."""

    path: Path
    data: bytes
    crlf: bool
    state: str  # patched, unpatched or unknown
    version: Dict[str, Any]  # original (its SHA-256), commit, patch, patched; the newest if unknown

    def write(self, data: bytes, expected: str) -> None:
        """Replace the file, its line ends and mode kept; `expected` is the SHA-256 with plain line ends."""
        if hashlib.sha256(data).hexdigest() != expected:
            raise ValueError(f"patches/{self.version['patch']} does not fit third_party/upstream.json; restore both")
        path, content = self.path.resolve(), data.replace(b"\n", b"\r\n") if self.crlf else data
        mode = path.stat().st_mode
        atomic_write(path, lambda file: file.write(content))
        os.chmod(path, mode)

    def __str__(self) -> str:
        commit = f" (version of commit {self.version['commit'][:7]})"
        known = {"unknown": " version", "patched by hand": ", all lines of art_edm are there"}.get(self.state, commit)
        return f"{self.path}: {self.state}{known}"


def checkouts() -> Path:
    """Where repositories are fetched to: third_party/ of the project, or in this folder for an installed package."""
    return Path("third_party") if installed() else ROOT / "third_party"


def lock() -> Dict[str, Any]:
    """The pinned versions."""
    return json.loads((ROOT / "third_party" / "upstream.json").read_text())


def read_script(path: Path, repo: str) -> Script:
    """Recognise a script by its SHA-256; git on Windows may have changed its line ends, which is no other version."""
    raw = path.read_bytes()
    crlf = 0 < raw.count(b"\n") == raw.count(b"\r\n")
    data = raw.replace(b"\r\n", b"\n") if crlf else raw
    digest = hashlib.sha256(data).hexdigest()
    versions = [{"original": key, **value} for key, value in lock()[repo]["scripts"][SCRIPTS[repo]].items()]
    for version in versions:
        for state, key in (("unpatched", "original"), ("patched", "patched")):
            if digest == version[key]:
                return Script(path, data, crlf, state, version)
    script = Script(path, data, crlf, "unknown", versions[0])
    return script if missing(script) else script._replace(state="patched by hand")


def missing(script: Script) -> List[Insertion]:
    """The insertions of the newest patch that do not stand in a script, however indented."""
    text = b"\n".join(line.strip() for line in script.data.split(b"\n"))
    return [item for item in read_patch(ROOT / "patches" / script.version["patch"])
            if b"\n".join(line.strip() for line in item.lines) not in text]


def change(script: Script, revert: bool) -> str:
    """Patch or revert a script, and say so; an unknown one stays as it is: returns what is wrong, prints the places."""
    if script.state == "patched by hand" and not revert:
        click.echo(f"{script}; nothing to do")
        return ""
    if script.state in ("unknown", "patched by hand"):
        again, remedy = "", "insert the lines above by hand"
        if b"art_edm" in script.data:
            again = " (it names art_edm already)"
            remedy = "put the lines above, which it lacks, in place of art_edm's older ones there"
        if revert:
            remedy = "remove the lines that name art_edm, and those that follow from them, by hand"
        else:
            describe_places(script)
        return f"{script.path} is no version of NVlabs' script known here{again}; it was left as it is: {remedy}"
    insertions = read_patch(ROOT / "patches" / script.version["patch"])
    if script.state == ("unpatched" if revert else "patched"):
        click.echo(f"{script}; nothing to do")
    elif revert:
        script.write(remove(script.data, insertions), script.version["original"])
        click.echo(f"{script.path}: reverted to the version of commit {script.version['commit'][:7]}")
    else:
        script.write(insert(script.data, insertions), script.version["patched"])
        click.echo(f"{script.path}: patched (version of commit {script.version['commit'][:7]})")
    return ""


# --- places in an unknown file -----------------------------------------------------------------------


def find_place(place: str, source: str) -> Optional[int]:
    """The line of `source` after which an insertion belongs, None if it cannot be found."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if place == "after the imports":
        first = min((f.lineno for f in functions.values()), default=0)
        imports = [n.end_lineno for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) and n.lineno < first]
        return max(imports, default=None)
    if place == "above @click.command()":
        return next((decorator.lineno - 1 for f in functions.values() for decorator in f.decorator_list
                     if ast.unparse(decorator).startswith("click.command(")), None)
    if place == "once all processes may load the network":
        return next((node.end_lineno for f in functions.values() if f.args.kwarg for node in f.body
                     if isinstance(node, ast.If) and ast.unparse(node.test) == "dist.get_rank() == 0"
                     and "torch.distributed.barrier()" in ast.unparse(node)), None)
    name = re.search(r"\b\w+_sampler\b", place).group()
    if name not in functions:
        return None
    if place.startswith("in the signature"):
        return _end_of_signature(functions[name], source.split("\n"))
    return _after_t_steps(functions[name])


def _end_of_signature(function: ast.FunctionDef, lines: List[str]) -> Optional[int]:
    """The line of the last parameter, if another may follow on a line of its own."""
    a = function.args
    nodes = [*a.posonlyargs, *a.args, *a.kwonlyargs, *a.defaults, *filter(None, a.kw_defaults)]
    last = max((node.end_lineno for node in nodes), default=0)
    free = last and not a.kwarg and lines[last - 1].rstrip().endswith(",") and "#" not in lines[last - 1]
    return last if free else None


def _after_t_steps(function: ast.FunctionDef) -> Optional[int]:
    """The end of the last assignment to t_steps before the loop."""
    found = None
    for node in function.body:
        if isinstance(node, ast.For):
            return found
        if isinstance(node, ast.Assign) and "t_steps" in [ast.unparse(target) for target in node.targets]:
            found = node.end_lineno
    return None


def describe_places(script: Script) -> None:
    """Print where the lines that it lacks belong, from the bottom up, so that the numbers stay right."""
    source = script.data.decode("utf-8", "replace")
    for item in reversed(missing(script)):
        line = find_place(item.place, source)
        where = f"after line {line} ({item.place})" if line is not None else f"{item.place} (line not found)"
        click.echo(f"{script.path}: {where}, insert:")
        click.echo("\n".join(text.decode() for text in item.lines) + "\n")


# --- checkouts ---------------------------------------------------------------------------------------


def git(*args: str) -> "subprocess.CompletedProcess[str]":
    """Run git without questions, without the caller's repository, and with files as they are stored."""
    settings = ("core.autocrlf=false", "advice.detachedHead=false", "http.lowSpeedLimit=1000", "http.lowSpeedTime=30")
    command = ["git", *(part for setting in settings for part in ("-c", setting)), *args]
    environment = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    return subprocess.run(command, env={**environment, "GIT_TERMINAL_PROMPT": "0"}, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")


def clone(repo: str, address: str) -> None:
    """Fetch the pinned commit into third_party/<repo>; the folder is complete or absent.

    Raises a ConnectionError if it cannot be fetched, a ValueError without git.
    """
    target, commit = checkouts() / repo, lock()[repo]["commit"]
    if not shutil.which("git"):
        raise ValueError(f"found no git; install it, or unpack commit {commit} of {address} as {target}")
    click.echo(f"fetching commit {commit[:7]} of {address}")
    address = os.path.abspath(address) if os.path.exists(address) else address
    target.parent.mkdir(exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{repo}.", dir=target.parent))
    try:
        tree = str(part / repo)
        git("init", "--quiet", tree)
        # that commit alone; or, from a server that gives no commit by its name, everything
        for wanted in (["--depth=1", address, commit], [address, "+refs/heads/*:refs/remotes/origin/*"]):
            result = git("-C", tree, "fetch", "--quiet", *wanted)
            if result.returncode == 0:
                break
        if result.returncode == 0:
            result = git("-C", tree, "checkout", "--quiet", commit)
        if result.returncode:
            reason = next(iter(result.stderr.strip().splitlines()), "git gave no reason")
            raise ConnectionError(
                f"could not fetch commit {commit[:7]} of {address} ({reason}); try again, give another address with "
                f"--repo={repo} --from=URL|PATH, or put a checkout of that commit at {target}"
            )
        os.replace(tree, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fetched(repos: List[str], address: Optional[str], fetch: bool) -> Dict[str, Path]:
    """The scripts in third_party/, by repository; missing checkouts are fetched, or else said and left out."""
    paths = {}
    for name in repos:
        folder = checkouts() / name
        if not folder.exists() and fetch:
            clone(name, address or lock()[name]["url"])
        elif address and folder.exists():
            click.echo(f"{folder} is there already; nothing fetched")
        if folder.exists():
            paths[name] = folder / SCRIPTS[name]
        else:
            click.echo(named(f"{folder}: no checkout; python tools/patch_upstream.py fetches one"))
    return paths


def in_folder(folder: Path) -> Dict[str, Path]:
    """The scripts in a checkout, by repository."""
    paths = {name: folder / script for name, script in SCRIPTS.items() if (folder / script).is_file()}
    if not paths:
        raise ValueError(f"found no {' or '.join(SCRIPTS.values())} in {folder}; give a checkout of edm or edm2")
    return paths


@click.command(cls=Command)
@click.argument("folder", required=False, metavar="[DIR]", type=click.Path(path_type=Path))
@click.option("--repo", type=click.Choice([*SCRIPTS, "both"]), default="both", show_default=True,
              help="Which to fetch and patch, without DIR.")
@click.option("--from", "address", metavar="URL|PATH", help="Fetch from here, such as a mirror; needs --repo.")
@click.option("--check", is_flag=True,
              help="Say whether they are patched; exit code 0 yes (by hand too), 1 no, 2 unknown.")
@click.option("--revert", is_flag=True, help="Restore the original scripts.")
def main(folder: Optional[Path], repo: str, address: Optional[str], check: bool, revert: bool) -> int:
    """Let generate.py (NVlabs/edm) and generate_images.py (edm2) take a grid, by --schedule=FILE.npy.

    Without DIR: fetches the pinned commits into third_party/ and patches them there. With DIR: patches the
    script in your checkout, if it is one of the known versions; for any other, prints what to insert where.

    \b
    Examples:
      python tools/patch_upstream.py
      python tools/patch_upstream.py ~/edm
      python tools/patch_upstream.py ~/edm --revert
    """
    if check and revert:
        raise click.UsageError("found --check and --revert; give one")
    if folder and (address or repo != "both"):
        raise click.UsageError("found --repo or --from with DIR, where nothing is fetched; leave them out")
    if address and (repo == "both" or check or revert):
        raise click.UsageError("found --from, which is for fetching one repository; add --repo=edm or --repo=edm2 only")
    repos = list(SCRIPTS) if repo == "both" else [repo]
    paths = in_folder(folder) if folder else fetched(repos, address, fetch=not (check or revert))
    scripts = [read_script(path, name) for name, path in paths.items()]
    if check:
        for script in scripts:
            click.echo(str(script))
        absent = not folder and len(scripts) < len(repos)
        return max([EXIT[script.state] for script in scripts] + [EXIT["unpatched"]] * absent)
    problems = [problem for problem in (change(script, revert) for script in scripts) if problem]
    if problems:
        raise ValueError("; ".join(problems))
    return 0


if __name__ == "__main__":
    main(prog_name="patch_upstream.py")
