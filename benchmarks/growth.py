"""How a step's time grows with group size and completion length: tiny model, CPU, 4 prompts.

    python benchmarks/growth.py          # about 3 minutes on 2 cores; run it alone
    python benchmarks/growth.py --device cuda --model DIR --lr 1e-6 --max-new-tokens 250 \\
        --group-sizes 8,16,32,64 --lengths 250,512 --image-sizes 224,448 --picture growth-gpu.png

Completions have a fixed length: no token ends one. Prints one table per varied size, with the
others at their defaults, and draws the first two. Each number is the median over all steps but the
first.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from peers import Task, add_flags, task_of
from step import PHASES, own_steps, prepare_gpu

from harness.terminal import check_folder, ignore_output_errors, write_file
from shapes import Figure

GROUP_SIZES = (4, 8, 16, 32, 64)
LENGTHS = (16, 32, 64, 128, 256)
STEPS = 5
PICTURE = Path(__file__).resolve().parents[1] / "experiments" / "results" / "growth.png"


def measure(task: Task) -> dict[str, float]:
    """Return the median seconds of a step of our trainer, and of its phases."""
    print(task, file=sys.stderr)
    steps = list(own_steps(task, STEPS, fixed_length=True))[1:]
    return {name: statistics.median(step[name] for step in steps) for name in ("step_s", *PHASES)}


def numbers(text: str) -> list[int]:
    """Return the numbers in a list like "4,8,16"."""
    return [int(number) for number in text.split(",") if number]


def table(name: str, measured: dict[int, tuple[Task, dict[str, float]]]) -> None:
    """Print one row per value of the varied size."""
    print(f"\n| {name} | s a step | rollout | reference | update | ms a completion | us a token |")
    print("|---|---|---|---|---|---|---|")
    for value, (task, seconds) in measured.items():
        rows, step_s = task.prompts * task.group_size, seconds["step_s"]
        phases = " | ".join(f"{seconds[phase]:.2f}" for phase in PHASES[1:])
        a_completion, a_token = 1e3 * step_s / rows, 1e6 * step_s / rows / task.max_new_tokens
        print(f"| {value} | {step_s:.2f} | {phases} | {a_completion:.1f} | {a_token:.0f} |")


def draw(groups: dict, lengths: dict, picture: Path) -> None:
    """Draw microseconds per completion token over group size and over completion length."""
    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, measured, label in (
        (left, groups, "completions per prompt"),
        (right, lengths, "tokens per completion"),
    ):
        for phase in ("rollout_s", "reference_s", "update_s", "step_s"):
            per_token = [
                1e6 * seconds[phase] / (task.prompts * task.group_size * task.max_new_tokens)
                for task, seconds in measured.values()
            ]
            name = "whole step" if phase == "step_s" else phase.removesuffix("_s")
            axes.plot(list(measured), per_token, marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(measured), [str(value) for value in measured])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.set_ylabel("microseconds per completion token")
    left.legend()
    figure.savefig(picture, format=picture.suffix[1:] or "png")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and draw the picture."""
    ignore_output_errors()
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    varied = {"group_size": GROUP_SIZES, "max_new_tokens": LENGTHS, "image_size": []}
    flags = ("--group-sizes", "--lengths", "--image-sizes")
    for flag, (name, values) in zip(flags, varied.items(), strict=True):
        parser.add_argument(flag, type=numbers, default=values, metavar="N,N,...", dest=f"{name}s")
    parser.add_argument("--picture", type=Path, default=PICTURE, metavar="FILE")
    add_flags(parser, Task(prompts=4, group_size=8, max_new_tokens=32))
    args = parser.parse_args(arguments)
    try:
        check_folder("--picture: its folder", args.picture.parent)
    except ValueError as error:
        parser.error(str(error))
    prepare_gpu()
    base, measured = task_of(args), {}
    tokens, group = base.max_new_tokens, base.group_size
    titles = {
        "group_size": f"completions per prompt, {tokens} tokens each",
        "max_new_tokens": f"tokens per completion, {group} per prompt",
        "image_size": f"pixels a side, {group} completions of {tokens} tokens",
    }
    for name, title in titles.items():
        tasks = {value: replace(base, **{name: value}) for value in getattr(args, f"{name}s")}
        measured[name] = {value: (task, measure(task)) for value, task in tasks.items()}
        if tasks:
            table(title, measured[name])
    picture = partial(draw, measured["group_size"], measured["max_new_tokens"])
    if not write_file(args.picture, picture):
        sys.exit(2)
    print(f"\npicture: {args.picture}")


if __name__ == "__main__":
    main()
