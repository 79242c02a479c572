"""README and pages: links lead somewhere, and every command shown takes the options it is shown with."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Iterator, List

import click
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "patches" / "README.md", ROOT / "third_party" / "README.md",
         *sorted((ROOT / "art_edm" / "docs").glob("*.md"))]


def anchors(text: str) -> set:
    """GitHub's addresses of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path, text: str) -> List[str]:
    """Links of `text`, as it would stand in `page`, that lead to no file or heading."""
    bad = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if link.startswith("https://"):
            continue
        if not target.exists() or anchor and anchor not in anchors(target.read_text() if path else text):
            bad.append(link)
    return bad


def commands(text: str) -> Iterator[List[str]]:
    """The words of every shell command of a page."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (shlex.split(part, comments=True) for part in line.split("&&"))


def unknown(words: List[str]) -> List[str]:
    """Options of a command of tools/ that the tool does not have."""
    place = next((i for i, word in enumerate(words) if re.fullmatch(r"(.*/)?tools/\w+\.py", word)), None)
    if place is None:
        return []
    command = importlib.import_module(Path(words[place]).stem).main
    given = words[place + 1:]
    if isinstance(command, click.Group) and given and not given[0].startswith("-"):
        command = command.get_command(click.Context(command), given.pop(0))
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    return [word for word in given if word.startswith("--") and word.split("=")[0] not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_commands_take_their_options(page):
    text = page.read_text()
    assert broken(page, text) == [] and [bad for words in commands(text) for bad in unknown(words)] == []


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_a_broken_link_and_an_unknown_option_are_found():
    text = "# A b\n[1](#a-b) [2](#c) [3](tests/none.md) [4](setup.py)\n"
    assert broken(ROOT / "README.md", text) == ["#c", "tests/none.md"]
    shown = "```bash\ncd x && python tools/fid.py gen \\\n    --grid=edm --color --num=3  # --no\n```"
    assert [unknown(words) for words in commands(shown)] == [[], ["--color"]]


def missing_tests(text: str) -> List[str]:
    """Tests that a page names, `file.py::test_name` in this folder, and that are not there."""
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", text)
    sources = {file: (ROOT / "tests" / file).read_text() if (ROOT / "tests" / file).exists() else ""
               for file, _ in named}
    return [f"{file}::{name}" for file, name in named if f"\ndef {name}(" not in sources[file]]


def test_the_catalogue_of_faults_names_tests_that_are_there():
    text = (ROOT / "tests" / "README.md").read_text()
    assert len(re.findall("::test_", text)) > 60 and missing_tests(text) == []
    absent = "metrics/test_frechet.py::test_none", "metrics/test_none.py::test_moments"
    assert missing_tests("".join(f"`{name}`" for name in absent)) == list(absent)
