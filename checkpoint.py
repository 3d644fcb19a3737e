"""Checkpoints: the whole state of a run after some step, on disk whole or not at all.

checkpoints/step-000100/
    config.json, model.safetensors, ...   policy and processor, for from_pretrained
    reference/                            the reference, if it has moved away from --model
    optimizer.pt                          moments and Kahan compensation (--save-optimizer)
    state.json                            steps done, and checksums of all of the above

There is no random state and no place in the data to keep: both are functions of (seed, step), and
so is the learning rate.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

from parallel import is_main, total
from policy import (
    GIB,
    Loaded,
    ModelError,
    copy_policy,
    copy_weights,
    first_line,
    optimizer_copies,
    save_merged,
    save_policy,
    save_weights,
    trainable,
)

FAILURES = (OSError, RuntimeError, SafetensorError)  # what the savers raise on a full disk
STEP_FOLDER = re.compile(r"step-[0-9]{6,}")
ROOM = 1.02  # of the tensors' bytes: headers, tokenizer, file system


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read. The message is one line for the user."""


def checkpoints_of(run: Path) -> list[Path]:
    """Return a run's checkpoints, the newest last: every folder with such a name is whole."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if path.is_dir()]
    return sorted(
        (path for path in folders if STEP_FOLDER.fullmatch(path.name)),
        key=lambda path: int(path.name.removeprefix("step-")),
    )


# --- saving -----------------------------------------------------------------------------


def save(
    run: Path,
    loaded: Loaded,
    optimizer: torch.optim.Optimizer,
    *,
    steps_done: int,
    with_optimizer: bool,
    with_reference: bool,
    keep: int,
) -> Path:
    """Write a checkpoint, delete all but the newest `keep`, and return its folder.

    Of several processes the main one writes, the others give it their share of the optimizer.
    Raises `CheckpointError` where there is no room, the disk refuses, or the policy is not worth
    it; what was there stays.
    """
    check_finite(loaded.policy)
    if with_optimizer and isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict()
    state = {"steps_done": steps_done, "checksums": checksums(loaded, optimizer, with_optimizer)}
    folder = run / "checkpoints" / f"step-{steps_done:06}"
    if not is_main():
        return folder
    needed = checkpoint_bytes(loaded, with_optimizer=with_optimizer, with_reference=with_reference)
    free = shutil.disk_usage(run).free
    if needed > free:
        raise CheckpointError(f"it takes {needed / GIB:.2f} GiB, {free / GIB:.2f} GiB are free")
    try:
        with whole_folder(folder) as partial:
            save_policy(loaded, partial)
            if with_reference:
                save_weights(loaded.reference, partial / "reference")
            if with_optimizer:
                torch.save(optimizer.state_dict(), partial / "optimizer.pt")
            (partial / "state.json").write_text(json.dumps(state) + "\n")
        for old in checkpoints_of(run)[:-keep]:
            discard(old)
    except FAILURES as error:
        raise CheckpointError(first_line(error)) from error
    return folder


def save_final(run: Path, loaded: Loaded, *, merge: bool = False) -> None:
    """Write the trained model, or its adapter, and its processor to `final/`.

    With `merge` the model with its adapter in its weights. Raises `CheckpointError`.
    """
    check_finite(loaded.policy)
    if not is_main():
        return
    try:
        with whole_folder(run / "final") as partial:
            (save_merged if merge else save_policy)(loaded, partial)
    except FAILURES as error:
        raise CheckpointError(first_line(error)) from error


def check_finite(policy) -> None:
    """Raise `CheckpointError` for a policy with a weight that is not a number, or infinite.

    One update can do that, with all its gradients finite: a good checkpoint must not give way to
    such a policy.
    """
    finite = torch.stack([parameter.isfinite().all() for parameter in policy.parameters()])
    if not finite.all():  # host sync
        raise CheckpointError("the policy has weights that are not finite")


def checkpoint_bytes(loaded: Loaded, *, with_optimizer: bool, with_reference: bool) -> int:
    """Return about how much disk a checkpoint takes: 62 GiB for 8.29 billion bf16 parameters."""
    weights, trained = (
        sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        for parameters in (loaded.policy.parameters(), trainable(loaded.policy))
    )
    saved = weights if loaded.adapter is None else trained
    moments = optimizer_copies(loaded.policy.dtype) * trained
    return int(ROOM * (saved + with_optimizer * moments + with_reference * weights))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `folder` once all in it is on disk.

    Whatever happens before that, to the disk, the process or the machine, `folder` stays as it was.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        if folder.exists():
            discard(folder)
        partial.rename(folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def discard(folder: Path) -> None:
    """Delete a folder; half deleted, it no longer has its name."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def clear_leftovers(run: Path) -> None:
    """Delete what a process that was killed while saving has left behind."""
    for pattern in (".*.partial", ".*.deleted", "checkpoints/.*.partial", "checkpoints/.*.deleted"):
        for path in run.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- restoring --------------------------------------------------------------------------


