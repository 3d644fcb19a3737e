"""Make tables and figures over several runs, from their folders and their models' held-out answers.

python experiments/figures.py tasks          # three tasks, before and after: README's table too
python experiments/figures.py split          # where the rest of the error is
python experiments/figures.py samples        # what more samples of a plot hold
python experiments/figures.py rate           # a rate that is too high, and what helps
python experiments/figures.py wide           # what helps on the wide size range
python experiments/figures.py exercises      # the numbers of docs/exercises.md

Reads run NAME-seedN from runs/, and its answers from
held-out/NAME-seedN-on-TASK-at-TEMPERATURE.json, as `evaluate.py --json` writes them; reproduce.sh
makes both. Prints the tables as they are in docs/. Writes a figure to results/, and a
JSON file with the numbers and the commands and commits that made them.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from harness.runlog import RunError, provenance, read_description
from harness.terminal import ignore_output_errors, write_file
from plot_rewards import ANCESTOR, PlotError, averages, read_metrics
from rewards import reasoning_of, relative_error, values_in
from shapes import Figure

ROOT = Path(__file__).resolve().parent.parent
RUNS, HELD_OUT, RESULTS = ROOT / "runs", ROOT / "held-out", ROOT / "experiments" / "results"
SEEDS = (0, 1, 2, 3, 4)
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided 95 %, by number of seeds
TEMPERATURES = {"greedy": 0, "sampled": 1}
WINDOW = 20  # steps per mean
TASKS = {"base": "sizes 20 to 35", "rotated": "turned by up to 45°", "wide": "sizes 5 to 35"}
MEASURES = {  # key of a summary: heading, factor, decimals
    "area_correctness_reward": ("area reward", 1, 2),
    "relative_error_median": ("median error, %", 100, 1),
    "relative_error_mean": ("mean error, %", 100, 1),
    "error_of_small": ("mean error of the smallest third, %", 100, 1),
    "shape_named": ("class named, %", 100, 1),
    "answer_follows": ("answer follows, %", 100, 1),
    "two_decimals": ("two decimals, %", 100, 1),
    "strict_xml": ("strict XML, %", 100, 1),
    "different_answers": ("different answers", 1, 0),
}
COLUMNS = [key for key in MEASURES if key not in ("relative_error_mean", "error_of_small")]
RATE = {  # row: run; the first is what the others are compared with
    "8e-5, the preset's": "base",
    "4e-4": "fast",
    "4e-4, `--beta 0.5`": "fast-kl",
    "4e-4, no area without a calculation that gives it": "fast-follows",
}
RATE_COLUMNS = (
    ("sampled", "area_correctness_reward"),
    ("sampled", "answer_follows"),
    ("sampled", "shape_named"),
    ("greedy", "relative_error_mean"),
    ("greedy", "answer_follows"),
    ("greedy", "different_answers"),
)
WIDE = {
    "the defaults": "wide",
    "log-uniform sizes": "wide-log",
    "divided by the batch's std": "wide-batch-std",
    "not divided by a std": "wide-no-std",
    "4 plots of 32 completions": "wide-4x32",
}
WIDE_COLUMNS = (
    ("sampled", "area_correctness_reward"),
    ("sampled", "relative_error_mean"),
    ("greedy", "relative_error_mean"),
    ("greedy", "error_of_small"),
    ("greedy", "relative_error_median"),
)
EXERCISES = {
    "the run to compare with": "ex",
    "1: groups of two": "ex-pairs",
    "2: not divided by the std": "ex-no-std",
    "3: only the area pays": "ex-area",
    "4: RLOO": "ex-rloo",
    "5: GRPO, 4 epochs": "ex-epochs",
    "5: GSPO, 4 epochs": "ex-gspo",
    "6: paid by length": "ex-length",
    "7: five times the rate": "ex-fast",
    "7: and no area unless the answer follows": "ex-fast-follows",
    "9: a fifth are ellipses": "ex-ellipse",
    "10: perimeters": "ex-perimeter",
}
EXERCISE_COLUMNS = {  # key of metrics.jsonl: heading, factor, format
    "area_correctness_reward": ("area", 1, ".2f"),
    "area_format_reward": ("decimals", 1, ".2f"),
    "xml_format_reward": ("XML", 1, ".2f"),
    "completion_length_mean": ("tokens", 1, ".1f"),
    "shape_named": ("class named, %", 100, ".0f"),
    "answer_follows": ("answer follows, %", 100, ".0f"),
    "no_spread_share": ("no spread, %", 100, ".0f"),
    "clip_fraction": ("clipped, %", 100, ".2f"),
    "grad_norm": ("gradient norm", 1, ".2f"),
}
PARTS = ("whole units", "half units", "reading", "formula", "arithmetic", "format")
NUMBER = r"(\d+(?:\.\d+)?)"
WORDS = (  # of the bundled model: class and dimensions
    rf"(circle|square), (?:diameter|side) {NUMBER}",
    rf"(rectangle|triangle), (?:width|base) {NUMBER}, height {NUMBER}",
)
FACTORS = {"rectangle": 1.0, "circle": math.pi / 4, "square": 1.0, "triangle": 0.5}


# --- numbers ----------------------------------------------------------------------------


def summaries(name: str, task: str, how: str) -> dict[str, list[float]]:
    """Return the MEASURES of a model's held-out answers to a task, one value per seed."""
    found = [measures(held_out(name, seed, task, how)) for seed in SEEDS]
    return {key: [each[key] for each in found] for key in MEASURES}


