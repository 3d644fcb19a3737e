"""Checkpoints: the whole state of a run after some step, on disk whole or not at all.

checkpoints/step-000100/
    config.json, model.safetensors, ...   policy and processor, for from_pretrained
    reference/                            the reference, if it has moved away from --model
    optimizer.pt                          moments and Kahan compensation (--save-optimizer)
    state.json                            steps done, and checksums of all of the above

Of several processes each writes the state of the parameters that it updates, to a file of its own:
optimizer-1-of-4.pt. Any number of processes can go on from them.

There is no random state and no place in the data to keep: both are functions of (seed, step), and
so is the learning rate.
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

FAILURES = (OSError, RuntimeError, SafetensorError, ModelError)  # what the savers raise
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


def steps_of(folder: Path) -> int | None:
    """Return after how many steps a checkpoint, or final/, was saved; None if it does not say.

    Raises `CheckpointError` for a damaged state.json.
    """
    return read_state(folder)["steps_done"] if (folder / "state.json").is_file() else None


def has_optimizer(checkpoint: Path) -> bool:
    """Return whether a checkpoint has the optimizer's state: only then can its run go on."""
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

    The main process writes all but the other processes' shares of the optimizer's state. Raises
    `CheckpointError`, in all of them, where there is no room, the disk refuses, or the policy is
    not worth it; what was there stays.
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

    With `merge` the model with its adapter in its weights. Raises `CheckpointError`.
    """
    with atomic_folder(run / "final") as partial:
        check_finite(loaded.policy)
        if is_main():
            (save_merged if merge else save_policy)(loaded, partial)
            (partial / "state.json").write_text(json.dumps({"steps_done": steps_done}) + "\n")


def check_finite(policy) -> None:
    """Raise `CheckpointError` for a policy with a weight that is not a number, or infinite.

    One update can do that, with all its gradients finite: a good checkpoint must not give way to
    such a policy.
    """
    if names := non_finite_parameters(policy):
        raise CheckpointError(
            f"the policy has {len(names)} weights that are not finite, as {names[0]}"
        )


def check_room(run: Path, needed: int) -> None:
    """Raise `CheckpointError` if the disk has fewer bytes free."""
    free = shutil.disk_usage(run).free
    if needed > free:
        raise CheckpointError(f"it takes {needed / GIB:.2f} GiB, {free / GIB:.2f} GiB are free")


def checkpoint_bytes(loaded: Loaded, *, with_optimizer: bool, with_reference: bool) -> int:
    """Return about how much disk a checkpoint takes: 62 GiB for 8.29 billion bf16 parameters."""
    weights, trained = (
        sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        for parameters in (loaded.policy.parameters(), trainable(loaded.policy))
    )
    saved = weights if loaded.adapter is None else trained
    moments = optimizer_copies(loaded.policy.dtype) * trained
    return int(ROOM * (saved + with_optimizer * moments + with_reference * weights))


def save_shard(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the state of the parameters that this process updates, in the form of `state_dict`.

    A parameter goes by its number among those of all processes. Tensors that lie on a device come
    to the host one at a time.
    """
    share = torch.optim.Optimizer.state_dict(optimizer)  # of several processes, the groups only
    for number, parameter in local_parameters(optimizer).items():
        share["state"][number] = local_optimizer(optimizer).state.get(parameter, {})
    path = folder / shard_name(process_index(), process_count())
    before = torch.serialization.get_crc32_options()
    # it would more than double the time, and the checksums in state.json tell of the same damage
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(share, path)
    finally:
        torch.serialization.set_crc32_options(before)
    flush(path)  # only the machine that has written can


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `folder` once all in it is on disk.

    All processes may write to it. Whatever happens before that, to the disk, a process or the
    machine, `folder` stays as it was. Raises `CheckpointError` in all of them if one cannot write.
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
                put_in_place(partial, folder)
    except BaseException:
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def fail_together() -> Iterator[None]:
    """Raise `CheckpointError` in all processes if the block fails in any; all wait for all."""
    problems, cause = [], None
    try:
        yield
    except (CheckpointError, *FAILURES) as error:
        problems, cause = [first_line(error)], error
    if problems := gather(problems):
        raise CheckpointError(problems[0]) from cause


