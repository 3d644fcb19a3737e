"""What an interrupted warm-up continues from: the weights and rounds so far, in one file."""

import argparse
import sys
from pathlib import Path

import torch

STATE = "cold_start.pt"  # in the new folder until the model is complete
OPTIONS = {  # that a stage's weights depend on, besides those of the stages before it
    "calculate": (
        "seed",
        "size",
        "batch_size",
        "image_size",
        "min_size",
        "max_size",
        "max_rotation",
        "calculate_steps",
    ),
    "see": ("see_steps",),
    "speak": ("speak_steps", "lr"),
    "stumble": ("stumble_steps", "sloppy", "mistakes", "misread"),
}
Rounds = list[tuple[str, bool]]  # the stage of each, and whether it met its target


def write_state(args: argparse.Namespace, rounds: Rounds, model) -> None:
    """Write rounds and weights, atomically.

    If the disk refuses, says so and leaves the file before it: the warm-up itself can go on.
    """
    partial = args.out / f"{STATE}.partial"
    options = {name: getattr(args, name) for name in options_until("stumble")}
    try:
        torch.save({"rounds": rounds, "options": options, "weights": model.state_dict()}, partial)
        partial.replace(args.out / STATE)
    except (OSError, RuntimeError) as error:  # a RuntimeError is torch's word for a full disk
        reason = str(error).partition("\n")[0]
        print(f"{args.out / STATE}: cannot be written: {reason}", file=sys.stderr)
        partial.unlink(missing_ok=True)


def read_state(args: argparse.Namespace, model) -> Rounds:
    """Load the weights that a warm-up left in its folder, and return its rounds.

    Returns [] if the folder is empty or not there. Raises `ValueError`, and `OSError`.
    """
    path = args.out / STATE
    if not path.exists():
        if args.out.exists() and not is_empty(args.out):
            raise ValueError(f"--out {args.out}: already exists; must be a new or an empty folder")
        return []
    damaged = ValueError(f"--out {args.out}: {STATE} is damaged; delete it, or choose another DIR")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        rounds, options, weights = (state[key] for key in ("rounds", "options", "weights"))
        names = options_until(rounds[-1][0])
        made_with = {name: options[name] for name in names}
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise damaged from error
    for name, value in made_with.items():
        if value != getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} {getattr(args, name)}: the unfinished warm-up in {args.out} has {flag} "
                f"{value}; give that, or choose another DIR"
            )
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:  # of another version's model
        raise damaged from error
    return rounds


def options_until(stage: str) -> list[str]:
    """Return the names of all options that the weights depend on after a stage."""
    stages = list(OPTIONS)
    return [name for each in stages[: stages.index(stage) + 1] for name in OPTIONS[each]]


def is_empty(folder: Path) -> bool:
    """Return whether a folder holds nothing, or only what was being written."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {f"{STATE}.partial"}
