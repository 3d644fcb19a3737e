"""What holds for the project as a whole: who imports whom, and that examples in docstrings run."""

import ast
import doctest
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = {  # the import graph: file -> project files it may import
    "rewards": set(),
    "shapes": set(),
    "runlog": set(),
    "plot_rewards": set(),
    "report": {"plot_rewards", "shapes"},
    "parallel": set(),
    "fastpath": set(),
    "attention": {"fastpath"},
    "policy": {"attention"},
    "sampling": {"policy", "attention", "fastpath", "parallel"},
    "scoring": {"policy", "attention", "fastpath"},
    "grpo": {"policy", "sampling", "scoring", "parallel"},
    "checkpoint": {"policy", "parallel"},
    "health": {"parallel"},
    "memory": {"policy", "scoring"},
    "evaluate": {
        *("policy", "sampling", "rewards", "shapes", "runlog", "checkpoint", "parallel"),
        *("fastpath", "grpo"),
    },
    "cold_start": {"policy", "scoring", "rewards", "shapes", "fastpath"},
    "config": {"grpo", "policy", "rewards", "runlog", "shapes"},
    "main": {
        *("config", "grpo", "policy", "sampling", "rewards", "shapes", "evaluate", "runlog"),
        *("checkpoint", "health", "memory", "parallel", "fastpath"),
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
