"""Test what a run survives: kills, a full disk, bad command lines, hostile completions.

    pip install -r requirements-dev.txt
    python benchmarks/faults.py               # about 13 minutes on 2 cores
    python benchmarks/faults.py --kills 3     # fewer kills, less time

Prints a table. Runs train the tiny model for 12 steps of 2 prompts x 4 completions, and save every
second step.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main as trainer  # noqa: E402
from harness.checkpoint import checkpoints_of  # noqa: E402
from harness.runlog import read_lines, replace_non_finite  # noqa: E402
from rewards import score  # noqa: E402

STEPS, SAVE_EVERY = 12, 2
RUN = f"--preset tiny --device cpu --steps {STEPS} --save-every {SAVE_EVERY} --keep 2 --workers 1"
RUN += " --prompts-per-step 2 --group-size 4 --eval-every 4 --eval-examples 4 --sample-every 1"
LOG_LIMIT = 6_000  # bytes: room for 7 of the 12 lines
LOGS = ("metrics", "evaluations", "samples")
TIMED = ("_s", "peak_gib")  # suffixes of the keys whose values differ from run to run


# --- runs -------------------------------------------------------------------------------


def start(runs: Path, name: str, *flags: str, file_limit: int | None = None) -> subprocess.Popen:
    """Start a run, or resume it if its folder is there; no file may exceed `file_limit` bytes."""
    is_there = (runs / name / "config.json").exists()
    new_run = [*RUN.split(), "--runs", str(runs), "--name", name, *flags]
    arguments = ["--resume", str(runs / name)] if is_there else new_run
    # a run killed before it wrote config.json left nothing to resume from
    if not is_there:
        shutil.rmtree(runs / name, ignore_errors=True)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        preexec_fn=limit if file_limit else None,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Wait for a run to end; return its exit code and its last line on stderr."""
    _, errors = process.communicate()
    lines = errors.decode(errors="replace").strip().splitlines()
    return process.returncode, lines[-1] if lines else ""


def curves(run: Path) -> dict[str, list[dict]]:
    """Return all log lines of a run, without the values that measure time or memory."""
    return {
        name: [
            {key: value for key, value in line.items() if not key.endswith(TIMED)}
            for line in read_lines(run / f"{name}.jsonl")
        ]
        for name in LOGS
    }


def is_same(run: Path, whole: Path) -> bool:
    """Return whether two runs have the same log lines and final weights, bit for bit."""
    weights = [(path / "final" / "model.safetensors").read_bytes() for path in (run, whole)]
    return curves(run) == curves(whole) and weights[0] == weights[1]


# --- kills ------------------------------------------------------------------------------


@dataclass
class Kills:
    """How the killed runs ended."""

    kills: int = 0
    while_saving: int = 0
    runs: int = 0
    same: int = 0
    most_steps_lost: int = 0
    faults: list[str] = field(default_factory=list)


