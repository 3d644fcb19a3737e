"""Train a vision-language model with GRPO to read the area of a shape off a plot.

python main.py                       # Qwen2.5-VL-7B-Instruct on one H200
python main.py --preset tiny         # the bundled tiny model on a CPU, in minutes
python main.py --rotate              # the task's variants
python main.py --min-size 5 --max-size 35
"""

import argparse
import dataclasses
import math
import os
import re
import resource
import statistics
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import optimi
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from evaluate import evaluate, summarize
from grpo import (
    LOSSES,
    Rollout,
    collect_rollout,
    has_spread,
    score_reference,
    sync_reference,
    update,
)
from policy import (
    DTYPES,
    GIB,
    Loaded,
    ModelError,
    Prompts,
    encode,
    load,
    place,
)
from rewards import REASONING_TAGS, SYSTEM_MESSAGE, Reward, make_prompt, score
from runlog import RunLog, Stopwatch, free_folder
from sampling import Sampler, make_generator
from shapes import Example, ShapeSpec, check_image_size, make_example

# --- every knob, declared once ------------------------------------------------------------


def knob(default, help: str, *, least=None, above=None, most=None, choices=None):
    """Return a dataclass field that also knows its help text and what values it accepts."""
    limits = {"least": least, "above": above, "most": most, "choices": choices}
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Config:
    """One run. The command line is made from these fields."""

    # model
    model: str = knob("Qwen/Qwen2.5-VL-7B-Instruct", "folder or hub id of a Qwen2.5-VL")
    device: str = knob("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = knob("auto", "auto: bfloat16 on cuda", choices=("auto", *DTYPES))
    checkpoint_layers: str = knob(
        "auto", "layers recomputed in the backward pass, a number; auto: as few as memory allows"
    )
    # task
    min_size: float = knob(20.0, "smallest dimension, grid units", above=0)
    max_size: float = knob(35.0, "largest dimension, grid units", above=0)
    rotate: bool = knob(False, "turn the shapes")
    max_rotation: float = knob(45.0, "largest turn to either side, degrees", least=0, most=180)
    image_size: int = knob(224, "side of the picture, pixels, a multiple of 28", least=28)
    reasoning_tag: str = knob("reasoning", "tag asked for and rewarded", choices=REASONING_TAGS)
    # rollout
    steps: int = knob(750, "rollouts, each followed by an update", least=1)
    prompts_per_step: int = knob(4, "plots per step", least=1)
    group_size: int = knob(8, "completions per plot, compared with each other", least=2)
    max_new_tokens: int = knob(512, "limit of a completion; longer ones are cut off", least=1)
    temperature: float = knob(1.0, "of sampling and of scoring", above=0)
    # algorithm
    loss: str = knob(
        "grpo", "how tokens are averaged: see token_weights in grpo.py", choices=LOSSES
    )
    beta: float = knob(0.05, "weight of the KL penalty; 0: no reference is loaded", least=0)
    clip_eps: float = knob(0.2, "lower clip of the ratio, 1 - eps", above=0, most=1)
    clip_eps_high: float = knob(0.2, "upper clip of the ratio, 1 + eps", above=0)
    inner_epochs: int = knob(1, "updates per rollout", least=1)
    sync_reference_every: int = knob(0, "steps between moves of the reference; 0: never", least=0)
    reference_mix: float = knob(0.6, "policy's share in such a move", above=0, most=1)
    # optimizer
    lr: float = knob(2e-6, "learning rate after the warm-up", above=0)
    warmup_steps: int = knob(20, "steps of linear warm-up", least=0)
    adam_beta1: float = knob(0.9, "decay of AdamW's first moment", least=0, most=0.9999)
    adam_beta2: float = knob(0.99, "decay of AdamW's second moment", least=0, most=0.9999)
    weight_decay: float = knob(
        0.0, "of AdamW; on bf16 weights lr * decay below 0.002 rounds to 0", least=0
    )
    max_grad_norm: float = knob(1.0, "gradients are scaled down to this norm", above=0)
    micro_batch: int = knob(4, "prompts per backward pass; memory only, same gradient", least=1)
    # run
    seed: int = knob(0, "of examples and samples", least=0)
    workers: int = knob(1, "processes that draw and encode plots ahead; 0: none", least=0)
    name: str = knob("", "run folder in --runs; empty: named after the preset or model")
    runs: str = knob("runs", "folder of all run folders")
    log_every: int = knob(10, "steps between two lines on the terminal", least=1)
    sample_every: int = knob(10, "steps between two entries of samples.jsonl", least=1)
    eval_every: int = knob(50, "steps between held-out evaluations; 0: none", least=0)
    eval_examples: int = knob(64, "held-out examples of an evaluation", least=1)

    @property
    def spec(self) -> ShapeSpec:
        """The shapes to draw."""
        rotation = self.max_rotation if self.rotate else 0.0
        return ShapeSpec(self.min_size, self.max_size, rotation)

    @property
    def layers_to_checkpoint(self) -> int | None:
        """`checkpoint_layers` as a number; None: as few as memory allows."""
        return None if self.checkpoint_layers == "auto" else int(self.checkpoint_layers)


PRESETS = {
    "default": {},
    "tiny": {
        "model": str(Path(__file__).resolve().parent / "tiny"),
        "steps": 200,
        "prompts_per_step": 8,
        "max_new_tokens": 48,
        "beta": 0.02,
        "lr": 1.5e-4,
        "warmup_steps": 10,
        "micro_batch": 8,
        "workers": 0,
    },
}
UPDATE_KNOBS = ("loss", "inner_epochs", "micro_batch", "temperature", "beta", "clip_eps")
UPDATE_KNOBS += ("clip_eps_high", "max_grad_norm", "max_new_tokens")
ADAM_EPS = 1e-8  # the gradient of one of 8 billion weights is about 1e-5 after clipping
# mean |log-prob sampled - scored| at the first step that still is rounding, in nats per token
MAX_SAMPLER_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.1}
MAX_SKIPPED = 5  # steps in a row without a finite gradient