def held_out(name: str, seed: int, task: str, how: str) -> dict:
    """Return what `evaluate.py --json` wrote about one model's held-out answers."""
    path = HELD_OUT / f"{name}-seed{seed}-on-{task}-at-{TEMPERATURES[how]}.json"
    return json.loads(path.read_text())


def measures(found: dict) -> dict[str, float]:
    """Return the summary of held-out answers, and what else the tables show."""
    different = {answer["reward"]["predicted"] for answer in found["answers"]} - {None}
    small = found["summaries"]["small"]["relative_error_mean"]
    counted = {"different_answers": len(different), "error_of_small": small}
    return {**found["summaries"]["all"], **counted}


def interval(values: list[float]) -> float:
    """Return the half-width of the 95 % interval of a mean over seeds (Student's t).

    >>> round(interval([1.0, 2.0, 3.0]), 3)
    2.484
    """
    return T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def cell(values: list[float], decimals: int = 1, *, sign: str = "") -> str:
    """Return a table cell: the mean and its interval.

    >>> cell([10.0, 11.0, 12.0]), cell([10.0, 11.0, 12.0], sign="+")
    ('11.0 ± 2.5', '+11.0 ± 2.5')
    """
    return f"{statistics.fmean(values):{sign}.{decimals}f} ± {interval(values):.{decimals}f}"


def measured(values: dict[str, list[float]], key: str, baseline: dict | None = None) -> str:
    """Return a table cell of one measure: its mean, and how it differs from a baseline.

    The difference is that of paired seeds: both runs of a pair see the same plots.
    """
    _, factor, decimals = MEASURES[key]
    scaled = [factor * value for value in values[key]]
    if baseline is None:
        return cell(scaled, decimals)
    pairs = zip(scaled, baseline[key], strict=True)
    difference = [value - factor * other for value, other in pairs]
    text = f"{cell(scaled, decimals)} ({cell(difference, decimals, sign='+')})"
    return text.replace("-", "\N{MINUS SIGN}")


def made_by(names: list[str], seeds: tuple[int, ...]) -> dict:
    """Return the provenance of an entry: this command, and the command and commit of each run."""
    runs = {}
    trained = [name for name in names if name != "before"]
    for path in [RUNS / f"{name}-seed{seed}" for name in trained for seed in seeds]:
        described = read_description(path)
        runs[path.name] = {key: described[key] for key in ("command", "git_commit")}
    return {**provenance("cpu"), "runs": runs}


