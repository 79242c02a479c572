"""The order of the folders: a module imports from folders below its own only, and from run-time packages only."""

from __future__ import annotations

import ast
import pkgutil
import sys
import sysconfig
from pathlib import Path
from typing import Iterator, Tuple

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["runtime", "pickles grids", "models", "sampling metrics", "measure compare", "learning refining",
          "upstream schedule", "tools __main__"]
FLOOR = {folder: number for number, names in enumerate(FLOORS) for folder in names.split()}
PACKAGES = {"torch", "numpy", "click", "PIL", "scipy", "requests", "urllib3", "art_edm", "paper", "cost", "networks"}
# Python's own modules; sys.stdlib_module_names is not there before Python 3.10.
STANDARD = {module.name for place in ("", "lib-dynload")
            for module in pkgutil.iter_modules([str(Path(sysconfig.get_path("stdlib"), place))])
            } | {*sys.builtin_module_names, "__future__"}
OPTIONAL = {"matplotlib", "msvcrt", "diffusers", "timm"}  # inside functions only


def imported(source: str) -> Iterator[Tuple[str, bool]]:
    """Every module that a source imports, with whether the import stands inside a function."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    nested = {id(child) for node in functions for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in nested) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import; write the whole address"
            names = [f"art_edm.{alias.name}" for alias in node.names] if node.module == "art_edm" else [node.module]
            yield from ((name, id(node) in nested) for name in names)


def upward(place: str, source: str) -> list:
    """Imports of `place` (a folder, or a module directly in art_edm) from its own floor or above."""
    folders = {name.split(".")[1] for name, _ in imported(source) if name.startswith("art_edm.")} - {place}
    return sorted(name for name in folders if FLOOR.get(name, -1) >= FLOOR[place])


def foreign(source: str) -> list:
    """Imported packages that are neither run-time packages, nor optional ones inside a function."""
    allowed = PACKAGES | STANDARD
    tops = {(name.split(".")[0], nested) for name, nested in imported(source)}
    return sorted(top for top, nested in tops if top not in allowed and not (nested and top in OPTIONAL))


def modules() -> list:
    """(folder, path) of every module."""
    ours = [(path.relative_to(ROOT / "art_edm").parts[0], path) for path in (ROOT / "art_edm").glob("*/**/*.py")]
    flat = [(path.stem, path) for path in (ROOT / "art_edm").glob("*.py") if path.stem != "__init__"]
    return sorted(ours + flat + [("tools", path) for path in (ROOT / "tools").rglob("*.py")])


@pytest.mark.parametrize("place, path", modules(), ids=lambda value: getattr(value, "stem", None))
def test_a_module_imports_from_below_and_run_time_packages_only(place, path):
    source = path.read_text()
    up = list(upward(place, source))
    assert (up, foreign(source)) == ([], [])


def test_the_package_itself_imports_nothing():
    assert not list(imported((ROOT / "art_edm" / "__init__.py").read_text()))  # import art_edm stays instant


def test_an_upward_import_is_found():
    assert upward("models", "from art_edm.sampling.solvers import sample") == ["sampling"]
    assert upward("grids", "def late():\n    import art_edm.pickles.network") == ["pickles"]
    assert upward("measure", "from art_edm import schedule") == ["schedule"]
    assert upward("measure", "from art_edm.sampling.solvers import sample\nimport art_edm.measure.field") == []


def test_a_foreign_package_is_found():
    assert foreign("import numpy, yaml") == ["yaml"] and foreign("import matplotlib") == ["matplotlib"]
    assert foreign("def draw():\n    import matplotlib") == []
