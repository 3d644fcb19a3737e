"""Plot the rewards of one run, or compare several runs. Reads nothing but their folders.

python plot_rewards.py RUN                          # writes three figures to the run folder
python plot_rewards.py RUN RUN ...                  # one of the area reward, to the current folder
python plot_rewards.py RUN RUN --metrics kl,entropy # a figure of each of these instead
python plot_rewards.py RUN --ancestor               # with what the ancestor published, as dots

Runs whose names differ only in a final "-seed0", "-seed1", ... share one curve: their mean, with
a band from the lowest seed to the highest. A run that is named twice counts once.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from harness.terminal import check_folder, ignore_output_errors, write_file
from shapes import Figure

REWARDS = {  # key in metrics.jsonl: the reward's title and range
    "area_correctness_reward": ("Area correctness", (-3.0, 3.0)),
    "area_format_reward": ("Area format (two decimals)", (0.0, 0.5)),
    "xml_format_reward": ("XML format", (0.0, 0.5)),
}
METRICS = {  # more keys in metrics.jsonl: title, and the range if there is one
    **REWARDS,
    "kl": ("KL to the reference, nats per token", None),
    "entropy": ("Entropy, nats per token", None),
    "completion_length_mean": ("Completion length, tokens", None),
    "shape_named": ("Class named, share of those that name one", (0.0, 1.0)),
    "answer_follows": ("Answer follows from the reasoning, share", (0.0, 1.0)),
}
ANCESTOR = {  # task: prompts and area reward, the means of 100 prompts as published; 7B on an H200
    "sizes 20 to 35": ([50, 900], [0.6, 2.65]),  # read off its figure
    "turned by up to 45°": (
        [100 * i + 50 for i in range(10)],
        [0.74, 1.49, 1.80, 2.04, 1.88, 1.99, 2.18, 2.28, 2.39, 2.31],
    ),
    "sizes 5 to 35": (
        [100 * i + 50 for i in range(10)],
        [0.50, 1.24, 0.90, 1.32, 1.44, 1.33, 1.49, 1.40, 1.47, 1.55],
    ),
}
AXES = {"prompts": "prompts seen", "steps": "steps"}
SEED = re.compile(r"-seed[0-9]+$")  # ends the name of a run
AS_IT_IS = {"parse_math": False, "usetex": False}  # names are plain text, not math or TeX


class PlotError(Exception):
    """A run cannot be drawn. The message is one line for the user."""


# --- reading ------------------------------------------------------------------------------


def read_metrics(run: Path) -> list[dict]:
    """Return the steps of a run, in order. Raises `PlotError` for a line that it cannot read.

    Skips a last line that has no newline: the run is still writing it, or died while doing so.
    """
    path = run / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror or error}") from error
    steps = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            step = json.loads(line)
            steps.append({"step": int(step["step"]), "prompts": int(step["prompts"]), **step})
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise PlotError(f"{path}: line {number} is not a step of a run") from error
    if not steps:
        raise PlotError(f"{path}: no step has been logged yet")
    return steps


def curve(steps: list[dict], key: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y, each of shape (steps,). A missing value becomes nan."""
    x = [step["prompts"] if axis == "prompts" else step["step"] + 1 for step in steps]
    y = [step.get(key) for step in steps]
    known = [value if is_number(value) else np.nan for value in y]
    return np.array(x), np.array(known, dtype=float)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of each value and the `window - 1` before it, ignoring nan.

    >>> moving_average(np.array([1.0, 3.0, 5.0, 7.0]), window=2)
    array([1., 2., 4., 6.])
    """
    known = ~np.isnan(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known)
    sums[window:] -= sums[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def each_once(runs: list[Path]) -> list[Path]:
    """Return the runs, keeping only the first of several paths to the same folder."""
    first: dict[str, Path] = {}
    for run in runs:
        first.setdefault(os.path.realpath(run), run)
    return list(first.values())


def named(run: Path) -> Path:
    """Return a run's absolute path. It ends in the run's name even if `run` is "." or ".."."""
    whole = os.path.abspath(run).encode("utf-8", "backslashreplace")  # not every path is valid text
    return Path(whole.decode())


def seeds_of(runs: list[Path]) -> list[tuple[str, list[Path]]]:
    """Return a label and the runs for each curve; runs that differ only in "-seed0" share one.

    >>> [label for label, _ in seeds_of([Path("x/a-seed0"), Path("x/b"), Path("x/a-seed1")])]
    ['a, 2 seeds', 'b']
    """
    groups: dict[Path, list[Path]] = {}
    for run in runs:
        groups.setdefault(named(run).parent / SEED.sub("", named(run).name), []).append(run)
    paths = [path if len(group) > 1 else named(group[0]) for path, group in groups.items()]
    counts = [f", {len(group)} seeds" if len(group) > 1 else "" for group in groups.values()]
    labels = [label + count for label, count in zip(short(paths), counts, strict=True)]
    return list(zip(labels, groups.values(), strict=True))


def short(paths: list[Path]) -> list[str]:
    """Return the shortest end of each path that no other path shares.

    >>> short([Path("/runs/base"), Path("/x/1/tiny"), Path("/y/1/tiny")])
    ['base', 'x/1/tiny', 'y/1/tiny']
    """
    ends = []
    for path in paths:
        length = 1
        while sum(other.parts[-length:] == path.parts[-length:] for other in set(paths)) > 1:
            length += 1
        ends.append(str(Path(*path.parts[-length:])))
    return ends


def averages(
    runs: list[Path], key: str, *, window: int, axis: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return x, of shape (steps,), and the runs' moving averages, of shape (runs, steps).

    Stops where the shortest run stops.
    """
    curves = [curve(read_metrics(run), key, axis) for run in runs]
    steps = min(len(x) for x, _ in curves)
    return curves[0][0][:steps], np.stack([moving_average(y[:steps], window) for _, y in curves])


