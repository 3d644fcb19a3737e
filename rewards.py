"""The prompt, the rewards of a completion, and what they do not see. Standard library only.

A completion is a model's text: it may be empty, huge, malformed or hostile. Nothing here raises on
it, and everything takes time linear in its length.
"""

import ast
import math
import operator
import re
from dataclasses import dataclass

CORRECTNESS_MIN, CORRECTNESS_MAX = -3.0, 3.0  # bounds of the area reward
AREA_FORMAT_REWARD = 0.5
XML_FORMAT_REWARD = 0.5
CORRECTNESS = ("linear", "root", "log")  # shapes of the area reward: see `penalty`
REASONING_TAGS = ("reasoning", "think")
MAX_ANSWER_CHARS = 100  # longer answers are not parsed

TWO_DECIMALS = re.compile(r"[0-9]+\.[0-9]{2}")

# Parsing first replaces LaTeX, Markdown and typographic signs with plain characters:
PLAIN = (  # (pattern, replacement), applied from top to bottom
    (r"\\d?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)"),
    (r"\{,\}", ","),  # 1{,}200
    (r"\\(?:boxed|text|textbf|mathrm|mathbf|left|right|quad|displaystyle)(?![A-Za-z])", " "),
    (r"\\[ ,;:!()\[\]]", " "),
    (r"[$~`{}_#\[\]\"\u2018\u2019\u201c\u201d]", " "),
    (r"(\*{1,3})(?=\S)([^*]+)\1(?![\d*])|\*\*([^*]+\*[^*]+)\*\*", r" \2\3 "),  # **400**
    (r"²|\*\*\s*2(?!\.?\d)", "^2"),
    (r"\\(?:times|cdot)(?![A-Za-z])|\btimes\b|[·\N{MULTIPLICATION SIGN}]", "*"),
    (r"(?<=[\d)\s])[xX](?=\s*[\d(])|(?<=\d)\s+by\s+(?=\d)", "*"),  # 20 x 20, 20 by 20
    (r"\\div(?![A-Za-z])|÷", "/"),
    (r"½", "(1/2)"),
    (r"\\pi(?![A-Za-z])|π", " pi "),
    (r"\\sqrt(?![A-Za-z])|√", " sqrt "),
    (r"\\approx(?![A-Za-z])|≈|\bequals\b", "="),
)
UNIT = r"(?<![A-Za-z])(?:[Uu]nits?|[cm]?m|in|ft|u|(?:[Cc]enti)?[Mm]eters?)(?![A-Za-z])"
AREA_UNIT = re.compile(rf"({UNIT}\s*)(?:\^\s*\(?\s*2\s*\)?|2|squared)(?!\.?\d)")  # cm² -> cm

# The answer must then be one number, among words that leave its value alone. Any text before an
# equals sign must be words too, or a calculation with that number as its result.
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
    """The three rewards of one completion, and the area parsed from it."""

    area_correctness: float  # in [-3, 3]
    area_format: float  # 0 or 0.5
    xml_format: float  # 0 or 0.5
    predicted: float | None  # None: no number could be parsed
    relative_error: float  # in [0, 1]; 1 if no number could be parsed
    shape_named: bool | None = None  # see `names_shape`; the last three earn nothing
    answer_follows: bool | None = None  # see `answer_follows`
    arithmetic_right: bool | None = None  # see `arithmetic_is_right`
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of the three rewards in the total

    @property
    def total(self) -> float:
        """Return the weighted sum of the three rewards, in [-3, 4] with weights of 1."""
        rewards = (self.area_correctness, self.area_format, self.xml_format)
        return sum(weight * reward for weight, reward in zip(self.weights, rewards, strict=True))


def make_prompt(reasoning_tag: str = "reasoning") -> str:
    """Return the user message, which asks for the format that `score` rewards."""
    return PROMPT.format(tag=reasoning_tag)


