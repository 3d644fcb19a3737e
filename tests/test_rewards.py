"""rewards.py: a table of texts, from well-behaved to hostile."""

import dataclasses

import pytest

from rewards import CORRECTNESS, SYSTEM_MESSAGE, make_prompt, parse_area, penalty, score

GOOD = "<reasoning>side 20</reasoning><answer>400.00</answer>"


def answer(text: str) -> str:
    return f"<reasoning>r</reasoning><answer>{text}</answer>"


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ("400.00", 3.0),
        ("440.00", 2.4),
        ("360.00", 2.4),
        ("600.00", 0.0),
        ("200.00", 0.0),
        ("0.00", -3.0),
        ("800.00", -3.0),
        ("99999.00", -3.0),
        ("-400.00", -3.0),
    ],
)
def test_correctness_by_hand(predicted, expected):
    assert score(answer(predicted), 400.0).area_correctness == pytest.approx(expected)


@pytest.mark.parametrize(
    ("correctness", "predicted", "expected"),
    [
        ("root", "400.00", 3.0),
        ("root", "404.00", 2.4),  # 1 % off: sqrt(0.01) = 0.1
        ("root", "300.00", 0.0),
        ("root", "800.00", -3.0),
        ("log", "400.00", 3.0),
        ("log", "565.69", 0.0),  # too large by sqrt(2)
        ("log", "282.84", 0.0),  # too small by as much
        ("log", "800.00", -3.0),
        ("log", "200.00", -3.0),
        ("log", "0.00", -3.0),
        ("log", "-400.00", -3.0),
        ("log", "4e-320", -3.0),
        ("log", "1e308", -3.0),
        *((name, "four", -3.0) for name in CORRECTNESS),
    ],
)
def test_other_shapes_of_the_area_reward(correctness, predicted, expected):
    reward = score(answer(predicted), 400.0, correctness=correctness)
    assert reward.area_correctness == pytest.approx(expected, abs=1e-4)
    linear = score(answer(predicted), 400.0)  # all else is the same
    assert dataclasses.replace(reward, area_correctness=linear.area_correctness) == linear


@pytest.mark.parametrize("correctness", CORRECTNESS)
def test_the_area_reward_falls_the_further_off_a_number_is(correctness):
    for direction in (1, -1):
        errors = [0, 0.01, 0.1, 0.3, 0.5, 0.9, 1, 3][: 8 if direction > 0 else 7]
        penalties = [
            penalty(50 * (1 + direction * e), 50.0, correctness=correctness) for e in errors
        ]
        assert penalties == sorted(penalties)
        assert (penalties[0], penalties[-1]) == (0, 1)


def test_a_shape_of_the_area_reward_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="must be one of linear, root, log"):
        penalty(1.0, 1.0, correctness="cubic")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("400", 400.0),
        ("400.", 400.0),
        ("400.0", 400.0),
        ("400.00", 400.0),
        ("  400.00\n", 400.0),
        ("+400", 400.0),
        ("-400", -400.0),
        ("4e2", 400.0),
        ("1,200.00", 1200.0),
        ("1,234,567", 1234567.0),
        ("400.00 square units", 400.0),
        ("about 400.00.", None),  # "400.00." is no number
        ("the area is 400", 400.0),
        ("$400$", 400.0),
        ("(400),", 400.0),
        ("", None),
        ("   ", None),
        ("four hundred", None),
        ("nan", None),
        ("inf", None),
        ("-inf", None),
        ("1e999", None),
        ("-1e999", None),
        ("1,20", None),
        ("1,2000", None),
        (".5", None),
        ("20 x 20 = 400", None),
        ("400 or 500", None),
        ("4_00", None),
        ("0x190", None),
        ("\u0664\u0660\u0660", None),  # Arabic digits
        ("\uff14\uff10\uff10", None),  # full-width digits
        ("²", None),
        ("9" * 101, None),
        ("9" * 1_000_000, None),
        ("<b>400</b>", None),
    ],
)
def test_which_numbers_are_read(text, value):
    assert parse_area(answer(text)) == value
    reward = score(answer(text), 400.0)
    assert reward.predicted == value
    assert -3.0 <= reward.area_correctness <= 3.0
    if value is None:
        assert reward.area_correctness == -3.0


