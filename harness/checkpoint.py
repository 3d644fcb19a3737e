"""Checkpoints: the whole state of a run after a step, written atomically.

checkpoints/step-000100/
    config.json, model.safetensors, ...   policy and processor, for from_pretrained
    reference/                            the reference, if it has moved away from --model
    optimizer.pt                          moments and Kahan compensation (--save-optimizer)
    state.json                            steps done, process count, checksums of all the above

With several processes, each writes its shard of the optimizer state to its own file, such as
optimizer-1-of-4.pt. Any number of processes can resume from the shards.

A checkpoint stores no random state and no position in the data: both are functions of
(seed, step), and so is the learning rate.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

from engine.loading import (
    Loaded,
    copy_policy,
    copy_weights,
    non_finite_parameters,
    save_merged,
    save_policy,
    save_weights,
    trainable,
)
from engine.model_files import ModelError, first_line
from engine.parallel import all_reduce_sum, gather, is_main, process_count, process_index
from engine.sizes import GIB, optimizer_copies

FAILURES = (OSError, RuntimeError, SafetensorError, ModelError)  # raised by the save functions
STEP_FOLDER = re.compile(r"step-[0-9]{6,}")
ROOM = 1.02  # times the tensors' bytes: adds headers, tokenizer and file system overhead


class CheckpointError(Exception):
    """A checkpoint cannot be written or read. The message is one line for the user."""


def checkpoints_of(run: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first. Every folder with such a name is complete."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if path.is_dir()]
    return sorted(
        (path for path in folders if STEP_FOLDER.fullmatch(path.name)),
        key=lambda path: int(path.name.removeprefix("step-")),
    )


def steps_of(folder: Path) -> int | None:
    """Return the steps done when a checkpoint or final/ was saved; None without a state.json.

    Raises `CheckpointError` for a damaged state.json.
    """
    return read_state(folder)["steps_done"] if (folder / "state.json").is_file() else None


def has_optimizer(checkpoint: Path) -> bool:
    """Return whether a checkpoint holds the optimizer state, which resuming needs."""
    return any(checkpoint.glob("optimizer*.pt"))


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

    The main process writes everything except the other processes' optimizer shards. Raises
    `CheckpointError` on all processes if the disk has too little space, a write fails, or the
    policy is not finite; existing checkpoints then stay.
    """
    needed = checkpoint_bytes(loaded, with_optimizer=with_optimizer, with_reference=with_reference)
    with fail_together():
        check_finite(loaded.policy)
        if is_main():
            check_room(run, needed)
    state = {
        "steps_done": steps_done,
        "processes": process_count(),
        "checksums": checksums(loaded, optimizer, with_optimizer),
    }
    folder = run / "checkpoints" / f"step-{steps_done:06}"
    with atomic_folder(folder) as partial:
        if is_main():
            save_policy(loaded, partial)
            if with_reference:
                save_weights(loaded.reference, partial / "reference")
            (partial / "state.json").write_text(json.dumps(state) + "\n")
        if with_optimizer:
            save_shard(optimizer, partial)
    with fail_together():
        for old in checkpoints_of(run)[:-keep] if is_main() else []:
            discard(old)
    return folder


def save_final(run: Path, loaded: Loaded, *, steps_done: int, merge: bool = False) -> None:
    """Write the trained model, or its adapter, and its processor to `final/`.

    With `merge`, write the model with the adapter merged into it. Raises `CheckpointError`.
    """
    with atomic_folder(run / "final") as partial:
        check_finite(loaded.policy)
        if is_main():
            (save_merged if merge else save_policy)(loaded, partial)
            (partial / "state.json").write_text(json.dumps({"steps_done": steps_done}) + "\n")


def check_finite(policy) -> None:
    """Raise `CheckpointError` if a weight of the policy is NaN or infinite.

    One update can do this even with finite gradients. Such a policy must not replace a good
    checkpoint.
    """
    if names := non_finite_parameters(policy):
        raise CheckpointError(
            f"{len(names)} of the policy's weight tensors are not finite, for example {names[0]}"
        )