def markdown(head: list[str], rows: dict[str, list[str]]) -> str:
    """Return a Markdown table; `head` includes the first column."""
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- drawing ----------------------------------------------------------------------------


def new_figure(panels: int, *, size: tuple[float, float], sharey: bool = True):
    """Return a figure and its panels, side by side, each with a light grid and no box."""
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(1, panels, sharey=sharey, squeeze=False)[0]
    for each in axes:
        each.grid(color="0.9")
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_named(axes, names: dict[str, str], key: str) -> None:
    """Draw runs, label -> name: the mean over the seeds, and a band from lowest to highest."""
    for label, name in names.items():
        runs = [RUNS / f"{name}-seed{seed}" for seed in SEEDS]
        x, y = averages(runs, key, window=WINDOW, axis="prompts")
        (line,) = axes.plot(x, y.mean(0), label=label.replace("`", ""))
        axes.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.2, linewidth=0)


# --- tasks: before and after -------------------------------------------------


def by_task(measure: Callable[[str, str, str], dict]) -> dict:
    """Return `measure(name, task, how)` by task, by model (before or after) and way to answer."""
    return {
        task: {
            when: {how: measure(name, task, how) for how in TEMPERATURES}
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
        f"{how}, {when}": [measured(numbers[when][how], key) for key in COLUMNS]
        for how in ("sampled", "greedy")
        for when in ("before", "after")
    }
    return markdown(["", *(MEASURES[key][0] for key in COLUMNS)], rows)


def tasks_figure(_: dict) -> Figure:
    """Return our curves, beside the ancestor's numbers, which are for another model."""
    figure, (ours, theirs) = new_figure(2, size=(11, 4.5))
    draw_named(ours, {TASKS[task]: task for task in TASKS}, "area_correctness_reward")
    for task, style in zip(TASKS.values(), ("o", "-o", "-o"), strict=False):
        label = f"{task}, two points read off its figure" if style == "o" else task
        theirs.plot(*ANCESTOR[task], style, label=label)
    ours.set_title(f"this program, the bundled tiny model, {len(SEEDS)} seeds")
    theirs.set_title("the ancestor: another model, 7B, on an H200")
    for axes, ylabel in ((ours, f"mean of {WINDOW} steps"), (theirs, "mean of 100 prompts")):
        axes.set(xlabel="prompts seen", ylabel=f"area correctness, {ylabel}", ylim=(-3.1, 3.1))
        axes.legend(loc="lower right", frameon=False)
    return figure


# --- split: where the rest of the error is -------------------------------------------------


def parts_per_seed(name: str, task: str, how: str) -> dict[str, list[float]]:
    """Return the mean of each part over a seed's held-out answers, one value per seed."""
    columns: dict[str, list[float]] = {part: [] for part in PARTS}
    for seed in SEEDS:
        answers = held_out(name, seed, task, how)["answers"]
        rows = [parts_of(answer) for answer in answers]
        for part, values in zip(PARTS, zip(*rows, strict=True), strict=True):
            columns[part].append(statistics.fmean(values))
    return columns


def parts_of(answer: dict) -> list[float]:
    """Return the relative error of the area at each of PARTS, for one held-out answer.

    The true dimensions in whole units, in half units; the dimensions as written; the calculation as
    written, without its mistakes; the number that was answered; the answer as scored. Words in
    which a part cannot be found add no error to it.
    """
    shape, reward = answer["shape"], answer["reward"]
    factor, sides = FACTORS[shape["kind"]], (shape["width"], shape["height"])
    reasoning = reasoning_of(answer["text"])
    areas = [factor * math.prod(step * round(side / step) for side in sides) for step in (1, 0.5)]
    for words in filter(None, (re.search(pattern, reasoning) for pattern in WORDS)):
        kind, *written = words.groups()
        areas.append(FACTORS[kind] * float(written[0]) * float(written[-1]))
        break
    else:
        areas.append(areas[-1])
    calculations = [each.value for each in values_in(reasoning) if each.is_calculation]
    areas.append(calculations[-1] if calculations else areas[-1])
    areas.append(areas[-1] if reward["predicted"] is None else reward["predicted"])
    errors = [relative_error(area, factor * math.prod(sides)) for area in areas]
    return [*errors, reward["relative_error"]]


def split_table(numbers: dict) -> str:
    """Return the table of the errors in percent, each with all that stand left of it."""
    rows = {
        f"{TASKS[task]}, {how}, {when}": [
            cell([100 * value for value in numbers[task][when][how][part]]) for part in PARTS
        ]
        for task in numbers
        for how in ("greedy", "sampled")
        for when in ("before", "after")
    }
    head = [part if part in PARTS[:2] else f"and {part}" for part in PARTS]
    return markdown(["mean error, %", *head], rows)


# --- samples: pass@k -----------------------------------------------------------------------


def samples_numbers() -> dict:
    """Return pass@k of seed 0's task, "within 5 %": for each k the mean and half its interval."""
    return {
        name: json.loads((HELD_OUT / f"{name}-64.json").read_text())["pass_at_k"]
        for name in ("before", "base")
    }


def samples_table(numbers: dict) -> str:
    """Return the table of pass@k in percent."""
    rows = {
        when: [f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in numbers[name].values()]
        for when, name in (("before", "before"), ("after", "base"))
    }
    return markdown(["within 5 % in", *(f"{k} of 64" for k in numbers["base"])], rows)


def samples_figure(numbers: dict) -> Figure:
    """Return pass@k over k, before and after."""
    figure, (axes,) = new_figure(1, size=(5.5, 4))
    for label, name in (("before", "before"), ("after", "base")):
        means, halves = zip(*numbers[name].values(), strict=True)
        axes.errorbar(range(len(means)), means, halves, marker="o", capsize=3, label=label)
    axes.set_xticks(range(len(means)), numbers["base"])
    axes.set(xlabel="samples of a plot", ylabel="plots with an area within 5 %", ylim=(0, 1.02))
    axes.legend(loc="lower right", frameon=False)
    return figure


# --- rate and wide: runs compared with the first of them --------------------------------------


def compared(task: str, runs: dict[str, str]) -> dict:
    """Return the measures of each run's answers to a task, by name and by way to answer."""
    return {
        name: {how: summaries(name, task, how) for how in TEMPERATURES} for name in runs.values()
    }


def compared_table(numbers: dict, runs: dict[str, str], columns: tuple) -> str:
    """Return the table of some measures; in brackets the difference from the first run."""
    first, *_ = runs.values()
    rows = {
        label: [
            measured(numbers[name][how], key, None if name == first else numbers[first][how])
            for how, key in columns
        ]
        for label, name in runs.items()
    }
    return markdown(["", *(f"{how}: {MEASURES[key][0]}" for how, key in columns)], rows)


def rate_figure(_: dict) -> Figure:
    """Return two panels: what the curve of the reward shows, and what it does not."""
    figure, panels = new_figure(2, size=(11, 4), sharey=False)
    for axes, key in zip(panels, ("area_correctness_reward", "answer_follows"), strict=True):
        draw_named(axes, RATE, key)
        axes.set(xlabel="prompts seen", ylabel=f"{key.replace('_', ' ')}, mean of {WINDOW} steps")
    panels[0].set_title("the reward that each run was paid")
    panels[1].set_title("what it does not see: the answer follows from the reasoning")
    panels[0].legend(frameon=False, loc="lower right")
    return figure


def wide_figure(numbers: dict) -> Figure:
    """Return the greedy and the sampled error as dots, one per seed; a bar at their mean."""
    figure, panels = new_figure(2, size=(10, 0.8 + 0.4 * len(WIDE)))
    for axes, how in zip(panels, TEMPERATURES, strict=True):
        rows = [numbers[name][how]["relative_error_mean"] for name in WIDE.values()]
        for row, seeds in enumerate(rows):
            percent = [100 * value for value in seeds]
            axes.plot(percent, [row] * len(seeds), "o", color="C0", alpha=0.6, markersize=5)
            axes.plot(statistics.fmean(percent), row, "|", color="black", markersize=14)
        axes.axvline(100 * statistics.fmean(rows[0]), color="0.5", linewidth=1, zorder=0)
        axes.set_yticks(range(len(rows)), list(WIDE))
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="mean relative error, %", title=how)
    return figure


