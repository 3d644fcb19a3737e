"""README and docs/: links work, commands and flags exist, numbers are those of the code."""

import ast
import dataclasses
import importlib
import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import config
import main
from shapes import ShapeSpec, sample_shape

sys.path += [str(ROOT / "experiments"), str(ROOT / "benchmarks"), str(ROOT / "docs")]
import figures
import perimeter
import walkthrough

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/RESULTS.md"]
OTHERS = {  # flags of other programs
    *("--nproc-per-node", "--limit-mm-per-prompt", "--generation-config", "--enable-lora"),
    *("--max-lora-rank", "--lora-modules", "--standalone"),
}
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return text.replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_and_pictures_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# --- commands -----------------------------------------------------------------------------


def commands(page: Path) -> list[tuple[str, str]]:
    """The programs of this project that a page tells to run, each with its arguments."""
    text = page.read_text().replace("\\\n", " ")
    launchers = "python|accelerate launch|torchrun .*?"
    return re.findall(rf"(?:{launchers}) ((?:\w+/)?\w+\.py)([^\n`#;&|]*)", text)


def help_of(program: str, capsys) -> str:
    module = importlib.import_module(Path(program).stem)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_have_files_and_flags_that_exist(page, capsys):
    helps = {}
    for program, arguments in commands(page):
        assert (ROOT / program).is_file(), program
        if program in ("experiments/figures.py", "experiments/ablate.py"):
            continue  # a name, not flags
        flags = re.findall(r"(?<!\S)--[a-z][\w-]*", arguments)
        if flags and program not in helps:
            helps[program] = help_of(program, capsys)
        for flag in flags:
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", helps[program]), (program, flag)


def test_there_are_commands_to_check():
    assert len(commands(ROOT / "README.md")) > 10
    programs = {program for page in PAGES for program, _ in commands(page)}
    assert {"main.py", "evaluate.py", "report.py", "benchmarks/step.py"} <= programs


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_flags_that_are_named_exist(page, capsys):
    programs = ("main", "evaluate", "report", "plot_rewards", "shapes", "cold_start")
    programs += ("step", "memory", "growth", "faults", "gpu", "peers", "walkthrough")
    helps = "".join(help_of(program, capsys) for program in programs)
    known = set(re.findall(r"--[a-z][\w-]*", helps)) | OTHERS
    named = set(re.findall(r"(?<=[`\s])--[a-z][\w-]*", page.read_text()))
    assert named <= known


def test_figures_that_are_named_exist():
    for page in PAGES:
        for name in re.findall(r"python experiments/figures\.py (\w+)", page.read_text()):
            assert name in figures.ENTRIES


def test_every_option_is_documented():
    text = (ROOT / "docs/running.md").read_text()
    tables = text[text.index("## Options") : text.index("## The metrics")]
    rows = set(re.findall(r"^\| `(--[\w-]+)", tables, re.M))
    flags = set(re.findall(r"--[a-z][\w-]*", config.make_parser().format_help()))
    assert rows == {flag for flag in flags if not flag.startswith("--no-")}


DEFAULTS = {field.name: field.default for field in dataclasses.fields(config.Config)}


def rows_of(text: str) -> list[tuple[list[str], list[str]]]:
    """The rows of tables of options: the options' names, and the other cells."""
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `--")]
    return [
        (
            [name.replace("-", "_") for name in re.findall(r"--([\w-]+)", first)],
            [cell.strip().strip("`") for cell in rest],
        )
        for first, *rest in rows
    ]


def is_shown(value, cell: str) -> bool:
    if isinstance(value, bool):
        return cell == ("on" if value else "off")
    return float(cell) == value if isinstance(value, int | float) else cell == value


def test_the_defaults_in_the_docs_are_those_of_the_code():
    text = (ROOT / "docs/running.md").read_text()
    rows = rows_of(text[text.index("### Model") : text.index("## The metrics")])
    assert {name for (name,), _ in rows} == DEFAULTS.keys()
    for (name,), (default, tiny, _) in rows:
        if name not in ("model", "name"):  # a folder; none
            assert is_shown(DEFAULTS[name], default), name
            preset = config.PRESETS["tiny"].get(name)
            assert tiny == "" if preset is None else is_shown(preset, tiny), name


def test_the_defaults_in_the_readme_are_those_of_the_code():
    text = (ROOT / "README.md").read_text()
    rows = rows_of(text[text.index("## Flags people change") : text.index("## What a run leaves")])
    assert len(rows) == 10
    for names, (defaults, _) in rows:
        for name, default in zip(names, defaults.split(", "), strict=True):
            assert is_shown(DEFAULTS[name], default), name


# --- numbers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step() -> walkthrough.Step:
    return walkthrough.take_step()


@pytest.fixture(scope="module")
def blocks() -> dict[str, str]:
    return walkthrough.blocks()


def is_same(block: str, other: str) -> bool:
    """Whether words are equal, and numbers too but for one in the last digit: rounding differs."""
    words, others = block.split(), other.split()
    return len(words) == len(others) and all(map(is_same_word, words, others))


