"""metrics.py: a step's numbers, computed by hand."""

from types import SimpleNamespace

import pytest
import torch

from engine.sizes import GIB
from harness import metrics as harness_metrics
from harness.metrics import (
    Stopwatch,
    group_sample,
    held_out_line,
    share_of_judged,
    step_metrics,
    terminal_line,
)
from rewards import Reward
from shapes import ShapeSpec, make_example

STATS = {"kl": 0.0125, "entropy": 0.5, "loss": 0.0, "skipped": 0, "not_finite": ""}


def metrics(*areas: float) -> dict:
    """Return the metrics of two groups of two completions with these area rewards."""
    return step_metrics(
        4,
        rewards=[Reward(area, 0.5, 0.0, 1.0, (3 - area) / 6) for area in areas],
        lengths=[10, 20, 30, 40],
        truncated=[False, False, False, True],
        prompts_per_step=2,
        group_size=2,
        stats=STATS,
        lr=1e-3,
        seconds={"rollout_s": 1.5, "update_s": 2.5},
    )


def test_a_step_by_hand():
    found = metrics(3.0, 3.0, 1.0, -3.0)
    assert (found["step"], found["prompts"]) == (4, 10)
    assert (found["reward_mean"], found["area_correctness_reward"]) == (1.5, 1.0)
    assert (found["area_format_reward"], found["xml_format_reward"]) == (0.5, 0.0)
    assert found["reward_std"] == pytest.approx(8**0.5)  # of 3.5, 3.5, 1.5, -2.5
    assert found["relative_error"] == pytest.approx(1 / 6)  # median of 0, 0, 1/3, 1
    assert (found["completion_length_mean"], found["completion_length_max"]) == (25.0, 40)
    assert (found["truncated_share"], found["no_spread_share"]) == (0.25, 0.5)
    assert (found["step_s"], found["tokens_per_s"]) == (4.0, 25.0)
    assert found["kl"] == 0.0125


def test_the_peak_is_that_of_the_process_that_needs_most(monkeypatch):
    monkeypatch.setattr(harness_metrics, "peak_memory", lambda: 3 * GIB)
    with_another = lambda items: [*items, GIB] if items == [3 * GIB] else items  # noqa: E731
    monkeypatch.setattr(harness_metrics, "gather", with_another)
    assert metrics(3.0, 3.0, 1.0, -3.0)["peak_gib"] == 3.0


def test_a_sample_is_an_example_with_its_group_token_by_token():
    example = make_example(ShapeSpec(), seed=0, split="train", index=7, image_size=56)
    group = SimpleNamespace(
        texts=["a", "bc"],
        rewards=[Reward(3.0, 0.5, 0.0, 400.0, 0.0), Reward(-3.0, 0.0, 0.5, None, 1.0)],
        advantages=torch.tensor([[0.5, -0.5]]),
        lengths=[1, 2],
        truncated=torch.tensor([False, True]),
    )
    stories = {"new_logprobs": torch.tensor([[-0.1, 7.0], [-1 / 3, -0.2]])}
    sample = group_sample(9, example, group, [["a"], ["b", "c"]], stories)
    assert (sample["step"], sample["index"], sample["area"]) == (9, 7, example.area)
    assert sample["shape"]["kind"] == example.shape.kind
    first, second = sample["completions"]
    assert (first["text"], first["advantage"], first["predicted"]) == ("a", 0.5, 400.0)
    assert (second["text"], second["advantage"], second["xml_format"]) == ("bc", -0.5, 0.5)
    assert (first["truncated"], second["truncated"]) == (False, True)
    assert first["tokens"] == {"texts": ["a"], "new_logprobs": [-0.100000001]}  # not the padding
    assert second["tokens"] == {"texts": ["b", "c"], "new_logprobs": [-0.333333343, -0.200000003]}


def test_what_cannot_be_judged_is_left_out_of_the_share():
    named = [True, False, True, None]
    assert share_of_judged("a", named) == {"a": pytest.approx(2 / 3), "a_judged": 0.75}
    assert share_of_judged("a", [None, None]) == {"a": None, "a_judged": 0.0}


def test_a_group_with_a_nan_has_no_spread():
    """As in `grpo.has_spread`: such a group teaches nothing."""
    assert metrics(3.0, float("nan"), 1.0, -3.0)["no_spread_share"] == 0.5


def test_the_line_on_the_terminal():
    assert terminal_line(metrics(3.0, 3.0, 1.0, -3.0), steps=200) == (
        "step   4/200 | reward  1.500 | area  1.000 | decimals 0.500 | xml 0.000 | error 16.7 % "
        "| kl 0.0125 | entropy 0.500 | tokens  25.0 | 4.00 s"
    )


def test_the_line_of_a_held_out_evaluation():
    summary = {"area_correctness_reward": 2.5, "relative_error_median": 0.052}
    summary |= {"two_decimals": 1.0, "strict_xml": 0.995}
    assert held_out_line(summary, steps_done=50) == (
        "held-out after 50 steps: area 2.500 | median error 5.2 % | two decimals 100 % "
        "| strict XML 100 %"
    )


def test_laps_add_up_and_wait_for_the_device():
    waits = []
    watch = Stopwatch(lambda: waits.append(1))
    start = watch.last
    for phase in ("a_s", "b_s", "a_s"):
        watch.lap(phase)
    assert list(watch.seconds) == ["a_s", "b_s"]
    assert sum(watch.seconds.values()) == pytest.approx(watch.last - start)
    assert len(waits) == 3
