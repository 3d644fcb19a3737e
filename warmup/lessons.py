"""The batches of a warm-up: calculations, plots to look at, and plots with their answers."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from engine.prompts import Prompts, encode_prompts
from rewards import REASONING_TAGS, SYSTEM_MESSAGE, make_prompt
from shapes import Example, ShapeSpec, make_example
from warmup.answers import Flaws, encode_answers, random_shape, written_answer
from warmup.seeing import dense_targets

CALCULATIONS = 4  # times the batch size: calculations per step
IGNORED = -100  # label of a token that is not trained


@dataclass
class Lessons:
    """What a model is taught: a function of the arguments, the rounds so far and the step.

    Every second plot is turned. The "cold_start" split of the plots shares none with training or
    evaluation. The plots of a round begin at index `plots`, so no two rounds share one.
    """

    processor: object
    args: argparse.Namespace
    rounds: int = 0  # done so far, of all stages
    plots: int = 0

    @property
    def specs(self) -> tuple[ShapeSpec, ShapeSpec]:
        """Return the two tasks: upright and turned."""
        least, most = self.args.min_size, self.args.max_size
        return ShapeSpec(least, most), ShapeSpec(least, most, self.args.max_rotation)

    def examples(self, step: int) -> list[Example]:
        """Return the examples of a step of this round."""
        first = self.plots + step * self.args.batch_size
        return [
            self.example(self.specs[i % 2], "cold_start", i)
            for i in range(first, first + self.args.batch_size)
        ]

    def held_out(self, spec: ShapeSpec, count: int) -> Iterator[list[Example]]:
        """Yield held-out examples in batches."""
        for first in range(0, count, self.args.batch_size):
            indices = range(first, min(first + self.args.batch_size, count))
            yield [self.example(spec, "eval", i) for i in indices]

    def example(self, spec: ShapeSpec, split: str, index: int) -> Example:
        """Return one example of a split."""
        options = {"seed": self.args.seed, "image_size": self.args.image_size}
        return make_example(spec, split=split, index=index, **options)

    def rng(self, step: int) -> np.random.Generator:
        """Return the random numbers of a step; no two steps of a warm-up share any."""
        return np.random.default_rng([self.args.seed, self.rounds, step])

    def encode(self, examples: list[Example], tag: str = REASONING_TAGS[0]) -> Prompts:
        """Return examples as the model's inputs, on the host."""
        images = [example.image for example in examples]
        return encode_prompts(
            self.processor, images, system=SYSTEM_MESSAGE, prompt=make_prompt(tag)
        )

    def looks(self, step: int) -> tuple[Prompts, tuple[Tensor, ...]]:
        """Return a step's prompts, and what a `DenseHead` must say of them."""
        examples = self.examples(step)
        return self.encode(examples), dense_targets(examples, self.args.image_size)

    def answers(self, step: int, flaws: Flaws) -> tuple[Prompts, Tensor, list[int]]:
        """Return a step's prompts, answer ids (rows, C) and their lengths; the tags take turns."""
        tag, rng = REASONING_TAGS[step % len(REASONING_TAGS)], self.rng(step)
        examples = self.examples(step)
        answers = [
            written_answer(example.shape, reasoning_tag=tag, flaws=flaws, rng=rng)
            for example in examples
        ]
        return self.encode(examples, tag), *encode_answers(self.processor.tokenizer, answers)

    def calculations(self, step: int) -> tuple[Tensor, Tensor]:
        """Return ids (rows, C) of perfect answers to no plot, and labels with IGNORED tokens.

        What stands before the colon is read off a plot; from text alone it cannot be learned.
        """
        rng, tokenizer = self.rng(step), self.processor.tokenizer
        answers = random_answers(self.specs[0], CALCULATIONS * self.args.batch_size, rng)
        ids, lengths = encode_answers(tokenizer, answers)
        labels = ids.clone()
        for row, (answer, length) in enumerate(zip(answers, lengths, strict=True)):
            reading = answer[: answer.index(":") + 1]
            labels[row, : len(tokenizer.encode(reading))] = IGNORED
            labels[row, length:] = IGNORED
        return ids, labels


def random_answers(spec: ShapeSpec, count: int, rng: np.random.Generator) -> list[str]:
    """Return perfect answers about shapes that are on no plot; the tags take turns."""
    tags = [REASONING_TAGS[i % len(REASONING_TAGS)] for i in range(count)]
    return [
        written_answer(random_shape(spec, rng), reasoning_tag=tag, flaws=Flaws(), rng=rng)
        for tag in tags
    ]
