"""docs/perimeter.py and docs/ellipse.py: the tasks are what they say, and main.py trains them."""

import doctest
import json
import math
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, config_of
from test_main import SMALL

import evaluate
import main
import report
import rewards
import shapes
from harness.runlog import read_lines
from shapes import Shape, ShapeSpec

sys.path.append(str(ROOT / "docs"))

import ellipse
import perimeter

SPEC = ShapeSpec(5.0, 35.0, max_rotation=45.0)


@pytest.fixture
def undone(monkeypatch):
    """The functions and tables that the two files replace, restored after the test."""
    for module in (main, evaluate):
        for name in ("make_example", "make_prompt"):
            monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(Shape, "area", Shape.area)
    monkeypatch.setattr(rewards, "CLASS_WORDS", dict(rewards.CLASS_WORDS))
    for name in ("KINDS", "corners"):
        monkeypatch.setattr(shapes, name, getattr(shapes, name))


def first_step(tmp_path, *flags: str) -> tuple[dict, dict]:
    """The metrics and the sample of the first step of a run."""
    main.main([*SMALL, *flags, "--steps", "1", "--runs", str(tmp_path), "--name", "run"])
    return tuple(
        read_lines(tmp_path / "run" / f"{name}.jsonl")[0] for name in ("metrics", "samples")
    )


def test_examples_in_docstrings():
    assert doctest.testmod(perimeter).attempted == 2
    assert doctest.testmod(perimeter).failed == 0


def test_a_perimeter_is_that_of_the_outline():
    for index in range(40):
        example = perimeter.make_example(SPEC, seed=0, split="train", index=index)
        shape = example.shape
        if shape.kind == "circle":
            assert example.area == pytest.approx(math.pi * shape.width)
        elif shape.kind == "triangle":
            assert example.area > 2 * shape.width  # no side is longer than the two others
        else:
            assert example.area == pytest.approx(2 * (shape.width + shape.height))


def test_the_prompt_asks_for_the_perimeter_only():
    prompt = perimeter.make_prompt("think")
    assert "What is the perimeter of the shape, in grid units?" in prompt
    assert "area" not in prompt and "square" not in prompt
    assert prompt.endswith("<think>your reasoning</think><answer>X.XX</answer>")


def test_a_run_is_rewarded_for_perimeters(undone, tmp_path):
    perimeter.use_task()
    _, sample = first_step(tmp_path, "--eval-every", "1", "--eval-examples", "2")
    right = perimeter.perimeter(Shape(**sample["shape"]))
    assert sample["area"] == pytest.approx(right)
    for completion in sample["completions"]:
        error = rewards.relative_error(completion["predicted"], right)
        assert completion["area_correctness"] == pytest.approx(3 - 6 * error)
    before, after = read_lines(tmp_path / "run" / "evaluations.jsonl")
    assert (before["steps_done"], after["steps_done"]) == (0, 1)


def test_a_perimeter_earns_all_and_an_area_nothing(undone):
    perimeter.use_task()
    example = main.make_example(ShapeSpec(), seed=0, split="train", index=0)
    config = config_of("--preset", "tiny")
    for number, reward in ((example.area, 3.0), (example.shape.area, -3.0)):
        text = f"<reasoning>?</reasoning><answer>{number:.2f}</answer>"
        found = main.judge(config, [example], text, 0).area_correctness
        assert found == pytest.approx(reward, abs=0.01)


def test_the_held_out_evaluation_asks_for_perimeters_too(undone, tmp_path, monkeypatch):
    perimeter.use_task()
    flags = ["--examples", "4", "--image-size", "84", "--max-new-tokens", "4", "--show", "0"]
    files = ["--plot", str(tmp_path / "e.png"), "--json", str(tmp_path / "e.json")]
    evaluate.main([TINY, *flags, *files])
    for answer in json.loads((tmp_path / "e.json").read_text())["answers"]:
        assert answer["area"] == pytest.approx(perimeter.perimeter(Shape(**answer["shape"])))


def test_an_ellipse_has_the_area_of_its_pixels(undone):
    ellipse.add_ellipses()
    examples = [
        shapes.make_example(SPEC, seed=0, split="train", index=index, image_size=448)
        for index in range(40)
    ]
    kinds = {example.shape.kind for example in examples}
    assert kinds == {*shapes.KINDS} and "ellipse" in kinds
    for example in examples:
        shape = example.shape
        if shape.kind == "ellipse":
            color = (255 * np.array(shape.color)).round()
            inside = np.abs(np.asarray(example.image).astype(float) - color).max(-1) <= 1
            pixels_per_unit = 448 * 0.86 / 50
            ring = math.pi * math.sqrt((shape.width**2 + shape.height**2) / 2)  # of the black edge
            counted = inside.sum() / pixels_per_unit**2
            assert shape.area - ring * 2.5 / pixels_per_unit < counted < shape.area


def test_a_run_has_ellipses_too(undone, tmp_path):
    ellipse.add_ellipses()
    kinds = [
        main.make_example(SPEC, seed=0, split="train", index=index).shape.kind
        for index in range(200)
    ]
    assert kinds.count("ellipse") == pytest.approx(40, abs=15)
    metrics, sample = first_step(tmp_path, "--eval-every", "0")
    assert metrics["step"] == 0
    assert sample["shape"]["kind"] == "ellipse"
    report.main([str(tmp_path / "run")])
    assert rewards.names_shape("an ellipse", "ellipse")