# --- training ---------------------------------------------------------------------------


def train(config: Config, loaded: Loaded, folder: Path) -> None:
    """Train the loaded policy in place, on `config.device`, and leave a run folder."""
    policy, reference, processor = loaded.policy, loaded.reference, loaded.processor
    optimizer = make_optimizer(config, policy)
    sampler = make_sampler(config, loaded)
    log = RunLog(folder, config=dataclasses.asdict(config), device=device_name(config.device))
    evaluate_and_log(config, sampler, processor, log, steps_done=0)
    batches = iter(make_batches(config, processor))
    skipped_in_a_row = 0
    for step in (progress := tqdm(range(config.steps), unit="step", desc=folder.name)):
        # host sync at every lap: a phase's seconds are those of its own device work
        watch = Stopwatch(torch.cuda.synchronize if config.device == "cuda" else lambda: None)
        set_learning_rate(optimizer, learning_rate(config, step))

        examples, prompts = next(batches)
        watch.lap("prompts_s")
        rollout = collect_rollout(
            sampler,
            processor,
            prompts.to(config.device),
            partial(judge, config, examples),
            **pick(config, "group_size", "temperature"),
            divide_by_std=config.loss != "dr_grpo",
            generator=make_generator(config.device, config.seed, step),
        )
        watch.lap("rollout_s")
        if reference is not None:
            rollout = score_reference(
                reference, rollout, **pick(config, "micro_batch", "temperature")
            )
        watch.lap("reference_s")
        stats = update(policy, optimizer, rollout, **update_knobs(config))
        if reference is not None and is_due(step, config.sync_reference_every):
            sync_reference(policy, reference, mix=config.reference_mix)
        watch.lap("update_s")

        metrics = step_metrics(config, step, rollout, stats, watch.seconds)
        log_step(config, log, progress, metrics, examples, rollout)
        check_sampler_gap(metrics, policy.dtype)
        skipped_in_a_row = check_skipped(metrics, skipped_in_a_row)
        if is_due(step, config.eval_every) or step + 1 == config.steps:
            evaluate_and_log(config, sampler, processor, log, steps_done=step + 1)
    policy.save_pretrained(folder / "final")
    processor.save_pretrained(folder / "final")
    log.close()


