"""loader.py: batches in order, and a worker that dies is reported in one line."""

import pytest

from harness.loader import make_loader, next_batch
from harness.runlog import RunError


@pytest.mark.parametrize("workers", [0, 2])
def test_each_step_gets_its_own_batch_in_order(workers):
    loader = make_loader(str, range(3, 7), workers=workers)
    assert list(loader) == ["3", "4", "5", "6"]


def test_a_loader_that_fails_is_told_without_advice_that_may_be_wrong():
    def batches():
        raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly\nmore of it")
        yield

    message = r"the loader could not make the next plots: .* exited unexpectedly$"
    with pytest.raises(RunError, match=message):
        next_batch(batches())
