"""What the model is asked, and how its answer is judged. Standard library only.

The text that is judged comes from a model: it may be empty, huge, malformed or hostile. Nothing
here raises on it, and the time is linear in its length.
"""

import math
import re
from dataclasses import dataclass

CORRECTNESS_MIN, CORRECTNESS_MAX = -3.0, 3.0  # bounds of the area reward
AREA_FORMAT_REWARD = 0.5
XML_FORMAT_REWARD = 0.5
CORRECTNESS = ("linear", "root", "log")  # shapes of the area reward: see `penalty`
REASONING_TAGS = ("reasoning", "think")
MAX_ANSWER_CHARS = 100  # a longer answer is not a number

TWO_DECIMALS = re.compile(r"[0-9]+\.[0-9]{2}")
NUMBER = re.compile(r"[+-]?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)(\.[0-9]*)?([eE][+-]?[0-9]+)?")
AROUND_A_NUMBER = "$~=:;,()[]*"  # "(400)," is read as 400; a full stop is read as a decimal point

SYSTEM_MESSAGE = (
    "You read geometric figures off plots. "
    "Measure with the axes, the tick labels and the grid lines before you calculate."
)
PROMPT = (
    "The plot shows one shape on a grid whose axes run from 0 to 50. "
    "What is the area of the shape, in square grid units? "
    "Reason briefly: name the shape, read its dimensions off the axes, and apply the area formula. "
    "Then give the area as a number with exactly two decimals. "
    "Answer in this form, with nothing after it:\n"
    "<{tag}>your reasoning</{tag}><answer>X.XX</answer>"
)


@dataclass(frozen=True, slots=True)
class Reward:
    """The three rewards of one completion, and what was read from it (None: no number)."""

    area_correctness: float  # in [-3, 3]
    area_format: float  # 0 or 0.5
    xml_format: float  # 0 or 0.5
    predicted: float | None
    relative_error: float  # in [0, 1], 1 where no number could be read

    @property
    def total(self) -> float:
        """The sum of the three, in [-3, 4]."""
        return self.area_correctness + self.area_format + self.xml_format


def make_prompt(reasoning_tag: str = "reasoning") -> str:
    """Return the user's message, which asks for the format that `score` rewards."""
    return PROMPT.format(tag=reasoning_tag)


def score(
    completion: str, area: float, *, reasoning_tag: str = "reasoning", correctness: str = "linear"
) -> Reward:
    """Return the rewards of a completion for a shape of this area. Never raises on any completion.

    >>> reward = score("<reasoning>A square of side 20.</reasoning><answer>400.00</answer>", 800.0)
    >>> reward.area_correctness, reward.area_format, reward.xml_format, reward.predicted
    (0.0, 0.5, 0.5, 400.0)
    """
    predicted = parse_area(completion)
    wrong = penalty(predicted, area, correctness=correctness)
    answer = answer_text(completion)
    two_decimals = answer is not None and TWO_DECIMALS.fullmatch(answer) is not None
    strict_xml = is_strict_xml(completion, reasoning_tag)
    return Reward(
        area_correctness=CORRECTNESS_MAX - (CORRECTNESS_MAX - CORRECTNESS_MIN) * wrong,
        area_format=AREA_FORMAT_REWARD if two_decimals else 0.0,
        xml_format=XML_FORMAT_REWARD if strict_xml else 0.0,
        predicted=predicted,
        relative_error=relative_error(predicted, area),
    )


def relative_error(predicted: float | None, area: float) -> float:
    """Return `min(1, |predicted - area| / area)`, and 1 where no number could be read.

    >>> relative_error(50.0, 100.0)
    0.5
    """
    return 1.0 if predicted is None else min(1.0, abs(predicted - area) / area)


def penalty(predicted: float | None, area: float, *, correctness: str = "linear") -> float:
    """Return how wrong a number is, from 0 (exact) to 1; the area reward is `3 - 6 * penalty`.

    linear  the relative error e: 0 points half off, -3 at double or nothing
    root    the square root of e: the last few percent count most
    log     |log2(predicted / area)|, at most 1: half is as wrong as double

    >>> [round(penalty(75.0, 100.0, correctness=name), 3) for name in CORRECTNESS]
    [0.25, 0.5, 0.415]
    """
    error = relative_error(predicted, area)
    if correctness == "linear":
        return error
    if correctness == "root":
        return math.sqrt(error)
    if correctness == "log":
        is_positive = predicted is not None and predicted > 0
        return min(1.0, abs(math.log2(predicted) - math.log2(area))) if is_positive else 1.0
    raise ValueError(f"correctness {correctness!r}: must be one of {', '.join(CORRECTNESS)}")


def parse_area(completion: str) -> float | None:
    """Return the one number in the one answer block, or None. Its format is judged elsewhere.

    Words around the number are passed over; two different answers, or an answer with two numbers,
    are no answer.

    >>> parse_area("<answer>about 1,200.5 square units</answer>")
    1200.5
    >>> parse_area("<answer>20 x 20 = 400</answer>") is None
    True
    """
    answer = answer_text(completion)
    if answer is None:
        return None
    words = [word.strip(AROUND_A_NUMBER) for word in answer.split()]
    numbers = [word for word in words if NUMBER.fullmatch(word)]
    if len(numbers) != 1:
        return None
    value = float(numbers[0].replace(",", ""))
    return value if math.isfinite(value) else None  # "1e999" is infinite


def answer_text(completion: str) -> str | None:
    """Return what stands in the answer block, stripped, if there is just one; else None."""
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    answer, closed, _ = completion.partition("<answer>")[2].partition("</answer>")
    answer = answer.strip()
    return answer if closed and len(answer) <= MAX_ANSWER_CHARS else None


def is_strict_xml(completion: str, reasoning_tag: str = "reasoning") -> bool:
    """Return whether the whole completion is one reasoning block, then one answer block.

    White space may stand around and between them, and each tag occurs exactly once. As it does, the
    pattern below has one place to match each tag, so it cannot backtrack for long.
    """
    tags = (f"<{reasoning_tag}>", f"</{reasoning_tag}>", "<answer>", "</answer>")
    if any(completion.count(tag) != 1 for tag in tags):
        return False
    pattern = r"\s*{}.*{}\s*{}.*{}\s*".format(*tags)
    return re.fullmatch(pattern, completion, re.DOTALL) is not None