def pick(config: Config, *names: str) -> dict:
    """Return some knobs as keyword arguments."""
    return {name: getattr(config, name) for name in names}


def update_knobs(config: Config) -> dict:
    """Return the knobs that `grpo.update` takes, as keyword arguments."""
    return {"checkpoint_layers": config.layers_to_checkpoint, **pick(config, *UPDATE_KNOBS)}


def make_optimizer(config: Config, policy) -> optimi.AdamW:
    """Return AdamW; on bf16 weights it adds Kahan summation, or small updates would be lost."""
    return optimi.AdamW(
        policy.parameters(),
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=ADAM_EPS,
        weight_decay=config.weight_decay,
    )


def learning_rate(config: Config, step: int) -> float:
    """Return the rate of a step (from 0): linear warm-up, never zero, then constant."""
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class Batches(Dataset):
    """The plots of every step and their model inputs; each is made when it is asked for.

    Step i's are numbers i * Q to (i + 1) * Q - 1 of the training split, whoever makes them.
    """

    def __init__(self, config: Config, processor) -> None:
        self.config, self.processor = config, processor

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> tuple[list[Example], Prompts]:
        config = self.config
        options = pick(config, "seed", "image_size")
        examples = [
            make_example(config.spec, split="train", index=index, **options)
            for index in range(step * config.prompts_per_step, (step + 1) * config.prompts_per_step)
        ]
        images = [example.image for example in examples]
        prompt = make_prompt(config.reasoning_tag)
        return examples, encode(self.processor, images, system=SYSTEM_MESSAGE, prompt=prompt)


def make_batches(config: Config, processor) -> DataLoader:
    """Return the steps' examples and prompts in order, made ahead by `config.workers` processes."""
    return DataLoader(
        Batches(config, processor),
        batch_size=None,  # an item is a step's batch already
        num_workers=config.workers,
        pin_memory=config.device == "cuda",
    )


def make_sampler(config: Config, loaded: Loaded) -> Sampler:
    """Return what draws the policy's completions, in training and in evaluation."""
    pad_id = loaded.processor.tokenizer.pad_token_id
    return Sampler(loaded.policy, max_new_tokens=config.max_new_tokens, pad_id=pad_id)


def judge(config: Config, examples: list[Example], text: str, prompt_index: int) -> Reward:
    """Return the rewards of one completion of prompt `prompt_index`."""
    return score(text, examples[prompt_index].area, reasoning_tag=config.reasoning_tag)


def is_due(step: int, every: int) -> bool:
    """Return whether something done every n steps is due after this step; never if n is 0."""
    return every > 0 and (step + 1) % every == 0


# --- what is logged ---------------------------------------------------------------------


def step_metrics(
    config: Config, step: int, rollout: Rollout, stats: dict, seconds: dict[str, float]
) -> dict[str, float]:
    """Return one line of metrics.jsonl; the README's glossary says what each value means."""
    rewards = rollout.rewards
    totals = torch.tensor([reward.total for reward in rewards]).view(-1, config.group_size)
    lengths = rollout.lengths
    step_s = sum(seconds.values())
    return {
        "step": step,
        "prompts": (step + 1) * config.prompts_per_step,
        "reward_mean": totals.mean().item(),
        "reward_std": totals.std().item(),
        "area_correctness_reward": statistics.fmean(r.area_correctness for r in rewards),
        "area_format_reward": statistics.fmean(r.area_format for r in rewards),
        "xml_format_reward": statistics.fmean(r.xml_format for r in rewards),
        "relative_error": statistics.median(r.relative_error for r in rewards),
        **stats,
        "lr": learning_rate(config, step),
        "completion_length_mean": statistics.fmean(lengths),
        "completion_length_max": max(lengths),
        "truncated_share": rollout.truncated.float().mean().item(),  # host sync
        "no_spread_share": 1.0 - has_spread(totals).float().mean().item(),
        **seconds,
        "step_s": step_s,
        "tokens_per_s": sum(lengths) / step_s,
        "peak_gib": peak_memory() / GIB,
    }