def check_room(run: Path, needed: int) -> None:
    """Raise `CheckpointError` if the disk has fewer than `needed` bytes free."""
    free = shutil.disk_usage(run).free
    if needed > free:
        raise CheckpointError(
            f"it needs {needed / GIB:.2f} GiB, and only {free / GIB:.2f} GiB are free"
        )


def checkpoint_bytes(loaded: Loaded, *, with_optimizer: bool, with_reference: bool) -> int:
    """Return a checkpoint's approximate bytes: 62 GiB for 8.29 billion bf16 parameters."""
    weights, trained = (
        sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        for parameters in (loaded.policy.parameters(), trainable(loaded.policy))
    )
    saved = weights if loaded.adapter is None else trained
    moments = optimizer_copies(loaded.policy.dtype) * trained
    return int(ROOM * (saved + with_optimizer * moments + with_reference * weights))


def save_shard(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the state of the parameters that this process updates, laid out as a `state_dict`.

    Its keys number the parameters of all processes. Tensors on a device are copied to the host
    one at a time.
    """
    share = torch.optim.Optimizer.state_dict(optimizer)  # several processes: only param_groups
    for number, parameter in local_parameters(optimizer).items():
        share["state"][number] = local_optimizer(optimizer).state.get(parameter, {})
    path = folder / shard_name(process_index(), process_count())
    before = torch.serialization.get_crc32_options()
    # crc32 would more than double the time, and state.json's checksums catch the same damage
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(share, path)
    finally:
        torch.serialization.set_crc32_options(before)
    flush(path)  # only the machine that wrote the file can flush it


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` once its content is on disk.

    All processes may write to it. If the disk, a process or the machine fails before that,
    `folder` stays as it was. Raises `CheckpointError` on all processes if any cannot write.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with fail_together():
            if is_main():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with fail_together():
            yield partial
        with fail_together():
            if is_main():
                move_into_place(partial, folder)
    except BaseException:
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def fail_together() -> Iterator[None]:
    """Raise `CheckpointError` on all processes if the block fails on any. Acts as a barrier."""
    problems, cause = [], None
    try:
        yield
    except (CheckpointError, *FAILURES) as error:
        problems, cause = [first_line(error)], error
    if problems := gather(problems):
        raise CheckpointError(problems[0]) from cause


def move_into_place(partial: Path, folder: Path) -> None:
    """Flush everything in `partial` to disk, then rename it to `folder`, replacing that one."""
    for path in [*partial.rglob("*"), partial]:
        flush(path)
    if folder.exists():
        discard(folder)
    partial.rename(folder)
    flush(folder.parent)


def discard(folder: Path) -> None:
    """Delete a folder. Rename it first, so that a half-deleted folder never keeps its name."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def clear_leftovers(run: Path) -> None:
    """Delete the temporary folders of a process that was killed while saving."""
    for pattern in (".*.partial", ".*.deleted", "checkpoints/.*.partial", "checkpoints/.*.deleted"):
        for path in run.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file or folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- restoring --------------------------------------------------------------------------


def restore(checkpoint: Path, loaded: Loaded, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint into policy, reference and optimizer, in place; return its steps done.

    `loaded` is the model that the run started from. Raises `CheckpointError` if the checkpoint is
    damaged, or if the reference is neither in the checkpoint nor the one that the run had.
    """
    try:
        state = read_state(checkpoint)
        copy_policy(checkpoint, loaded)
        if (checkpoint / "reference").is_dir():
            copy_weights(checkpoint / "reference", loaded.reference)
        with_optimizer = has_optimizer(checkpoint)  # without it, no step is left to train
        if with_optimizer:
            restore_optimizer(checkpoint, optimizer, processes=state["processes"])
    except CheckpointError:
        raise
    except ModelError as error:
        raise CheckpointError(f"damaged checkpoint: {error}") from error
    except Exception as error:  # the loaders raise many types for a damaged file
        raise CheckpointError(f"{checkpoint}: damaged: {first_line(error)}") from error
    state["checksums"].setdefault("files", checksum_of_files(loaded.files))  # older ones lack it
    for part, found in checksums(loaded, optimizer, with_optimizer).items():
        if found != state["checksums"].get(part):
            where = f"{checkpoint}: damaged"
            is_of_model = part == "reference" and not (checkpoint / "reference").is_dir()
            if part == "files" or is_of_model:
                where = "--model: not the model that this run started from"
            raise CheckpointError(f"{where}: the checksum of the {part} does not match")
    return state["steps_done"]


def read_state(checkpoint: Path) -> dict:
    """Return the content of state.json. Raises `CheckpointError` if it cannot be read."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        return {
            "steps_done": int(state["steps_done"]),
            "processes": int(state.get("processes", 1)),  # older ones have one file
            "checksums": dict(state.get("checksums", {})),  # final/ has none
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint / 'state.json'}: damaged: {first_line(error)}"
        ) from error


