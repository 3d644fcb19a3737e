"""How a step's time grows with the group and with the completions: tiny model, CPU, 4 prompts.

    python benchmarks/growth.py          # about 3 minutes on 2 cores, best run alone

Completions have a fixed length here: no token ends one. Prints two tables and draws
results/growth.png. Each number is the median of the steps but the first.
"""

import statistics
import sys
from dataclasses import replace
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peers import Task
from step import PHASES, own_steps

GROUP_SIZES = (4, 8, 16, 32, 64)
LENGTHS = (16, 32, 64, 128, 256)
STEPS = 5
PICTURE = Path(__file__).resolve().parent.parent / "results" / "growth.png"


def measure(task: Task) -> dict[str, float]:
    """Return the median seconds of a step of this trainer, and of its phases."""
    steps = list(own_steps(task, STEPS, fixed_length=True))[1:]
    return {name: statistics.median(step[name] for step in steps) for name in ("step_s", *PHASES)}


def table(name: str, measured: dict[int, tuple[Task, dict[str, float]]]) -> None:
    """Print one row per value of what was varied."""
    print(f"\n| {name} | s a step | rollout | reference | update | ms a completion | us a token |")
    print("|---|---|---|---|---|---|---|")
    for value, (task, seconds) in measured.items():
        rows, step_s = task.prompts * task.group_size, seconds["step_s"]
        phases = " | ".join(f"{seconds[phase]:.2f}" for phase in PHASES[1:])
        a_completion, a_token = 1e3 * step_s / rows, 1e6 * step_s / rows / task.max_new_tokens
        print(f"| {value} | {step_s:.2f} | {phases} | {a_completion:.1f} | {a_token:.0f} |")


def draw(groups: dict, lengths: dict) -> None:
    """Draw milliseconds a completion over group size, and microseconds a token over length."""
    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, measured, label in (
        (left, groups, "completions per prompt (32 tokens each)"),
        (right, lengths, "tokens per completion (8 per prompt)"),
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
    figure.savefig(PICTURE)


def main() -> None:
    """Measure, print and draw."""
    base = replace(Task(), prompts=4, max_new_tokens=32)
    groups, lengths = {}, {}
    for group_size in GROUP_SIZES:
        print(f"group size {group_size}", file=sys.stderr)
        task = replace(base, group_size=group_size)
        groups[group_size] = (task, measure(task))
    for length in LENGTHS:
        print(f"length {length}", file=sys.stderr)
        task = replace(base, max_new_tokens=length)
        lengths[length] = (task, measure(task))
    table("completions per prompt, 32 tokens each", groups)
    table("tokens per completion, 8 per prompt", lengths)
    draw(groups, lengths)
    print(f"\npicture: {PICTURE}")


if __name__ == "__main__":
    main()
