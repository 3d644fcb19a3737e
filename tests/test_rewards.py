"""rewards.py: tables of texts, from well-behaved to hostile."""
# ruff: noqa: RUF001 - these texts need ambiguous Unicode characters

import dataclasses
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
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
    linear = score(answer(predicted), 400.0)  # the rest must be equal
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


READ = [  # text of the answer, number that is parsed
    ("400", 400.0),
    ("400.", 400.0),
    ("400.0", 400.0),
    ("400.00", 400.0),
    ("400.00.", 400.0),
    ("400.00!", 400.0),
    ("  400.00\n", 400.0),
    ("+400", 400.0),
    ("-400", -400.0),
    ("= -400", -400.0),
    ("4e2", 400.0),
    ("4e-2", 0.04),
    ("1,200.00", 1200.0),
    ("1,234,567", 1234567.0),
    # words
    ("about 400.00.", 400.0),
    ("~400.00", 400.0),
    ("approx. 400.00", 400.0),
    ("The area under the shape is 400.00", 400.0),
    ("about 400.00, not exact", 400.0),
    ("__400.00__", 400.0),
    ("### 400.00", 400.0),
    ("Area_{square} = 400.00", 400.0),
    (r"\displaystyle 400.00", 400.0),
    ("20 by 20 = 400.00", 400.0),
    ("400 pixels", 400.0),
    ("400 square units.", 400.0),
    ("So, 400", 400.0),
    ("the area is 400", 400.0),
    ("The area is 400.00.", 400.0),
    ("The area of the square is approximately equal to 400.00 square grid units.", 400.0),
    ("The shape’s total area is: 400.00", 400.0),
    ("A rectangle with an area of 400", 400.0),
    ("400.00 is the area.", 400.0),
    ("I would say that it comes to some 400.00 in all", 400.0),
    ("side = 400", 400.0),  # the name does not matter
    ("Area=400.00", 400.0),
    ("area:400.00", 400.0),
    ("Area (in square units): 400", 400.0),
    ("≈400.00", 400.0),
    ("area =-400", -400.0),
    # units
    ("400.00 square units", 400.0),
    ("400.00 Square Units", 400.0),
    ("400.00units", 400.0),
    ("400 grid squares", 400.0),
    ("400 cells", 400.0),
    ("400 sq. units", 400.0),
    ("400 square unit(s)", 400.0),
    ("400 square meters", 400.0),
    ("400 units squared", 400.0),
    ("400 units^2", 400.0),
    ("400 units**2", 400.0),
    ("400 u²", 400.0),
    ("400.00 m", 400.0),
    ("400.00cm²", 400.0),
    ("400.00cm2", 400.0),
    ("400.00 cm².", 400.0),
    ("400.00 cm^2.", 400.0),
    ("400.00 cm2.", 400.0),
    ("400.00 units squared.", 400.0),
    ("400.00 cm**2.", 400.0),
    (r"The area is $20 \times 20 = \boxed{400.00}$ cm².", 400.0),  # as the README has it
    ("400.00 cm2.5", None),
    ("400.00 cm^2", 400.0),
    ("400.00 (cm ²)", 400.0),
    # quotes, brackets, Markdown
    ("(400),", 400.0),
    ("[400.00]", 400.0),
    ("{400.00}", 400.0),
    ("'400.00'", 400.0),
    ('"400.00"', 400.0),
    ("‘400.00’", 400.0),
    ("“400.00”", 400.0),
    ("`400.00`", 400.0),
    ("*400.00*", 400.0),
    ("**400.00**", 400.0),
    ("***400.00***!", 400.0),
    ("**Area:** 400.00", 400.0),
    ("**20*20 = 400.00**", 400.0),
    ('{"area": 400.00}', 400.0),
    ("{'shape': 'square', 'area': '400.00', 'units': 'square units'}", 400.0),
    # LaTeX
    ("$400$", 400.0),
    ("$$400$$ .", 400.0),
    (r"\(400.00\)", 400.0),
    (r"\[400.00\]", 400.0),
    (r"\boxed{400.00}", 400.0),
    (r"$\boxed{400.00}$", 400.0),
    (r"The answer is $\boxed{400.00\,\text{cm}^2}$.", 400.0),
    (r"\left(\mathbf{400.00}\right)", 400.0),
    (r"400.00 \text{ cm}^{2}", 400.0),
    (r"400.00\,\text{square units}", 400.0),
    (r"400.00\quad\mathrm{units}^2", 400.0),
    (r"\text{Area} = 400", 400.0),
    (r"\sqrt{400} \cdot 20 = 400", 400.0),
    (r"\approx400", 400.0),
    ("1{,}200.50", 1200.5),
    # results of calculations
    ("20*20=400.00", 400.0),
    ("20 x 20 = 400", 400.0),
    ("20X20=400", 400.0),
    ("20×20 = 400.00", 400.0),
    ("20 · 20 = 400.00", 400.0),
    ("20 * 20 equals 400", 400.0),
    ("20 cm x 20 cm = 400 cm²", 400.0),
    ("Area = 20*20 = 400.00", 400.0),
    ("The area of the square is 20 × 20 = 400.00 square units.", 400.0),
    ("(20)(20) = 400", 400.0),
    ("(20+20)/2 * (30 - 10) = 400", 400.0),
    ("20 × 40 ÷ 2 = 400", 400.0),
    ("½bh = ½ * 20 * 40 = 400", 400.0),
    ("(1/2)bh = 400", 400.0),
    ("Area = Length x Width = 400", 400.0),
    ("Area = side² = 20**2 = 400", 400.0),
    (r"20\times20=400", 400.0),
    (r"20 \cdot 20 = 400", 400.0),
    (r"\boxed{\frac{1}{2} \times 20 \times 40 = 400}", 400.0),
    (r"800\div2 = 400", 400.0),
    ("pi*10^2 = 314.16", 314.16),
    ("100π ≈ 314.16", 314.16),
    (r"100\pi \approx 314.16", 314.16),
    ("A = πr² = π(10)^2 ≈ 314.16", 314.16),
]

