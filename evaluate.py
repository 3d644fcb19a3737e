"""Held-out evaluation: answers to examples that training never sees, judged and broken down.

python evaluate.py RUN_OR_MODEL
python evaluate.py runs/tiny --rotate --examples 512 --json rotated.json
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from config import check_number
from engine.batching import is_out_of_memory
from engine.fastpath import prepare_gpu
from engine.loading import check_use, load
from engine.model_files import ModelError
from engine.parallel import check_alone, process_count, process_index
from engine.prompts import encode_prompts
from engine.sampling import Sampler, completion_texts, make_generator, stop_ids
from engine.sizes import place
from harness.checkpoint import CheckpointError, checkpoints_of, steps_of
from harness.runlog import RunError, read_description
from harness.terminal import check_folder, never_fail, write_file
from rewards import CORRECTNESS, REASONING_TAGS, SYSTEM_MESSAGE, Reward, make_prompt, score
from shapes import KINDS, Figure, Shape, ShapeSpec, check_image_size, make_example

Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
SIZE_THIRDS = ("small", "medium", "large")  # thirds of the examples, by true area
COLUMNS = {  # of the table: heading and key of `summarize`
    "area": "area_correctness_reward",
    "decimals": "area_format_reward",
    "xml": "xml_format_reward",
    "mean err": "relative_error_mean",
    "median": "relative_error_median",
}
RATE_COLUMNS = {"dec. %": "two_decimals", "xml %": "strict_xml"}
SHARE_COLUMNS = {"within 5 %": "within_5_percent", "within 10 %": "within_10_percent"}


@dataclass(frozen=True, slots=True)
class Answer:
    """One held-out example with the model's answer."""

    shape: Shape
    text: str
    reward: Reward


# --- answers ----------------------------------------------------------------------------


def evaluate(
    sampler: Sampler,
    processor,
    spec: ShapeSpec,
    *,
    examples: int,
    seed: int,
    image_size: int,
    reasoning_tag: str,
    correctness: str,
    batch_size: int,
    temperature: float = 0.0,
) -> Iterator[Answer]:
    """Yield the model's answers to the first `examples` of the "eval" split; greedy by default.

    Of several processes each answers every n-th batch, and yields nothing of the others'.
    """
    prompt, model = make_prompt(reasoning_tag), sampler.model
    first, stride = process_index() * batch_size, process_count() * batch_size
    for start in range(first, examples, stride):
        batch = [  # a full one: the sampler keeps its buffers, and what is too much is not judged
            make_example(spec, seed=seed, split="eval", index=i, image_size=image_size)
            for i in range(start, start + batch_size)
        ]
        images = [example.image for example in batch]
        completions = sampler.generate(
            encode_prompts(processor, images, system=SYSTEM_MESSAGE, prompt=prompt).to(
                model.device
            ),
            group_size=1,
            temperature=temperature,
            generator=make_generator(model.device, seed, start),
        )
        texts = completion_texts(processor, completions, stop_ids(model))
        for example, text in zip(batch[: examples - start], texts, strict=False):
            reward = score(text, example.area, reasoning_tag=reasoning_tag, correctness=correctness)
            yield Answer(example.shape, text, reward)


# --- numbers ----------------------------------------------------------------------------


def summarize(answers: list[Answer]) -> dict[str, float]:
    """Return means, medians and shares of some answers; shares come with 95 % Wilson intervals."""
    rewards = [answer.reward for answer in answers]
    errors = [reward.relative_error for reward in rewards]
    return {
        "examples": len(answers),
        "area_correctness_reward": statistics.fmean(r.area_correctness for r in rewards),
        "area_format_reward": statistics.fmean(r.area_format for r in rewards),
        "xml_format_reward": statistics.fmean(r.xml_format for r in rewards),
        "relative_error_mean": statistics.fmean(errors),
        "relative_error_median": statistics.median(errors),
        **share("within_5_percent", [error <= 0.05 for error in errors]),
        **share("within_10_percent", [error <= 0.10 for error in errors]),
        **share("two_decimals", [r.area_format > 0 for r in rewards]),
        **share("strict_xml", [r.xml_format > 0 for r in rewards]),
        **share("readable", [r.predicted is not None for r in rewards]),
    }


