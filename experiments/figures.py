"""Make tables and figures over several runs, from their folders and their models' held-out answers.

python experiments/figures.py tasks          # two tasks, before and after: README's table too

Reads run NAME-seedN from runs/, and its answers from
held-out/NAME-seedN-on-TASK-at-TEMPERATURE.json, as `evaluate.py --json` writes them; reproduce.sh
makes both. Prints the tables as they are in docs/results.md. Writes a figure to results/, and a
JSON file with the numbers and the commands and commits that made them.
"""

import json
import math
import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from harness.runlog import RunError, provenance, read_description
from harness.terminal import ignore_output_errors, write_file
from plot_rewards import PlotError, averages
from shapes import Figure

ROOT = Path(__file__).resolve().parent.parent
RUNS, HELD_OUT, RESULTS = ROOT / "runs", ROOT / "held-out", ROOT / "experiments" / "results"
SEEDS = (0, 1, 2)
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided 95 %, by number of seeds
TEMPERATURES = {"greedy": 0, "sampled": 1}
WINDOW = 20  # steps per mean
TASKS = {"base": "sizes 20 to 35", "wide": "sizes 5 to 35"}
ANCESTOR = {  # mean area reward per 100 prompts, as published
    "rotated": [0.74, 1.49, 1.80, 2.04, 1.88, 1.99, 2.18, 2.28, 2.39, 2.31],
    "wide": [0.50, 1.24, 0.90, 1.32, 1.44, 1.33, 1.49, 1.40, 1.47, 1.55],
}
ANCESTOR_BASE = {50: 0.6, 900: 2.65}  # prompts: reward, read off its figure
COLUMNS = {  # of the tables: heading -> key of a summary, factor, decimals
    "area reward": ("area_correctness_reward", 1, 2),
    "median error, %": ("relative_error_median", 100, 1),
    "class named, %": ("shape_named", 100, 1),
    "answer follows, %": ("answer_follows", 100, 1),
    "two decimals, %": ("two_decimals", 100, 1),
    "strict XML, %": ("strict_xml", 100, 1),
    "different answers": ("different_answers", 1, 0),
}


# --- numbers ----------------------------------------------------------------------------


def summaries(name: str, task: str, how: str) -> dict[str, list[float]]:
    """Return what the columns show of a model's held-out answers to a task, one value per seed."""
    found = [held_out(f"{name}-seed{seed}-on-{task}-at-{TEMPERATURES[how]}") for seed in SEEDS]
    return {key: [each[key] for each in found] for key, _, _ in COLUMNS.values()}


def held_out(answers: str) -> dict[str, float]:
    """Return the summary of one model's held-out answers, and how many different ones it gave."""
    found = json.loads((HELD_OUT / f"{answers}.json").read_text())
    different = {answer["reward"]["predicted"] for answer in found["answers"]} - {None}
    return {**found["summaries"]["all"], "different_answers": len(different)}


def interval(values: list[float]) -> float:
    """Return the half-width of the 95 % interval of a mean over seeds (Student's t).

    >>> round(interval([1.0, 2.0, 3.0]), 3)
    2.484
    """
    return T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def cell(values: list[float], decimals: int = 1) -> str:
    """Return a table cell: the mean and its interval.

    >>> cell([10.0, 11.0, 12.0])
    '11.0 ± 2.5'
    """
    return f"{statistics.fmean(values):.{decimals}f} ± {interval(values):.{decimals}f}"


def made_by(names: list[str]) -> dict:
    """Return the provenance of an entry: this command, and the command and commit of each run."""
    runs = {}
    for path in [RUNS / f"{name}-seed{seed}" for name in names for seed in SEEDS]:
        described = read_description(path)
        runs[path.name] = {key: described[key] for key in ("command", "git_commit")}
    return {**provenance("cpu"), "runs": runs}


def markdown(head: list[str], rows: dict[str, list[str]]) -> str:
    """Return a Markdown table; `head` includes the first column."""
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- drawing ----------------------------------------------------------------------------