NOT_READ = [
    # no number
    "",
    "   ",
    "four hundred",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1e999",
    ".5",
    "9" * 101,
    "9" * 1_000_000,
    # not a number in this notation
    "1,20",
    "1,2000",
    "4,00",
    "0,400",
    "1 200.50",
    "1'200.50",
    "1.200,50",
    r"1\,200",
    "4_00",
    "0x190",
    "4 e2",
    "400.00.5",
    "400..5",
    "1.2.3",
    "v1.2",
    "2024-01-02",
    "01/02/2024",
    "12:30",
    "- 400",
    "400-",
    "+-400",
    "area-400",
    "(area)-400",
    "4{00}",
    r"4\text{00}",
    # words and signs that change the number
    "half of 400",
    "the square of 20",
    "the square root of 400",
    "4 hundred",
    "2 thousand",
    "400k",
    "400M",
    "400 M",
    "20 squared",
    "(20 cm)^2",
    r"(20 \text{cm})^{2}",
    "400 cm³",
    "400 m^3",
    "40%",
    "40 %",
    r"40\%",
    "40 percent",
    "40 per cent",
    "400 pct",
    "400 dozen",
    "400 divided by two",
    "400 and three quarters",
    "400 point five",
    "400 trillion",
    "a fifth of 400",
    "400, doubled",
    "400, halved",
    "20 cells squared",
    "up to 400",
    "over 400",
    "under 400",
    "no 400",
    "wrong: 400",
    "400 K",
    "sin(400)",
    "log 400",
    "max(400)",
    "20 x",
    "20 X",
    ". 5",
    ".{5}",
    r".\text{5}",
    ",{5}",
    "400°",
    "√400",
    "400½",
    "20A",
    "not 400",
    "400 or more",
    "at least 400",
    "<b>400</b>",
    # two numbers
    "400 or 500",
    "between 390 and 400",
    "390-400",
    "390–400",
    "390~400",
    "[390, 400]",
    "400 400.00",
    "400 ± 5",
    "400 +- 5",
    "400 (20 x 20)",
    "area = 400, side = 20",
    "side = 20, area = 400",
    '{"area": 400, "side": 20}',
    "Figure 1: 400",
    # not calculated
    "20^2",
    "20²",
    "20**2",
    "20 ^ {2}",
    "3/4",
    r"\frac{400}{1}",
    r"\sqrt{400}",
    "20x20",
    "20x2",
    "20 × 20",
    "20*20",
    "20 times 20",
    "20*",
    "*20",
    "×20",
    "x20 = 400",
    "100π",
    "100 pi",
    r"100\pi",
    r"4 \times 10^2",
    "20*20 =",
    # not a chain of calculations that ends in one number
    "400 = 400.00",
    "400=20*20",
    "400 = 500",
    "20*20 = 400 = 500",
    "20*20 = 400, 500",
    "20*20 400 = 500",
    "20*20 +- 5 = 400",
    "400 is 20 squared",
    "40000 cm² = 4 m²",
    "40000 (cm²) = 4 (m²)",
    "500 (20*20 = 400)",
    r"\boxed{500} (20*20 = 400)",
    "500 (π(10)^2 = 314.16)",
    "4x = 400",
    "4x + 2 = 402",
    "1,200, 20*20 = 400",
    "half the area = 200",
    "area/2 = 200",
    "area*2 = 800",
    "2 × area = 800",
    "2(area) = 800",
    "area*400",
    "area * 400",
    "area != 400",
    "area =! 400",
    "area ≠ 400",
    "area < 400",
    "area >= 400",
    "20*20 => 400",
    r"area \neq 400",
]
FOREIGN_DIGITS = [  # "400" in Arabic and in full-width digits, and similar
    "\u0664\u0660\u0660",
    "\uff14\uff10\uff10",
    "400\u0660",
    "400 \u0660",
    "²",
    "4²",
]


