"""Several processes that train one policy: who they are, and what they tell each other.

`accelerate launch main.py` starts them. Each holds the whole policy, rolls out its share of every
step's prompts and makes its part of the gradient; a group of completions never leaves its process.
`python main.py` is one process, and all of this is nothing to it.

Gradients are added up here, once a step, and not by DistributedDataParallel in the backward pass:
so a process may do that pass over in smaller pieces when its memory runs out, without the others.
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
LAUNCHER = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE
PATIENCE = timedelta(hours=1)  # all wait for one while it writes a checkpoint


def launched() -> tuple[int, int]:
    """Return this process's number, and how many a launcher has started; (0, 1) without one.

    Variables that some other tool has left are passed over, as RANK without WORLD_SIZE. Raises
    `ValueError` where several processes are spoken of and the rest is missing.
    """
    count = number_in("WORLD_SIZE") or 1
    if count == 1:
        return 0, 1
    missing = [name for name in LAUNCHER if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={count}: without {' and '.join(missing)}; accelerate launch and torchrun "
            f"set them all, and without WORLD_SIZE this is one process"
        )
    return number_in("RANK") or 0, count


def number_in(variable: str) -> int | None:
    """Return the number in an environment variable; None without one. Raises `ValueError`."""
    text = os.environ.get(variable, "").strip()
    if text and not text.isdecimal():
        raise ValueError(f"{variable}={text}: must be a number")
    return int(text) if text else None


def check_alone() -> None:
    """Raise `ValueError` in a command for one process that several were started of."""
    _, count = launched()
    if count > 1:
        raise ValueError(
            f"WORLD_SIZE={count}: only main.py runs in several processes; start this with python"
        )


def connect(*, on_cpu: bool) -> None:
    """Meet the processes started beside this one, if there are any: one per GPU, or on the CPU.

    Raises `ValueError`: see `launched`.
    """
    if launched()[1] > 1 and not dist.is_initialized():
        PartialState(cpu=on_cpu, timeout=PATIENCE)
        atexit.register(disconnect)


def disconnect() -> None:
    """Part from the other processes; those that have parted already do nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()


def process_count() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_index() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Return whether this is the process that writes and talks."""
    return process_index() == 0


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of the processes' values."""
    return reduced(value, dist.ReduceOp.SUM)


def all_reduce_max(value: Tensor) -> Tensor:
    """Return the largest of the processes' values, element by element."""
    return reduced(value, dist.ReduceOp.MAX)


def reduced(value: Tensor, how: dist.ReduceOp) -> Tensor:
    """Return what becomes of the processes' values; the same on all of them."""
    if process_count() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, how)
    return value


def all_reduce_gradients(parameters: Iterable) -> None:
    """Give every process the sum of all processes' gradients, in place."""
    if process_count() > 1:
        gradients = (p.grad for p in parameters if p.grad is not None)
        for pending in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            pending.wait()


def gather(items: list[T]) -> list[T]:
    """Return the processes' lists one after the other; the host waits for the slowest."""
    if process_count() == 1:
        return items
    lists: list = [None] * process_count()
    dist.all_gather_object(lists, items)
    return [item for each in lists for item in each]


def barrier() -> None:
    """Wait until every process has come here."""
    gather([])