def lines_of(run: Path) -> int:
    """Return the number of steps in the log of a run."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_to_kill(process: subprocess.Popen, run: Path, moments: random.Random) -> bool:
    """Wait for a random moment, in a save, in a step or anywhere; False if the run has ended."""
    kind, seen = moments.choice(("save", "save", "steps", "steps", "any")), lines_of(run)
    if kind == "any":
        time.sleep(moments.uniform(0, 10))
    elif kind == "steps":
        while process.poll() is None and lines_of(run) in (0, seen):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 1))
    else:
        after = seen + moments.randint(0, 4)
        while process.poll() is None and (lines_of(run) < after or not is_saving(run)):
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.1))
    return process.poll() is None


def is_saving(run: Path) -> bool:
    """Return whether a checkpoint or the final model is only half written."""
    return any(run.glob(".final.partial")) or any(run.glob("checkpoints/.*.partial"))


def kill_runs(runs: Path, whole: Path, *, count: int, seed: int = 0) -> Kills:
    """Kill runs `count` times at random moments, resume each time, and compare the results."""
    found, moments = Kills(), random.Random(seed)
    while found.kills < count:
        run = runs / f"killed-{found.runs}"
        found.runs += 1
        while True:
            process = start(runs, run.name)
            if found.kills < count and wait_to_kill(process, run, moments):
                process.send_signal(signal.SIGKILL)
                process.communicate()
                note_kill(found, run)
                continue
            code, last_line = finish(process)
            if code and "12 steps are done" not in last_line:  # killed after its last step
                found.faults.append(f"{run.name}: exit code {code}: {last_line}")
                break
            found.same += is_same(run, whole)
            break
        print(f"  {found.kills} kills, {found.same} of {found.runs} runs identical", flush=True)
    return found


def note_kill(found: Kills, run: Path) -> None:
    """Count a kill, and the steps it lost."""
    found.kills += 1
    found.while_saving += is_saving(run)
    saved = checkpoints_of(run)
    done = int(saved[-1].name.removeprefix("step-")) if saved else 0
    found.most_steps_lost = max(found.most_steps_lost, lines_of(run) - done)


# --- full disks -------------------------------------------------------------------------


def full_disks(runs: Path, whole: Path) -> dict[str, str]:
    """Return how runs ended whose disk was full in every save, and in a log line."""
    outcome = {}
    # room for every file but the optimizer's moments
    process = start(runs, "no-room-to-save", file_limit=15_000_000)
    code, _ = finish(process)
    run = runs / "no-room-to-save"
    left = list((run / "checkpoints").iterdir())
    good = code == 0 and not left and is_same(run, whole)
    outcome["in every save"] = "finished, same result" if good else f"FAULT: {code}, {left}"

    # no workers: they hand over batches in files of their own
    process = start(runs, "no-room-to-log", "--workers", "0", file_limit=LOG_LIMIT)
    code, last_line = finish(process)
    run = runs / "no-room-to-log"
    size = (run / "metrics.jsonl").stat().st_size
    resumed, _ = finish(start(runs, "no-room-to-log"))
    good = code == 1 and "cannot be written" in last_line and size == LOG_LIMIT and resumed == 0
    good = good and is_same(run, whole)
    outcome["in a log line"] = "reported; resumed, same result" if good else f"FAULT: {last_line}"
    return outcome


# --- command lines ----------------------------------------------------------------------


class Accepted(BaseException):
    """Raised in place of loading a model: the command line was accepted."""


def command_lines() -> st.SearchStrategy[list[str]]:
    """Return a strategy for random command lines: all flags, with values of every kind."""
    actions = [a for a in trainer.make_parser()._actions if "--help" not in a.option_strings]
    flags = [flag for action in actions for flag in action.option_strings]
    odd = ["", "-1", "0", "nan", "inf", "-inf", "1e999", "9" * 30, "--", "-", ".", "/", "a\nb"]
    odd += ["True", "auto", "cuda", "tiny", "runs", "no/such/folder", "x" * 300, "\u2028", "0x10"]
    values = st.one_of(
        st.sampled_from(odd),
        st.text(max_size=12),
        st.integers(-(10**12), 10**12).map(str),
        st.floats().map(str),
    )
    pairs = st.tuples(st.sampled_from([*flags, "--no-such-flag"]), values).map(list)
    alone = st.sampled_from(flags).map(lambda flag: [flag])
    some = st.lists(st.one_of(pairs, pairs, alone), min_size=1, max_size=4)
    small = st.sampled_from([[], ["--preset", "tiny"]])
    return st.tuples(small, some).map(lambda parts: [*parts[0], *chain(*parts[1])])


def refused_lines(count: int) -> tuple[int, int]:
    """Feed `main` random command lines until it refuses `count`; return how many, and the accepted.

    Raises `AssertionError` for a traceback, an error of several lines, or a file left behind.
    """
    refused, accepted = [], []

    @settings(
        max_examples=4 * count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(command_lines())
    def try_one(line: list[str]) -> None:
        if len(refused) < count:
            (refused if is_refused(line) else accepted).append(line)

    with working_in_empty_folder():
        try_one()
        assert not list(Path().iterdir()), f"left behind: {list(Path().iterdir())}"
    return len(refused), len(accepted)


def is_refused(line: list[str]) -> bool:
    """Return whether `main` refuses a command line; it must do so in one line, with exit code 2."""
    errors = io.StringIO()
    try:
        with (
            mock.patch.object(trainer, "load", side_effect=Accepted),
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            trainer.main(line)
    except Accepted:
        return False
    except SystemExit as stop:
        if stop.code == 0:  # --dry-run
            return False
        is_dry = "--dry-run" in line and not errors.getvalue()
        assert stop.code == 2, (line, stop.code)
        assert is_dry or len(errors.getvalue().splitlines()) == 1, (line, errors.getvalue())
        return True
    raise AssertionError(line)


@contextlib.contextmanager
def working_in_empty_folder() -> Iterator[None]:
    """Change to an empty temporary folder within the block."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