@pytest.mark.parametrize(
    ("text", "value"), [*READ, *((text, None) for text in NOT_READ + FOREIGN_DIGITS)]
)
def test_which_numbers_are_read(text, value):
    assert parse_area(answer(text)) == value
    reward = score(answer(text), 400.0)
    assert reward.predicted == value
    assert -3.0 <= reward.area_correctness <= 3.0
    if value is None:
        assert reward.area_correctness == -3.0


# "@" and "#" stand for two different numbers.
ONE_NUMBER = [
    *("@", "@.", "-@", "~@", "≈@", "=@", "(@)", "**@**", "`@`", '"@"', "$@$", "\\[@\\]", "@cm²"),
    *("\\boxed{@}", "@ units^2", "The area is @ square units.", "Area = @", '{"area": @}'),
    *("20*20 = @", "A = πr² = π(10)^2 ≈ @ \\text{cm}^2", "\\frac{1}{2}\\times20\\times40 = @"),
]
TWO_NUMBERS = [
    *("@ or #", "between @ and #", "@ #", "@\n#", "@; #", "@ (#)", "@(#)", "@-#", "@ - #", "@–#"),
    *("@/#", "@*#", "@×#", "@ x #", "@^#", "@ ± #", "@ +- #", "@ +/- #", "@~#", "@:#", "@ = #"),
    *("@ ≈ #", "\\boxed{@} \\boxed{#}", "\\frac{@}{#}", "@\\pi#", "@ cm² = # m²", "@ is #"),
    *("area = @, side = #", "side = @, area = #", '{"area": @, "side": #}', "area: @ area: #"),
    *("@ (20*20 = #)", "\\boxed{@}(20*20 = #)", "20*20 = @ = #", "@ = 20*20 = #", "**@** #"),
]
HUNDREDTHS = st.integers(0, 10**9)
FORMATS = st.sampled_from(["{:.2f}", "{:,.2f}", "{:.0f}", "{:,.0f}", "{:.4f}", "{:e}"])
FIXED = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@FIXED
@given(HUNDREDTHS, FORMATS, st.sampled_from(ONE_NUMBER))
def test_in_any_dressing_a_number_is_read_as_it_is_written(hundredths, form, template):
    number = form.format(hundredths / 100)
    written = float(number.replace(",", ""))
    expected = -written if template.startswith("-") else written
    assert parse_area(answer(template.replace("@", number))) == expected


