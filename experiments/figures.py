"""Make tables and figures over several runs, from their folders and their models' held-out answers.

python experiments/figures.py base           # held-out answers of one seed, before and after
python experiments/figures.py variations     # reward curves of the three tasks
python experiments/figures.py transfer       # what training on one task buys on the others
python experiments/figures.py gap            # what helps on the wide size range
python experiments/figures.py confirm        # the same for what helped, with other seeds
python experiments/figures.py ablations      # what each part of the algorithm is for
python experiments/figures.py bf16           # what Kahan summation is for

Reads run NAME-seedN from runs/, and its answers from
held-out/NAME-seedN-on-TASK-at-TEMPERATURE.json, as `evaluate.py --json` writes them; reproduce.sh
makes both. Prints the table as it is in docs/results.md. Writes a figure to results/, and a JSON
file with the numbers and the commands and commits that made them.
"""

import json
import math
import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from harness.runlog import provenance, read_description
from harness.terminal import ignore_output_errors, write_file
from plot_rewards import PlotError, averages
from shapes import Figure

ROOT = Path(__file__).resolve().parent.parent
TAKEN_OUT = Path(__file__).with_name("taken_out.json")  # runs of code that is no longer there
RUNS, HELD_OUT, RESULTS = ROOT / "runs", ROOT / "held-out", ROOT / "experiments" / "results"
SEEDS = (0, 1, 2)
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided 95 %, by number of seeds
TEMPERATURES = {"greedy": 0, "sampled": 1}
WINDOW = 20  # steps per mean
REWARDS = {
    "area_correctness_reward": "area correctness (-3 to 3)",
    "area_format_reward": "area format (0 to 0.5)",
    "xml_format_reward": "XML format (0 to 0.5)",
}
TASKS = {"base": "sizes 20 to 35", "rotated": "turned by up to 45°", "wide": "sizes 5 to 35"}
KINDS = ("rectangle", "circle", "square", "triangle")
THIRDS = ("small", "medium", "large")
ANCESTOR = {  # mean area reward per 100 prompts, as published
    "rotated": [0.74, 1.49, 1.80, 2.04, 1.88, 1.99, 2.18, 2.28, 2.39, 2.31],
    "wide": [0.50, 1.24, 0.90, 1.32, 1.44, 1.33, 1.49, 1.40, 1.47, 1.55],
}
ANCESTOR_BASE = {50: 0.6, 900: 2.65}  # prompts: reward, read off its figure
GAP = {  # row of the table: run
    "before training": "before",
    "the defaults": "wide",
    "`--correctness root`": "wide-root",
    "`--correctness log`": "wide-log",
    "`--group-size 4`": "wide-group4",
    "`--group-size 16`": "wide-group16",
    "`--temperature 0.6`": "wide-temp0.6",
    "cold start on half of the plots": "wide-coldgrpo",
    "cold start alone, no GRPO": "wide-coldonly",
    "taken out: -3 from half off": "wide-tight",
    "taken out: log, -3 from a factor of 4": "wide-log4",
    "taken out: sizes widen over 100 steps": "wide-curriculum",
}
CONFIRM = {
    "the defaults": "wide",
    "`--correctness log`": "wide-log",
    "`--group-size 16`": "wide-group16",
}
CONFIRM_SEEDS = (3, 4, 5)
ABLATIONS = {  # panel: its runs, label -> name, the first with the defaults; all on the wide task
    "group size": {"8": "wide", "4": "wide-group4", "16": "wide-group16"},
    "advantages": {"divided by the group's std": "wide", "not divided": "wide-nostd"},
    "KL weight": {"0.02": "wide", "0": "wide-beta0"},
    "sampled at temperature 0.6": {
        "and scored at 0.6": "wide-temp0.6",
        "but scored at 1": "wide-temp0.6unscored",
    },
    "stop token": {"trained": "wide", "not trained": "wide-nostop"},
}
BF16 = {  # row of the table, curve: run
    "fp32 weights": "wide",
    "bf16, Kahan summation": "wide-bf16",
    "bf16, plain AdamW": "wide-bf16-plain",
    "bf16, Kahan summation, lr 1.5e-5": "wide-bf16-slow",
    "bf16, plain AdamW, lr 1.5e-5": "wide-bf16-slow-plain",
}