# --- exercises ---------------------------------------------------------------------------------


def exercises_numbers() -> dict:
    """Return the means over the last WINDOW steps of seed 0's run, by run and key."""
    return {
        name: {
            key: statistics.fmean(known_values(RUNS / f"{name}-seed0", key))
            for key in EXERCISE_COLUMNS
        }
        for name in EXERCISES.values()
    }


def known_values(run: Path, key: str) -> list[float]:
    """Return a metric's values in the last WINDOW steps of a run; [nan] if there is none."""
    values = [step.get(key) for step in read_metrics(run)[-WINDOW:]]
    return [value for value in values if value is not None] or [math.nan]


def exercises_table(numbers: dict) -> str:
    """Return the table of the exercises' runs."""
    rows = {
        label: [
            f"{factor * numbers[name][key]:{form}}".replace("-", "\N{MINUS SIGN}")
            for key, (_, factor, form) in EXERCISE_COLUMNS.items()
        ]
        for label, name in EXERCISES.items()
    }
    return markdown(["", *(heading for heading, _, _ in EXERCISE_COLUMNS.values())], rows)


# --- command ----------------------------------------------------------------------------

ENTRIES = {  # name: makers of the numbers, the table and, for some, the figure
    "tasks": (partial(by_task, summaries), tasks_table, tasks_figure),
    "split": (partial(by_task, parts_per_seed), split_table, None),
    "samples": (samples_numbers, samples_table, samples_figure),
    "rate": (
        partial(compared, "base", RATE),
        partial(compared_table, runs=RATE, columns=RATE_COLUMNS),
        rate_figure,
    ),
    "wide": (
        partial(compared, "wide", WIDE),
        partial(compared_table, runs=WIDE, columns=WIDE_COLUMNS),
        wide_figure,
    ),
    "exercises": (exercises_numbers, exercises_table, None),
}
ONE_SEED = ("samples", "exercises")  # entries of seed 0 alone


