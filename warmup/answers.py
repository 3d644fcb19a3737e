"""The answers that a warm-up teaches: read the dimensions, write them down, calculate with them.

The area of an answer is that of the numbers in its words, whatever the shape's own area is: an
answer always follows from its reasoning, also where the reading or the formula is wrong.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shapes import KINDS, Shape, ShapeSpec, sample_size

READING_STEP = 0.5  # grid units: dimensions are written as multiples of it
WORDS = {  # of the dimensions w and h as they were read
    "rectangle": "rectangle, width {w:.1f}, height {h:.1f}",
    "circle": "circle, diameter {w:.1f}",
    "square": "square, side {w:.1f}",
    "triangle": "triangle, base {w:.1f}, height {h:.1f}",
}
Formulas = dict[str, tuple[str, Callable[[float, float], float]]]  # text and value, by class
FORMULAS = {
    "rectangle": ("{w:.1f} * {h:.1f}", lambda w, h: w * h),
    "circle": ("pi * {w:.1f}^2 / 4", lambda w, h: math.pi * w * w / 4),
    "square": ("{w:.1f} * {w:.1f}", lambda w, h: w * w),
    "triangle": ("{w:.1f} * {h:.1f} / 2", lambda w, h: w * h / 2),
}
MISTAKES = {  # halves in the wrong place: no calculation that another class does not teach
    "rectangle": ("{w:.1f} * {h:.1f} / 2", lambda w, h: w * h / 2),
    "circle": ("{w:.1f} * {w:.1f} / 2", lambda w, h: w * w / 2),
    "square": ("{w:.1f} * {w:.1f} / 2", lambda w, h: w * w / 2),
    "triangle": ("{w:.1f} * {h:.1f}", lambda w, h: w * h),
}
PERIMETERS = {  # nobody is taught to calculate them; the tokenizer knows their signs
    "rectangle": ("2 * ({w:.1f} + {h:.1f})", lambda w, h: 2 * (w + h)),
    "circle": ("pi * {w:.1f}", lambda w, h: math.pi * w),
    "square": ("4 * {w:.1f}", lambda w, h: 4 * w),
    "triangle": ("{w:.1f} * {h:.1f}", lambda w, h: w * h),  # no perimeter: without the half
}
MISREADING = (0.06, 0.25)  # a misread dimension is off by so much of itself, to either side
TIDY = "<{tag}>{reasoning}</{tag}><answer>{area:.2f}</answer>"
SLOPPY = (
    "<{tag}>{reasoning}</{tag}><answer>{area:.0f}</answer>",
    "<{tag}>{reasoning}</{tag}><answer>{area:.1f}</answer>",
    "<{tag}>{reasoning}</{tag}><answer>{area:.2f} square units</answer>",
    "{reasoning}<answer>{area:.2f}</answer>",
    "{reasoning}<answer>{area:.0f}</answer>",
    "<{tag}>{reasoning}</{tag}><answer>{area:.2f}</answer> square units",
    "<{tag}>{reasoning}<answer>{area:.1f}</answer>",
)


@dataclass(frozen=True, slots=True)
class Flaws:
    """How taught answers differ from perfect ones: shares from 0 to 1."""

    sloppy: float = 0.0  # answers with a flawed format
    mistakes: float = 0.0  # answers with a wrong formula
    misread: float = 0.0  # dimensions that are read wrong


def written_answer(
    shape: Shape,
    *,
    reasoning_tag: str,
    flaws: Flaws,
    rng: np.random.Generator,
    mistakes: Formulas = MISTAKES,
) -> str:
    """Return an answer for a shape: its class, its dimensions, a calculation, and the area.

    >>> shape = Shape("square", 20.2, 20.2, (25, 25), (), (0, 0, 0))
    >>> rng = np.random.default_rng(0)
    >>> written_answer(shape, reasoning_tag="think", flaws=Flaws(), rng=rng)
    '<think>square, side 20.0: 20.0 * 20.0</think><answer>400.00</answer>'
    """
    style = SLOPPY[rng.integers(len(SLOPPY))] if rng.uniform() < flaws.sloppy else TIDY
    formulas = mistakes if rng.uniform() < flaws.mistakes else FORMULAS
    w, h = (read(size, flaws.misread, rng) for size in (shape.width, shape.height))
    calculation, area = formulas[shape.kind]
    reasoning = f"{WORDS[shape.kind]}: {calculation}".format(w=w, h=h)
    return style.format(tag=reasoning_tag, reasoning=reasoning, area=area(w, h))


def read(size: float, misread: float, rng: np.random.Generator) -> float:
    """Return a dimension as it is written: rounded to `READING_STEP`, and at times misread."""
    if rng.uniform() < misread:
        size *= 1 + rng.choice([-1, 1]) * rng.uniform(*MISREADING)
    return max(READING_STEP, READING_STEP * round(size / READING_STEP))


def random_shape(spec: ShapeSpec, rng: np.random.Generator) -> Shape:
    """Return a shape that is nowhere on a plot: enough to write an answer about."""
    kind = KINDS[rng.integers(len(KINDS))]
    width, height = sample_size(kind, spec, rng)
    return Shape(kind, width, height, center=(0.0, 0.0), vertices=(), color=(0.0, 0.0, 0.0))


def encode_answers(tokenizer, answers: list[str]) -> tuple[Tensor, list[int]]:
    """Return token ids (rows, C), right-padded, and the length of each row with its stop token."""
    rows = [torch.tensor([*tokenizer.encode(answer), tokenizer.eos_token_id]) for answer in answers]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return ids, [len(row) for row in rows]
