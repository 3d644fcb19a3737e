"""Size of a step's passes, and the retry with smaller ones if memory runs out."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
ALL_LAYERS = 1_000_000  # more layers than any model has


@dataclass
class PassSize:
    """Size of one forward and backward pass. It changes memory use, never the gradient."""

    micro_batch: int  # prompts
    checkpoint_layers: int | None = None  # None: as few as fit in memory
    reduced: bool = False  # whether memory has run out once

    def reduce(self) -> None:
        """Use less memory from now on: halve the micro-batch and checkpoint every layer."""
        self.micro_batch = max(1, self.micro_batch // 2)
        self.checkpoint_layers, self.reduced = ALL_LAYERS, True
        warnings.warn(
            f"out of memory: retrying, and continuing, with --micro-batch {self.micro_batch} "
            f"and every layer checkpointed",
            stacklevel=3,
        )


def within_memory(run_passes: Callable[..., T], *arguments, pass_size: PassSize, **options) -> T:
    """Return the result of `run_passes`, retried with smaller passes if memory runs out.

    Retries once per `pass_size`, from scratch: `run_passes` must be safe to repeat after it fails.
    """
    try:
        return run_passes(*arguments, pass_size=pass_size, **options)
    except RuntimeError as error:
        if pass_size.reduced or not is_out_of_memory(error):
            raise
    pass_size.reduce()  # outside the handler, where the error keeps the failed pass's tensors alive
    with suppress(RuntimeError):  # best effort
        torch.cuda.empty_cache()
    return run_passes(*arguments, pass_size=pass_size, **options)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether the GPU ran out of memory, in torch or in a library's workspace."""
    mentioned = any(words in str(error) for words in ("out of memory", "_ALLOC_FAILED"))
    return isinstance(error, torch.OutOfMemoryError) or mentioned