def log_step(
    config: Config,
    log: RunLog,
    progress: tqdm,
    metrics: dict,
    examples: list[Example],
    rollout: Rollout,
) -> None:
    """Write the step's metrics, now and then its first prompt, and tell the terminal."""
    step = metrics["step"]
    log.write("metrics", metrics)
    progress.set_postfix(reward=f"{metrics['reward_mean']:.2f}", kl=f"{metrics['kl']:.4f}")
    if step % config.sample_every == 0:
        log.write("samples", sample_of(config, step, examples[0], rollout))
    if step % config.log_every == 0 or step + 1 == config.steps:
        tqdm.write(terminal_line(metrics, config.steps))


def terminal_line(metrics: dict, steps: int) -> str:
    """Return the step in one aligned line."""
    return (
        f"step {metrics['step']:>{len(str(steps))}}/{steps}"
        f" | reward {metrics['reward_mean']:6.3f}"
        f" | area {metrics['area_correctness_reward']:6.3f}"
        f" | decimals {metrics['area_format_reward']:.3f}"
        f" | xml {metrics['xml_format_reward']:.3f}"
        f" | error {100 * metrics['relative_error']:4.1f} %"
        f" | kl {metrics['kl']:.4f}"
        f" | entropy {metrics['entropy']:.3f}"
        f" | tokens {metrics['completion_length_mean']:5.1f}"
        f" | {metrics['step_s']:.2f} s"
    )


def sample_of(config: Config, step: int, example: Example, rollout: Rollout) -> dict:
    """Return one line of samples.jsonl: the step's first prompt with all its completions."""
    first_group = range(config.group_size)
    return {
        "step": step,
        "index": example.index,
        "kind": example.shape.kind,
        "area": example.area,
        "completions": [
            {
                "text": rollout.texts[row],
                **dataclasses.asdict(rollout.rewards[row]),
                "advantage": rollout.advantages[0, row].item(),  # host sync
            }
            for row in first_group
        ],
    }


def evaluate_and_log(
    config: Config, sampler: Sampler, processor, log: RunLog, *, steps_done: int
) -> None:
    """Answer the held-out examples greedily and write one line of evaluations.jsonl."""
    if config.eval_every == 0:
        return
    answers = evaluate(
        sampler,
        processor,
        config.spec,
        examples=config.eval_examples,
        batch_size=config.prompts_per_step * config.group_size,  # the sampler's buffers stay
        **pick(config, "seed", "image_size", "reasoning_tag"),
    )
    summary = summarize(list(answers))
    log.write("evaluations", {"steps_done": steps_done, **summary})
    tqdm.write(
        f"held out, after {steps_done} steps: area {summary['area_correctness_reward']:.3f}"
        f" | median error {100 * summary['relative_error_median']:.1f} %"
        f" | two decimals {100 * summary['two_decimals']:.0f} %"
        f" | strict XML {100 * summary['strict_xml']:.0f} %"
    )


def check_sampler_gap(metrics: dict, dtype: torch.dtype) -> None:
    """Stop the run if, at the first step, sampling and scoring were not the same distribution."""
    allowed = MAX_SAMPLER_GAP[dtype]
    if metrics["step"] == 0 and not metrics["sampler_gap_mean"] <= allowed:
        sys.exit(
            f"main.py: the log-probs recorded while sampling and those of the scoring pass differ "
            f"by {metrics['sampler_gap_mean']:.4f} per token (up to {allowed} is rounding). The "
            f"policy would be trained on samples it did not draw: temperature, positions, masks or "
            f"the key-value cache differ between sampling.Sampler and scoring.completion_logprobs."
        )


def check_skipped(metrics: dict, in_a_row: int) -> int:
    """Return how many steps in a row were skipped; stop the run after too many."""
    in_a_row = in_a_row + 1 if metrics["skipped"] else 0
    if metrics["skipped"]:
        tqdm.write(f"step {metrics['step']}: the gradient is not finite; the step was skipped")
    if in_a_row >= MAX_SKIPPED:
        sys.exit(
            f"main.py: no finite gradient in {MAX_SKIPPED} steps in a row; stopped. "
            f"A lower --lr or a higher --beta usually helps."
        )
    return in_a_row