def is_same_word(word: str, other: str) -> bool:
    if word == other:
        return True
    if not re.fullmatch(r"[+-]?\d+\.\d+", word) or not re.fullmatch(r"[+-]?\d+\.\d+", other):
        return False
    digits = len(word.partition(".")[2])
    return abs(float(word) - float(other)) < 1.5 * 10**-digits


def test_one_in_the_last_digit_is_the_same_and_two_are_not():
    assert is_same("a 1.25  b", "a 1.26 b")
    assert not is_same("a 1.25 b", "a 1.27 b")
    assert not is_same("a 1.25 b", "c 1.25 b")


def test_the_numbers_of_the_walkthrough_are_those_of_the_step(blocks):
    page = (ROOT / "docs/walkthrough.md").read_text()
    shown = re.findall(r"^```\n(.*?)\n```$", page, re.S | re.M)
    assert len(shown) == len(blocks)
    for block, made in zip(shown, blocks.values(), strict=True):
        assert is_same(block, made), made


def test_the_numbers_in_the_text_of_the_walkthrough_stand_in_its_blocks():
    page = (ROOT / "docs/walkthrough.md").read_text().replace("\N{MINUS SIGN}", "-")
    blocks = re.findall(r"^```\n.*?\n```$", page, re.S | re.M)
    text = page
    for block in blocks:
        text = text.replace(block, "")
    numbers = re.findall(r"(?<![\w.])[+-]?\d\.\d{3,}", text)
    assert len(numbers) >= 7
    for number in numbers:
        assert number in "".join(blocks), number


def test_what_the_walkthrough_says_of_its_plot(step):
    page = (ROOT / "docs/walkthrough.md").read_text()
    shape = step.example.shape
    assert f"a {shape.kind} with base {shape.width:.1f} and height {shape.height:.1f}" in page
    assert f"**{shape.area:.2f}**" in page


def test_the_diagram_shows_the_rewards_and_advantages_of_the_walkthrough(step):
    diagram = (ROOT / "docs/img/step.svg").read_text().replace("\N{MINUS SIGN}", "-")
    shown = re.findall(r">([+-]?\d\.\d\d)<", diagram)
    rewards = [f"{reward.total:.2f}" for reward in step.rollout.rewards]
    advantages = [f"{advantage:+.2f}" for advantage in step.rollout.advantages[0]]
    assert shown == [*rewards, *advantages]
    assert f"true area {step.example.area:.2f}" in diagram


def test_the_functions_of_the_algorithm_stand_where_the_walkthrough_says():
    page = (ROOT / "docs/walkthrough.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| \[([\w/.]+)\]", page, re.M)
    assert len(rows) == 8
    for name, file in rows:
        nodes = ast.walk(ast.parse((ROOT / file).read_text()))
        assert set(name.split(".")) <= {getattr(node, "name", None) for node in nodes}


def test_the_code_of_the_exercises_is_that_of_the_runs():
    page = (ROOT / "docs/exercises.md").read_text()
    source = (ROOT / "experiments/ablate.py").read_text()
    blocks = re.findall(r"^```python\n(.*?)\n```$", page, re.S | re.M)
    assert len(blocks) == 2
    for block in blocks:
        assert textwrap.indent(block, 8 * " ") in source
        assert len(block.splitlines()) <= 10


def test_on_the_exercise_s_sizes_an_area_is_never_near_a_perimeter():
    """Area over perimeter grows with a shape: the least is that of the smallest right triangle."""
    spec, least = ShapeSpec(), 20 * 20 / 2 / (20 + 20 + 800**0.5)
    assert least == pytest.approx(2.93, abs=0.005)
    for index in range(1000):
        shape = sample_shape(spec, np.random.default_rng([0, 0, index]))
        assert shape.area >= least * perimeter.perimeter(shape)


def test_every_metric_is_in_the_glossary(step):
    page = (ROOT / "docs/running.md").read_text()
    glossary = page[page.index("## The metrics") : page.index("## When a curve")]
    rows = re.findall(r"^\| (`.+?) \|", glossary, re.M)
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == step.metrics.keys()


def test_the_table_of_the_readme_is_that_of_the_results():
    numbers = json.loads((ROOT / "experiments/results/tasks.json").read_text())["numbers"]
    assert figures.task_table(numbers["base"]) in (ROOT / "README.md").read_text()


# --- size ---------------------------------------------------------------------------------


def test_the_readme_is_read_in_one_sitting():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 2000


def test_the_loop_comes_first_in_a_short_file():
    source = (ROOT / "main.py").read_text()
    functions = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert functions[:2] == [main.train.__name__, main.take_step.__name__]
    assert len(source.splitlines()) <= 350


def test_the_top_level_is_what_users_type_and_what_readers_came_for():
    assert len(list(ROOT.glob("*.py"))) <= 9


def test_no_function_is_longer_than_a_screen():
    paths = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    assert len(paths) > 50
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, (path.name, node.name)