def restore_optimizer(
    checkpoint: Path, optimizer: torch.optim.Optimizer, *, processes: int
) -> None:
    """Load this process's part of the state that `processes` processes saved, tensor by tensor."""
    names = [shard_name(number, processes) for number in range(processes)]
    shares = [open_shard(checkpoint / name) for name in names]
    saved = {number: state for share in shares for number, state in share["state"].items()}
    own_form = {"triton": optimizer.param_groups[0]["triton"]}  # depends on this machine
    groups = [group | own_form for group in shares[0]["param_groups"]]
    torch.optim.Optimizer.load_state_dict(optimizer, {"state": {}, "param_groups": groups})
    for number, parameter in local_parameters(optimizer).items():
        local_optimizer(optimizer).state[parameter] = {
            name: value if value is None else value.to(parameter.device, copy=True)
            for name, value in saved.get(number, {}).items()
        }


def open_shard(path: Path) -> dict:
    """Return what `save_shard` wrote; tensors stay on disk until they are read."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except UnpicklingError as error:  # its own text explains how to run foreign code
        raise CheckpointError(f"{path}: damaged: it holds more than tensors") from error


# --- shared by saving and restoring -----------------------------------------------------


def shard_name(number: int, processes: int) -> str:
    """Return the file name of a process's shard of the optimizer state.

    >>> shard_name(0, 1), shard_name(0, 4)
    ('optimizer.pt', 'optimizer-1-of-4.pt')
    """
    return "optimizer.pt" if processes == 1 else f"optimizer-{number + 1}-of-{processes}.pt"


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that holds the state of this process's parameters."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def local_parameters(optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
    """Return the parameters that this process updates, by number among those of all processes."""
    all_parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    own = {
        tensor for group in local_optimizer(optimizer).param_groups for tensor in group["params"]
    }
    return {number: tensor for number, tensor in enumerate(all_parameters) if tensor in own}


def checksums(
    loaded: Loaded, optimizer: torch.optim.Optimizer, with_optimizer: bool
) -> dict[str, int]:
    """Return a checksum of each part of a run's state; the optimizer's covers all processes."""
    found = {
        "policy": checksum(loaded.policy.parameters()),
        "files": checksum_of_files(loaded.files),
    }
    if loaded.reference is not None:
        found["reference"] = checksum(loaded.reference.parameters())
    if with_optimizer:
        states = local_optimizer(optimizer).state.values()
        tensors = (value for state in states for value in state.values() if value is not None)
        share = torch.tensor(checksum(tensors), device=loaded.policy.device)
        found["optimizer"] = int(all_reduce_sum(share))  # host sync
    return found


def checksum_of_files(files: Mapping[str, bytes]) -> int:
    """Return a checksum of the tokenizer, chat template and other files of the model."""
    return zlib.crc32(b"".join(name.encode() + files[name] for name in sorted(files)))


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return the sum of the tensors' bits read as integers: exact, so the same on every device.

    >>> checksum([torch.tensor([1.0]), torch.tensor([2.0])])
    2139095040
    """
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [
        tensor.detach().contiguous().view(words[tensor.element_size()]).sum(dtype=torch.int64)
        for tensor in tensors
    ]
    return int(torch.stack(sums).sum()) if sums else 0  # host sync
