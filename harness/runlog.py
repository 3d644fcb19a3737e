"""The run folder: everything that a run writes.

config.json         every option, versions, device, git commit, command; the same for each resume
metrics.jsonl       one object per step
evaluations.jsonl   one object per held-out evaluation
samples.jsonl       one prompt with all its completions, every few steps
checkpoints/        the state after some steps, to resume from: see checkpoint.py
final/              model and processor, for from_pretrained
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:
    sys.exit("This program runs on Linux and macOS. On Windows, run it in WSL")

ROOT = Path(__file__).resolve().parent.parent  # of the source code
PACKAGES = ("torch", "transformers", "accelerate", "torch-optimi", "matplotlib", "numpy", "pillow")
TRACKED = {"metrics": "", "evaluations": "held_out/"}  # logs for the tracker -> prefix
STEP_KEYS = {"metrics": "step", "evaluations": "steps_done", "samples": "step"}  # log -> step key


class RunError(Exception):
    """A run cannot start, resume or continue. The message is one line for the user."""


class RunLog:
    """Writes the log lines of one run; only one process at a time can. Raises `RunError`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tracker = folder, None
        try:
            self.files = {
                name: (folder / f"{name}.jsonl").open("ab", buffering=0) for name in STEP_KEYS
            }
            lock(self.files["metrics"])
        except BlockingIOError as error:
            raise RunError(f"{folder}: another process is writing this run") from error
        except OSError as error:
            raise RunError(f"{folder}: cannot be written: {error.strerror}") from error
        self.pending = dict.fromkeys(STEP_KEYS, b"")  # bytes not on disk yet

    def write(self, name: str, record: dict) -> None:
        """Append one line to metrics, evaluations or samples, unbuffered.

        If the disk is full, warn, keep the line in memory, and retry with the next line.
        """
        record = replace_non_finite(record)
        if self.tracker is not None and name in TRACKED:
            steps_done = record[STEP_KEYS[name]] + (name == "metrics")
            self.tracker.log(record, prefix=TRACKED[name], step=steps_done)
        line = json.dumps(record, allow_nan=False) + "\n"
        self.pending[name] += line.encode()
        try:
            self.flush()
        except OSError as error:
            waiting = sum(len(lines) for lines in self.pending.values())
            print(
                f"\n{self.folder}: {error.strerror}: {waiting} bytes of log lines wait in memory",
                file=sys.stderr,
            )

    def flush(self) -> None:
        """Write the pending lines. Raises `OSError` if the disk is full."""
        for name, file in self.files.items():
            while self.pending[name]:
                written = file.write(self.pending[name])  # maybe only a part of it
                self.pending[name] = self.pending[name][written:]

    def sync(self) -> None:
        """Flush all lines to disk (fsync). Raises `OSError` if the disk is full."""
        self.flush()
        for file in self.files.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        """Write the pending lines and close the files. Raises `OSError` if the disk is full."""
        try:
            self.flush()
        finally:
            for file in self.files.values():
                file.close()
            if self.tracker is not None:
                self.tracker.finish()


