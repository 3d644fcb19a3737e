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

# How the number in an answer is found. LaTeX, Markdown and typeset signs first become plain ones:
PLAIN = (  # pattern, and what stands for it, from top to bottom
    (r"\\d?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)"),
    (r"\{,\}", ","),  # 1{,}200
    (r"\\(?:boxed|text|textbf|mathrm|mathbf|left|right|quad|displaystyle)(?![A-Za-z])", " "),
    (r"\\[ ,;:!()\[\]]", " "),
    (r"[$~`{}_#\[\]\"\u2018\u2019\u201c\u201d]", " "),
    (r"(\*{1,3})(?=\S)([^*]+)\1(?![\d*])|\*\*([^*]+\*[^*]+)\*\*", r" \2\3 "),  # **400**
    (r"²|\*\*\s*2(?![\d.])", "^2"),
    (r"\\(?:times|cdot)(?![A-Za-z])|\btimes\b|[·\N{MULTIPLICATION SIGN}]", "*"),
    (r"(?<=[\d)\s])[xX](?=\s*[\d(])|(?<=\d)\s+by\s+(?=\d)", "*"),  # 20 x 20, 20 by 20
    (r"\\div(?![A-Za-z])|÷", "/"),
    (r"½", "(1/2)"),
    (r"\\pi(?![A-Za-z])|π", " pi "),
    (r"\\sqrt(?![A-Za-z])|√", " sqrt "),
    (r"\\approx(?![A-Za-z])|≈|\bequals\b", "="),
)
UNIT = r"(?<![A-Za-z])(?:[Uu]nits?|[cm]?m|in|ft|u|(?:[Cc]enti)?[Mm]eters?)(?![A-Za-z])"
AREA_UNIT = re.compile(rf"({UNIT}\s*)(?:\^\s*\(?\s*2\s*\)?|2|squared)(?![\d.])")  # loses its power

# Then there must be one number, and beside it words that do not change it. What stands before an
# equals sign must be words too, or a calculation, of which the number is the result.
WORDS = r"[A-Za-z\s.,;:'()]*"
CHANGING = re.compile(
    r"\b(?:half|thirds?|quarters?|fifth|tenth|double|twice|triple|halved|doubled|square of|squared"
    r"|cubed|root|sqrt|pi|dozen|hundred|thousand|[mbtr]+illion|(?-i:[kKM])|per ?cent|pct|plus"
    r"|minus|negative|divided|point|wrong|least|most|more|less|than|up to|sin|cos|tan|log|ln|max"
    r"|min|(?:not?|over|under|below|above)(?=\s+\d))\b"
    r"|\d\s*[xX]\b|(?:^|[^\w\s)])\s*[.,]\s*\d",  # 20 x, .5
    re.IGNORECASE,
)
NUMBER = r"[+-]?(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?(?:[eE][+-]?\d+)?"
RESULT = re.compile(rf"{WORDS}(?<![\w.)])({NUMBER})(?:{UNIT}|(?![A-Za-z])){WORDS}", re.ASCII)
NAMES = "pi|sqrt|length|width|height|base|side|radius|diameter|[bdhlrsw]{1,2}"
OPERAND = rf"(?<![A-Za-z])(?:(?:{NAMES})(?![A-Za-z])|{UNIT}|[(\d])"
CALCULATION = re.compile(rf"(?:{OPERAND}|[-+*/^().\s])+", re.ASCII | re.IGNORECASE)
OPERATION = re.compile(r"[-+*/^]|[\d)]\s*\(\s*\d|pi|sqrt")
NO_OPERATION = re.compile(r"[-+*/^]\s*(?:[-+*/^]|$)|[\d.)]\s+\d|[A-Za-z]\d")

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

    Words, units and LaTeX around it are passed over unless they change it, and so is a calculation
    that it is the result of. Two answer blocks are no answer, nor are two numbers in one, not even
    equal ones.

    >>> [parse_area(f"<answer>{text}</answer>") for text in ("about 1,200.5 cm²", "20 x 20 = 400")]
    [1200.5, 400.0]
    >>> [parse_area(f"<answer>{text}</answer>") for text in ("400 or 500", "20 x 20", "100 pi")]
    [None, None, None]
    """
    answer = answer_text(completion)
    if answer is None:
        return None
    *before, result = plain(answer).split("=")
    found = RESULT.fullmatch(result)
    if found is None or CHANGING.search(result):
        return None
    if not all(is_words(part) or is_calculation(part) for part in before):
        return None
    value = float(found[1].replace(",", ""))
    return value if math.isfinite(value) else None  # "1e999" is infinite


def plain(answer: str) -> str:
    r"""Return an answer without what only dresses it.

    >>> plain(r"$\boxed{20\times20=400 \text{ cm}^2}$").split()
    ['20*20=400', 'cm']
    """
    for pattern, sign in PLAIN:
        answer = re.sub(pattern, sign, answer, flags=re.ASCII)
    return AREA_UNIT.sub(r"\1 ", answer).strip().rstrip("!")


def is_words(text: str) -> bool:
    """Return whether there are only words in a text, and none that changes a number."""
    return re.fullmatch(WORDS, text) is not None and CHANGING.search(text) is None


def is_calculation(text: str) -> bool:
    """Return whether a text is arithmetic, perhaps after some words: `The area is 20 * 20`."""
    start = re.search(OPERAND, text, re.ASCII | re.IGNORECASE)
    if start is None or not is_words(text[: start.start()]):
        return False
    text = text[start.start() :].strip()
    return (
        CALCULATION.fullmatch(text) is not None
        and text.count("(") == text.count(")")
        and OPERATION.search(text) is not None
        and NO_OPERATION.search(text) is None
    )


def answer_text(completion: str) -> str | None:
    """Return what stands in the answer block, stripped, if there is just one; else None."""
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    answer, closed, _ = completion.partition("<answer>")[2].partition("</answer>")
    answer = answer.strip()
    return answer if closed and len(answer) <= MAX_ANSWER_CHARS else None


def is_strict_xml(completion: str, reasoning_tag: str = "reasoning") -> bool:
    """Return whether the whole completion is one reasoning block, then one answer block.

    White space may stand around and between them, each tag occurs exactly once, and neither block
    is empty or only white space. Half a point for saying nothing would be the most that a group of
    wrong answers could earn, so GRPO would teach silence. What else stands in the blocks is not
    judged.

    Because each tag occurs once, the pattern below has one place to match it, so it cannot
    backtrack for long.
    """
    tags = (f"<{reasoning_tag}>", f"</{reasoning_tag}>", "<answer>", "</answer>")
    if any(completion.count(tag) != 1 for tag in tags):
        return False
    pattern = r"\s*{}(.*){}\s*{}(.*){}\s*".format(*tags)
    blocks = re.fullmatch(pattern, completion, re.DOTALL)
    return blocks is not None and all(block.strip() for block in blocks.groups())
