"""Time to a reward: seconds until samples earn 2.5 for their areas, beside two peers.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speedrun.py                       # 35 minutes on 2 cores; run it alone
    python benchmarks/speedrun.py --trainers own        # only our trainer: to compare two commits

All start from the same checkpoint, draw the same plots, and have the settings of `main.py --preset
tiny`, but for the warm-up and the decay of its rate, which the peers lack. The seconds are those of
the steps, without loading the model. The reward is the mean over the last 10 steps. Each seed runs
in a process of its own.
"""

import argparse
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from peers import Task, add_flags, task_of
from step import TRAINERS, end_of, start

WINDOW = 10  # steps per mean


def seconds_to(target: float, name: str, task: Task, steps: int) -> tuple[float, int] | None:
    """Return the seconds and steps that a trainer takes to the target; None if it never does."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = start(name, task, steps, errors)
        seconds, rewards = 0.0, []
        try:
            for line in child.stdout:
                step = json.loads(line)
                seconds += step["step_s"]
                rewards.append(step["area_reward"])
                if len(rewards) >= WINDOW and statistics.fmean(rewards[-WINDOW:]) >= target:
                    return seconds, len(rewards)
        finally:
            stop(child)
        if len(rewards) < steps:
            told = f"failed after {len(rewards)} steps:\n{end_of(errors)}"
            sys.exit(f"{' '.join(child.args)}: {told}")
    return None


def stop(child: subprocess.Popen) -> None:
    """Stop a process as Ctrl-C does, so that TRL removes its folder; kill it after 30 seconds."""
    child.send_signal(signal.SIGINT)
    try:
        child.wait(timeout=30)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def report(found: dict[str, list[tuple[float, int] | None]], steps: int) -> None:
    """Print the table: medians over the seeds, in which a run that never gets there is slowest."""
    print("| trainer | seconds, median | ratio to the first | of each seed | steps, median |")
    print("|---|---|---|---|---|")
    first = math.nan
    for name, runs in found.items():
        never = (math.inf, steps)
        ends = zip(*(run or never for run in runs), strict=True)
        seconds, count = (statistics.median(each) for each in ends)
        first = seconds if math.isnan(first) else first
        ratio = f"{seconds / first:.1f}" if max(seconds, first) < math.inf else "-"
        each = ", ".join(f"{run[0]:.0f}" if run else "never" for run in runs)
        median = f"{seconds:.0f}" if seconds < math.inf else "never"
        print(f"| {TRAINERS[name]} | {median} | {ratio} | {each} | {count:.0f} |")


def main(arguments: list[str] | None = None) -> None:
    """Run the trainers in turn, seed by seed, and print the table."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trainers", default="own,naive,trl", help="default: own,naive,trl")
    parser.add_argument("--seeds", default="0,1,2", help="default: 0,1,2; --seed is ignored")
    parser.add_argument("--target", type=float, default=2.5, metavar="X", help="default: 2.5")
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="at most; default: 120")
    add_flags(parser)
    args = parser.parse_args(arguments)
    names = args.trainers.split(",")
    if unknown := set(names) - TRAINERS.keys():
        parser.error(f"--trainers {','.join(unknown)}: must be one of {', '.join(TRAINERS)}")
    if not all(seed.isdecimal() for seed in args.seeds.split(",")):
        parser.error(f"--seeds {args.seeds}: must be numbers with commas between them")
    if args.steps < WINDOW:
        parser.error(f"--steps {args.steps}: must be at least {WINDOW}")
    found = {name: [] for name in names}
    for seed in map(int, args.seeds.split(",")):
        for name in names:
            task = replace(task_of(args), seed=seed)
            found[name].append(seconds_to(args.target, name, task, args.steps))
            print(f"seed {seed}, {TRAINERS[name]}: {found[name][-1]}", file=sys.stderr)
    print(
        f"area reward {args.target:g} (mean of {WINDOW} steps), {Path(args.model).name}, "
        f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}\n"
    )
    report(found, args.steps)


if __name__ == "__main__":
    main()
