"""Held-out evaluation: scores a model's answers to examples that training never sees.

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
from engine.fastpath import prepare_gpu
from engine.loading import check_compatible, load
from engine.model_files import ModelError
from engine.parallel import check_single_process, process_count, process_index
from engine.passes import is_out_of_memory
from engine.prompts import encode_prompts
from engine.sampling import Sampler, completion_texts, make_generator, stop_ids
from engine.sizes import resolve_placement
from harness import metrics
from harness.checkpoint import CheckpointError, checkpoints_of, steps_of
from harness.runlog import RunError, read_description
from harness.terminal import check_folder, ignore_output_errors, write_file
from rewards import CORRECTNESS, REASONING_TAGS, SYSTEM_MESSAGE, Reward, make_prompt, score
from shapes import KINDS, Figure, Shape, ShapeSpec, check_image_size, make_example

PASS_AT = (1, 4, 16, 64)  # numbers of samples in which a right one is looked for
Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
SIZE_THIRDS = ("small", "medium", "large")  # thirds of the examples, by true area
COLUMNS = {  # table heading -> key in `summarize`
    "area": "area_correctness_reward",
    "decimals": "area_format_reward",
    "xml": "xml_format_reward",
    "mean err": "relative_error_mean",
    "median": "relative_error_median",
}
RATE_COLUMNS = {"dec. %": "two_decimals", "xml %": "strict_xml"}
WORDS = {  # of the table about the reasoning: heading -> key, judged only where words allow it
    "class named": "shape_named",
    "answer follows": "answer_follows",
    "arithmetic right": "arithmetic_right",
}
SHARE_COLUMNS = {"within 5 %": "within_5_percent", "within 10 %": "within_10_percent"}


@dataclass(frozen=True, slots=True)
class Answer:
    """The shape of one held-out example, its area, the model's answer and its reward."""

    shape: Shape
    area: float
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
    samples: int = 1,
) -> Iterator[Answer]:
    """Yield the model's answers to the first `examples` of the "eval" split; greedy by default.

    Each example has `samples` answers, one after the other. With several processes, each answers
    every n-th batch and yields only its own answers.
    """
    prompt, model = make_prompt(reasoning_tag), sampler.model
    first, stride = process_index() * batch_size, process_count() * batch_size
    for start in range(first, examples, stride):
        batch = [  # always full, so that the sampler keeps its buffers; extra answers are dropped
            make_example(spec, seed=seed, split="eval", index=i, image_size=image_size)
            for i in range(start, start + batch_size)
        ]
        images = [example.image for example in batch]
        completions = sampler.generate(
            encode_prompts(processor, images, system=SYSTEM_MESSAGE, prompt=prompt).to(
                model.device
            ),
            group_size=samples,
            temperature=temperature,
            generator=make_generator(model.device, seed, start),
        )
        texts = completion_texts(processor, completions, stop_ids(model))
        options = {"reasoning_tag": reasoning_tag, "correctness": correctness}
        for row, text in enumerate(texts[: (examples - start) * samples]):
            example = batch[row // samples]
            reward = score(text, example.area, kind=example.shape.kind, **options)
            yield Answer(example.shape, example.area, text, reward)


# --- numbers ----------------------------------------------------------------------------


def summarize(answers: list[Answer]) -> dict[str, float]:
    """Return the answers' means, medians and shares; shares have 95 % Wilson intervals."""
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
        **share_of_judged("shape_named", [r.shape_named for r in rewards]),
        **share_of_judged("answer_follows", [r.answer_follows for r in rewards]),
        **share_of_judged("arithmetic_right", [r.arithmetic_right for r in rewards]),
    }


def share(name: str, hits: list[bool]) -> dict[str, float]:
    """Return the share of hits and its interval as `name`, `name_low`, `name_high`."""
    low, high = wilson_interval(sum(hits), len(hits))
    return {name: sum(hits) / len(hits), f"{name}_low": low, f"{name}_high": high}