# --- numbers ----------------------------------------------------------------------------


def errors(name: str, task: str, how: str, seeds: tuple[int, ...] = SEEDS) -> dict[str, list]:
    """Return mean relative errors in percent, one per seed, for each group of examples."""
    answers = [held_out(f"{name}-seed{seed}-on-{task}-at-{TEMPERATURES[how]}") for seed in seeds]
    groups = ("all", *THIRDS, *KINDS)
    return {
        group: [100 * each[group]["relative_error_mean"] for each in answers] for group in groups
    }


def errors_on_wide(name: str, seeds: tuple[int, ...] = SEEDS) -> dict[str, dict[str, list]]:
    """Return the errors on the wide task, greedy and sampled."""
    return {how: errors(name, "wide", how, seeds) for how in TEMPERATURES}


def held_out(answers: str) -> dict:
    """Return the summaries of one model's held-out answers, by group of examples."""
    return json.loads((HELD_OUT / f"{answers}.json").read_text())["summaries"]


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


def made_by(names: list[str], seeds: tuple[int, ...]) -> dict:
    """Return the provenance of an entry: this command, and the command and commit of each run."""
    runs = {}
    for path in [RUNS / f"{name}-seed{seed}" for name in names for seed in seeds]:
        if (path / "metrics.jsonl").is_file():  # a cold start has none
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
    axes = figure.subplots(1, panels, sharey=sharey)
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


# --- base: one model, before and after ----------------------------------------------------


def base_numbers() -> dict:
    """Return the summaries of seed 0's answers to the base task, over all examples."""
    return {
        name: {
            how: held_out(f"{name}-seed0-on-base-at-{temperature}")["all"]
            for how, temperature in TEMPERATURES.items()
        }
        for name in ("before", "base")
    }


def base_table(numbers: dict) -> str:
    """Return the table of reward, errors and shares; the one within 10 % has a 95 % interval."""
    rows = {}
    for how in ("sampled", "greedy"):
        for when, name in (("before", "before"), ("after", "base")):
            found = numbers[name][how]
            percent = {key: f"{100 * value:.1f}" for key, value in found.items()}
            near = "within_10_percent"
            rows[f"{how}, {when}"] = [
                f"{found['area_correctness_reward']:.2f}",
                f"{percent['relative_error_median']} %",
                f"{percent[near]} % ({percent[near + '_low']} to {percent[near + '_high']})",
                f"{percent['two_decimals']} %",
                f"{percent['strict_xml']} %",
            ]
    head = ["", "area correctness", "median error", "within 10 %", "two decimals", "strict XML"]
    return markdown(head, rows)


# --- variations: reward curves of the three tasks ---------------------------------------


def variations_numbers() -> dict:
    """Return each seed's mean over the first and the last steps, by task and reward."""
    return {task: {key: ends(task, key) for key in REWARDS} for task in TASKS}


def ends(name: str, key: str) -> dict[str, list[float]]:
    """Return the means over the first and the last WINDOW steps of a run, one per seed."""
    _, y = averages([RUNS / f"{name}-seed{s}" for s in SEEDS], key, window=WINDOW, axis="steps")
    return {"first": y[:, WINDOW - 1].tolist(), "last": y[:, -1].tolist()}


def variations_table(numbers: dict) -> str:
    """Return the table of the three rewards' rise, by task."""
    rows = {
        TASKS[task]: [
            f"{cell(rewards[key]['first'], 2)} → {cell(rewards[key]['last'], 2)}" for key in REWARDS
        ]
        for task, rewards in numbers.items()
    }
    return markdown(["task", *REWARDS.values()], rows)