# --- completions ------------------------------------------------------------------------

PIECES = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "<think>", "</think>", "<", ">"]
PIECES += ["400.00", "1e999", "-0.0", "nan", "1,2,3", ".", ",", " ", "\n", "\t", "\r", "\u2028"]
PIECES += [
    "\x00",
    "\x1b[2J",
    '"',
    "\\",
    "\ud800",
    "٣",
    "½",
    "🟦",
    "<|im_end|>",
    "{}",
    "%s",
    "(a+)+$",
]


def hostile_completions(count: int, *, seed: int = 0) -> Iterator[str]:
    """Yield completions that a reward must not trust: most are short, one in 100 is a megabyte."""
    chance = random.Random(seed)
    for number in range(count):
        pieces = chance.choices(PIECES, k=chance.randint(0, 30))
        if number % 100 == 0:  # a long repetition of one or two pieces
            run = "".join(chance.choices(PIECES, k=chance.randint(1, 2)))
            pieces.insert(chance.randint(0, len(pieces)), run * (2**20 // len(run)))
        if number % 3 == 0:
            pieces.insert(0, "<reasoning>")
            pieces += ["</reasoning>", "<answer>", "400.00", "</answer>"]
        yield "".join(pieces)


def judge(completion: str) -> float:
    """Return the seconds it takes to judge and log a completion; assert what holds for all."""
    begin = time.perf_counter()
    reward = score(completion, 400.0, kind="square")
    line = json.dumps(
        replace_non_finite({"text": completion, "total": reward.total}), allow_nan=False
    )
    seconds = time.perf_counter() - begin
    assert -3.0 <= reward.area_correctness <= 3.0
    assert reward.area_format in (0.0, 0.5)
    assert reward.xml_format in (0.0, 0.5)
    assert len(line.splitlines()) == 1
    assert json.loads(line)["text"] == completion
    return seconds


# --- command ----------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run all four parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="default: 100")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments; default: 0")
    args = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        code, last_line = finish(start(runs, "whole"))
        if code:
            sys.exit(f"the run to compare with failed: {last_line}")
        found = kill_runs(runs, runs / "whole", count=args.kills, seed=args.seed)
        disks = full_disks(runs, runs / "whole")
    refused, accepted = refused_lines(200)
    seconds = [judge(completion) for completion in hostile_completions(10_000)]
    print("\n| fault | outcome |\n|---|---|")
    print(
        f"| SIGKILL at {found.kills} random moments, {found.while_saving} of them in a save | "
        f"{found.same} of {found.runs} runs resumed to the log and weights of a run never killed, "
        f"bit for bit; at most {found.most_steps_lost} steps lost, with saves every {SAVE_EVERY} |"
    )
    for where, outcome in disks.items():
        print(f"| full disk {where} | {outcome} |")
    print(f"| {refused} bad command lines (and {accepted} good ones) | one line, exit code 2 |")
    print(
        f"| {len(seconds):,} hostile completions, 100 of a megabyte | no exception, "
        f"slowest {1e3 * max(seconds):.0f} ms |"
    )
    print(f"\n{(time.perf_counter() - begin) / 60:.0f} minutes")
    for fault in found.faults:
        print(fault)
    if found.faults or found.same < found.runs or any("FAULT" in text for text in disks.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