def check_metrics(run: Path, keys: list[str]) -> None:
    """Raise `ValueError` for a key of which a run has no number."""
    steps = read_metrics(run)
    known = {key for step in steps for key, value in step.items() if is_number(value)}
    known = {key for key in known - {"step", "prompts"} if key.isidentifier()}  # also a file name
    for key in keys:
        if key not in known:
            named = ", ".join(sorted(known))
            raise ValueError(f"--metrics {key!r}: {run} has no such number; it has: {named}")


def is_number(value: object) -> bool:
    """Return whether a value from a JSON file is a number that a figure can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def title_of(key: str) -> tuple[str, tuple[float, float] | None]:
    """Return the title of a metric's figure, and its range if it has one."""
    return METRICS.get(key, (key.replace("_", " ").capitalize(), None))


def change(run: Path, keys: list[str], window: int) -> str:
    """Return one line with each metric's mean over the first and the last `window` steps."""
    steps = read_metrics(run)
    parts = []
    for key in keys:
        _, values = curve(steps, key, "steps")
        first, last = moving_average(values, window)[[min(window, len(values)) - 1, -1]]
        form = ".2f" if key in REWARDS else ".3g"
        parts.append(f"{key} {first:{form}} -> {last:{form}}")
    return f"{run}: " + ", ".join(parts)


# --- drawing ------------------------------------------------------------------------------


def new_axes(title: str, ylabel: str, xlabel: str):
    """Return a figure and its axes."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, **AS_IT_IS)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def show_range(axes, limits: tuple[float, float] | None) -> None:
    """Show a metric's whole range, and what has been drawn outside of it, with a small margin."""
    if limits:
        low, high = min(limits[0], axes.dataLim.y0), max(limits[1], axes.dataLim.y1)
        margin = 0.03 * (high - low)
        axes.set_ylim(low - margin, high + margin)


def add_legend(axes) -> None:
    """Add a legend that lists every line.

    Sets the labels afterwards, because matplotlib skips a label that starts with "_".
    """
    legend = axes.legend(axes.lines, [" "] * len(axes.lines), loc="lower right", frameon=False)
    for text, line in zip(legend.get_texts(), axes.lines, strict=True):
        text.set(text=line.get_label(), **AS_IT_IS)


def draw_run(run: Path, key: str, path: Path, *, window: int, axis: str, ancestor: bool) -> None:
    """Write a figure of one metric in one run."""
    title, limits = title_of(key)
    ylabel = "mean reward" if key in REWARDS else "value of the step"
    figure, axes = new_axes(f"{title}: {named(run).name}", ylabel, AXES[axis])
    x, y = curve(read_metrics(run), key, axis)
    axes.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    label = f"moving average over {window} steps"
    axes.plot(x, moving_average(y, window), color="tab:blue", linewidth=2, label=label)
    if ancestor:
        draw_ancestor(axes)
    show_range(axes, limits)
    add_legend(axes)
    figure.savefig(path)