def variations_figure(_: dict) -> Figure:
    """Return our curves, beside the ancestor's numbers, which are for another model."""
    figure, (ours, theirs) = new_figure(2, size=(11, 4.5))
    draw_named(ours, {TASKS[task]: task for task in TASKS}, "area_correctness_reward")
    for task, rewards in ANCESTOR.items():
        prompts = [100 * i + 50 for i in range(len(rewards))]
        color = f"C{list(TASKS).index(task)}"
        theirs.plot(prompts, rewards, marker="o", color=color, label=TASKS[task])
    label = f"{TASKS['base']}, two points read off its figure"
    theirs.plot(*zip(*ANCESTOR_BASE.items(), strict=True), "o", color="C0", label=label)
    ours.set_title("this program, the bundled tiny model, 3 seeds")
    theirs.set_title("the ancestor: another model, 7B, on an H200")
    for axes, ylabel in ((ours, f"mean of {WINDOW} steps"), (theirs, "mean of 100 prompts")):
        axes.set(xlabel="prompts seen", ylabel=f"area correctness, {ylabel}", ylim=(-3.1, 3.1))
        axes.legend(loc="lower right", frameon=False)
    return figure


# --- transfer: each model on each task --------------------------------------------------


def transfer_numbers() -> dict:
    """Return the errors on every task, of the model before training and after each task."""
    return {
        name: {task: {how: errors(name, task, how) for how in TEMPERATURES} for task in TASKS}
        for name in ("before", *TASKS)
    }


def transfer_table(numbers: dict) -> str:
    """Return two tables: errors on all examples; errors of each task by size and class."""
    models = {"before": "nothing yet", **TASKS}
    rows = {
        f"{models[name]}, {how}": [cell(tasks[task][how]["all"]) for task in TASKS]
        for how in TEMPERATURES
        for name, tasks in numbers.items()
    }
    groups = (*THIRDS, *KINDS)
    details = {
        f"{text}, {when}": [cell(numbers[name][task]["greedy"][group]) for group in groups]
        for task, text in TASKS.items()
        for when, name in (("before", "before"), ("after", task))
    }
    first = markdown(["trained on", *(f"on {text}" for text in TASKS.values())], rows)
    return first + "\n\n" + markdown(["greedy", *groups], details)


# --- gap: what helps on the wide size range ---------------------------------------------


def gap_numbers() -> dict:
    """Return the errors on the wide task of everything we tried, and of the model before training.

    Some of what did not help is no longer in the code; TAKEN_OUT has its numbers and commits.
    """
    kept = json.loads(TAKEN_OUT.read_text())["numbers"]
    return {name: kept.get(name) or errors_on_wide(name) for name in GAP.values()}


def gap_table(numbers: dict) -> str:
    """Return the table of errors by thirds of the true area."""
    return by_size(numbers, GAP)


def by_size(numbers: dict, names: dict[str, str]) -> str:
    """Return a table of errors by size, greedy and sampled, one row per run, label -> name."""
    columns = [(group, how) for how in TEMPERATURES for group in (*THIRDS, "all")]
    rows = {
        label: [cell(numbers[name][how][group]) for group, how in columns]
        for label, name in names.items()
    }
    return markdown(["", *(f"{group}, {how}" for group, how in columns)], rows)


def gap_figure(numbers: dict) -> Figure:
    """Return the same errors as dots, one per seed."""
    columns = [(how, group) for how in TEMPERATURES for group in ("small", "all")]
    figure, panels = new_figure(len(columns), size=(13, 0.6 + 0.33 * len(GAP)))
    for axes, (how, group) in zip(panels, columns, strict=True):
        draw_dots(axes, {label: numbers[name][how][group] for label, name in GAP.items()})
        axes.set(title=f"{group}, {how}", xlabel="mean relative error, %")
    return figure


def draw_dots(axes, values: dict[str, list[float]]) -> None:
    """Draw one row per label, top down: a dot for each seed, a bar at their mean.

    The first row is the model before training, the second the baseline; a line marks its mean.
    """
    for row, seeds in enumerate(values.values()):
        axes.plot(seeds, [row] * len(seeds), "o", color="C0", alpha=0.6, markersize=5)
        axes.plot(statistics.fmean(seeds), row, "|", color="black", markersize=14)
    axes.axvline(statistics.fmean(list(values.values())[1]), color="0.5", linewidth=1, zorder=0)
    axes.set_yticks(range(len(values)), [label.replace("`", "") for label in values])
    axes.set_ylim(len(values) - 0.5, -0.5)


