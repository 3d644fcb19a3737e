"""warmup/lessons.py: batches that are functions of the arguments, and share no plot."""

import numpy as np
import pytest
import torch

from cold_start import fill_in_defaults, make_parser
from shapes import make_example
from warmup.answers import Flaws
from warmup.lessons import CALCULATIONS, IGNORED, Lessons


@pytest.fixture
def lessons(processor):
    flags = ["--from-scratch", "--out", "-", "--batch-size", "4", "--image-size", "84"]
    args = make_parser().parse_args(flags)
    fill_in_defaults(args)
    return Lessons(processor, args)


def test_every_second_plot_is_turned_and_no_round_repeats_one(lessons):
    first = lessons.examples(0) + lessons.examples(1)
    lessons.plots = 8
    assert [example.index for example in first + lessons.examples(0)] == list(range(12))
    for example, spec in zip(first, 4 * lessons.specs, strict=True):
        again = make_example(spec, seed=0, split="cold_start", index=example.index, image_size=84)
        assert example.shape == again.shape
    assert [spec.max_rotation for spec in lessons.specs] == [0.0, 45.0]


def test_held_out_plots_come_from_the_split_of_evaluations(lessons):
    batches = list(lessons.held_out(lessons.specs[1], 6))
    assert [len(batch) for batch in batches] == [4, 2]
    again = make_example(lessons.specs[1], seed=0, split="eval", index=5, image_size=84)
    assert batches[1][1].shape == again.shape


def test_the_tags_take_turns_and_the_prompt_asks_for_the_taught_one(lessons):
    tokenizer = lessons.processor.tokenizer
    for step, tag in enumerate(("reasoning", "think")):
        prompts, ids, lengths = lessons.answers(step, Flaws())
        for row, length in zip(ids, lengths, strict=True):
            answer = tokenizer.decode(row[: length - 1])
            assert answer.startswith(f"<{tag}>") and answer.endswith("</answer>")
        assert f"<{tag}>your reasoning</{tag}>" in tokenizer.decode(prompts.input_ids[0])


def test_a_step_is_a_function_of_seed_round_and_step(lessons):
    flaws = Flaws(0.5, 0.5, 0.5)
    one, same = (lessons.answers(3, flaws)[1] for _ in range(2))
    assert torch.equal(one, same)
    lessons.rounds = 1
    assert not np.array_equal(one.tolist(), lessons.answers(3, flaws)[1].tolist())


def test_a_calculation_is_trained_from_behind_the_colon_to_the_stop_token(lessons):
    tokenizer = lessons.processor.tokenizer
    ids, labels = lessons.calculations(0)
    assert ids.shape == labels.shape
    assert len(ids) == 4 * CALCULATIONS
    for row, trained in zip(ids.tolist(), labels.tolist(), strict=True):
        text = tokenizer.decode([i for i in row if i != tokenizer.pad_token_id])
        taught = tokenizer.decode([i for i in trained if i != IGNORED])
        assert taught == text.partition(":")[2]
        assert taught.endswith("</answer><|im_end|>")
