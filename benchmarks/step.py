"""Time a training step of the tiny model on a CPU: our trainer against its peers.

    pip install -r benchmarks/requirements.txt
    python benchmarks/step.py                      # on 2 cores; run it alone
    python benchmarks/step.py --trainers own       # only our trainer

On a GPU, with a checkpoint of the 7B model's shape (random_checkpoint.py writes one):

    python benchmarks/step.py --device cuda --model DIR --prompts 4 --group-size 8 --lr 1e-6 \\
        --trainers own,naive,static,trl --steps 4 --rounds 1 --max-new-tokens 250 --rows-per-pass 4

The trainers run in turn, each in a process of its own, for several rounds. Numbers are medians over
all steps but the first of each round. Checkpoint, plots, group size, lengths, rewards and loss are
the same for all: by default those of `main.py --preset tiny`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
import transformers
from peers import Task, add_flags, flags_of, peak, task_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main as trainer  # noqa: E402
from engine.fastpath import prepare_gpu  # noqa: E402
from engine.loading import load  # noqa: E402
from engine.passes import PassSize  # noqa: E402

TRAINERS = {
    "own": "this trainer",
    "naive": "stock transformers, repeated images",
    "static": "stock transformers, static cache",
    "trl": "TRL's GRPOTrainer",
}
PHASES = ("prompts_s", "rollout_s", "reference_s", "update_s")


def own_steps(task: Task, steps: int, *, fixed_length: bool = False) -> Iterator[dict]:
    """Yield the timings of our trainer's steps: main.train without its log and evaluations.

    With `fixed_length`, no token ends a completion.
    """
    dtype = "float32" if task.device == "cpu" else "bfloat16"
    flags = ["--preset", "tiny", "--dtype", dtype, "--steps", str(steps)]
    flags += ["--warmup-steps", "0", "--decay-steps", "0"]
    names = ("model", "device", "group_size", "max_new_tokens", "image_size", "beta", "lr")
    for name in (*names, "temperature", "seed"):
        flags += ["--" + name.replace("_", "-"), str(getattr(task, name))]
    flags += ["--prompts-per-step", str(task.prompts), "--micro-batch", str(task.prompts)]
    config = trainer.make_config(trainer.make_parser().parse_args(flags))
    loaded = load(config.model, device=config.device, dtype=config.dtype, reference=config.beta > 0)
    if fixed_length:
        loaded.policy.generation_config.eos_token_id = []
    optimizer = trainer.make_optimizer(config, loaded.policy)
    sampler = trainer.make_sampler(config, loaded)
    batches = iter(trainer.make_batches(config, loaded.processor))
    pass_size = PassSize(config.micro_batch, config.layers_to_checkpoint)
    for step in range(steps):
        _, rollout, metrics = trainer.take_step(
            config, step, batches, sampler, loaded, optimizer, pass_size
        )
        yield {
            "step_s": metrics["step_s"],
            "completion_tokens": sum(rollout.lengths),
            "area_reward": metrics["area_correctness_reward"],
            **{phase: metrics[phase] for phase in PHASES},
            **peak(task),
        }


def measure(name: str, task: Task, steps: int) -> tuple[list[dict], float]:
    """Run a trainer in a fresh process; return all steps but the first, and its peak memory.

    The peak, in GiB, is of GPU memory, or on a CPU of the process's RAM.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = start(name, task, steps, errors)
        lines = child.stdout.read().splitlines()
        _, status, usage = os.wait4(child.pid, 0)
        if status or len(lines) != steps:
            sys.exit(f"{' '.join(child.args)}: failed:\n{end_of(errors)}")
    found = [json.loads(line) for line in lines]
    return found[1:], found[-1].get("peak_gib", usage.ru_maxrss / 2**20)


def start(name: str, task: Task, steps: int, errors: IO[str]) -> subprocess.Popen:
    """Start a trainer; it prints a line of JSON per step, and what goes wrong into a file."""
    command = ["step.py", "--own-process"] if name == "own" else ["peers.py", name]
    command[0] = str(ROOT / "benchmarks" / command[0])
    return subprocess.Popen(
        [sys.executable, *command, "--steps", str(steps), *flags_of(task)],
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def end_of(errors: IO[str]) -> str:
    """Return the end of what a process wrote to a file, to be shown."""
    errors.seek(0)
    return errors.read()[-3000:]


def report(measured: dict[str, tuple[list[dict], float]]) -> None:
    """Print the table, one row per trainer."""
    own = statistics.median(step["step_s"] for step in next(iter(measured.values()))[0])
    print("| trainer | s a step | ratio | prompts | rollout | reference | update "
          "| tokens a step | tokens/s | peak, GiB |")  # fmt: skip
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
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="per round; default: 6")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="default: 6")
    parser.add_argument("--own-process", action="store_true", help=argparse.SUPPRESS)
    add_flags(parser)
    args = parser.parse_args(arguments)
    prepare_gpu()
    task = task_of(args)
    if args.own_process:
        for step in own_steps(task, args.steps):
            print(json.dumps(step), flush=True)
        return
    names = args.trainers.split(",")
    if unknown := set(names) - TRAINERS.keys():
        parser.error(f"--trainers {','.join(unknown)}: must be one of {', '.join(TRAINERS)}")
    if args.steps < 2 or args.rounds < 1:
        parser.error("--steps must be at least 2 and --rounds at least 1")
    measured = {name: ([], 0.0) for name in names}
    for number in range(args.rounds):
        for name in names:
            print(f"round {number + 1}: {TRAINERS[name]}", file=sys.stderr)
            steps, peak_gib = measure(name, task, args.steps)
            measured[name] = (measured[name][0] + steps, max(measured[name][1], peak_gib))
    on = f"{torch.get_num_threads()} CPU threads"
    if task.device == "cuda":
        on = torch.cuda.get_device_name()
    print(f"{task.prompts} prompts x {task.group_size} completions of at most "
          f"{task.max_new_tokens} tokens, {on}, "
          f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{time.strftime('%Y-%m-%d')}\n")  # fmt: skip
    report(measured)


if __name__ == "__main__":
    main()
