"""The run folder: what a run leaves behind, and nothing else.

config.json         every knob, versions, device, git commit, command line
metrics.jsonl       one object per step
evaluations.jsonl   one object per held-out evaluation
samples.jsonl       now and then one prompt with all its completions
final/              model and processor, loadable with from_pretrained
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "accelerate", "torch-optimi", "matplotlib", "numpy", "pillow")


class RunLog:
    """Writes one run's folder. The folder is created here and must not exist before."""

    def __init__(self, folder: Path, *, config: dict, device: str) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        description = {
            "config": config,
            "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device,
            "git_commit": git_commit(),
            "versions": {"python": sys.version.split()[0], **package_versions()},
        }
        (folder / "config.json").write_text(json.dumps(description, indent=2, default=str) + "\n")
        self.files = {
            name: (folder / f"{name}.jsonl").open("a", encoding="utf-8")
            for name in ("metrics", "evaluations", "samples")
        }

    def write(self, name: str, record: dict) -> None:
        """Append one line to metrics, evaluations or samples; then it outlives the process."""
        file = self.files[name]
        file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        file.flush()

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()


def finite(value):
    """Return the value with every nan and infinity, which JSON lacks, replaced by None.

    >>> finite({"loss": float("nan"), "rewards": [1.0, float("inf")]})
    {'loss': None, 'rewards': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def free_folder(runs: Path, name: str) -> Path:
    """Return the folder `runs/name`, or `runs/name-2`, `-3`, ... if there are earlier runs."""
    folder, number = runs / name, 1
    while folder.exists():
        number += 1
        folder = runs / f"{name}-{number}"
    return folder


def git_commit() -> str | None:
    """Return the commit of this code, with "+changes" if files differ; None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12"]
    command += ["--dirty=+changes", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that can change a run's result."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


class Stopwatch:
    """Seconds of each phase of a step: `lap` names the phase that has just ended."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize = synchronize
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the time since the last lap, the device's work included, under `phase`."""
        self.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now
