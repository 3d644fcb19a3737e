"""What holds for the project as a whole: who imports whom, and that examples in docstrings run."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = {  # the import graph: file -> project files it may import
    "terminal": set(),
    "machine": set(),
    "model_files": set(),
    "rewards": set(),
    "shapes": {"terminal"},
    "runlog": set(),
    "plot_rewards": {"shapes", "terminal"},
    "report": {"plot_rewards", "shapes", "terminal"},
    "parallel": set(),
    "fastpath": set(),
    "attention": {"fastpath"},
    "policy": {"attention", "machine", "model_files"},
    "sampling": {"policy", "attention", "fastpath", "parallel"},
    "scoring": {"policy", "attention", "fastpath"},
    "grpo": {"policy", "sampling", "scoring", "parallel"},
    "checkpoint": {"policy", "parallel"},
    "health": {"parallel"},
    "memory": {"policy", "scoring"},
    "evaluate": {
        *("policy", "sampling", "rewards", "shapes", "runlog", "checkpoint", "parallel"),
        *("fastpath", "grpo", "config", "terminal"),
    },
    "cold_start": {
        *("policy", "scoring", "rewards", "shapes", "fastpath", "config", "parallel", "terminal"),
    },
    "config": {"grpo", "model_files", "policy", "rewards", "runlog", "shapes"},
    "main": {
        *("config", "grpo", "policy", "sampling", "rewards", "shapes", "evaluate", "runlog"),
        *("checkpoint", "health", "memory", "parallel", "fastpath", "terminal", "machine"),
    },
}


def imported_by(module: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_all_files_are_in_the_graph():
    assert {path.stem for path in ROOT.glob("*.py")} == IMPORTS.keys()


@pytest.mark.parametrize("module", IMPORTS)
def test_import_graph(module):
    assert imported_by(module) & IMPORTS.keys() <= IMPORTS[module]


def test_light_files_stay_light():
    assert imported_by("rewards") <= sys.stdlib_module_names
    for module in ("shapes", "plot_rewards", "report"):
        assert "torch" not in imported_by(module)


@pytest.mark.parametrize("module", IMPORTS)
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


WINDOWS = """
import builtins, runpy, signal, sys
from os.path import dirname
root, found = sys.argv[1], builtins.__import__
def find(name, scope=None, *rest, **options):
    if name in ("fcntl", "resource") and dirname((scope or {}).get("__file__") or "") == root:
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
    """Where this project's own files find no fcntl, no resource and no SIGHUP."""
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS, str(ROOT)], capture_output=True, text=True, check=True
    )
    line = "This runs on Linux and macOS. On Windows: in WSL, which is a Linux\n"
    assert (done.stdout, done.stderr) == (3 * line, "")
