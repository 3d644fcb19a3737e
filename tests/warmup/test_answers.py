"""warmup/answers.py: perfect and flawed answers, and that each follows from its words."""

import numpy as np
import pytest

from rewards import score
from shapes import KINDS, Shape, ShapeSpec, make_example
from warmup.answers import Flaws, encode_answers, random_shape, read, written_answer

WIDE = ShapeSpec(min_size=5.0, max_size=35.0)


def shape_of(kind: str, width: float, height: float) -> Shape:
    return Shape(kind, width, height, (25.0, 25.0), (), (0, 0, 0))


def answers_and_shapes(tag: str = "reasoning", **flaws: float):
    rng = np.random.default_rng(0)
    for i in range(200):
        shape = make_example(WIDE, seed=0, split="cold_start", index=i).shape
        yield written_answer(shape, reasoning_tag=tag, flaws=Flaws(**flaws), rng=rng), shape


@pytest.mark.parametrize(
    ("shape", "answer"),
    [
        (shape_of("rectangle", 24.4, 28.1), "rectangle, width 24.5, height 28.0: 24.5 * 28.0=686"),
        (shape_of("circle", 20.1, 20.1), "circle, diameter 20.0: pi * 20.0^2 / 4=314.16"),
        (shape_of("square", 26.9, 26.9), "square, side 27.0: 27.0 * 27.0=729"),
        (shape_of("triangle", 9.7, 6.1), "triangle, base 9.5, height 6.0: 9.5 * 6.0 / 2=28.50"),
    ],
)
def test_perfect_answers_by_hand(shape, answer):
    reasoning, _, area = answer.partition("=")
    written = written_answer(
        shape, reasoning_tag="think", flaws=Flaws(), rng=np.random.default_rng(0)
    )
    assert written.startswith(f"<think>{reasoning}</think><answer>{area}")


@pytest.mark.parametrize("tag", ["reasoning", "think"])
def test_a_perfect_answer_is_as_right_as_its_rounding(tag):
    for answer, shape in answers_and_shapes(tag):
        reward = score(answer, shape.area, kind=shape.kind, reasoning_tag=tag)
        off = sum(0.25 / size for size in (shape.width, shape.height))
        assert reward.relative_error < 1.1 * off
        assert reward.area_format + reward.xml_format == 1.0
        assert reward.shape_named and reward.answer_follows and reward.arithmetic_right


@pytest.mark.parametrize("flaw", ["sloppy", "mistakes", "misread"])
def test_a_flawed_answer_follows_from_its_words_too(flaw):
    """Rounded to whole numbers, a small area is off by more than the 1 % that is allowed."""
    for answer, shape in answers_and_shapes(**{flaw: 1.0}):
        reward = score(answer, shape.area, kind=shape.kind)
        assert reward.shape_named
        assert reward.answer_follows or (flaw == "sloppy" and reward.predicted < 50)


def test_a_sloppy_answer_lacks_format_but_has_the_area():
    rewards = [score(answer, shape.area) for answer, shape in answers_and_shapes(sloppy=1.0)]
    assert all(r.area_format + r.xml_format < 1.0 for r in rewards)
    assert all(r.relative_error < 0.1 for r in rewards)
    assert {(r.area_format, r.xml_format) for r in rewards} == {(0, 0), (0, 0.5), (0.5, 0)}


def test_mistakes_put_the_half_in_the_wrong_place():
    expected = {
        "rectangle": lambda shape: shape.width * shape.height / 2,
        "circle": lambda shape: shape.width**2 / 2,
        "square": lambda shape: shape.width**2 / 2,
        "triangle": lambda shape: shape.width * shape.height,
    }
    for answer, shape in answers_and_shapes(mistakes=1.0):
        reward = score(answer, expected[shape.kind](shape))
        assert reward.relative_error < 0.1
        assert reward.area_format + reward.xml_format == 1.0


def test_a_misread_dimension_is_off_by_6_to_25_percent():
    rng = np.random.default_rng(0)
    off = [abs(read(100.0, 1.0, rng) / 100 - 1) for _ in range(500)]
    assert 0.06 <= min(off) < 0.07
    assert 0.24 < max(off) <= 0.25
    assert {read(24.3, 0.0, rng), read(0.1, 0.0, rng)} == {24.5, 0.5}


def test_random_shapes_have_the_sizes_of_drawn_ones():
    rng = np.random.default_rng(0)
    shapes = [random_shape(WIDE, rng) for _ in range(400)]
    drawn = [make_example(WIDE, seed=0, split="cold_start", index=i).shape for i in range(400)]
    for kind in KINDS:
        means = [
            np.mean([shape.area for shape in some if shape.kind == kind])
            for some in (shapes, drawn)
        ]
        assert means[0] == pytest.approx(means[1], rel=0.2)


def test_answers_end_in_the_stop_token(processor):
    ids, lengths = encode_answers(processor.tokenizer, ["12.50", "7"])
    stop = processor.tokenizer.eos_token_id
    assert [row[n - 1] for row, n in zip(ids, lengths, strict=True)] == [stop, stop]
    assert lengths == [6, 2]