def share_of_judged(name: str, hits: list[bool | None]) -> dict[str, float | None]:
    """Return the share of hits among those that are not None, with its interval.

    Also the share that is not None, as `name_judged`; the others are None if all are.
    """
    judged = [hit for hit in hits if hit is not None]
    low, high = wilson_interval(sum(judged), len(judged)) if judged else (None, None)
    return {**metrics.share_of_judged(name, hits), f"{name}_low": low, f"{name}_high": high}


def wilson_interval(hits: int, trials: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share (Wilson 1927, no continuity correction).

    >>> low, high = wilson_interval(8, 10)
    >>> round(low, 4), round(high, 4)
    (0.4902, 0.9433)
    """
    p, z2 = hits / trials, Z_95**2
    center = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)) * Z_95 / (1 + z2 / trials)
    return max(0.0, center - half), min(1.0, center + half)


def pass_at_k(samples: int, hits: int, k: int) -> float:
    """Return the chance that k of so many samples, of which `hits` are right, hold a right one.

    Unbiased: 1 - C(samples - hits, k) / C(samples, k) (Chen et al. 2021, arXiv:2107.03374).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1 - math.comb(samples - hits, k) / math.comb(samples, k)


def passes(answers: list[Answer], samples: int) -> dict[int, tuple[float, float]]:
    """Return pass@k for "within 5 %", by k: the mean over examples, and half its 95 % interval.

    `answers` hold so many samples of one example after the other.
    """
    groups = [answers[i : i + samples] for i in range(0, len(answers) - samples + 1, samples)]
    hits = [sum(answer.reward.relative_error <= 0.05 for answer in group) for group in groups]
    found = {}
    for k in [k for k in PASS_AT if k <= samples] if groups else []:
        values = [pass_at_k(samples, hit, k) for hit in hits]
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        found[k] = (statistics.fmean(values), Z_95 * spread / math.sqrt(len(values)))
    return found


def groups_of(answers: list[Answer]) -> dict[str, list[Answer]]:
    """Return all answers, each class, and each third by true area, without empty groups."""
    by_area = sorted(answers, key=lambda answer: answer.area)
    cuts = [len(answers) * third // 3 for third in range(4)]
    groups = {"all": answers}
    groups |= {kind: [a for a in answers if a.shape.kind == kind] for kind in KINDS}
    for name, low, high in zip(SIZE_THIRDS, cuts, cuts[1:], strict=False):
        groups[name] = by_area[low:high]
    return {name: group for name, group in groups.items() if group}


def summary_table(summaries: dict[str, dict[str, float]]) -> str:
    """Return the summaries as an aligned table: rewards and errors, then shares in percent."""
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


def words_table(summaries: dict[str, dict[str, float]]) -> str:
    """Return the checks of the reasoning as an aligned table: percent, and of how many answers."""
    lines = [f"{'':9}" + "".join(f"{heading + ' %':>27}" for heading in WORDS)]
    for name, summary in summaries.items():
        line = f"{name:9}"
        for key in WORDS.values():
            judged = round(summary[f"{key}_judged"] * summary["examples"])
            share = f"{100 * summary[key]:.1f}" if judged else "-"
            line += f"{f'{share} of {judged}':>27}"
        lines.append(line)
    return "\n".join(lines)


# --- plot -------------------------------------------------------------------------------


def plot_answers(answers: list[Answer], path: Path, *, title: str) -> None:
    """Save a plot of predicted against true area, one colour per class, to `path`."""
    figure = Figure(figsize=(6, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    limit = 1.05 * max(answer.area for answer in answers)
    axes.plot([0, limit], [0, limit], color="0.6", linewidth=1, label="exact")
    for kind in KINDS:
        read = [a for a in answers if a.shape.kind == kind and a.reward.predicted is not None]
        true = [answer.area for answer in read]
        predicted = [min(max(answer.reward.predicted, 0.0), limit) for answer in read]
        axes.scatter(true, predicted, s=14, alpha=0.7, label=f"{kind} ({len(read)})", clip_on=False)
    unread = sum(answer.reward.predicted is None for answer in answers)
    axes.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
    axes.set_title(
        f"{title}: {len(answers)} held-out examples, {unread} without a number",
        parse_math=False,  # a $ in a path is literal
        usetex=False,
    )
    axes.set_xlabel("true area, square grid units")
    axes.set_ylabel("predicted area (values outside the frame: on its edge)")
    axes.legend(loc="upper left")
    figure.savefig(path)


# --- command ----------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Return the parser. `resolve_args` fills in omitted task flags."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description="Evaluate a run's final model (or newest checkpoint), or any Qwen2.5-VL model, "
        "on held-out examples. "
        "Task flags default to the run's own values, also for a model inside a run folder.",
    )
    parser.add_argument("target", metavar="RUN_OR_MODEL", help="run folder, model folder or hub id")
    number, count = {"type": float, "metavar": "X"}, {"type": int, "metavar": "N"}
    add_task_flags(parser)
    parser.add_argument("--max-new-tokens", **count, help="token limit of an answer")
    parser.add_argument("--examples", **count, default=256, help="held-out examples; default: 256")
    parser.add_argument("--batch-size", **count, default=32, help="answers per batch; default: 32")
    parser.add_argument(
        "--temperature", **number, default=0.0, help="sampling temperature; default: 0, greedy"
    )
    parser.add_argument(
        "--samples",
        **count,
        default=1,
        help="answers per example, sampled: prints pass@k (needs --temperature); default: 1",
    )
    parser.add_argument("--show", **count, default=3, help="answers to print; default: 3")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write all numbers and answers here"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="plot file; default: evaluation.png in the run folder, else in the current folder",
    )
    return parser


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that set the task; omitted ones are None."""
    number, count = {"type": float, "metavar": "X"}, {"type": int, "metavar": "N"}
    parser.add_argument("--min-size", **number, help="smallest dimension in grid units")
    parser.add_argument("--max-size", **number, help="largest dimension in grid units")
    parser.add_argument("--rotate", action=argparse.BooleanOptionalAction, help="rotate the shapes")
    parser.add_argument(
        "--max-rotation", **number, help="largest rotation to either side in degrees"
    )
    parser.add_argument(
        "--image-size", **count, help="side of the image in pixels, a multiple of 28"
    )
    parser.add_argument(
        "--reasoning-tag",
        choices=REASONING_TAGS,
        help="tag that the prompt asks for and the reward checks",
    )
    parser.add_argument(
        "--correctness", choices=CORRECTNESS, help="shape of the area reward, as in training"
    )
    parser.add_argument("--seed", **count, help="random seed of examples and sampling")


DEFAULTS = {  # for a model outside a run
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
    """The weights to evaluate, their run (None without one) and the steps they were trained."""

    weights: str
    run: Path | None
    steps_done: int | None

    def __str__(self) -> str:
        steps = "" if self.steps_done is None else f", after {self.steps_done} steps"
        task = f"the task of {self.run}" if self.run else "no run: the flags set the task"
        return f"{self.weights}{steps}; {task}"


def find_target(target: str) -> Target:
    """Return the target that RUN_OR_MODEL names: for a run, the weights with the most steps.

    A model inside a run folder (final/, a checkpoint) belongs to that run. Raises `ValueError` for
    a run without weights, `CheckpointError` for a damaged one.
    """
    run, folder = Path(target), Path(target).resolve()
    if not (run / "metrics.jsonl").is_file():
        around = folder.parents[:3] if folder.is_dir() else ()  # for final/, a checkpoint
        run = next((path for path in around if (path / "metrics.jsonl").is_file()), None)
        return Target(target, run, steps_of(folder) if run else None)
    saved = [path for path in (*checkpoints_of(run), run / "final") if path.is_dir()]
    if not saved:
        raise ValueError(f"{run}: this run has neither final/ nor a checkpoint yet")
    # an older version's final/ has no step count: any checkpoint is at least as new
    newest = max(saved, key=lambda path: (steps_of(path) or 0, path.name == "final"))
    return Target(str(newest), run, steps_of(newest))


def resolve_args(args: argparse.Namespace, run: Path | None) -> None:
    """Fill in omitted flags, in place, from the run or else the defaults, and check all values.

    Raises `ValueError` for values out of range, and `RunError` for a damaged config.json.
    """
    settings = DEFAULTS | (run_settings(run) if run else {})
    max_rotation_given = args.max_rotation is not None
    for name in DEFAULTS:
        if getattr(args, name) is None:
            setattr(args, name, settings[name])
    if max_rotation_given and not args.rotate:
        raise ValueError("--max-rotation: has no effect without --rotate")
    limits = {"examples": 1, "batch_size": 1, "max_new_tokens": 1, "samples": 1}
    limits |= {"seed": 0, "show": 0}
    for name, least in limits.items():
        check_number(f"--{name.replace('_', '-')}", getattr(args, name), least=least)
    if args.temperature:  # 0 is greedy
        check_number("--temperature", args.temperature, least=0.01, most=100)
    elif args.samples > 1:
        raise ValueError(f"--samples {args.samples}: greedy answers are all equal; --temperature 1")
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
    """Return a run's own values of `DEFAULTS`. Raises `ValueError` or `RunError`."""
    config = read_description(folder)["config"]
    settings = {name: config[name] for name in DEFAULTS if name in config}
    for name, value in settings.items():
        if type(value) is not type(DEFAULTS[name]):
            raise ValueError(f"{folder / 'config.json'}: {name} cannot be {value!r}")
    return settings


def collect_answers(answers: Iterator[Answer], count: int) -> tuple[list[Answer], str | None]:
    """Return the answers made, and the reason if Ctrl-C or a lack of memory ended them early."""
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
        return done, "out of GPU memory (try a smaller --batch-size or --max-new-tokens)"
    return done, None


def write_results(
    answers: list[Answer], spec: ShapeSpec, target: Target, args: argparse.Namespace
) -> bool:
    """Print some answers and the table; write the plot and, with --json, all numbers.

    If one file cannot be written, the other still is. Return whether all files were written.
    """
    firsts = answers[:: args.samples]  # one of each example: the intervals need independent ones
    summaries = {name: summarize(group) for name, group in groups_of(firsts).items()}
    found = passes(answers, args.samples) if args.samples > 1 else {}
    writers = {args.plot: partial(plot_answers, firsts, title=args.target)}
    if args.json:
        numbers = {
            **dataclasses.asdict(target),
            "arguments": vars(args),
            "summaries": summaries,
            "pass_at_k": found,
            "answers": [dataclasses.asdict(answer) for answer in answers],
        }
        writers = {args.json: partial(write_json, numbers), **writers}
    for answer in firsts[: args.show]:
        print(f"{answer.shape.kind}, area {answer.area:.2f}: {answer.text!r}")
    print(target)
    print(f"{spec}, {args.correctness} area reward, relative errors are capped at 1")
    print(summary_table(summaries))
    print(words_table(summaries))
    for k, (mean, half) in found.items():
        print(f"within 5 % in {k} of {args.samples} samples: {100 * mean:.1f} ± {100 * half:.1f} %")
    written = [path for path, write in writers.items() if write_file(path, write)]
    for path in written:
        print(f"written: {path}")
    return len(written) == len(writers)


def write_json(numbers: dict, path: Path) -> None:
    """Write the numbers to a JSON file."""
    path.write_text(json.dumps(numbers, indent=2, default=str) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Evaluate the run or model on the command line, and report the results."""
    ignore_output_errors()
    prepare_gpu()
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        check_single_process()
        target = find_target(args.target)
        resolve_args(args, target.run)
        rotation = args.max_rotation if args.rotate else 0.0
        spec = ShapeSpec(args.min_size, args.max_size, rotation)
        check_compatible(target.weights, image_size=args.image_size)
        runs_here = {"device": args.device, "command_that_runs": "python evaluate.py tiny"}
        device, dtype = resolve_placement(target.weights, **runs_here)
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
            batch_size=max(1, min(args.batch_size // args.samples, args.examples)),
            temperature=args.temperature,
            samples=args.samples,
        ),
        args.examples * args.samples,
    )
    if cut_short:
        print(f"{cut_short} after {len(answers)} of {args.examples} answers", file=sys.stderr)
    is_whole = write_results(answers, spec, target, args) if answers else True
    if cut_short or not is_whole:
        sys.exit(130 if cut_short == "stopped" else 2)


if __name__ == "__main__":
    main()
