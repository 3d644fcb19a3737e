"""Train with one part of the algorithm taken out, to see what that part is for.

python experiments/ablate.py stop-token --preset tiny --name no-stop-token

All flags are those of main.py. For parts that main.py can switch off itself (--beta 0,
--group-size), use its own flags.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

import grpo
import main
from harness import health


def without_std(group_advantages: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a `group_advantages` that does not divide by the group's standard deviation."""
    return lambda rewards, *, divide_by_std: group_advantages(rewards, divide_by_std=False)


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


ABLATIONS = {  # name: module, function to replace, maker of its replacement
    "std": (grpo, "group_advantages", without_std),
    "stop-token": (grpo, "token_weights", without_stop_token),
    "scored-temperature": (grpo, "completion_logprobs", without_temperature),
    "kahan": (main, "make_optimizer", without_kahan),
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
