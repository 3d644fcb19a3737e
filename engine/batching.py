"""How a step is cut into passes of the model, and what happens when memory runs out."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
ALL_LAYERS = 1_000_000  # to checkpoint: more than a model has


@dataclass
class PassSize:
    """How much one forward and backward pass holds: a matter of memory, never of the gradient."""

    micro_batch: int  # prompts
    checkpoint_layers: int | None = None  # None: as few as memory allows
    reduced: bool = False  # whether memory has run out before

    def reduce(self) -> None:
        """Use less memory from now on: half the prompts, every layer checkpointed."""
        self.micro_batch = max(1, self.micro_batch // 2)
        self.checkpoint_layers, self.reduced = ALL_LAYERS, True
        warnings.warn(
            f"out of memory: trying again, and from here on, with --micro-batch {self.micro_batch} "
            f"and every layer checkpointed",
            stacklevel=3,
        )


def within_memory(run_passes: Callable[..., T], *arguments, pass_size: PassSize, **options) -> T:
    """Return what `run_passes` returns; if memory runs out for the first time, try smaller passes.

    The second attempt starts from scratch: `run_passes` must not have changed anything that it
    would change again.
    """
    try:
        return run_passes(*arguments, pass_size=pass_size, **options)
    except RuntimeError as error:
        if pass_size.reduced or not is_out_of_memory(error):
            raise
    pass_size.reduce()  # outside the handler: until it ends, its error keeps the failed pass alive
    with suppress(RuntimeError):  # best effort
        torch.cuda.empty_cache()
    return run_passes(*arguments, pass_size=pass_size, **options)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether the GPU ran out of memory, in torch or in a library's workspace."""
    mentioned = any(words in str(error) for words in ("out of memory", "_ALLOC_FAILED"))
    return isinstance(error, torch.OutOfMemoryError) or mentioned
