"""A task of your own, worked out: GRPO on the perimeter of a shape instead of its area.

    python docs/perimeter.py --workers 0            # trains, with all flags of main.py
    python docs/perimeter.py evaluate runs/RUN      # with all flags of evaluate.py

A task is three functions, which main.py and evaluate.py call by these names:

    make_example    what the model sees, and the right number: an image, `area`, `shape`
    make_prompt     what it is asked
    score           what a completion earns: `total`, and what the logs show of it

This file replaces the first two. The third stays: it compares the answer with the right number,
whatever that is, and checks the words and the format. Keep --workers at 0, because the task is set
in this process, and do not resume such a run with main.py.

The bundled model learns nothing here: it has only ever answered with areas, which are so far from
the perimeters that they all earn the same. GRPO makes likelier what is sampled at times.
"""

import math
import sys
from itertools import pairwise
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import evaluate
import main
import rewards
import shapes


def perimeter(shape: shapes.Shape) -> float:
    """Return the exact perimeter of a shape, in grid units.

    >>> corners = ((10, 10), (13, 10), (10, 14))
    >>> perimeter(shapes.Shape("triangle", 3.0, 4.0, (11.5, 12), corners, (0, 0, 0)))
    12.0
    """
    if shape.kind == "circle":
        return math.pi * shape.width
    return sum(math.dist(*side) for side in pairwise([*shape.vertices, shape.vertices[0]]))


class PerimeterExample(shapes.Example):
    """A plot whose right answer is the perimeter."""

    @property
    def area(self) -> float:
        """Return the number that an answer is compared with."""
        return perimeter(self.shape)


def make_example(spec: shapes.ShapeSpec, **options) -> PerimeterExample:
    """Return the same plot as `shapes.make_example`, with the other right answer."""
    example = shapes.make_example(spec, **options)
    return PerimeterExample(example.image, example.shape, example.index)


def make_prompt(reasoning_tag: str = "reasoning") -> str:
    """Return the user message, which asks for the perimeter in the same form."""
    prompt = rewards.make_prompt(reasoning_tag).replace("square grid units", "grid units")
    return prompt.replace("apply the area formula", "add up its sides").replace("area", "perimeter")


def use_task() -> None:
    """Replace the task in the trainer and in the held-out evaluation, in this process."""
    for module in (main, evaluate):
        module.make_example, module.make_prompt = make_example, make_prompt


if __name__ == "__main__":
    use_task()
    if sys.argv[1:2] == ["evaluate"]:
        evaluate.main(sys.argv[2:])
    else:
        main.main()
