"""Seconds of a training step of the tiny model on a CPU: this trainer beside two peers.

    pip install -r benchmarks/requirements.txt
    python benchmarks/step.py                      # about 6 minutes on 2 cores, best run alone
    python benchmarks/step.py --trainers own       # only this trainer

Every trainer runs in a process of its own, one after the other, in rounds; its number is the median
over all steps but each round's first. Checkpoint, plots, group size, lengths, rewards and loss are
the same: those of `main.py --preset tiny`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from peers import Task

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main as trainer  # noqa: E402
from grpo import Passes  # noqa: E402
from policy import load  # noqa: E402

TRAINERS = {
    "own": "this trainer",
    "naive": "stock transformers, repeated images",
    "trl": "TRL's GRPOTrainer",
}
PHASES = ("prompts_s", "rollout_s", "reference_s", "update_s")


def own_steps(task: Task, steps: int, *, fixed_length: bool = False) -> Iterator[dict]:
    """Yield what each step of this trainer took: main.train without its log and evaluations.

    With `fixed_length` no token ends a completion.
    """
    flags = ["--preset", "tiny", "--device", "cpu", "--dtype", "float32", "--steps", str(steps)]
    for name in ("model", "group_size", "max_new_tokens", "image_size", "beta", "lr", "seed"):
        flags += ["--" + name.replace("_", "-"), str(getattr(task, name))]
    flags += ["--prompts-per-step", str(task.prompts), "--micro-batch", str(task.prompts)]
    config = trainer.make_config(trainer.make_parser().parse_args(flags))
    loaded = load(config.model, device="cpu", dtype="float32", reference=config.beta > 0)
    if fixed_length:
        loaded.policy.generation_config.eos_token_id = []
    optimizer = trainer.make_optimizer(config, loaded.policy)
    sampler = trainer.make_sampler(config, loaded)
    batches = iter(trainer.make_batches(config, loaded.processor))
    passes = Passes(config.micro_batch, config.layers_to_checkpoint)
    for step in range(steps):
        _, rollout, metrics = trainer.take_step(
            config, step, batches, sampler, loaded, optimizer, passes
        )
        yield {
            "step_s": metrics["step_s"],
            "completion_tokens": sum(rollout.lengths),
            **{phase: metrics[phase] for phase in PHASES},
        }


def measure(name: str, steps: int) -> tuple[list[dict], float]:
    """Return the steps of a trainer in a fresh process, but the first, and its peak GiB of RAM."""
    file = Path(__file__) if name == "own" else ROOT / "benchmarks" / "peers.py"
    command = [sys.executable, str(file), *([] if name == "own" else [name])]
    command += ["--own-process"] if name == "own" else []
    child = subprocess.Popen(
        [*command, "--steps", str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    lines = child.stdout.read().splitlines()
    _, status, usage = os.wait4(child.pid, 0)
    if status or len(lines) != steps:
        sys.exit(f"{' '.join(command)}: failed; run it alone to see why")
    return [json.loads(line) for line in lines][1:], usage.ru_maxrss / 2**20


def report(measured: dict[str, tuple[list[dict], float]]) -> None:
    """Print one table row per trainer."""
    own = statistics.median(step["step_s"] for step in next(iter(measured.values()))[0])
    print("| trainer | s a step | ratio | prompts | rollout | reference | update "
          "| tokens a step | tokens/s | peak RAM, GiB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, (steps, peak_gib) in measured.items():
        seconds = statistics.median(step["step_s"] for step in steps)
        tokens = statistics.fmean(step["completion_tokens"] for step in steps)
        phases = [
            f"{statistics.median(step[phase] for step in steps):.2f}" if phase in steps[0] else "-"
            for phase in PHASES
        ]
        print(f"| {TRAINERS[name]} | {seconds:.2f} | {seconds / own:.1f} | {' | '.join(phases)} "
              f"| {tokens:.0f} | {tokens / seconds:.0f} | {peak_gib:.2f} |")  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure the trainers in turn and print the table."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trainers", default="own,naive,trl", help="default: own,naive,trl")
    parser.add_argument("--steps", type=int, default=9, metavar="N", help="of a round; default: 9")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--own-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.own_process:
        for step in own_steps(Task(), args.steps):
            print(json.dumps(step), flush=True)
        return
    names = args.trainers.split(",")
    if unknown := set(names) - TRAINERS.keys():
        parser.error(f"--trainers {','.join(unknown)}: must be of {', '.join(TRAINERS)}")
    if args.steps < 2 or args.rounds < 1:
        parser.error("--steps must be at least 2 and --rounds at least 1")
    measured = {name: ([], 0.0) for name in names}
    for number in range(args.rounds):
        for name in names:
            print(f"round {number + 1}: {TRAINERS[name]}", file=sys.stderr)
            steps, peak_gib = measure(name, args.steps)
            measured[name] = (measured[name][0] + steps, max(measured[name][1], peak_gib))
    task = Task()
    print(f"{task.prompts} prompts x {task.group_size} completions of at most "
          f"{task.max_new_tokens} tokens, {torch.get_num_threads()} CPU threads, "
          f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{time.strftime('%Y-%m-%d')}\n")  # fmt: skip
    report(measured)


if __name__ == "__main__":
    main()
