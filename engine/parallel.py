"""Train one policy with several processes: ranks, collectives, and the process group.

`accelerate launch main.py` starts the processes. Each holds the whole policy, rolls out its shard
of every step's prompts and computes its part of the gradient; a group of completions stays in one
process. In a single process (`python main.py`) none of this has any effect.

Gradients are all-reduced here, once a step, not by DistributedDataParallel in the backward pass.
So a process that runs out of memory can repeat that pass in smaller micro-batches on its own.
"""

import atexit
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

T = TypeVar("T")
LAUNCHER = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # set along with WORLD_SIZE
PATIENCE = timedelta(hours=1)  # all processes wait while one writes a checkpoint


def rank_and_world_size() -> tuple[int, int]:
    """Return rank and world size as a launcher has set them; (0, 1) without a launcher.

    Ignores variables that another tool left behind, such as RANK without WORLD_SIZE. Raises
    `ValueError` if WORLD_SIZE is above 1 and other variables are missing.
    """
    count = number_in("WORLD_SIZE") or 1
    if count == 1:
        return 0, 1
    missing = [name for name in LAUNCHER if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={count}: set without {' and '.join(missing)}; accelerate launch and "
            f"torchrun set them all; for a single process, unset WORLD_SIZE"
        )
    return number_in("RANK") or 0, count


def number_in(variable: str) -> int | None:
    """Return the number in an environment variable; None without one. Raises `ValueError`."""
    text = os.environ.get(variable, "").strip()
    if text and not text.isdecimal():
        raise ValueError(f"{variable}={text}: must be a number")
    return int(text) if text else None


def check_single_process() -> None:
    """Raise `ValueError` if a launcher has started several processes of this command."""
    _, count = rank_and_world_size()
    if count > 1:
        raise ValueError(
            f"WORLD_SIZE={count}: only main.py runs in several processes; start this with python"
        )


def connect(*, on_cpu: bool) -> None:
    """Join the process group if there are several processes: one per GPU, or all on the CPU.

    Raises `ValueError`: see `rank_and_world_size`.
    """
    if rank_and_world_size()[1] > 1 and not dist.is_initialized():
        PartialState(cpu=on_cpu, timeout=PATIENCE)
        atexit.register(disconnect)


def disconnect() -> None:
    """Leave the process group, unless this process has left it already."""
    if dist.is_initialized():
        dist.destroy_process_group()


def process_count() -> int:
    """Return the world size, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_index() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Return whether this is the process that writes files and prints."""
    return process_index() == 0


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of all processes' values."""
    return reduced(value, dist.ReduceOp.SUM)


def all_reduce_max(value: Tensor) -> Tensor:
    """Return the element-wise maximum of all processes' values."""
    return reduced(value, dist.ReduceOp.MAX)


def reduced(value: Tensor, how: dist.ReduceOp) -> Tensor:
    """Return the all-reduced value, the same in every process."""
    if process_count() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, how)
    return value


def all_reduce_gradients(parameters: Iterable) -> None:
    """Sum the gradients over all processes, in place."""
    if process_count() > 1:
        gradients = (p.grad for p in parameters if p.grad is not None)
        for pending in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            pending.wait()


def gather(items: list[T]) -> list[T]:
    """Return all processes' lists, concatenated by rank; waits for the slowest process."""
    if process_count() == 1:
        return items
    lists: list = [None] * process_count()
    dist.all_gather_object(lists, items)
    return [item for each in lists for item in each]


def barrier() -> None:
    """Wait until every process has reached this call."""
    gather([])