def score(
    completion: str,
    area: float,
    *,
    kind: str = "",
    reasoning_tag: str = "reasoning",
    correctness: str = "linear",
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Reward:
    """Return the rewards of a completion for a shape of this area. No completion makes it raise.

    With the shape's `kind` it also checks the words, for which there is no reward.

    >>> reward = score("<reasoning>A square of side 20.</reasoning><answer>400.00</answer>", 800.0)
    >>> reward.area_correctness, reward.area_format, reward.xml_format, reward.predicted
    (0.0, 0.5, 0.5, 400.0)
    """
    predicted = parse_area(completion)
    wrong = penalty(predicted, area, correctness=correctness)
    answer = answer_text(completion)
    two_decimals = answer is not None and TWO_DECIMALS.fullmatch(answer) is not None
    strict_xml = is_strict_xml(completion, reasoning_tag)
    reasoning = reasoning_of(completion) if kind else ""
    values = values_in(reasoning)
    return Reward(
        area_correctness=CORRECTNESS_MAX - (CORRECTNESS_MAX - CORRECTNESS_MIN) * wrong,
        area_format=AREA_FORMAT_REWARD if two_decimals else 0.0,
        xml_format=XML_FORMAT_REWARD if strict_xml else 0.0,
        predicted=predicted,
        relative_error=relative_error(predicted, area),
        shape_named=names_shape(reasoning, kind),
        answer_follows=answer_follows(values, predicted),
        arithmetic_right=arithmetic_is_right(values, predicted),
        weights=weights,
    )


def relative_error(predicted: float | None, area: float) -> float:
    """Return `min(1, |predicted - area| / area)`, or 1 if `predicted` is None.

    >>> relative_error(50.0, 100.0)
    0.5
    """
    return 1.0 if predicted is None else min(1.0, abs(predicted - area) / area)


def penalty(predicted: float | None, area: float, *, correctness: str = "linear") -> float:
    """Return how wrong a number is, from 0 (exact) to 1; the area reward is `3 - 6 * penalty`.

    linear  the relative error e: a number 50 % off earns 0, one 100 % off earns -3
    root    the square root of e: the last few percent count most
    log     |log2(predicted / area)|, at most 1: half the area is as wrong as double

    Raises `ValueError` for any other `correctness`.

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
    """Return the number in the answer block, whatever its format, or None.

    Skips words, units and LaTeX that leave the number's value alone, and a calculation that ends
    in it. Returns None for two answer blocks, and for two numbers in one block, even equal ones.

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
    return value if math.isfinite(value) else None  # float("1e999") is inf


def plain(answer: str) -> str:
    r"""Return an answer in plain characters: no LaTeX, no Markdown, no squared units.

    >>> plain(r"$\boxed{20\times20=400 \text{ cm}^2}$").split()
    ['20*20=400', 'cm']
    """
    for pattern, sign in PLAIN:
        answer = re.sub(pattern, sign, answer, flags=re.ASCII)
    return AREA_UNIT.sub(r"\1 ", answer).strip().rstrip("!")


def is_words(text: str) -> bool:
    """Return whether a text consists of words, none of which changes a number's value."""
    return re.fullmatch(WORDS, text) is not None and CHANGING.search(text) is None


def is_calculation(text: str) -> bool:
    """Return whether a text is arithmetic, possibly after some words: `The area is 20 * 20`."""
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
    """Return the stripped text of the answer block; None if there is not one, or it is too long."""
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    answer, closed, _ = completion.partition("<answer>")[2].partition("</answer>")
    answer = answer.strip()
    return answer if closed and len(answer) <= MAX_ANSWER_CHARS else None


def is_strict_xml(completion: str, reasoning_tag: str = "reasoning") -> bool:
    """Return whether the whole completion is one reasoning block, then one answer block.

    Each tag must occur exactly once, with nothing but white space around and between the blocks,
    and neither block may be blank. If two empty blocks earned half a point, a group of wrong
    answers could earn no more, and GRPO would teach the model to say nothing. The text in the
    blocks is not checked any further.

    The pattern cannot backtrack for long: each tag occurs once, so it has one place to match.
    """
    tags = (f"<{reasoning_tag}>", f"</{reasoning_tag}>", "<answer>", "</answer>")
    if any(completion.count(tag) != 1 for tag in tags):
        return False
    pattern = r"\s*{}(.*){}\s*{}(.*){}\s*".format(*tags)
    blocks = re.fullmatch(pattern, completion, re.DOTALL)
    return blocks is not None and all(block.strip() for block in blocks.groups())


# --- what the rewards do not see ----------------------------------------------------------

MAX_REASONING_CHARS = 2_000  # of a longer reasoning the end is checked
TOLERANCE = 0.01  # relative; 3.14 passes for pi, a wrong digit does not
CLASS_WORDS = {  # words that name a class; "square units" names none
    "rectangle": r"\brectang(?:les?|ular)\b",
    "circle": r"\bcirc(?:les?|ular)\b",
    "square": r"\bsquares?\b(?!\s*(?:grid|units?|[cm]?m\b|centi|met|inch|feet|root|of\b|number))",
    "triangle": r"\btriang(?:les?|ular)\b",
}
UNITS = re.compile(r"\b(?:square\s+)?(?:grid\s+)?units?\b|\b[cm]?m\b", re.IGNORECASE)
DIMENSIONS = "width|height|base|side|length|radius|diameter"
BINDING = re.compile(  # a name with the number that stands behind it: width 24, side length = 24
    rf"(?<![-+*/^]\s)\b(?:({DIMENSIONS})\s*(?:is|of|=|:)?|([a-z])\s*=)"
    r"\s*(\d+(?:\.\d+)?)(?!\.?\d|\s*[-+*/^])"
)
USE = re.compile(  # a name beside an operator
    rf"(?<=[-+*/^(=])(\s*)({DIMENSIONS}|[a-z])\b|\b({DIMENSIONS}|[a-z])(?=\s*[-+*/^])"
)
EXPRESSION = re.compile(r"(?:[\d(]|pi\b|sqrt\b)(?:[\d.\s+\-*/^()]|pi\b|sqrt\b)*", re.ASCII)
IMPLICIT_PRODUCT = re.compile(r"(?<=[\d)])\s*(?=\(|pi)|(?<=pi)\s*(?=[\d(])")
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


@dataclass(frozen=True, slots=True)
class Value:
    """A number in a text, or the value of a calculation in it, and what is written behind an `=`.

    `result` is None where no equals sign follows.
    """

    value: float
    is_calculation: bool
    result: float | None


def reasoning_of(completion: str) -> str:
    """Return the text before the answer block, without tags; of a long one, the end."""
    text = completion.partition("<answer>")[0][-MAX_REASONING_CHARS:]
    return re.sub(r"</?\w{1,20}>", " ", text)


def names_shape(reasoning: str, kind: str) -> bool | None:
    """Return whether a text names this class and no other; None if it names none.

    >>> [names_shape(text, "square") for text in ("A square.", "a square or a circle", "5 units")]
    [True, False, None]
    """
    words = CLASS_WORDS.items()
    named = {name for name, pattern in words if re.search(pattern, reasoning, re.IGNORECASE)}
    return named == {kind} if named else None


def answer_follows(values: list[Value], predicted: float | None) -> bool | None:
    """Return whether the last calculation, or the last number, gives the answer.

    None if there is no answer, or no number in the reasoning.

    >>> [answer_follows(values_in(text), 400.0) for text in ("side 20: 20 * 20", "side 20", "?")]
    [True, False, None]
    """
    if predicted is None or not values:
        return None
    calculations = [value for value in values if value.is_calculation]
    return any(is_close(each.value, predicted) for each in (*calculations[-1:], values[-1]))


def arithmetic_is_right(values: list[Value], predicted: float | None) -> bool | None:
    """Return whether every calculation gives the number written behind it.

    Behind the last one the answer may stand instead. None if no calculation has a result.

    >>> [arithmetic_is_right(values_in(text), 600.0) for text in ("20 * 30 = 500", "20 * 30")]
    [False, True]
    """
    calculations = [value for value in values if value.is_calculation]
    pairs = [(each.value, each.result) for each in calculations if each.result is not None]
    if calculations and calculations[-1].result is None and predicted is not None:
        pairs.append((calculations[-1].value, predicted))
    return all(is_close(*pair) for pair in pairs) if pairs else None


def is_close(value: float, other: float) -> bool:
    """Return whether two numbers agree within `TOLERANCE`, or within half of a second decimal."""
    return abs(value - other) <= max(TOLERANCE * abs(other), 0.005)


def values_in(reasoning: str) -> list[Value]:
    """Return the numbers and calculations of a text, in order.

    Names are replaced by the numbers that stand behind them: `width 24 ... width * 2` is 48.

    >>> [(each.value, each.result) for each in values_in("base 24, height 20: base * height / 2")]
    [(24.0, None), (20.0, None), (240.0, None)]
    >>> [(each.value, each.result) for each in values_in("20 * 30 = 600")]
    [(600.0, 600.0), (600.0, None)]
    """
    text = UNITS.sub(" ", plain(re.sub(r"(?<=\d),(?=\d{3}\b)", "", reasoning)))
    text = re.sub(r"\.(?=\s|$)", ";", text)  # a full stop is no decimal point
    bound = {found[1] or found[2]: found[3] for found in BINDING.finditer(text)}
    text = USE.sub(lambda use: replaced(use, bound), text)
    found = []
    for match in EXPRESSION.finditer(text):
        expression = match[0].rstrip(" .+-*/^(\t\n")
        value = value_of(expression)
        if value is not None:
            found.append((match.start(), expression, value))
    values = []
    for (start, expression, value), after in zip(found, [*found[1:], None], strict=False):
        rest = text[start + len(expression) : after[0]] if after else ""
        result = written_result(value, *after[1:]) if rest.strip() == "=" else None
        values.append(Value(value, re.fullmatch(r"[\d.]+", expression) is None, result))
    return values


def written_result(value: float, expression: str, result: float) -> float:
    """Return what a calculation is said to give: the expression behind its `=`, or its beginning.

    In `20 * 30 = 600 / 2` it is 600: the text goes on calculating.
    """
    start = re.match(r"\d+(?:\.\d+)?", expression)
    return float(start[0]) if start and is_close(value, float(start[0])) else result


def replaced(use: re.Match, bound: dict[str, str]) -> str:
    """Return a name's number, behind the same space; the name itself if it has none."""
    name = use[2] or use[3]
    return (use[1] or "") + bound.get(name, name)


def value_of(expression: str) -> float | None:
    """Return the value of an arithmetic expression, or None.

    >>> value_of("pi * 10^2 / 4"), value_of("2(3 + 4)"), value_of("9^9^9^9"), value_of("20 * ")
    (78.53981633974483, 14.0, None, None)
    """
    source = IMPLICIT_PRODUCT.sub(" * ", expression).replace("^", "**")
    try:
        value = evaluated(ast.parse(source.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError, TypeError):
        return None
    return value if math.isfinite(value) else None


def evaluated(node: ast.expr) -> float:
    """Return the value of a parsed expression. Raises `ValueError` for anything but arithmetic."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id="pi"):
            return math.pi
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -evaluated(operand)
        case ast.Call(func=ast.Name(id="sqrt"), args=[operand], keywords=[]):
            return math.sqrt(evaluated(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return float(OPERATORS[type(op)](evaluated(left), evaluated(right)))
    raise ValueError(f"not arithmetic: {ast.dump(node)}")