class NullRunLog(RunLog):
    """The log of every process but the main one: it writes nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self.tracker = folder, {}, None

    def write(self, name: str, record: dict) -> None:
        """Write nothing."""


class Tracker:
    """Sends metrics to tensorboard, wandb or trackio; the run's own files stay the record.

    accelerate provides the trackers and their settings. A tracker that fails loses those numbers,
    but does not stop the run.
    """

    def __init__(
        self,
        tool: str,
        folder: Path,
        *,
        config: dict | None,
        on_cpu: bool,
        resumed_at: int | None = None,
    ) -> None:
        """Start the tracker's run, or continue it after a resume. Raises `RunError`.

        The x axis of its curves is the steps done.
        """
        from accelerate import Accelerator

        options = {"name": folder.name, "resume": "allow"}
        if tool == "tensorboard":
            options = {}
            if resumed_at is not None:  # purge repeated steps; a config would add another run
                options, config = {"purge_step": resumed_at + 1}, None
        if tool == "wandb":  # with only a name, each resume would start another run
            started = read_description(folder)["started"]
            options["id"] = re.sub(r"[^\w-]", "-", f"{folder.name}-{started}")
        try:
            self.accelerator = Accelerator(log_with=tool, project_dir=folder, cpu=on_cpu)
            self.accelerator.init_trackers(
                "tensorboard" if tool == "tensorboard" else "vlm-area",  # folder or project
                config=config,
                init_kwargs={tool: options},
            )
        except Exception as error:  # without network or account, trackers raise many types
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RunError(f"--report-to {tool}: {problem}") from error

    def log(self, record: dict, *, prefix: str, step: int) -> None:
        """Send the numbers in a record to the tracker."""
        numbers = {
            prefix + key: value for key, value in record.items() if isinstance(value, int | float)
        }
        try:
            self.accelerator.log(numbers, step=step)
        except Exception as error:
            print(
                f"\n--report-to: the numbers after {step} steps have not been logged: {error!r}",
                file=sys.stderr,
            )

    def finish(self) -> None:
        """Let the tracker send its last numbers and close."""
        try:
            self.accelerator.end_training()
        except Exception as error:
            print(f"\n--report-to: the last numbers may be missing: {error!r}", file=sys.stderr)


def lock(file) -> None:
    """Lock a file for this process. Raises `BlockingIOError` if another process holds the lock.

    The loader's workers inherit their parent's lock, and outlive a killed parent by about half a
    second. So retry for two seconds.
    """
    for pause_s in (0.5, 0.5, 0.5, 0.5, 0):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not pause_s:
                raise
            time.sleep(pause_s)


# --- start and resume -------------------------------------------------------------------


def create_run(folders: Iterable[Path], *, config: dict, device: str) -> RunLog:
    """Create a new run in the first of `folders` that does not exist. Raises `RunError`.

    Runs started at the same time get different folders, because mkdir both checks and creates. If
    config.json cannot be written, the folder is removed.
    """
    folder = new_folder(folders)
    try:
        about = {"folder": str(folder.absolute()), **provenance(device)}
        write_json(folder / "config.json", {"config": config, **about})
    except OSError as error:
        folder.rmdir()
        raise RunError(f"{folder}: cannot be created: {error.strerror}") from error
    return RunLog(folder)


def new_folder(folders: Iterable[Path]) -> Path:
    """Create and return the first of `folders` that does not exist. Raises `RunError`."""
    for folder in folders:
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            if not folder.exists():
                raise RunError(f"{folder}: cannot be created: {error.strerror}") from error
    raise RunError(f"{folder}: exists; runs are never overwritten")


def reopen_run(folder: Path, *, config: dict, device: str, steps_done: int) -> RunLog:
    """Reopen a run's folder, and cut the log lines of steps that the run will repeat.

    Raises `RunError`, and cuts nothing, if lines of the steps before are missing or damaged.
    """
    log = RunLog(folder)
    lengths = {name: bytes_to_keep(folder, name, steps_done) for name in STEP_KEYS}
    kept = [line["step"] for line in read_lines(folder / "metrics.jsonl", lengths["metrics"])]
    if kept != list(range(steps_done)):
        path = folder / "metrics.jsonl"
        raise RunError(f"{path}: does not contain the {steps_done} steps before the checkpoint")
    description = read_description(folder)
    earlier = description.pop("resumed", [])
    description |= {
        "config": config,
        "folder": str(folder.absolute()),  # the run may have moved, with its model
        "resumed": [*earlier, {"steps_done": steps_done, **provenance(device)}],
    }
    try:
        write_json(folder / "config.json", description)
        for name, length in lengths.items():
            log.files[name].truncate(length)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}") from error
    return log


def bytes_to_keep(folder: Path, name: str, steps_done: int) -> int:
    """Return the length in bytes of a log's lines about the first `steps_done` steps.

    A line without a newline is not counted: the run died while writing it. Raises `RunError` for a
    damaged line.
    """
    path, length = folder / f"{name}.jsonl", 0
    is_evaluation = name == "evaluations" and steps_done > 0  # keyed by the steps done
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                step = int(json.loads(line)[STEP_KEYS[name]])
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(f"{path}: line {number} is damaged") from error
            if step >= steps_done + is_evaluation:
                break
            length += len(line)
    return length


def read_lines(path: Path, length: int = -1) -> list[dict]:
    """Return the JSON objects in the first `length` bytes of a file, one per line."""
    with path.open("rb") as file:
        return [json.loads(line) for line in file.read(length).splitlines()]


def read_description(folder: Path) -> dict:
    """Return the content of config.json, with the options under "config". Raises `RunError`."""
    path = folder / "config.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(description["config"], dict):
            return description
        raise TypeError("it has no options")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not readable: {error}") from error


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file atomically. Raises `OSError`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def provenance(device: str) -> dict:
    """Return the command, start time, device, git commit and versions of this run."""
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "git_commit": git_commit(),
        "versions": {"python": sys.version.split()[0], **package_versions()},
    }


def replace_non_finite(value):
    """Return the value with every NaN and infinity replaced by None, because JSON lacks them.

    >>> replace_non_finite({"loss": float("nan"), "rewards": [1.0, float("inf")]})
    {'loss': None, 'rewards': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbered_folders(runs: Path, name: str) -> Iterator[Path]:
    """Yield the folders that a run without --name may use, in order.

    >>> folders = numbered_folders(Path("runs"), "tiny")
    >>> [next(folders).name for _ in range(3)]
    ['tiny', 'tiny-2', 'tiny-3']
    """
    yield runs / name
    for number in count(2):
        yield runs / f"{name}-{number}"


def git_commit(root: Path = ROOT) -> str | None:
    """Return the commit of this code, with "+changes" if Python files differ from it.

    Return None without git, and for a copy of the code inside a repository that does not track it.
    """
    git = ["git", "-C", str(root)]
    try:
        commit, changes, is_tracked = (
            subprocess.run([*git, *what], capture_output=True, text=True, timeout=10).stdout.strip()
            for what in (
                ("rev-parse", "--short=12", "HEAD"),
                ("diff", "--stat", "HEAD", "--", "*.py"),
                ("ls-files", "--", "*.py"),
            )
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if not (commit and is_tracked):
        return None
    return commit + "+changes" if changes else commit


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that can change a run's results."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def peak_host_memory() -> int:
    """Return this process's peak host memory in bytes."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024  # macOS reports bytes