def restore(checkpoint: Path, loaded: Loaded, optimizer: torch.optim.Optimizer) -> int:
    """Bring policy, reference and optimizer, in place, to a checkpoint's state; return its steps.

    `loaded` is what the run started from. Raises `CheckpointError` for a damaged checkpoint, and
    where the reference, unless it is part of the checkpoint, is not the one the run had.
    """
    try:
        state = read_state(checkpoint)
        copy_policy(checkpoint, loaded)
        if (checkpoint / "reference").is_dir():
            copy_weights(checkpoint / "reference", loaded.reference)
        on_cpu = loaded.policy.device.type == "cpu"
        optimizer.load_state_dict(
            torch.load(
                checkpoint / "optimizer.pt",
                weights_only=True,
                map_location="cpu",
                mmap=not on_cpu,  # else a second copy would stand in memory on the way to the GPU
            )
        )
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            optimizer.state.clear()  # a second copy: its inner optimizer has its own
    except CheckpointError:
        raise
    except ModelError as error:
        raise CheckpointError(f"damaged checkpoint: {error}") from error
    except UnpicklingError as error:  # its own text tells how to run the code of others
        problem = f"{checkpoint}: damaged: optimizer.pt holds not just tensors"
        raise CheckpointError(problem) from error
    except Exception as error:  # whatever else a damaged file makes the loaders raise
        raise CheckpointError(f"{checkpoint}: damaged: {first_line(error)}") from error
    for part, found in checksums(loaded, optimizer, True).items():
        if found != state["checksums"].get(part):
            where = f"{checkpoint}: damaged"
            if part == "reference" and not (checkpoint / "reference").is_dir():
                where = "--model: not the one this run was started from"
            raise CheckpointError(f"{where}: the checksum of the {part} differs")
    return state["steps_done"]


def read_state(checkpoint: Path) -> dict:
    """Return what state.json holds. Raises `CheckpointError` if it cannot be read."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        return {"steps_done": int(state["steps_done"]), "checksums": dict(state["checksums"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint / 'state.json'}: damaged: {first_line(error)}"
        ) from error


def checksums(
    loaded: Loaded, optimizer: torch.optim.Optimizer, with_optimizer: bool
) -> dict[str, int]:
    """Return a checksum of each part of a run's state; the optimizer's is that of all processes."""
    found = {"policy": checksum(loaded.policy.parameters())}
    if loaded.reference is not None:
        found["reference"] = checksum(loaded.reference.parameters())
    if with_optimizer:
        sharded = isinstance(optimizer, ZeroRedundancyOptimizer)
        states = (optimizer.optim if sharded else optimizer).state.values()
        tensors = (value for state in states for value in state.values() if value is not None)
        share = torch.tensor(checksum(tensors), device=loaded.policy.device)
        found["optimizer"] = int(total(share))
    return found


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return the sum of all bits, read as integers: exact, so the same on every device.

    >>> checksum([torch.tensor([1.0]), torch.tensor([2.0])])
    2139095040
    """
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [
        tensor.detach().contiguous().view(words[tensor.element_size()]).sum(dtype=torch.int64)
        for tensor in tensors
    ]
    return int(torch.stack(sums).sum()) if sums else 0  # host sync
