"""One real group of completions, followed through one step: the numbers of docs/walkthrough.md.

    python experiments/walkthrough.py                       # prints the page's blocks, in seconds
    python experiments/walkthrough.py --picture plot.png    # also writes its plot

The step is the one that FLAGS give main.py: the first step of the tiny preset, but with one plot
and four completions, so that a page can show all of it.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

import main as trainer
from config import make_config, make_parser
from engine.loading import load
from engine.passes import PassSize
from engine.sampling import token_texts
from grpo import Rollout, k3_kl, token_stories
from harness.terminal import ignore_output_errors
from shapes import Example

FLAGS = "--preset tiny --prompts-per-step 1 --group-size 4 --device cpu --dtype float32"
TOKENS = ((0, "2"), (1, "1"), (2, " square"), (3, "1"), (3, "<answer"))  # row, text


@dataclass(frozen=True)
class Step:
    """Everything about a step that the page shows."""

    example: Example
    rollout: Rollout
    tokens: list[list[str]]  # the text of each token, row by row
    metrics: dict
    weights: Tensor  # (B, C)
    after: Tensor  # (B, C) log-probs under the updated policy


def take_step(*flags: str) -> Step:
    """Return the first step of a run with FLAGS and these, with the log-probs after its update."""
    config = make_config(make_parser().parse_args([*FLAGS.split(), *flags]))
    loaded = load(config.model, device=config.device, dtype=config.dtype, reference=True)
    pass_size = PassSize(micro_batch=1, checkpoint_layers=0)
    (example,), rollout, metrics = trainer.take_step(
        config,
        0,
        iter(trainer.make_batches(config, loaded.processor)),
        trainer.make_sampler(config, loaded),
        loaded,
        trainer.make_optimizer(config, loaded.policy),
        pass_size,
    )
    options = config.pick("temperature", "loss", "max_new_tokens")
    stories = token_stories(loaded.policy, rollout, pass_size=pass_size, **options)
    tokens = token_texts(loaded.processor, rollout.completion_ids, rollout.lengths)
    return Step(
        example, rollout, tokens, metrics, weights=stories["weights"], after=stories["new_logprobs"]
    )


# --- the blocks of the page -----------------------------------------------------------------


def completions_block(step: Step) -> str:
    """Return the sampled texts, numbered from 1 as on the page."""
    texts = enumerate(step.rollout.texts, start=1)
    return "\n".join(f"{number}  {text}" for number, text in texts)


def rewards_block(step: Step) -> str:
    """Return the rewards, their sums and the advantages, one row per completion."""
    lines = ["    answer    area  decimals   XML     sum  advantage"]
    rows = zip(step.rollout.rewards, step.rollout.advantages[0].tolist(), strict=True)
    for number, (reward, advantage) in enumerate(rows, start=1):
        answer = "none" if reward.predicted is None else f"{reward.predicted:.2f}"
        lines.append(
            f"{number}  {answer:>8}  {reward.area_correctness:6.3f}"
            f"  {reward.area_format:8.1f}  {reward.xml_format:4.1f}"
            f"  {reward.total:6.3f}  {advantage:+9.3f}"
        )
    totals = torch.tensor([reward.total for reward in step.rollout.rewards])
    lines.append(f"mean {totals.mean():.3f}, standard deviation {totals.std():.3f}")
    return "\n".join(lines)


def token_block(step: Step) -> str:
    """Return one token's way into the loss."""
    row, column = find(step, *TOKENS[0])
    advantage = step.rollout.advantages[0, row].item()
    weight = step.weights[row, column].item()
    logprob = step.rollout.sampled_logprobs[row, column].item()
    values = {
        "log-prob when sampled": (logprob, f"a probability of {probability(logprob):.4f}"),
        "ratio": (step.metrics["ratio"], "exp(log-prob - the same number, detached)"),
        "k3": (step.metrics["kl"], "the policy still equals the reference"),
        "advantage": (advantage, "of its whole completion"),
        "weight": (weight, f"1 / (4 completions x {len(step.tokens[row])} tokens)"),
        "part of the loss": (
            weight * -advantage,
            "weight x (beta x k3 - ratio x advantage)",
        ),
    }
    return "\n".join(f"{name:<22} {value:8.4f}    {how}" for name, (value, how) in values.items())


def loss_block(step: Step) -> str:
    """Return each completion's part of the loss, and what the update was made of."""
    parts = (-step.weights * step.rollout.advantages.view(-1, 1)).sum(1).tolist()
    lines = [f"{number}  {part:+.4f}" for number, part in enumerate(parts, start=1)]
    norm = step.metrics["grad_norm"]
    clipped = "scaled down to 1" if norm > 1 else "below the limit of 1"
    return "\n".join(
        [
            *lines,
            f"sum {abs(step.metrics['loss']):.4f}",
            f"gradient norm {norm:.2f}, {clipped}; learning rate {step.metrics['lr']:.1e}",
        ]
    )


def update_block(step: Step) -> str:
    """Return what the update did to a few tokens."""
    lines = ["completion, token     advantage  probability       ratio     k3"]
    for row, text in TOKENS:
        row, column = find(step, row, text)
        before, after = step.rollout.sampled_logprobs[row, column], step.after[row, column]
        kl = k3_kl(after, step.rollout.ref_logprobs[row, column])
        lines.append(
            f"{row + 1}  {text.strip():<18}  {step.rollout.advantages[0, row]:+9.3f}"
            f"  {probability(before):.4f} -> {probability(after):.4f}"
            f"  {probability(after - before):.4f}  {kl:.4f}"
        )
    return "\n".join(lines)


def rate_block(step: Step, hasty: Step) -> str:
    """Return the mean k3 after the update, and after one at the preset's full learning rate."""
    return "\n".join(
        f"learning rate {each.metrics['lr']:.1e}    mean k3 after one update {mean_kl(each):.3f}"
        for each in (step, hasty)
    )


def find(step: Step, row: int, text: str) -> tuple[int, int]:
    """Return row and column of the token with this text that was least likely when sampled."""
    places = [i for i, token in enumerate(step.tokens[row]) if token == text]
    return row, min(places, key=lambda i: step.rollout.sampled_logprobs[row, i])


def probability(logprob: float | Tensor) -> float:
    """Return the exponential of a log-prob, or of a difference of two: then a ratio."""
    return float(torch.as_tensor(logprob).exp())


def mean_kl(step: Step) -> float:
    """Return k3 between the updated policy and the reference, the mean over all tokens."""
    kl = k3_kl(step.after, step.rollout.ref_logprobs) * step.rollout.completion_mask
    return (kl.sum() / step.rollout.completion_mask.sum()).item()


def blocks() -> dict[str, str]:
    """Return all blocks of the page, by name, in its order."""
    step = take_step()
    return {
        "completions": completions_block(step),
        "rewards and advantages": rewards_block(step),
        "one token": token_block(step),
        "loss": loss_block(step),
        "update": update_block(step),
        "learning rate": rate_block(step, take_step("--warmup-steps", "0")),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the blocks; write the plot if asked to."""
    ignore_output_errors()
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="One step, in numbers.")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the plot here")
    args = parser.parse_args(arguments)
    if args.picture:
        take_step().example.image.save(args.picture)
    for name, block in blocks().items():
        print(f"# {name}\n{block}\n")


if __name__ == "__main__":
    main()