# --- confirm: the same with seeds that had no part in choosing ------------------------------


def confirm_numbers() -> dict:
    """Return the errors on the wide task, with other seeds, of the defaults and of what helped."""
    return {name: errors_on_wide(name, CONFIRM_SEEDS) for name in CONFIRM.values()}


def confirm_table(numbers: dict) -> str:
    """Return the table of errors in the form of `gap_table`."""
    return by_size(numbers, CONFIRM)


# --- ablations: with and without each part of the algorithm -----------------------------


def ablations_numbers() -> dict:
    """Return the errors on the wide task of all runs in ABLATIONS."""
    names = {name: None for runs in ABLATIONS.values() for name in runs.values()}
    return {name: errors_on_wide(name) for name in names}


def ablations_table(numbers: dict) -> str:
    """Return the table of errors over all sizes, greedy and sampled."""
    rows = {}
    for title, runs in ABLATIONS.items():
        for label, name in runs.items():
            found = numbers[name]
            rows[f"{title}: {label}"] = [cell(found[how]["all"]) for how in ("greedy", "sampled")]
    return markdown(["", "greedy", "sampled"], rows)


def ablations_figure(_: dict) -> Figure:
    """Return one panel per part, with the area reward during training."""
    figure, panels = new_figure(len(ABLATIONS), size=(15, 3.6))
    for axes, (title, names) in zip(panels, ABLATIONS.items(), strict=True):
        draw_named(axes, names, "area_correctness_reward")
        axes.set(title=title, xlabel="prompts seen")
        axes.legend(frameon=False, loc="lower right")
    panels[0].set_ylabel(f"area correctness, mean of {WINDOW} steps")
    return figure


# --- bf16: weights rounded after every update -------------------------------------------


def bf16_numbers() -> dict:
    """Return the errors on the wide task, by dtype and optimizer."""
    return {name: errors_on_wide(name) for name in BF16.values()}


def bf16_table(numbers: dict) -> str:
    """Return the table of errors in the form of `gap_table`."""
    return by_size(numbers, BF16)


def bf16_figure(_: dict) -> Figure:
    """Return two panels: the area reward during training, and the KL from the initial policy."""
    figure, panels = new_figure(2, size=(9, 3.6), sharey=False)
    for axes, key in zip(panels, ("area_correctness_reward", "kl"), strict=True):
        draw_named(axes, BF16, key)
        axes.set(xlabel="prompts seen", ylabel=f"{key.replace('_', ' ')}, mean of {WINDOW} steps")
    panels[0].legend(frameon=False, loc="lower right")
    return figure


# --- command ----------------------------------------------------------------------------

ENTRIES = {  # name: makers of the numbers, the table and, for some, the figure
    "base": (base_numbers, base_table, None),
    "variations": (variations_numbers, variations_table, variations_figure),
    "transfer": (transfer_numbers, transfer_table, None),
    "gap": (gap_numbers, gap_table, gap_figure),
    "confirm": (confirm_numbers, confirm_table, None),
    "ablations": (ablations_numbers, ablations_table, ablations_figure),
    "bf16": (bf16_numbers, bf16_table, bf16_figure),
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
    except (FileNotFoundError, PlotError) as error:
        again = f"rm -f experiments/results/{name}.txt; experiments/reproduce.sh {name}"
        sys.exit(f"figures.py: {error}; what makes it: {again}")
    print(tabulate(numbers))
    made = made_by(list(numbers), CONFIRM_SEEDS if name == "confirm" else SEEDS)
    text = json.dumps(rounded({"made_by": made, "numbers": numbers}), indent=1, ensure_ascii=False)
    source = f"{made['command']}, commit {made['git_commit']}"
    files = {"json": lambda path: path.write_text(text + "\n", encoding="utf-8")}
    if draw is not None:
        files["png"] = lambda path: draw(numbers).savefig(path, metadata={"Source": source})
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
