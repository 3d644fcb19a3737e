"""Supervised warm-up: teach a model to read plots and to answer in the task's format before GRPO.

    python cold_start.py --from-scratch --out tiny         # makes the bundled tiny model
    python cold_start.py --from-scratch --size small --workers 12 --batch-size 64 \\
        --out small                                        # 164 million parameters, on a GPU
    python cold_start.py --model MODEL --out DIR           # starts from any Qwen2.5-VL

A model from scratch goes through four stages:

    calculate   text alone: the language model learns what the taught calculations give
    see         pictures alone: dense supervision of every visual token, for the vision tower
    speak       supervised fine-tuning on perfect answers: write down what is seen, calculate with
                that, and answer
    stumble     the same, gently, on answers that are flawed in format, formula or reading: as with
                an instruct model, GRPO still has something to teach

Whatever is taught, an answer follows from its own words. Every second plot is turned. The first
three stages have targets on held-out examples, and one to three rounds to meet them, each with a
warm-up and a cosine decay of its own. Every round says what it reached and leaves its weights in
DIR, where the same command continues if it is stopped. A model that exists gets one round of
perfect answers.
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path

import torch

from config import check_number
from engine.fastpath import prepare_gpu
from engine.loading import Loaded, check_compatible, load, non_finite_parameters, save_policy
from engine.model_files import ModelError
from engine.parallel import check_single_process
from engine.prompts import check_no_resize
from engine.sizes import resolve_placement, shape_config, trained_count
from harness.terminal import ignore_output_errors
from shapes import ShapeSpec, check_image_size
from warmup.lessons import Lessons
from warmup.models import SIZES, new_model
from warmup.stages import calculate, judge, see, speak, stumble
from warmup.state import STATE, Rounds, read_state, write_state

STEPS = {  # of a round, by stage: of a new model, and of one that exists
    "calculate": (1500, 0),
    "see": (3000, 0),
    "speak": (1500, 500),
    "stumble": (400, 0),
}
ROUNDS = 3  # of a stage of a new model, at most, until it meets its target
FLAWS = {"sloppy": 0.45, "mistakes": 0.4, "misread": 0.15}


def main(arguments: list[str] | None = None) -> None:
    """Warm up a model and save it to a new folder."""
    ignore_output_errors()
    prepare_gpu()
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        check_single_process()
        check_arguments(args)
        fill_in_defaults(args)
        loaded = starting_model(args)
        rounds = read_state(args, loaded.policy)
        args.out.mkdir(parents=True, exist_ok=True)  # fails before the training, if at all
    except (ValueError, OSError, ModelError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        warm_up(loaded, args, rounds)
        save(loaded, args.out)
        print(f"{args.out}: saved; load it with from_pretrained", flush=True)
        if args.model:  # a new model has been judged after each round
            judge(loaded.policy, Lessons(loaded.processor, args), "saved")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"{args.out}: not saved: {error}")
    finally:
        with suppress(OSError):  # remove the folder if nothing was saved to it
            args.out.rmdir()


def warm_up(loaded: Loaded, args: argparse.Namespace, rounds: Rounds) -> None:
    """Take the model through its stages, from where it is after these rounds."""
    model, lessons = loaded.policy, Lessons(loaded.processor, args)
    if rounds:
        print(f"{args.out}: continues after: {', '.join(name for name, _ in rounds)}", flush=True)
    for stage in (calculate, see, speak, stumble):
        name = stage.__name__
        while steps_of(name, args) and not is_finished(name, rounds, args):
            lessons.rounds = len(rounds)
            lessons.plots = args.batch_size * sum(steps_of(each, args) for each, _ in rounds)
            rounds.append((name, stage(model, lessons)))
            if wrong := non_finite_parameters(model):
                hint = "; a lower --lr usually helps" if name in ("speak", "stumble") else ""
                sys.exit(f"{args.out}: {name} not saved: {wrong[0]} is not finite{hint}")
            if args.from_scratch:
                write_state(args, rounds, model)


def steps_of(stage: str, args: argparse.Namespace) -> int:
    """Return the steps of a round of a stage."""
    return getattr(args, f"{stage}_steps")


def is_finished(stage: str, rounds: Rounds, args: argparse.Namespace) -> bool:
    """Return whether a stage has met its target, or had all its rounds."""
    met = [met for name, met in rounds if name == stage]
    return any(met) or len(met) >= (ROUNDS if args.from_scratch else 1)


def save(loaded: Loaded, folder: Path) -> None:
    """Save model and processor in Hugging Face format, with the weights rounded to bf16."""
    for parameter in loaded.policy.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    loaded.policy.config.dtype = "bfloat16"
    save_policy(loaded, folder)
    (folder / STATE).unlink(missing_ok=True)


def make_parser() -> argparse.ArgumentParser:
    """Return the command-line parser. `fill_in_defaults` fills in what is omitted."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description="Supervised warm-up of a model, before GRPO.",
    )
    number, count = {"type": float, "metavar": "X"}, {"type": int, "metavar": "N"}
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--from-scratch", action="store_true", help="make a new model")
    start.add_argument("--model", metavar="MODEL", help="folder or hub id to start from")
    parser.add_argument("--size", choices=SIZES, help="of a new model; default: tiny")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    taught = {
        "calculate": "with calculations, in text alone",
        "see": "with plots, for the vision tower alone",
        "speak": "with perfect answers to plots",
        "stumble": "with flawed answers, at a fifth of --lr",
    }
    for stage, (new, old) in STEPS.items():
        text = f"steps {taught[stage]}; default: {new} from scratch, {old} from a model"
        parser.add_argument(f"--{stage}-steps", **count, help=text)
    parser.add_argument("--batch-size", **count, default=32, help="plots per step; default: 32")
    rates = "learning rate of the answers; default: 1e-3 from scratch, 1e-5 from a model"
    parser.add_argument("--lr", **number, help=rates)
    flaws = {
        "sloppy": "answers with a flawed format",
        "mistakes": "answers with a wrong formula",
        "misread": "dimensions that are misread",
    }
    for name, what in flaws.items():
        text = f"share of {what}, with --stumble-steps; default: {FLAWS[name]}"
        parser.add_argument(f"--{name}", **number, help=text)
    parser.add_argument("--min-size", **number, default=5.0, help="grid units; default: 5")
    parser.add_argument("--max-size", **number, default=35.0, help="grid units; default: 35")
    parser.add_argument("--max-rotation", **number, default=45.0, help="degrees; default: 45")
    parser.add_argument("--image-size", **count, default=224, help="pixels; default: 224")
    drawn = "processes that prepare batches in advance; default: 0"
    parser.add_argument("--workers", **count, default=0, help=drawn)
    parser.add_argument("--seed", **count, default=0, help="of weights and examples; default: 0")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run"
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError`, with a one-line message, if an option's value is not accepted."""
    check_image_size(args.image_size)
    ShapeSpec(args.min_size, args.max_size, args.max_rotation)
    check_number("--batch-size", args.batch_size, least=1)
    check_number("--seed", args.seed, least=0)
    check_number("--workers", args.workers, least=0, most=256)
    if args.lr is not None:
        check_number("--lr", args.lr, above=0, most=1)
    for stage in STEPS:
        if steps_of(stage, args) is not None:
            check_number(f"--{stage}-steps", steps_of(stage, args), least=0)
    if args.model and args.size:
        raise ValueError(f"--size {args.size}: only with --from-scratch")
    for stage in ("calculate", "see"):
        if args.model and steps_of(stage, args):
            steps = steps_of(stage, args)
            raise ValueError(f"--{stage}-steps {steps}: only with --from-scratch")
    stumbles = args.from_scratch if args.stumble_steps is None else args.stumble_steps > 0
    for name in FLAWS:
        if (share := getattr(args, name)) is not None:
            check_number(f"--{name}", share, least=0, most=1)
            if not stumbles:
                raise ValueError(f"--{name} {share:g}: only with --stumble-steps above 0")


def fill_in_defaults(args: argparse.Namespace) -> None:
    """Fill in what depends on other options. Raises `ValueError` if nothing would be taught."""
    for stage, steps in STEPS.items():
        if steps_of(stage, args) is None:
            setattr(args, f"{stage}_steps", steps[0 if args.from_scratch else 1])
    if not any(steps_of(stage, args) for stage in STEPS):
        raise ValueError("--speak-steps 0: at least one stage must have steps")
    if args.lr is None:
        args.lr = 1e-3 if args.from_scratch else 1e-5
    args.size = args.size or "tiny"
    for name, share in FLAWS.items():
        if getattr(args, name) is None:
            setattr(args, name, share)


def starting_model(args: argparse.Namespace) -> Loaded:
    """Return the model to train, on its device: a new one, or that of `--model`."""
    found_gpu = torch.cuda.is_available()
    if args.from_scratch:
        if args.device == "cuda" and not found_gpu:
            raise ValueError("--device cuda: no CUDA GPU was found")
        loaded = new_model(args.seed, args.size)
        check_no_resize(loaded.processor.image_processor, args.image_size)
        loaded.policy.to("cuda" if found_gpu and args.device != "cpu" else "cpu")
        return loaded
    check_compatible(args.model, image_size=args.image_size)
    device, dtype = resolve_placement(
        args.model,
        device=args.device,
        trained=trained_count(shape_config(args.model)),
        command_that_runs="python cold_start.py --from-scratch --out DIR",
    )
    return load(args.model, device=device, dtype=dtype)


if __name__ == "__main__":
    main()
