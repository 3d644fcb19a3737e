"""Figures of one run, or of several side by side. Reads run folders and nothing else.

python plot_rewards.py RUN            # three figures, in the run folder
python plot_rewards.py RUN RUN ...    # one figure of the area reward, in the current folder

Runs named alike but for a "-seed0", "-seed1", ... at the end are drawn as one curve: their mean,
and a band from the lowest to the highest.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

REWARDS = {  # key in metrics.jsonl: title and range of the reward
    "area_correctness_reward": ("Area correctness", (-3.0, 3.0)),
    "area_format_reward": ("Area format (two decimals)", (0.0, 0.5)),
    "xml_format_reward": ("XML format", (0.0, 0.5)),
}
AXES = {"prompts": "prompts seen", "steps": "steps"}
SEED = re.compile(r"-seed[0-9]+$")  # at the end of a run's name


class RunError(Exception):
    """A run that cannot be drawn. The message is one line for the user."""


# --- reading ------------------------------------------------------------------------------


def read_metrics(run: Path) -> list[dict]:
    """Return the steps of a run, in order. Raises `RunError`.

    A last line without its end is one that is being written, or was when the run died: it is left
    out. Any other line that cannot be read is an error.
    """
    path = run / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    steps = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            step = json.loads(line)
            steps.append({"step": int(step["step"]), "prompts": int(step["prompts"]), **step})
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise RunError(f"{path}: line {number} is not a step of a run") from error
    if not steps:
        raise RunError(f"{path}: no step has been logged yet")
    return steps


def curve(steps: list[dict], key: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Return where and what to draw, (steps,) each; a value that is missing becomes nan."""
    x = [step["prompts"] if axis == "prompts" else step["step"] + 1 for step in steps]
    y = [step.get(key) for step in steps]
    known = [value if isinstance(value, int | float) else np.nan for value in y]
    return np.array(x), np.array(known, dtype=float)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of each value and up to `window - 1` before it, skipping nan.

    >>> moving_average(np.array([1.0, 3.0, 5.0, 7.0]), window=2)
    array([1., 2., 4., 6.])
    """
    known = ~np.isnan(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known)
    sums[window:] -= sums[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def seeds_of(runs: list[Path]) -> dict[str, list[Path]]:
    """Return the runs by label: those named alike but for "-seed0" and the like are together.

    >>> list(seeds_of([Path("runs/wide-seed0"), Path("runs/base"), Path("runs/wide-seed1")]))
    ['wide, 2 seeds', 'base']
    """
    groups: dict[Path, list[Path]] = {}
    for run in runs:
        groups.setdefault(run.with_name(SEED.sub("", run.name)), []).append(run)
    return {
        f"{path.name}, {len(group)} seeds" if len(group) > 1 else group[0].name: group
        for path, group in groups.items()
    }


def averages(
    runs: list[Path], key: str, *, window: int, axis: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return where to draw, (steps,), and the runs' moving averages, (runs, steps).

    Runs of different lengths are compared as far as the shortest goes.
    """
    curves = [curve(read_metrics(run), key, axis) for run in runs]
    steps = min(len(x) for x, _ in curves)
    return curves[0][0][:steps], np.stack([moving_average(y[:steps], window) for _, y in curves])


def change(run: Path, window: int) -> str:
    """Return one line: each reward's mean over the first and over the last `window` steps."""
    steps = read_metrics(run)
    parts = []
    for key in REWARDS:
        _, values = curve(steps, key, "steps")
        first, last = moving_average(values, window)[[min(window, len(values)) - 1, -1]]
        parts.append(f"{key} {first:.2f} -> {last:.2f}")
    return f"{run}: " + ", ".join(parts)


# --- drawing ------------------------------------------------------------------------------


def new_axes(title: str, ylabel: str, xlabel: str, limits: tuple[float, float]):
    """Return a figure and its axes; the whole range of the reward is shown, with some air."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    air = 0.03 * (limits[1] - limits[0])
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(limits[0] - air, limits[1] + air))
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_run(run: Path, out: Path, *, window: int, axis: str) -> list[Path]:
    """Write the three reward figures of one run and return their paths."""
    steps = read_metrics(run)
    paths = []
    for key, (title, limits) in REWARDS.items():
        figure, axes = new_axes(f"{title}: {run.name}", "mean reward", AXES[axis], limits)
        x, y = curve(steps, key, axis)
        axes.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
        label = f"moving average over {window} steps"
        axes.plot(x, moving_average(y, window), color="tab:blue", linewidth=2, label=label)
        axes.legend(loc="lower right", frameon=False)
        paths.append(out / f"{key}.png")
        figure.savefig(paths[-1])
    return paths


def draw_variations(runs: list[Path], out: Path, *, window: int, axis: str) -> list[Path]:
    """Write the area reward's moving averages of several runs in one figure; return its path."""
    key = "area_correctness_reward"
    title, limits = REWARDS[key]
    figure, axes = new_axes(title, f"moving average over {window} steps", AXES[axis], limits)
    draw_seeds(axes, runs, key, window=window, axis=axis)
    axes.legend(loc="lower right", frameon=False)
    path = out / f"{key}_variations.png"
    figure.savefig(path)
    return [path]


def draw_seeds(axes, runs: list[Path], key: str, *, window: int, axis: str) -> None:
    """Draw a curve for each run, or for the mean of its seeds, with a band of their range."""
    for label, group in seeds_of(runs).items():
        x, y = averages(group, key, window=window, axis=axis)
        (line,) = axes.plot(x, y.mean(0), linewidth=2, label=label)
        if len(group) > 1:
            axes.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.2, linewidth=0)


# --- command ------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Draw the runs named on the command line."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the figures")
    parser.add_argument(
        "--window", type=int, default=20, metavar="N", help="steps averaged; default: 20"
    )
    parser.add_argument("--axis", choices=AXES, default="prompts", help="default: prompts")
    args = parser.parse_args(arguments)
    if args.window < 1:
        parser.error(f"--window {args.window}: must be at least 1")
    try:
        if len(args.runs) == 1:
            (run,) = args.runs
            paths = draw_run(run, args.out or run, window=args.window, axis=args.axis)
        else:
            out = args.out or Path()
            paths = draw_variations(args.runs, out, window=args.window, axis=args.axis)
        changes = [change(run, args.window) for run in args.runs]
    except RunError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--out: {error}")
    print("\n".join(map(str, paths)))
    print(f"Means over the first and the last {args.window} steps:")
    print("\n".join(changes))


if __name__ == "__main__":
    main()
