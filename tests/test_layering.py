"""The package reads downwards: a module imports only from the layers below its own, and only known packages."""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "art_edm"
LAYERS: Dict[int, str] = {
    -1: "files progress seeding config transfer pickle_tree uncertainty optimizer lifelines descent benchmarks_report",
    0: "denoiser grid clock policy frechet pickles upstream_sources images download cells result multistep",
    1: "analytic unet features field adapters mnist pickled_tensors trusted_pickle distributed devices interop profile "
       "pieces",
    2: "solvers trajectories pretrain pickled_data",
    3: "upstream checkpoint control evaluation network_pickle references sensitivity local_errors",
    4: "actor_critic distill loading refine_state stochastic",
    5: "training detectors plots image_fields exact_ends benchmarks_networks",
    6: "cli feature_stats tables learned benchmarks refine growth",
    7: "report tallies result_plots endpoint refined",
    8: "experiment grid_choice",
    9: "scores comparison",
    10: "fid_commands laboratory",
    11: "recipes latent_images",
    12: "oned_table image_cells field_transfer",
    13: "image_tables",
    14: "ablations",
    15: "reproduction",
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names.split()}
ONLY = {"cli": {"denoiser", "progress"}}  # it must start quickly
PACKAGES = {"torch", "numpy", "click", "PIL", "scipy", "requests"}
OPTIONAL = {  # inside functions only
    ("plots", "matplotlib"), ("tables", "matplotlib"), ("result_plots", "matplotlib"), ("download", "msvcrt"),
}


class Import(NamedTuple):
    """One imported name: a module of the package (`own`), or a package (its top name)."""

    own: bool
    name: str
    line: int
    nested: bool  # inside a function


def imports(tree: ast.Module, modules: "set[str]") -> Iterator[Import]:
    """Every import of a module's source, those inside functions included."""
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    nested = {id(child) for node in functions for child in ast.walk(node)}
    for node in ast.walk(tree):
        inside = id(node) in nested
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = ("art_edm." if node.level else "") + (node.module or "")
            # `from . import x` may import a module or a name of the package
            plain = source.rstrip(".") == "art_edm"
            names = [f"art_edm.{alias.name}" for alias in node.names] if plain else [source]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top != "art_edm":
                yield Import(False, top, node.lineno, inside)
            elif rest.split(".")[0] in modules:
                yield Import(True, rest.split(".")[0], node.lineno, inside)


def edges(module: str, source: str, modules: "set[str]") -> List[str]:
    """Complaints about imports within the package."""
    found = []
    for item in imports(ast.parse(source), modules | set(LAYER)):
        if not item.own:
            continue
        if LAYER.get(item.name, 99) >= LAYER[module]:
            found.append(f"{module}.py:{item.line} imports {item.name}, which is not in a layer below")
        elif item.name not in ONLY.get(module, {item.name}):
            found.append(f"{module}.py:{item.line} imports {item.name}; it may import only {sorted(ONLY[module])}")
    return found


def is_standard(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    if spec is None:
        return False
    origin = spec.origin or ""
    library = Path(sysconfig.get_paths()["stdlib"])
    return origin in ("built-in", "frozen") or (
        library in Path(origin).parents and "site-packages" not in origin and "dist-packages" not in origin
    )


def foreign(module: str, source: str) -> List[str]:
    """Complaints about packages that are not among the run-time packages."""
    found = []
    for item in imports(ast.parse(source), set()):
        allowed = item.name in PACKAGES or (item.nested and (module, item.name) in OPTIONAL)
        if not (item.own or allowed or is_standard(item.name)):
            found.append(f"{module}.py:{item.line} imports {item.name}, not a run-time package")
    return found


def sources() -> Dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(PACKAGE.glob("*.py")) if path.stem != "__init__"}


def unplaced(modules: "set[str]") -> str:
    names = ", ".join(sorted(modules - set(LAYER)))
    return names and f"new module(s) {names}: place them in LAYERS of {Path(__file__).name}, by what they import"


def test_every_module_has_a_layer():
    assert not unplaced(set(sources())), unplaced(set(sources()))
    assert "place them in LAYERS" in unplaced({"field", "novelty"}) and "novelty" in unplaced({"novelty"})


def test_imports_go_down():
    modules = {name: text for name, text in sources().items() if name in LAYER}
    complaints = [line for name, text in modules.items() for line in edges(name, text, set(modules))]
    assert not complaints, "\n".join(complaints)


def test_the_package_itself_imports_nothing():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert not list(imports(tree, set(LAYER)))  # import art_edm stays instant


def test_only_run_time_packages_are_imported():
    complaints = [line for name, text in sources().items() for line in foreign(name, text)]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("module, source", [
    ("clock", "from .training import train"),
    ("clock", "from .grid import Grid"),  # a neighbour of the same layer
    ("field", "def late():\n    from art_edm.control import rollout"),
    ("field", "import art_edm.control"),
    ("field", "from art_edm import control"),
    ("field", "from . import denoiser, profile"),
    ("cli", "from .training import train"),
    ("cli", "from .grid import Grid"),  # below, yet not among what the command line may import
    ("grid", "if True:\n    from .unknown import x"),
])
def test_an_upward_import_is_found(module, source):
    assert len(edges(module, source, {"unknown"})) == 1


@pytest.mark.parametrize("module, source", [
    ("field", "from .denoiser import Denoiser"), ("cli", "from . import __version__"),
    ("training", "import art_edm.clock\nfrom . import control"), ("grid", "from .files import x"),
])
def test_a_downward_import_is_not_a_complaint(module, source):
    assert edges(module, source, set()) == []


@pytest.mark.parametrize("module, source, complaints", [
    ("plots", "def draw():\n    import matplotlib.figure", 0),
    ("plots", "import matplotlib", 1),
    ("report", "def draw():\n    import matplotlib", 1),
    ("grid", "def late():\n    import pandas.io", 1),
    ("grid", "from yaml import load", 1),
    ("grid", "import pytest, torch", 1),
    ("grid", "import torch.nn, os.path, numpy as np\nfrom PIL import Image\nimport _thread", 0),
])
def test_a_foreign_package_is_found(module, source, complaints):
    assert len(foreign(module, source)) == complaints