def share(name: str, hits: list[bool]) -> dict[str, float]:
    """Return the share of hits and its interval as `name`, `name_low`, `name_high`."""
    low, high = wilson_interval(sum(hits), len(hits))
    return {name: sum(hits) / len(hits), f"{name}_low": low, f"{name}_high": high}


def wilson_interval(hits: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927, without continuity correction).

    >>> low, high = wilson_interval(8, 10)
    >>> round(low, 4), round(high, 4)
    (0.4902, 0.9433)
    """
    p, z2 = hits / trials, Z_95**2
    center = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)) * Z_95 / (1 + z2 / trials)
    return max(0.0, center - half), min(1.0, center + half)


def groups_of(answers: list[Answer]) -> dict[str, list[Answer]]:
    """Return the answers as a whole, by class, and by third of the true area; no group is empty."""
    by_area = sorted(answers, key=lambda answer: answer.shape.area)
    cuts = [len(answers) * third // 3 for third in range(4)]
    groups = {"all": answers}
    groups |= {kind: [a for a in answers if a.shape.kind == kind] for kind in KINDS}
    for name, low, high in zip(SIZE_THIRDS, cuts, cuts[1:], strict=False):
        groups[name] = by_area[low:high]
    return {name: group for name, group in groups.items() if group}


def summary_table(summaries: dict[str, dict[str, float]]) -> str:
    """Return the summaries as aligned lines: rewards and errors, then shares in percent."""
    lines = [
        f"{'':9}{'n':>5}"
        + "".join(f"{heading:>9}" for heading in COLUMNS)
        + "".join(f"{heading:>8}" for heading in RATE_COLUMNS)
        + "".join(f"{heading + ' (95 %)':>21}" for heading in SHARE_COLUMNS)
    ]
    for name, summary in summaries.items():
        line = f"{name:9}{summary['examples']:>5}"
        line += "".join(f"{summary[key]:>9.3f}" for key in COLUMNS.values())
        line += "".join(f"{100 * summary[key]:>8.1f}" for key in RATE_COLUMNS.values())
        for key in SHARE_COLUMNS.values():
            value, low, high = (100 * summary[key + end] for end in ("", "_low", "_high"))
            line += f"{value:>8.1f} ({low:4.1f}-{high:5.1f})"
        lines.append(line)
    return "\n".join(lines)


# --- picture ----------------------------------------------------------------------------


def plot_answers(answers: list[Answer], path: Path, *, title: str) -> None:
    """Write a picture: predicted against true area, one colour per class."""
    figure = Figure(figsize=(6, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    limit = 1.05 * max(answer.shape.area for answer in answers)
    axes.plot([0, limit], [0, limit], color="0.6", linewidth=1, label="exact")
    for kind in KINDS:
        read = [a for a in answers if a.shape.kind == kind and a.reward.predicted is not None]
        true = [answer.shape.area for answer in read]
        predicted = [min(max(answer.reward.predicted, 0.0), limit) for answer in read]
        axes.scatter(true, predicted, s=14, alpha=0.7, label=f"{kind} ({len(read)})", clip_on=False)
    unread = sum(answer.reward.predicted is None for answer in answers)
    axes.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
    axes.set_title(
        f"{title}: {len(answers)} held-out examples, {unread} without a number",
        parse_math=False,  # a $ in a path is a dollar
        usetex=False,
    )
    axes.set_xlabel("true area, square grid units")
    axes.set_ylabel("predicted area (beyond the frame: drawn on its edge)")
    axes.legend(loc="upper left")
    figure.savefig(path)


# --- command ----------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Return the command line. Task flags left out are those of the run, or the defaults."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description="Evaluate a run's final model (or newest checkpoint), or any Qwen2.5-VL, on "
        "held-out examples. "
        "Task flags that are left out are the run's own, also for a model in a run folder.",
    )
    parser.add_argument("target", metavar="RUN_OR_MODEL", help="run folder, model folder or hub id")
    number = {"type": float, "metavar": "X"}
    count = {"type": int, "metavar": "N"}
    parser.add_argument("--min-size", **number, help="smallest dimension, grid units")
    parser.add_argument("--max-size", **number, help="largest dimension, grid units")
    parser.add_argument("--rotate", action=argparse.BooleanOptionalAction, help="turn the shapes")
    parser.add_argument("--max-rotation", **number, help="largest turn to either side, degrees")
    parser.add_argument("--image-size", **count, help="pixels, a multiple of 28")
    parser.add_argument(
        "--reasoning-tag", choices=REASONING_TAGS, help="tag asked for and rewarded"
    )
    parser.add_argument(
        "--correctness", choices=CORRECTNESS, help="shape of the area reward, as in training"
    )
    parser.add_argument("--seed", **count, help="of the examples")
    parser.add_argument("--max-new-tokens", **count, help="limit of an answer")
    parser.add_argument("--examples", **count, default=256, help="held-out examples; default: 256")
    parser.add_argument("--batch-size", **count, default=32, help="examples at once; default: 32")
    parser.add_argument("--temperature", **number, default=0.0, help="default: 0, greedy")
    parser.add_argument("--show", **count, default=3, help="answers to print; default: 3")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers here")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="default: evaluation.png in the run folder or here",
    )
    return parser


DEFAULTS = {  # for a model that comes without a run
    "min_size": 20.0,
    "max_size": 35.0,
    "rotate": False,
    "max_rotation": 45.0,
    "image_size": 224,
    "reasoning_tag": "reasoning",
    "correctness": "linear",
    "seed": 0,
    "max_new_tokens": 512,
}


@dataclass(frozen=True, slots=True)
class Target:
    """What is evaluated: weights to load, of which run (None: of none), after how many steps."""

    weights: str
    run: Path | None
    steps_done: int | None

    def __str__(self) -> str:
        steps = "" if self.steps_done is None else f", after {self.steps_done} steps"
        task = f"the task of {self.run}" if self.run else "no run: the task is that of the flags"
        return f"{self.weights}{steps}; {task}"


def find_target(target: str) -> Target:
    """Return what RUN_OR_MODEL stands for: of a run, the weights of most steps.

    A model inside a run folder (final/, a checkpoint) belongs to that run. Raises `ValueError` for
    a run without weights, `CheckpointError` for a damaged one.
    """
    run, folder = Path(target), Path(target).resolve()
    if not (run / "metrics.jsonl").is_file():
        around = folder.parents[:3] if folder.is_dir() else ()  # of RUN/final, of a checkpoint
        run = next((path for path in around if (path / "metrics.jsonl").is_file()), None)
        return Target(target, run, steps_of(folder) if run else None)
    saved = [path for path in (*checkpoints_of(run), run / "final") if path.is_dir()]
    if not saved:
        raise ValueError(f"{run}: this run has neither final/ nor a checkpoint yet")
    # an older version's final/ does not say: any checkpoint is at least as new
    newest = max(saved, key=lambda path: (steps_of(path) or 0, path.name == "final"))
    return Target(str(newest), run, steps_of(newest))


def fill_in(args: argparse.Namespace, run: Path | None) -> None:
    """Fill in the flags that were left out, in place, from a run or else the defaults.

    Raises `ValueError` for values out of range; `RunError` for a damaged config.json.
    """
    settings = DEFAULTS | (run_settings(run) if run else {})
    max_rotation_given = args.max_rotation is not None
    for name in DEFAULTS:
        if getattr(args, name) is None:
            setattr(args, name, settings[name])
    if max_rotation_given and not args.rotate:
        raise ValueError("--max-rotation: has no effect without --rotate")
    limits = {"examples": 1, "batch_size": 1, "max_new_tokens": 1, "seed": 0, "show": 0}
    for name, least in limits.items():
        check_number(f"--{name.replace('_', '-')}", getattr(args, name), least=least)
    if args.temperature:  # 0 is greedy
        check_number("--temperature", args.temperature, least=0.01, most=100)
    check_image_size(args.image_size)
    if args.plot is None:
        args.plot = (run if run and os.access(run, os.W_OK) else Path()) / "evaluation.png"
    endings = [f".{ending}" for ending in sorted(Figure().canvas.get_supported_filetypes())]
    if args.plot.suffix.lower() not in endings:
        raise ValueError(f"--plot {args.plot}: must end in one of {', '.join(endings)}")
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None and path.is_dir():
            raise ValueError(f"{flag} {path}: is a folder; must be a file")
        if path is not None:
            check_folder(f"{flag} {path}: its folder", path.parent)


def run_settings(folder: Path) -> dict:
    """Return the options of `DEFAULTS` that a run was started with. Raises `ValueError`."""
    config = read_description(folder)["config"]
    settings = {name: config[name] for name in DEFAULTS if name in config}
    for name, value in settings.items():
        if type(value) is not type(DEFAULTS[name]):
            raise ValueError(f"{folder / 'config.json'}: {name} cannot be {value!r}")
    return settings


def collect_answers(answers: Iterator[Answer], count: int) -> tuple[list[Answer], str | None]:
    """Return the answers, and what has cut them short: those that are there are not lost."""
    done = []
    try:
        for answer in tqdm(
            answers, total=count, unit="answer", desc="evaluate", leave=False, disable=None
        ):
            done.append(answer)
    except KeyboardInterrupt:
        return done, "stopped"
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return done, "out of GPU memory; less is taken with --batch-size, --max-new-tokens"
    return done, None


def write_results(
    answers: list[Answer], spec: ShapeSpec, target: Target, args: argparse.Namespace
) -> bool:
    """Write all numbers if asked, print some answers and the table, draw the picture.

    Each fails alone; return whether all files are written.
    """
    summaries = {name: summarize(group) for name, group in groups_of(answers).items()}
    writers = {args.plot: partial(plot_answers, answers, title=args.target)}
    if args.json:
        numbers = {
            **dataclasses.asdict(target),
            "arguments": vars(args),
            "summaries": summaries,
            "answers": [dataclasses.asdict(answer) for answer in answers],
        }
        writers = {args.json: partial(write_json, numbers), **writers}
    for answer in answers[: args.show]:
        print(f"{answer.shape.kind}, area {answer.shape.area:.2f}: {answer.text!r}")
    print(target)
    print(f"{spec}, {args.correctness} area reward, relative errors are capped at 1")
    print(summary_table(summaries))
    written = [path for path, write in writers.items() if write_file(path, write)]
    for path in written:
        print(f"written: {path}")
    return len(written) == len(writers)


def write_json(numbers: dict, path: Path) -> None:
    """Write numbers to a file."""
    path.write_text(json.dumps(numbers, indent=2, default=str) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Evaluate what the command line names, and report."""
    never_fail()
    prepare_gpu()
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        check_alone()
        target = find_target(args.target)
        fill_in(args, target.run)
        rotation = args.max_rotation if args.rotate else 0.0
        spec = ShapeSpec(args.min_size, args.max_size, rotation)
        check_use(target.weights, image_size=args.image_size)
        runs_here = {"device": args.device, "command_that_runs": "python evaluate.py tiny"}
        device, dtype = place(target.weights, **runs_here)
        loaded = load(target.weights, device=device, dtype=dtype)
    except (ValueError, ModelError, RunError, CheckpointError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    answers, cut_short = collect_answers(
        evaluate(
            Sampler(
                loaded.policy,
                max_new_tokens=args.max_new_tokens,
                pad_id=loaded.processor.tokenizer.pad_token_id,
            ),
            loaded.processor,
            spec,
            examples=args.examples,
            seed=args.seed,
            image_size=args.image_size,
            reasoning_tag=args.reasoning_tag,
            correctness=args.correctness,
            batch_size=min(args.batch_size, args.examples),
            temperature=args.temperature,
        ),
        args.examples,
    )
    if cut_short:
        print(f"{cut_short} after {len(answers)} of {args.examples} answers", file=sys.stderr)
    is_whole = write_results(answers, spec, target, args) if answers else True
    if cut_short or not is_whole:
        sys.exit(130 if cut_short == "stopped" else 2)


if __name__ == "__main__":
    main()
