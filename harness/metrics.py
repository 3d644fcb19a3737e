"""What a step leaves in the logs, and on the terminal: metrics, seconds, peak memory, a sample."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from engine.parallel import gather
from engine.sizes import GIB
from harness.runlog import peak_host_memory


def step_metrics(
    step: int,
    *,
    rewards: list,
    lengths: list[int],
    truncated: list[bool],
    prompts_per_step: int,
    group_size: int,
    stats: dict[str, float | str],
    lr: float,
    seconds: dict[str, float],
) -> dict[str, float | str]:
    """Return one line of metrics.jsonl; the glossary in docs/running.md explains each key.

    `rewards`, `lengths` and `truncated` describe this process's completions, group-major. `stats`
    comes from `grpo.update`, `seconds` from a `Stopwatch`.
    """
    rewards, lengths, truncated = gather(rewards), gather(lengths), gather(truncated)
    totals = torch.tensor([reward.total for reward in rewards]).view(-1, group_size)
    has_spread = totals.amax(1) > totals.amin(1)  # as `grpo.has_spread`, for all processes' groups
    step_s = sum(seconds.values())
    return {
        "step": step,
        "prompts": (step + 1) * prompts_per_step,
        "reward_mean": totals.mean().item(),
        "reward_std": totals.std().item(),
        "area_correctness_reward": statistics.fmean(r.area_correctness for r in rewards),
        "area_format_reward": statistics.fmean(r.area_format for r in rewards),
        "xml_format_reward": statistics.fmean(r.xml_format for r in rewards),
        "relative_error": statistics.median(r.relative_error for r in rewards),
        **share_of_judged("shape_named", [r.shape_named for r in rewards]),
        **share_of_judged("answer_follows", [r.answer_follows for r in rewards]),
        **share_of_judged("arithmetic_right", [r.arithmetic_right for r in rewards]),
        **stats,
        "lr": lr,
        "completion_length_mean": statistics.fmean(lengths),
        "completion_length_max": max(lengths),
        "truncated_share": statistics.fmean(truncated),
        "no_spread_share": 1.0 - has_spread.float().mean().item(),
        **seconds,
        "step_s": step_s,
        "tokens_per_s": sum(lengths) / step_s,
        "peak_gib": max(gather([peak_memory()])) / GIB,
    }


def share_of_judged(name: str, hits: list[bool | None]) -> dict[str, float | None]:
    """Return the share of hits among those that are not None, and the share that is not None.

    The first is None if all are.
    """
    judged = [hit for hit in hits if hit is not None]
    found = statistics.fmean(judged) if judged else None
    return {name: found, f"{name}_judged": len(judged) / len(hits)}


def terminal_line(metrics: dict, steps: int) -> str:
    """Return a step's metrics as one aligned line."""
    return (
        f"step {metrics['step']:>{len(str(steps))}}/{steps}"
        f" | reward {metrics['reward_mean']:6.3f}"
        f" | area {metrics['area_correctness_reward']:6.3f}"
        f" | decimals {metrics['area_format_reward']:.3f}"
        f" | xml {metrics['xml_format_reward']:.3f}"
        f" | error {100 * metrics['relative_error']:4.1f} %"
        f" | kl {metrics['kl']:.4f}"
        f" | entropy {metrics['entropy']:.3f}"
        f" | tokens {metrics['completion_length_mean']:5.1f}"
        f" | {metrics['step_s']:.2f} s"
    )


def held_out_line(summary: dict, steps_done: int) -> str:
    """Return a held-out evaluation's summary as one line."""
    return (
        f"held-out after {steps_done} steps: area {summary['area_correctness_reward']:.3f}"
        f" | median error {100 * summary['relative_error_median']:.1f} %"
        f" | two decimals {100 * summary['two_decimals']:.0f} %"
        f" | strict XML {100 * summary['strict_xml']:.0f} %"
    )


def group_sample(
    step: int, example, group, tokens: list[list[str]], stories: dict[str, Tensor]
) -> dict:
    """Return one line of samples.jsonl: an example, and its group token by token.

    `group` is a rollout of one prompt. `tokens` holds the text of each token, one row per
    completion; `stories` are those of `grpo.token_stories`.
    """
    numbers = {name: values.tolist() for name, values in stories.items()}  # host sync
    advantages, truncated = group.advantages[0].tolist(), group.truncated.tolist()  # host sync
    completions = []
    for row, advantage in enumerate(advantages):
        length = group.lengths[row]
        told = {name: nine_digits(values[row][:length]) for name, values in numbers.items()}
        completions.append(
            {
                "text": group.texts[row],
                **dataclasses.asdict(group.rewards[row]),
                "advantage": advantage,
                "truncated": truncated[row],
                "tokens": {"texts": tokens[row], **told},
            }
        )
    return {
        "step": step,
        "index": example.index,
        "area": example.area,
        "shape": dataclasses.asdict(example.shape),
        "completions": completions,
    }


def nine_digits(values: list[float]) -> list[float]:
    """Return the values with the nine digits that tell any two numbers in fp32 apart."""
    return [float(f"{value:.9g}") for value in values]


def peak_memory() -> int:
    """Return this process's peak memory in bytes: of the GPU if it uses one, else of the host."""
    is_on_gpu = torch.cuda.is_initialized()
    return torch.cuda.max_memory_allocated() if is_on_gpu else peak_host_memory()


class Stopwatch:
    """Measures the seconds of each phase of a step. Call `lap` when a phase ends."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize = synchronize
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to `phase`, device work included."""
        self.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now