def main() -> None:
    """Make the entry that the command line names: print its table, write its JSON and figure."""
    ignore_output_errors()
    if len(sys.argv) != 2 or sys.argv[1] not in ENTRIES:
        sys.exit(f"figures.py: the argument must be one of: {', '.join(ENTRIES)}")
    name = sys.argv[1]
    find, tabulate, draw = ENTRIES[name]
    try:
        numbers = find()
        made = made_by(list(numbers), SEEDS[:1] if name in ONE_SEED else SEEDS)
    except (FileNotFoundError, PlotError, RunError) as error:
        again = f"rm -f experiments/results/{name}.txt; experiments/reproduce.sh {name}"
        sys.exit(f"figures.py: {error}; what makes it: {again}")
    print(tabulate(numbers))
    text = json.dumps(rounded({"made_by": made, "numbers": numbers}), indent=1, ensure_ascii=False)
    source = f"{made['command']}, commit {made['git_commit']}"
    files = {"json": lambda path: path.write_text(text + "\n", encoding="utf-8")}
    if draw is not None:
        files["png"] = lambda path: draw(numbers).savefig(path, metadata={"Source": source})
    written = [write_file(RESULTS / f"{name}.{kind}", write) for kind, write in files.items()]
    if not all(written):
        sys.exit(2)


def rounded(value):
    """Return the value with every number in it rounded to six decimals."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
