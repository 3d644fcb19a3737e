"""Train with one part of the algorithm or the task taken out or replaced, to see what it is for.

python experiments/ablate.py stop-token --preset tiny --name no-stop-token

All flags are those of main.py; keep --workers at 0, because the change is made in this process, and
do not resume such a run with main.py. For parts that main.py can switch off itself (--beta 0,
--group-size), use its own flags.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

import grpo
import main
import shapes
from harness import health
from rewards import CORRECTNESS_MIN, Reward


def without_std(group_advantages: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a `group_advantages` that does not divide by the group's standard deviation."""
    return lambda rewards, *, divide_by_std: group_advantages(rewards, divide_by_std=False)


def with_batch_std(_: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a `group_advantages` that divides by the std of all rewards of the step.

    A group's rewards then keep their size beside those of other groups.
    """

    def advantages(rewards: Tensor, *, divide_by_std: bool) -> Tensor:
        centered = rewards - rewards.mean(1, keepdim=True)
        scaled = centered / (rewards.std() + grpo.STD_EPS)
        return torch.where(grpo.has_spread(rewards)[:, None], scaled, 0.0)

    return advantages


def with_the_others_as_baseline(_: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a `group_advantages` that subtracts the mean of the other rewards of the group.

    RLOO: Ahmadian et al. 2024, Back to Basics, arXiv:2402.14740. It is G / (G - 1) times what is
    left without the division by the std.
    """

    def advantages(rewards: Tensor, *, divide_by_std: bool) -> Tensor:
        others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
        return torch.where(grpo.has_spread(rewards)[:, None], rewards - others, 0.0)

    return advantages


def with_one_ratio_per_completion(grpo_loss: Callable) -> Callable:
    """Return a `grpo_loss` whose ratio is the geometric mean of a completion's token ratios.

    GSPO: Zheng et al. 2025, arXiv:2507.18071.
    """

    def loss(logprobs: Tensor, rollout: grpo.Rollout, weights: Tensor, **options):
        if options["beta"] > 0:
            sys.exit("ablate.py gspo: needs --beta 0: the KL term would be that of the mean ratio")
        old = logprobs.detach() if rollout.old_logprobs is None else rollout.old_logprobs
        mask = rollout.completion_mask
        mean = ((logprobs - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return grpo_loss(old + mean, rollout, weights, **options)

    return loss


def without_stop_token(token_weights: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a `token_weights` that is 0 for each row's last token, so stopping is not trained."""

    def weights(completion_mask: Tensor, **options) -> Tensor:
        last = completion_mask.sum(1, keepdim=True) - 1
        return token_weights(completion_mask, **options).scatter(1, last, 0.0)

    return weights


def without_temperature(completion_logprobs: Callable) -> Callable:
    """Return a `completion_logprobs` at temperature 1, whatever the tokens were sampled at."""
    return lambda *arguments, temperature, **options: completion_logprobs(
        *arguments, temperature=1.0, **options
    )


def without_kahan(_: Callable) -> Callable[..., torch.optim.Optimizer]:
    """Return a `make_optimizer` of plain AdamW, which rounds each update to the weights' dtype."""
    return lambda config, policy: torch.optim.AdamW(
        policy.parameters(),
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=main.ADAM_EPS,
        weight_decay=config.weight_decay,
    )


def only_if_it_follows(score: Callable[..., Reward]) -> Callable[..., Reward]:
    """Return a `score` whose area reward is the worst unless the answer follows from the words."""

    def strict(*arguments, **options) -> Reward:
        reward = score(*arguments, **options)
        return (
            reward if reward.answer_follows else replace(reward, area_correctness=CORRECTNESS_MIN)
        )

    return strict


def paid_by_length(score: Callable[..., Reward]) -> Callable[..., Reward]:
    """Return a `score` that adds 0.05 per character to the area reward: it can be cheated."""

    def generous(text: str, *arguments, **options) -> Reward:
        reward = score(text, *arguments, **options)
        return replace(reward, area_correctness=reward.area_correctness + 0.05 * len(text))

    return generous


def with_log_sizes(_: Callable) -> Callable[..., tuple[float, float]]:
    """Return a `sample_size` that is uniform in the logarithm: small shapes come more often."""

    def sample_size(kind: str, spec: shapes.ShapeSpec, rng) -> tuple[float, float]:
        low, high = math.log(spec.min_size), math.log(spec.max_size)
        while True:
            width, height = (math.exp(rng.uniform(low, high)) for _ in range(2))
            if kind in ("square", "circle"):
                return width, width
            if kind == "triangle" or abs(width - height) >= shapes.MIN_SIDE_DIFFERENCE:
                return width, height

    return sample_size


ABLATIONS = {  # name: module, function to replace, maker of its replacement
    "std": (grpo, "group_advantages", without_std),
    "batch-std": (grpo, "group_advantages", with_batch_std),
    "rloo": (grpo, "group_advantages", with_the_others_as_baseline),
    "gspo": (grpo, "grpo_loss", with_one_ratio_per_completion),
    "stop-token": (grpo, "token_weights", without_stop_token),
    "scored-temperature": (grpo, "completion_logprobs", without_temperature),
    "kahan": (main, "make_optimizer", without_kahan),
    "unfounded-answers": (main, "score", only_if_it_follows),
    "paid-by-length": (main, "score", paid_by_length),
    "uniform-sizes": (shapes, "sample_size", with_log_sizes),
}


def take_out(part: str) -> None:
    """Replace one function of the trainer with its ablated form, in this process."""
    module, name, ablated = ABLATIONS[part]
    setattr(module, name, ablated(getattr(module, name)))
    if part == "scored-temperature":  # the trainer would notice, and stop the run
        health.check_sampler_gap = lambda metrics, dtype: None


def run() -> None:
    """Train with main.py's flags, without the part that the first argument names."""
    part, *flags = sys.argv[1:] or ["--help"]
    if part in ("-h", "--help"):
        sys.exit(f"{__doc__}\nThe first argument: {', '.join(ABLATIONS)}")
    if part not in ABLATIONS:
        sys.exit(f"ablate.py {part}: the first argument must be one of: {', '.join(ABLATIONS)}")
    take_out(part)
    main.main(flags)


if __name__ == "__main__":
    run()