@pytest.mark.parametrize(
    ("text", "rewarded"),
    [
        ("400.00", True),
        (" 400.00 ", True),
        ("0.00", True),
        ("400", False),
        ("400.0", False),
        ("400.000", False),
        (".00", False),
        ("+400.00", False),
        ("-400.00", False),
        ("1,200.00", False),
        ("400.00 square units", False),
        ("400,00", False),
        ("\uff14\uff10\uff10.\uff10\uff10", False),
        ("", False),
    ],
)
def test_two_decimals(text, rewarded):
    assert score(answer(text), 400.0).area_format == (0.5 if rewarded else 0.0)


@pytest.mark.parametrize(
    ("completion", "rewarded"),
    [
        (GOOD, True),
        (f" \n{GOOD}\n ", True),
        ("<reasoning>a\nb < c</reasoning>\n\n<answer>400</answer>", True),
        ("<reasoning></reasoning><answer></answer>", True),
        (f"Sure! {GOOD}", False),
        (f"{GOOD} Done.", False),
        ("<reasoning>r</reasoning> so <answer>4</answer>", False),
        (GOOD + GOOD, False),
        ("<answer>4</answer><reasoning>r</reasoning>", False),
        ("<reasoning>r<answer>4</answer></reasoning>", False),
        ("<reasoning>r</reasoning><answer>4", False),
        ("<reasoning>r<answer>4</answer>", False),
        ("<reasoning>r</reasoning><answer>4</answer><answer>4</answer>", False),
        ("<reasoning><reasoning>r</reasoning><answer>4</answer>", False),
        ("<REASONING>r</REASONING><ANSWER>4</ANSWER>", False),
        ("<think>r</think><answer>4</answer>", False),
        ("<reasoning >r</reasoning><answer>4</answer>", False),
        ("", False),
        ("400.00", False),
    ],
)
def test_strict_xml(completion, rewarded):
    assert score(completion, 400.0).xml_format == (0.5 if rewarded else 0.0)


def test_the_reasoning_tag_is_that_of_the_prompt():
    for tag in ("reasoning", "think"):
        completion = f"<{tag}>r</{tag}><answer>400.00</answer>"
        assert f"<{tag}>your reasoning</{tag}><answer>X.XX</answer>" in make_prompt(tag)
        assert score(completion, 400.0, reasoning_tag=tag).total == pytest.approx(4.0)
        other = "think" if tag == "reasoning" else "reasoning"
        assert score(completion, 400.0, reasoning_tag=other).xml_format == 0.0
    assert "grid" in SYSTEM_MESSAGE


@pytest.mark.parametrize(
    "completion",
    [
        GOOD.replace("<answer>", "<answer>1.00</answer><answer>"),  # two answers
        "<answer>" * 2 + "400.00</answer>",
        "</answer>400.00<answer>",
        "400.00",
        "<answer>400.00",
    ],
)
def test_without_exactly_one_answer_nothing_is_read(completion):
    reward = score(completion, 400.0)
    assert (reward.area_correctness, reward.area_format) == (-3.0, 0.0)


MEGA = 1_000_000


@pytest.mark.parametrize(
    "completion",
    [
        "<answer>" * MEGA,
        "<reasoning>" * MEGA + "</answer>" * MEGA,
        "<reasoning>" + " " * MEGA + "</reasoning>" + " " * MEGA + "x<answer></answer>",
        "<reasoning></reasoning>" + "\n" * MEGA + "<answer>" + "9" * MEGA + "</answer>",
        answer("1," * MEGA),
        answer(" " * MEGA + "400.00" + " " * MEGA),
        "<" * MEGA,
        "\x00\ud800<|image_pad|>\u2028" * 1000,
    ],
    ids=range(8),
)
def test_hostile_texts_are_judged_like_any_other(completion):
    reward = score(completion, 400.0)
    assert -3.0 <= reward.total <= 4.0


def test_the_totals_bounds():
    assert score(GOOD, 400.0).total == 4.0
    assert score("", 400.0).total == -3.0