def put_in_place(partial: Path, folder: Path) -> None:
    """Give a folder the name and place of another, once all in it is on disk."""
    for path in [*partial.rglob("*"), partial]:
        flush(path)
    if folder.exists():
        discard(folder)
    partial.rename(folder)
    flush(folder.parent)


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
        with_optimizer = has_optimizer(checkpoint)  # if not, there is no step left to be done
        if with_optimizer:
            restore_optimizer(checkpoint, optimizer, processes=state["processes"])
    except CheckpointError:
        raise
    except ModelError as error:
        raise CheckpointError(f"damaged checkpoint: {error}") from error
    except Exception as error:  # whatever else a damaged file makes the loaders raise
        raise CheckpointError(f"{checkpoint}: damaged: {first_line(error)}") from error
    state["checksums"].setdefault("files", checksum_of_files(loaded.files))  # none in older ones
    for part, found in checksums(loaded, optimizer, with_optimizer).items():
        if found != state["checksums"].get(part):
            where = f"{checkpoint}: damaged"
            is_of_model = part == "reference" and not (checkpoint / "reference").is_dir()
            if part == "files" or is_of_model:
                where = "--model: not the one this run was started from"
            raise CheckpointError(f"{where}: the checksum of the {part} differs")
    return state["steps_done"]


def read_state(checkpoint: Path) -> dict:
    """Return what state.json holds. Raises `CheckpointError` if it cannot be read."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        return {
            "steps_done": int(state["steps_done"]),
            "processes": int(state.get("processes", 1)),  # older ones have one file for all
            "checksums": dict(state.get("checksums", {})),  # none in final/
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint / 'state.json'}: damaged: {first_line(error)}"
        ) from error


def restore_optimizer(
    checkpoint: Path, optimizer: torch.optim.Optimizer, *, processes: int
) -> None:
    """Give the optimizer, tensor by tensor, its own part of what so many processes have saved."""
    names = [shard_name(number, processes) for number in range(processes)]
    shares = [open_shard(checkpoint / name) for name in names]
    saved = {number: state for share in shares for number, state in share["state"].items()}
    own_form = {"triton": optimizer.param_groups[0]["triton"]}  # a matter of the machine
    groups = [group | own_form for group in shares[0]["param_groups"]]
    torch.optim.Optimizer.load_state_dict(optimizer, {"state": {}, "param_groups": groups})
    for number, parameter in local_parameters(optimizer).items():
        local_optimizer(optimizer).state[parameter] = {
            name: value if value is None else value.to(parameter.device, copy=True)
            for name, value in saved.get(number, {}).items()
        }


def open_shard(path: Path) -> dict:
    """Return what `save_shard` wrote; a tensor stays on the disk until it is read."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except UnpicklingError as error:  # its own text tells how to run the code of others
        raise CheckpointError(f"{path}: damaged: it holds not just tensors") from error


# --- for saving and restoring -----------------------------------------------------------


def shard_name(number: int, processes: int) -> str:
    """Return the name of the file with a process's share of the optimizer's state.

    >>> shard_name(0, 1), shard_name(0, 4)
    ('optimizer.pt', 'optimizer-1-of-4.pt')
    """
    return "optimizer.pt" if processes == 1 else f"optimizer-{number + 1}-of-{processes}.pt"


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that keeps the state of what this process updates."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def local_parameters(optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
    """Return the parameters that this process updates, by their number among those of all."""
    all_parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    own = {
        tensor for group in local_optimizer(optimizer).param_groups for tensor in group["params"]
    }
    return {number: tensor for number, tensor in enumerate(all_parameters) if tensor in own}


def checksums(
    loaded: Loaded, optimizer: torch.optim.Optimizer, with_optimizer: bool
) -> dict[str, int]:
    """Return a checksum of each part of a run's state; the optimizer's is that of all processes."""
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
    """Return a checksum of tokenizer, chat template and the like, which are part of the model."""
    return zlib.crc32(b"".join(name.encode() + files[name] for name in sorted(files)))


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
