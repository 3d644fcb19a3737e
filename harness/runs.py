"""How a run starts, resumes and ends."""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from engine.loading import Loaded
from engine.parallel import barrier, connect, gather, is_main, process_count
from engine.passes import is_out_of_memory
from harness import checkpoint
from harness.health import Unhealthy, launcher_limit
from harness.runlog import (
    NullRunLog,
    RunError,
    RunLog,
    Tracker,
    create_run,
    numbered_folders,
    read_description,
    reopen_run,
)

# --- before anything is loaded ----------------------------------------------------------


def connect_processes(prompts_per_step: int, *, on_cpu: bool) -> None:
    """Connect the processes that `accelerate launch` started; silence all but the main one.

    That replaces the `sys.stdout` of the others. Raises `ValueError` if they cannot split a step's
    prompts evenly; see also `rank_and_world_size`.
    """
    connect(on_cpu=on_cpu)
    if prompts_per_step % process_count():
        raise ValueError(
            f"--prompts-per-step {prompts_per_step}: must be a multiple of the "
            f"{process_count()} processes"
        )
    if not is_main():
        disable_progress_bar()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    elif warning := launcher_limit():
        print(warning)


def candidate_folders(parent: Path, name: str, *, default_name: str) -> Iterable[Path]:
    """Return the folders that a new run may use, in order; with a name, only that one.

    Raises `ValueError` if the named folder exists, or if `parent` is not writable.
    """
    existing = next(path for path in (parent, *parent.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"--runs {parent}: cannot write to {existing}")
    if not name:
        return numbered_folders(parent, default_name)
    folder = parent / name
    if Path(name).name != name:
        raise ValueError(f"--name {name}: must be the name of a folder in {parent}")
    if folder.exists():
        raise ValueError(f"--name {name}: {folder} exists; runs are never overwritten")
    return [folder]


def checkpoint_to_resume(
    run: Path, *, steps: int, decay_steps: int, model: str, merge: bool
) -> Path | None:
    """Return the checkpoint that a run resumes from; None if it died before its first one.

    Raises `ValueError` if no step is left, or if the optimizer state has not been saved.
    """
    saved = checkpoint.checkpoints_of(run)
    if not saved:
        check_first_model(run, model)
        return None
    done = checkpoint.steps_of(saved[-1])
    is_final = checkpoint.steps_of(run / "final") == done
    is_adapter = (run / "final" / "adapter_config.json").is_file()
    is_to_merge = merge and is_adapter
    if steps < done or (steps == done and is_final and not is_to_merge):
        more = f"; --steps {steps} must be larger"
        if decay_steps:  # then `config.check_same_run` refuses more steps
            merging = f"--resume {shlex.quote(str(run))} --merge, then " if is_adapter else ""
            more = (
                f", and the learning rate has ended (--decay-steps {decay_steps}). A new run can "
                f"start from its weights: {merging}--model {shlex.quote(str(run / 'final'))}"
            )
        raise ValueError(f"--resume {run}: {done} steps are done{more}")
    if steps > done and not checkpoint.has_optimizer(saved[-1]):
        raise ValueError(
            f"--resume {run}: {saved[-1].name} has no optimizer state (--no-save-optimizer). A new "
            f"run can start from its weights: --model {shlex.quote(str(saved[-1]))}"
        )
    return saved[-1]


def check_first_model(run: Path, model: str) -> None:
    """Raise `ValueError` for another model if no checkpoint can prove that it is the same one."""
    before = read_description(run)["config"]["model"]
    if model != before and os.path.isdir(before):
        raise ValueError(
            f"--model {model}: the run started from {before}, and has no checkpoint yet whose "
            f"checksums could show that the two are the same"
        )


# --- start and resume -------------------------------------------------------------------


def start_run(folders: Iterable[Path], *, config: dict, report_to: str, device: str) -> RunLog:
    """Create a new run in the first free folder and return its log.

    Raises `RunError`, and leaves no folder behind; the other processes exit with the main one.
    """
    log, problem = None, None
    if is_main():
        try:
            log = create_with_tracker(folders, config=config, report_to=report_to, device=device)
        except RunError as error:
            problem = error
    folder = gather([log.folder if log else None])[0]  # a barrier: the folder exists
    if problem:
        raise problem
    if folder is None:
        sys.exit(2)  # the main process reports the reason
    return log or NullRunLog(folder)


def create_with_tracker(
    folders: Iterable[Path], *, config: dict, report_to: str, device: str
) -> RunLog:
    """Create the run's folder and start its tracker; return its log. Raises `RunError`."""
    log = create_run(folders, config=config, device=device_name(device))
    try:
        log.tracker = make_tracker(report_to, log.folder, config=config, device=device)
    except BaseException:
        log.close()
        shutil.rmtree(log.folder)
        raise
    return log


def resume_run(run: Path, *, config: dict, report_to: str, device: str, steps_done: int) -> RunLog:
    """Return the log of a run that resumes after `steps_done` steps; cut off the lines after them.

    Raises `RunError`, and then cuts no line.
    """
    if not is_main():
        barrier()  # until the main process has cut the lines
        return NullRunLog(run)
    tracker = make_tracker(report_to, run, config=config, device=device, resumed_at=steps_done)
    log = reopen_run(run, config=config, device=device_name(device), steps_done=steps_done)
    log.tracker = tracker
    checkpoint.clear_leftovers(run)
    barrier()
    print(f"{run}: resuming after {steps_done} steps")
    if (run / "final").is_dir() and steps_done < config["steps"]:
        print(f"{run / 'final'}: is from an earlier step until the run finishes again")
    return log


def make_tracker(
    report_to: str, folder: Path, *, config: dict, device: str, resumed_at: int | None = None
) -> Tracker | None:
    """Return the tracker that --report-to names; None for "none". Raises `RunError`."""
    if report_to == "none":
        return None
    return Tracker(report_to, folder, config=config, on_cpu=device == "cpu", resumed_at=resumed_at)


def device_name(device: str) -> str:
    """Return the hardware that the run uses, for its config.json."""
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {threads} threads"
    return name if process_count() == 1 else f"{process_count()} x {name}"


# --- save and end -----------------------------------------------------------------------


def save_checkpoint(
    log: RunLog, loaded: Loaded, optimizer: torch.optim.Optimizer, *, steps_done: int, **parts
) -> None:
    """Save a checkpoint. If that fails, say why, and let the run continue.

    `parts` are further arguments of `checkpoint.save`.
    """
    started = time.perf_counter()
    try:
        with checkpoint.fail_together():  # a run cannot resume without the lines of its steps
            log.sync()
        saved = checkpoint.save(log.folder, loaded, optimizer, steps_done=steps_done, **parts)
    except (OSError, checkpoint.CheckpointError) as error:
        tqdm.write(f"step {steps_done - 1}: no checkpoint was saved: {error}")
    else:
        tqdm.write(f"{saved}: saved in {time.perf_counter() - started:.1f} s")


def stop_run(log: RunLog, signal_number: int) -> None:
    """Exit after a signal, with the exit code that shells expect: 128 + its number."""
    log.close()
    tqdm.write(f"{log.folder}: stopped. {how_to_resume(log.folder)}")
    sys.exit(128 + signal_number)


@contextmanager
def one_line_errors(run: Path, flags_for_less_memory: Callable[[], str]) -> Iterator[None]:
    """Turn an error that ends the run into an exit with one line: the reason, and what to do."""
    try:
        yield
        return
    except Unhealthy as error:  # a resumed run would end the same way
        sys.exit(f"main.py: {run}: {error}. {last_checkpoint(run)}")
    except RunError as error:
        problem = str(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        problem = f"out of GPU memory. Flags that save a tenth: {flags_for_less_memory()}"
    except (OSError, checkpoint.CheckpointError) as error:
        problem = f"cannot be written: {error}"
    sys.exit(f"main.py: {run}: {problem}. {how_to_resume(run)}")


def how_to_resume(run: Path) -> str:
    """Return one sentence on how to continue a run that ended early."""
    saved = checkpoint.checkpoints_of(run)
    command = f"python main.py --resume {shlex.quote(str(run))}"
    if not saved:
        return f"No checkpoint has been saved yet. To start over: {command}"
    if not checkpoint.has_optimizer(saved[-1]):
        return f"{last_checkpoint(run)}. A new run can start from it (--model)"
    return f"{last_checkpoint(run)}. To resume: {command}"


def last_checkpoint(run: Path) -> str:
    """Return a phrase that names the last checkpoint."""
    saved = checkpoint.checkpoints_of(run)
    return f"Last checkpoint: {saved[-1]}" if saved else "No checkpoint has been saved"