def new_figure(panels: int, *, size: tuple[float, float]):
    """Return a figure and its panels, side by side, each with a light grid and no box."""
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(1, panels, sharey=True)
    for each in axes:
        each.grid(color="0.9")
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_named(axes, names: dict[str, str], key: str) -> None:
    """Draw runs, label -> name: the mean over the seeds, and a band from lowest to highest."""
    for label, name in names.items():
        runs = [RUNS / f"{name}-seed{seed}" for seed in SEEDS]
        x, y = averages(runs, key, window=WINDOW, axis="prompts")
        (line,) = axes.plot(x, y.mean(0), label=label)
        axes.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.2, linewidth=0)


# --- tasks: before and after -------------------------------------------------


def tasks_numbers() -> dict:
    """Return what the columns show, by task, by model (before or after) and by way to answer."""
    return {
        task: {
            when: {how: summaries(name, task, how) for how in TEMPERATURES}
            for when, name in (("before", "before"), ("after", task))
        }
        for task in TASKS
    }


def tasks_table(numbers: dict) -> str:
    """Return one table per task."""
    return "\n\n".join(f"{TASKS[task]}:\n\n{task_table(numbers[task])}" for task in numbers)


def task_table(numbers: dict) -> str:
    """Return the table of a task: means over the seeds, and their intervals."""
    rows = {
        f"{how}, {when}": [
            cell([factor * value for value in numbers[when][how][key]], decimals)
            for key, factor, decimals in COLUMNS.values()
        ]
        for how in ("sampled", "greedy")
        for when in ("before", "after")
    }
    return markdown(["", *COLUMNS], rows)


def tasks_figure(_: dict) -> Figure:
    """Return our curves, beside the ancestor's numbers, which are for another model."""
    figure, (ours, theirs) = new_figure(2, size=(11, 4.5))
    draw_named(ours, {TASKS[task]: task for task in TASKS}, "area_correctness_reward")
    for task in ANCESTOR.keys() & TASKS.keys():
        rewards = ANCESTOR[task]
        prompts = [100 * i + 50 for i in range(len(rewards))]
        color = f"C{list(TASKS).index(task)}"
        theirs.plot(prompts, rewards, marker="o", color=color, label=TASKS[task])
    label = f"{TASKS['base']}, two points read off its figure"
    theirs.plot(*zip(*ANCESTOR_BASE.items(), strict=True), "o", color="C0", label=label)
    ours.set_title(f"this program, the bundled tiny model, {len(SEEDS)} seeds")
    theirs.set_title("the ancestor: another model, 7B, on an H200")
    for axes, ylabel in ((ours, f"mean of {WINDOW} steps"), (theirs, "mean of 100 prompts")):
        axes.set(xlabel="prompts seen", ylabel=f"area correctness, {ylabel}", ylim=(-3.1, 3.1))
        axes.legend(loc="lower right", frameon=False)
    return figure


# --- command ----------------------------------------------------------------------------

ENTRIES = {  # name: makers of the numbers, the table and the figure
    "tasks": (tasks_numbers, tasks_table, tasks_figure),
}


def main() -> None:
    """Make the entry that the command line names: print its table, write its JSON and figure."""
    ignore_output_errors()
    if len(sys.argv) != 2 or sys.argv[1] not in ENTRIES:
        sys.exit(f"figures.py: the argument must be one of: {', '.join(ENTRIES)}")
    name = sys.argv[1]
    find, tabulate, draw = ENTRIES[name]
    try:
        numbers = find()
        made = made_by(list(numbers))
    except (FileNotFoundError, PlotError, RunError) as error:
        again = f"rm -f experiments/results/{name}.txt; experiments/reproduce.sh {name}"
        sys.exit(f"figures.py: {error}; what makes it: {again}")
    print(tabulate(numbers))
    text = json.dumps(rounded({"made_by": made, "numbers": numbers}), indent=1, ensure_ascii=False)
    source = f"{made['command']}, commit {made['git_commit']}"
    files = {
        "json": lambda path: path.write_text(text + "\n", encoding="utf-8"),
        "png": lambda path: draw(numbers).savefig(path, metadata={"Source": source}),
    }
    written = [write_file(RESULTS / f"{name}.{kind}", write) for kind, write in files.items()]
    if not all(written):
        sys.exit(2)


def rounded(value):
    """Return the value with every number in it rounded to four decimals."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