def peak_memory() -> int:
    """Return the most bytes this process has held: on the GPU if there is one, else in RAM."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024  # macOS counts bytes


def device_name(device: str) -> str:
    """Return what the run computes on, for its config.json."""
    return (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )


# --- command line -----------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Return the command line made from `Config`; flags left out do not appear in the result."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        argument_default=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="default",
        help="values that suit a model (default: default)",
    )
    for knob_field in dataclasses.fields(Config):
        flag = "--" + knob_field.name.replace("_", "-")
        options = {"help": f"{knob_field.metadata['help']} ({default_text(knob_field)})"}
        if knob_field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = knob_field.type
            options["choices"] = knob_field.metadata["choices"]
            if not options["choices"]:
                options["metavar"] = {int: "N", float: "X", str: "TEXT"}[knob_field.type]
        parser.add_argument(flag, **options)
    return parser


def default_text(knob_field: dataclasses.Field) -> str:
    """Return a knob's default for its help text, and the preset's where it differs."""
    text = f"default: {knob_field.default}"
    if knob_field.name != "model" and knob_field.name in PRESETS["tiny"]:
        text += f"; tiny: {PRESETS['tiny'][knob_field.name]}"
    return text.replace("%", "%%")


def make_config(arguments: argparse.Namespace) -> Config:
    """Return the run's knobs: defaults, under the preset's values, under the flags that were given.

    Raises `ValueError`, in one line, for a value that is not accepted.
    """
    given = vars(arguments).copy()
    preset = PRESETS[given.pop("preset")]
    config = Config(**{**preset, **given})
    for knob_field in dataclasses.fields(Config):
        check_limits(knob_field, getattr(config, knob_field.name))
    if not re.fullmatch(r"auto|\d+", config.checkpoint_layers):
        raise ValueError(
            f"--checkpoint-layers {config.checkpoint_layers}: must be a number of layers or auto"
        )
    if "max_rotation" in given and not config.rotate:
        raise ValueError("--max-rotation: has no effect without --rotate")
    if "reference_mix" in given and not config.sync_reference_every:
        raise ValueError("--reference-mix: has no effect without --sync-reference-every")
    if config.sync_reference_every and config.beta == 0:
        raise ValueError("--sync-reference-every: there is no reference with --beta 0")
    check_image_size(config.image_size)
    _ = config.spec  # refuses shapes that do not fit
    return config


def check_limits(knob_field: dataclasses.Field, value) -> None:
    """Raise `ValueError`, naming flag, value and what is accepted, for a number out of range."""
    if not isinstance(value, int | float):
        return
    least, above, most = (knob_field.metadata[name] for name in ("least", "above", "most"))
    in_range = (
        (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and math.isfinite(value)
    )
    if not in_range:
        bounds = [("at least", least), ("above", above), ("at most", most)]
        accepted = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        flag = "--" + knob_field.name.replace("_", "-")
        finite = "" if isinstance(value, int) else ", and finite"
        raise ValueError(f"{flag} {value}: must be {accepted}{finite}")


def choose_folder(config: Config, preset: str) -> Path:
    """Return the new run's folder. Raises `ValueError` if it exists or cannot be made."""
    runs = Path(config.runs)
    existing = next(path for path in (runs, *runs.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"--runs {runs}: cannot write to {existing}")
    if not config.name:
        model = Path(config.model).name
        return free_folder(runs, preset if preset != "default" else model)
    folder = runs / config.name
    if folder.exists():
        raise ValueError(f"--name {config.name}: {folder} exists; runs are never overwritten")
    return folder


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, refuse what cannot work before anything is loaded, and train."""
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    try:
        config = make_config(parsed)
        folder = choose_folder(config, parsed.preset)
        device, dtype = place(
            config.model,
            device=config.device,
            dtype=config.dtype,
            training=True,
            reference=config.beta > 0,
            command_that_runs="python main.py --preset tiny",
        )
        config = dataclasses.replace(config, device=device, dtype=dtype)
        loaded = load(config.model, device=device, dtype=dtype, reference=config.beta > 0)
    except (ValueError, ModelError) as error:
        parser.error(str(error))
    train(config, loaded, folder)
    print(f"{folder}: done. Next: python plot_rewards.py {folder} ; python evaluate.py {folder}")


if __name__ == "__main__":
    main()
