"""The run folder: what a run leaves behind, and nothing else.

config.json         every option, versions, device, git commit, command; the same for each resume
metrics.jsonl       one object per step
evaluations.jsonl   one object per held-out evaluation
samples.jsonl       now and then one prompt with all its completions
checkpoints/        the state after some steps, to resume from: see checkpoint.py
final/              model and processor, loadable with from_pretrained
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
    sys.exit("This runs on Linux and macOS. On Windows: in WSL, which is a Linux")

ROOT = Path(__file__).resolve().parent.parent  # of this code
PACKAGES = ("torch", "transformers", "accelerate", "torch-optimi", "matplotlib", "numpy", "pillow")
TRACKED = {"metrics": "", "evaluations": "held_out/"}  # what a tool is shown, under which prefix
STEP_KEYS = {"metrics": "step", "evaluations": "steps_done", "samples": "step"}  # file -> key


class RunError(Exception):
    """A run folder that cannot be used. The message is one line for the user."""


class RunLog:
    """Writes the lines of one run; only one process at a time can. Raises `RunError`."""

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
        self.pending = dict.fromkeys(STEP_KEYS, b"")  # what the disk did not take yet

    def write(self, name: str, record: dict) -> None:
        """Append one line to metrics, evaluations or samples; then it outlives the process.

        What a full disk refuses is kept, told, and tried again with the next line.
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
        """Write what is pending. Raises `OSError` when the disk takes no more."""
        for name, file in self.files.items():
            while self.pending[name]:
                written = file.write(self.pending[name])  # perhaps not all: the rest comes next
                self.pending[name] = self.pending[name][written:]

    def sync(self) -> None:
        """Wait until all lines are on the disk itself. Raises `OSError` when it is full."""
        self.flush()
        for file in self.files.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        """Write what is pending and close the files. Raises `OSError` when the disk is full."""
        try:
            self.flush()
        finally:
            for file in self.files.values():
                file.close()
            if self.tracker is not None:
                self.tracker.finish()


class NullRunLog(RunLog):
    """The log of a process that leaves the writing to another one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self.tracker = folder, {}, None

    def write(self, name: str, record: dict) -> None:
        """Write nothing."""


class Tracker:
    """Shows metrics in a tool made for watching them; the run's own files stay the record.

    Tools and their settings are those of accelerate. What a tool fails to take is lost to it, and
    does not stop the run.
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
        """Begin, or after a resume go on, with what the tool calls a run. Raises `RunError`.

        Points are placed by the steps done.
        """
        from accelerate import Accelerator

        options = {"name": folder.name, "resume": "allow"}
        if tool == "tensorboard":
            options = {}
            if resumed_at is not None:  # what comes again is cut; a config would be one run more
                options, config = {"purge_step": resumed_at + 1}, None
        if tool == "wandb":  # a name alone would be a second run each time
            started = read_description(folder)["started"]
            options["id"] = re.sub(r"[^\w-]", "-", f"{folder.name}-{started}")
        try:
            self.accelerator = Accelerator(log_with=tool, project_dir=folder, cpu=on_cpu)
            self.accelerator.init_trackers(
                "tensorboard" if tool == "tensorboard" else "vlm-area",  # a folder, or a project
                config=config,
                init_kwargs={tool: options},
            )
        except Exception as error:  # whatever a tool raises without a network or an account
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RunError(f"--report-to {tool}: {problem}") from error

    def log(self, record: dict, *, prefix: str, step: int) -> None:
        """Show the numbers among the values of a record."""
        numbers = {
            prefix + key: value for key, value in record.items() if isinstance(value, int | float)
        }
        try:
            self.accelerator.log(numbers, step=step)
        except Exception as error:
            print(
                f"\n--report-to: the numbers after {step} steps are not shown: {error!r}",
                file=sys.stderr,
            )

    def finish(self) -> None:
        """Hand over what the tool still holds."""
        try:
            self.accelerator.end_training()
        except Exception as error:
            print(f"\n--report-to: may lack its end: {error!r}", file=sys.stderr)


def lock(file) -> None:
    """Claim a file for this process. Raises `BlockingIOError` if another one has it.

    The loader's workers share the claim of the process that made them, and outlive it, if it is
    killed, by half a second or so: it is tried for two.
    """
    for pause_s in (0.5, 0.5, 0.5, 0.5, 0):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not pause_s:
                raise
            time.sleep(pause_s)


