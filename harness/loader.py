"""Batches prepared ahead of the training loop, by worker processes that never outlive it."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from torch.utils.data import DataLoader, Dataset

from engine.model_files import first_line
from harness.health import exit_with_parent
from harness.runlog import RunError

T = TypeVar("T")
WORKER_TIMEOUT_S = 300  # without it, a worker that cannot deliver its batch blocks forever


class Steps(Dataset):
    """The batches of all steps, each made on request."""

    def __init__(self, make_batch: Callable[[int], object]) -> None:
        self.make_batch = make_batch

    def __getitem__(self, step: int) -> object:
        return self.make_batch(step)


def make_loader(
    make_batch: Callable[[int], object], steps: range, *, workers: int, pin_memory: bool = False
) -> DataLoader:
    """Return a loader of `make_batch(step)` for each step, in order.

    `workers` processes prepare the batches ahead; with 0, this process makes each on request.
    """
    return DataLoader(
        Steps(make_batch),
        sampler=steps,
        batch_size=None,  # each item is already a step's whole batch
        num_workers=workers,
        worker_init_fn=exit_with_parent,
        timeout=WORKER_TIMEOUT_S if workers else 0,
        pin_memory=pin_memory,
    )


def next_batch(batches: Iterator[T]) -> T:
    """Return the next step's batch. Raises `RunError` if the loader has failed."""
    try:
        return next(batches)
    except RuntimeError as error:
        raise RunError(f"the loader could not make the next plots: {first_line(error)}") from error
