"""The project as a whole: which file imports which, and doctests."""

import ast
import doctest
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {  # folder -> project folders that its files may import from; "" is the top
    "engine": {"engine"},
    "harness": {"engine", "harness"},
    "warmup": {"", "engine", "harness", "warmup"},
    "": {"", "engine", "harness", "warmup"},
}
MODULES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
LIGHT = ("rewards", "shapes", "plot_rewards", "report")  # must run without torch


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported_by(path: Path) -> set[str]:
    """Return the modules that a file imports, those of this project with their folder."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


OWN = {name_of(path): imported_by(path) for path in MODULES}
OWN = {name: imported & OWN.keys() for name, imported in OWN.items()}


def folder_of(name: str) -> str:
    return name.rpartition(".")[0]


@pytest.mark.parametrize("name", OWN)
def test_a_folder_imports_only_what_stands_below_it(name):
    assert {folder_of(other) for other in OWN[name]} <= FOLDERS[folder_of(name)]


def test_no_import_closes_a_loop():
    assert len(list(TopologicalSorter(OWN).static_order())) == len(OWN)  # raises CycleError


def test_the_algorithm_knows_no_task():
    assert not OWN["grpo"] & {"rewards", "shapes", "config", "evaluate", "main"}


def test_light_files_stay_light():
    assert packages_of("rewards") <= sys.stdlib_module_names
    allowed = sys.stdlib_module_names | {"numpy", "matplotlib", "PIL", "jinja2", "markupsafe"}
    own = {name.partition(".")[0] for name in OWN}
    for name in LIGHT:
        for each in reached_from(name):
            assert packages_of(each) <= allowed | own


def reached_from(name: str) -> set[str]:
    """Return a module and every project module that importing it imports."""
    return {name}.union(*(reached_from(other) for other in OWN[name]))


def packages_of(name: str) -> set[str]:
    imported = imported_by(ROOT / f"{name.replace('.', '/')}.py")
    return {each.partition(".")[0] for each in imported}


@pytest.mark.parametrize("name", OWN)
def test_examples_in_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


WINDOWS = """
import builtins, runpy, signal, sys
from os.path import dirname
root, found = sys.argv[1], builtins.__import__
def find(name, scope=None, *rest, **options):
    asks = dirname((scope or {}).get("__file__") or "")
    if name in ("fcntl", "resource") and asks in (root, f"{root}/harness"):
        raise ModuleNotFoundError(name)
    return found(name, scope, *rest, **options)
builtins.__import__ = find
del signal.SIGHUP
sys.path.insert(0, root)
for command in ("main", "evaluate", "cold_start"):
    try:
        runpy.run_path(f"{root}/{command}.py", run_name="__main__")
    except SystemExit as stop:
        print(stop)
"""


def test_windows_is_refused_in_one_line():
    """Windows is simulated: the project's own files find no fcntl, no resource and no SIGHUP."""
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS, str(ROOT)], capture_output=True, text=True, check=True
    )
    line = "This program runs on Linux and macOS. On Windows, run it in WSL\n"
    assert (done.stdout, done.stderr) == (3 * line, "")