# --- runs begin and go on ---------------------------------------------------------------


def create_run(folders: Iterable[Path], *, config: dict, device: str) -> RunLog:
    """Make a new run's folder, the first of some that is not there. Raises `RunError`.

    Runs that are started together each get one: looking and making are one act. Where it fails,
    nothing is left.
    """
    folder = new_folder(folders)
    try:
        about = {"folder": str(folder.absolute()), **provenance(device)}
        write_json(folder / "config.json", {"config": config, **about})
    except OSError as error:
        folder.rmdir()
        raise RunError(f"{folder}: cannot be made: {error.strerror}") from error
    return RunLog(folder)


def new_folder(folders: Iterable[Path]) -> Path:
    """Return the first of these folders that could be made. Raises `RunError`."""
    for folder in folders:
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            if not folder.exists():
                raise RunError(f"{folder}: cannot be made: {error.strerror}") from error
    raise RunError(f"{folder}: exists; runs are never overwritten")


def reopen_run(folder: Path, *, config: dict, device: str, steps_done: int) -> RunLog:
    """Open a run's folder again, and cut the lines of steps that will be done again.

    Raises `RunError`, with nothing cut, where lines of the steps before are missing or damaged.
    """
    log = RunLog(folder)
    lengths = {name: length_up_to(folder, name, steps_done) for name in STEP_KEYS}
    kept = [line["step"] for line in read_lines(folder / "metrics.jsonl", lengths["metrics"])]
    if kept != list(range(steps_done)):
        path = folder / "metrics.jsonl"
        raise RunError(f"{path}: does not hold the {steps_done} steps before the checkpoint")
    description = read_description(folder)
    earlier = description.pop("resumed", [])
    description |= {
        "config": config,
        "folder": str(folder.absolute()),  # a run may move, and its model with it
        "resumed": [*earlier, {"steps_done": steps_done, **provenance(device)}],
    }
    try:
        write_json(folder / "config.json", description)
        for name, length in lengths.items():
            log.files[name].truncate(length)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}") from error
    return log


def length_up_to(folder: Path, name: str, steps_done: int) -> int:
    """Return the bytes of a file's lines about the first `steps_done` steps.

    A line without its end was being written when the run died. Raises `RunError` for a line that
    is damaged.
    """
    path, length = folder / f"{name}.jsonl", 0
    is_evaluation = name == "evaluations" and steps_done > 0  # one comes after the last step
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
    """Return the objects in the first `length` bytes of a file, one per line."""
    with path.open("rb") as file:
        return [json.loads(line) for line in file.read(length).splitlines()]


def read_description(folder: Path) -> dict:
    """Return what config.json holds, the run's options under "config". Raises `RunError`."""
    path = folder / "config.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(description["config"], dict):
            return description
        raise TypeError("no options in it")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not readable: {error}") from error


def write_json(path: Path, value: dict) -> None:
    """Write a file whole or not at all. Raises `OSError`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def provenance(device: str) -> dict:
    """Return by what command, when, with which code and versions, and where a run is made."""
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "git_commit": git_commit(),
        "versions": {"python": sys.version.split()[0], **package_versions()},
    }


def replace_non_finite(value):
    """Return the value with every nan and infinity, which JSON lacks, replaced by None.

    >>> replace_non_finite({"loss": float("nan"), "rewards": [1.0, float("inf")]})
    {'loss': None, 'rewards': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbered_folders(runs: Path, name: str) -> Iterator[Path]:
    """Yield the folders that a run without a name of its own may have, in order.

    >>> folders = numbered_folders(Path("runs"), "tiny")
    >>> [next(folders).name for _ in range(3)]
    ['tiny', 'tiny-2', 'tiny-3']
    """
    yield runs / name
    for number in count(2):
        yield runs / f"{name}-{number}"


def git_commit(root: Path = ROOT) -> str | None:
    """Return the commit of this code, with "+changes" if Python files differ.

    None without git, and for a copy of the code that some other repository does not track.
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
    """Return the versions of the packages that can change a run's result."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def peak_host_memory() -> int:
    """Return the most bytes of host memory that this process has held."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024  # macOS counts bytes