def draw_variations(
    runs: list[Path], key: str, path: Path, *, window: int, axis: str, ancestor: bool
) -> None:
    """Write a figure that compares the moving averages of one metric in several runs."""
    title, limits = title_of(key)
    figure, axes = new_axes(title, f"moving average over {window} steps", AXES[axis])
    draw_seeds(axes, runs, key, window=window, axis=axis)
    if ancestor:
        draw_ancestor(axes)
    show_range(axes, limits)
    add_legend(axes)
    figure.savefig(path)


def draw_ancestor(axes) -> None:
    """Draw the ancestor's published numbers as hollow dots: another model, other options."""
    for (task, points), marker in zip(ANCESTOR.items(), "os^", strict=True):
        label = f"the ancestor, 7B: {task}"
        axes.plot(*points, marker, color="0.35", markerfacecolor="none", label=label)


def draw_seeds(axes, runs: list[Path], key: str, *, window: int, axis: str) -> None:
    """Draw a curve for each run, and for several seeds of a run their mean and their range."""
    for label, group in seeds_of(runs):
        x, y = averages(group, key, window=window, axis=axis)
        (line,) = axes.plot(x, y.mean(0), linewidth=2, label=label)
        if len(group) > 1:
            axes.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.2, linewidth=0)


def pictures(
    runs: list[Path], keys: list[str], out: Path | None, *, ancestor: bool, **options
) -> dict[Path, Callable]:
    """Return the path of each figure and the function that writes it, one per metric.

    Those of one run go to its folder. The ancestor's numbers are of the area reward only.
    """
    draw, folder, end = partial(draw_run, runs[0]), out or runs[0], ""
    if len(runs) > 1:
        draw, folder, end = partial(draw_variations, runs), out or Path(), "_variations"
    return {
        folder / f"{key}{end}.png": partial(
            draw, key, ancestor=ancestor and key == "area_correctness_reward", **options
        )
        for key in keys
    }


# --- command ------------------------------------------------------------------------------


def chosen_metrics(given: str | None, runs: int) -> list[str]:
    """Return the keys to draw, each once: those given, or the default for so many runs.

    >>> chosen_metrics("kl, entropy,kl", 1), chosen_metrics(None, 2)
    (['kl', 'entropy'], ['area_correctness_reward'])
    """
    if given is not None:
        return list(dict.fromkeys(key.strip() for key in given.split(",")))
    return list(REWARDS) if runs == 1 else ["area_correctness_reward"]


def check_options(args: argparse.Namespace, keys: list[str]) -> None:
    """Raise `ValueError` for options that are not accepted."""
    if args.window < 1:
        raise ValueError(f"--window {args.window}: must be at least 1")
    if args.ancestor and (args.axis != "prompts" or "area_correctness_reward" not in keys):
        raise ValueError(
            f"--ancestor: its numbers are the area reward by prompts, not {', '.join(keys)} "
            f"by {args.axis}"
        )
    if args.out:
        check_folder("--out", args.out)


def main(arguments: list[str] | None = None) -> None:
    """Print how the rewards of each run changed, then plot them."""
    ignore_output_errors()
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="one or more run folders")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write the figures to")
    parser.add_argument(
        "--window", type=int, default=20, metavar="N", help="steps to average; default: 20"
    )
    parser.add_argument(
        "--axis", choices=AXES, default="prompts", help="the x axis; default: prompts"
    )
    parser.add_argument(
        "--metrics",
        metavar="KEY,KEY,...",
        help="keys of metrics.jsonl to draw; default: the three rewards, of several runs the area",
    )
    parser.add_argument(
        "--ancestor", action="store_true", help="add the ancestor's published area rewards, as dots"
    )
    args = parser.parse_args(arguments)
    runs = each_once(args.runs)
    keys = chosen_metrics(args.metrics, len(runs))
    try:
        check_options(args, keys)
        for run in runs if args.metrics is not None else []:
            check_metrics(run, keys)
        changes = [
            change(run, list(REWARDS) if args.metrics is None else keys, args.window)
            for run in runs
        ]
    except (ValueError, PlotError) as error:
        parser.error(" ".join(str(error).split()))
    print(f"Means over the first and the last {args.window} steps:")
    print("\n".join(changes))
    options = {"window": args.window, "axis": args.axis, "ancestor": args.ancestor}
    drawn = pictures(runs, keys, args.out, **options)
    written = [path for path, write in drawn.items() if write_file(path, write)]
    for path in written:
        print(path)
    if len(written) < len(drawn):
        sys.exit(2)


if __name__ == "__main__":
    main()