@FIXED
@given(HUNDREDTHS, HUNDREDTHS, FORMATS, st.sampled_from(TWO_NUMBERS))
def test_of_two_numbers_none_is_read(first, second, form, template):
    numbers = [form.format(hundredths / 100) for hundredths in (first, second)]
    text = template.replace("@", numbers[0]).replace("#", numbers[1])
    assert parse_area(answer(text)) is None


PIECES = [
    *"4.,=*²(){}[]\\πx×%~$!mMaA:+-/'\"±_٤ \n",
    *("20", "400.00", "7.5", "1,200", "e2", "**", "^", "^2", "\\text{", "\\frac", "\\sqrt", "\\pi"),
    *("pi", " cm", " square", " units", "area", " of ", " is ", " or ", " squared", "half "),
]


@FIXED
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text())
def test_a_number_that_is_read_stands_in_the_answer(text):
    value = parse_area(answer(text))
    literals = re.findall(r"[+-]?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?", text.replace(",", ""))
    assert value is None or value in map(float, literals)
    assert value is None or math.isfinite(value)


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
        ("<reasoning>r</reasoning><answer>unknown</answer>", True),
        ("<reasoning></reasoning><answer></answer>", False),
        ("<reasoning></reasoning><answer>400.00</answer>", False),
        ("<reasoning>r</reasoning><answer></answer>", False),
        ("<reasoning> \n</reasoning><answer>400.00</answer>", False),
        ("<reasoning>r</reasoning><answer>\t\u2003</answer>", False),
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


# --- what the rewards do not see ------------------------------------------------------------

NAMED = [  # reasoning, class, whether it names that class and no other
    ("square, side 27: 27 * 27", "square", True),
    ("It is a Square.", "square", True),
    ("a square or a rectangle", "square", False),
    ("a rectangle", "square", False),
    ("an area of 20 square units", "rectangle", None),
    ("20 square grid units, 30 square cm, the square root, the square of 5", "square", None),
    ("a triangular shape of 20 square units", "triangle", True),
    ("two circles", "circle", True),
    ("a circular disc in square units", "circle", True),
    ("", "circle", None),
]


@pytest.mark.parametrize(("reasoning", "kind", "named"), NAMED)
def test_a_class_is_named_alone(reasoning, kind, named):
    assert rewards.names_shape(reasoning, kind) is named


REASONED = [  # reasoning, answer, whether it follows, whether the arithmetic is right
    ("square, side 27: 27 * 27", 729.0, True, True),
    ("square, side 27: 27 * 27", 700.0, False, False),
    ("square, side 26: side * side", 676.0, True, True),
    ("square, side 26: side * side", 689.85, False, False),
    ("rectangle, width 24, height 28: width * height", 672.0, True, True),
    ("circle, diameter 24: pi * (diameter / 2)^2", 452.39, True, True),
    ("circle, diameter 24: pi * 24^2 / 4", 452.39, True, True),
    ("circle, radius 12: 3.14 * 12^2", 452.16, True, True),
    ("width × height = 24 × 28 = 672 square units.", 672.0, True, True),
    ("24 × 28 = 680, so the area is 680", 680.0, True, False),
    ("24 x 28 = 672", 680.0, False, True),
    ("A base of 24 and a height of 20.6. Area = (1/2) * base * height = 247.2", 247.2, True, True),
    (r"Area = \frac{1}{2} \times 24 \times 20 = 240 \text{ cm}^2", 240.0, True, True),
    ("The radius is 12, so the area is π(12)² ≈ 452.39.", 452.39, True, True),
    ("r = 12, so pi * r^2", 452.39, True, True),
    ("20 * 22 + 5 * 22 = 440 + 110 = 550 / 2", 275.0, True, True),
    ("36 - 12 = 24 wide, 40 - 20 = 20 high: 24 * 20", 480.0, True, True),
    ("36 - 12 = 25 wide, 40 - 20 = 20 high: 25 * 20", 500.0, True, False),
    ("1,200 + 34", 1234.0, True, True),
    ("r = 12.0. 3.14159 * 12.0 * 12.0 = 452.389", 452.39, True, True),
    ("the height is 43 - 15 = 28. 24 * 28 = 672.", 672.0, True, True),
    ("24 * 28 = 20 * 28 + 4 * 28 = 560 + 112", 672.0, True, True),
    ("\\[ A = \\pi r^2 = \\pi (12.5)^2 = 490.87 \\]", 490.87, True, True),
    ("the area is 400", 400.0, True, None),
    ("side 20", 400.0, False, None),
    ("no number", 400.0, None, None),
    ("20 * 20", None, None, None),
    ("20 * 20 = 400", None, None, True),
]


@pytest.mark.parametrize(("reasoning", "predicted", "follows", "right"), REASONED)
def test_whether_an_answer_follows_from_the_words(reasoning, predicted, follows, right):
    values = rewards.values_in(reasoning)
    assert rewards.answer_follows(values, predicted) is follows
    assert rewards.arithmetic_is_right(values, predicted) is right


def test_one_percent_is_close_and_two_are_not():
    assert rewards.is_close(100.9, 100.0)
    assert not rewards.is_close(102.0, 100.0)
    assert rewards.is_close(0.333, 1 / 3)  # two decimals of a small number


def test_the_words_are_checked_only_where_the_class_is_known():
    text = "<reasoning>square, side 20: 20 * 20</reasoning><answer>400.00</answer>"
    known, unknown = score(text, 400.0, kind="square"), score(text, 400.0)
    assert (known.shape_named, known.answer_follows, known.arithmetic_right) == (True,) * 3
    assert (unknown.shape_named, unknown.answer_follows, unknown.arithmetic_right) == (None,) * 3
    assert known.total == unknown.total == 4.0  # there is no reward for them


def test_the_answer_block_is_no_part_of_the_reasoning():
    wrong = score(
        "<reasoning>square</reasoning><answer>20 * 20 = 400</answer>", 400.0, kind="square"
    )
    assert (wrong.predicted, wrong.answer_follows) == (400.0, None)


PIECES = st.sampled_from(
    [
        *("1", "9", ".", " ", "*", "**", "^", "/", "-", "+", "(", ")", "=", "pi", "sqrt", "width"),
        *("a", "side 3", "\\frac{", "}", "{", "²", "x", "1,000", "units", "square", "e", "_", "\n"),
    ]
)


@given(st.lists(PIECES, max_size=400).map("".join))
def test_no_reasoning_makes_the_checks_raise(text):
    reward = score(f"{text}<answer>9.00</answer>", 9.0, kind="square")
    for check in (reward.shape_named, reward.answer_follows, reward.arithmetic_right):
        assert check in (True, False, None)


@pytest.mark.parametrize("text", ["9**9" * 500, "(" * 5000, "2^" * 900, "*a" * 9000, "=1" * 9000])
def test_hostile_arithmetic_has_no_value(text):
    assert score(f"{text}<answer>9.00</answer>", 9.0, kind="square").arithmetic_right is None


def bracketed(parts):
    return st.tuples(parts, st.sampled_from("+-*/"), parts).map(lambda each: f"({' '.join(each)})")


@given(st.recursive(st.integers(1, 99).map(str), bracketed, max_leaves=8))
def test_arithmetic_is_that_of_python(expression):
    try:
        expected = float(eval(expression))
    except ZeroDivisionError:
        expected = None
    assert rewards.value_of(expression) == (None if expected is None else pytest.approx(expected))


def test_weights_change_the_total_and_nothing_else():
    text = "<reasoning>r</reasoning><answer>400.00</answer>"
    plain, weighted = score(text, 400.0), score(text, 400.0, weights=(2.0, 0.0, 10.0))
    assert (plain.total, weighted.total) == (4.0, 11.0)
    assert dataclasses.replace(weighted, weights=plain.weights) == plain
