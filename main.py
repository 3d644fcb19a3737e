"""Train a vision-language model with GRPO to read the area of a shape off a plot.

python main.py                       # Qwen2.5-VL-7B-Instruct on one H200
python main.py --preset tiny         # the bundled tiny model on a CPU, in minutes
python main.py --rotate              # the task's variants
python main.py --min-size 5 --max-size 35
python main.py --dry-run             # check the flags, show what memory and disk it takes
python main.py --resume runs/RUN     # go on where a run was stopped or killed
accelerate launch main.py            # on all GPUs of this machine, or on several machines
"""

import dataclasses
import math
import os
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import optimi
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from config import Config, make_config, make_parser
from engine.fastpath import prepare_gpu, trust_triton
from engine.loading import Loaded, check_files, check_use, load, trainable
from engine.machine import threads_beside_others
from engine.model_files import ModelError, first_line
from engine.parallel import everyone, is_main, join, launched, process_count, process_index
from engine.prompts import Prompts, encode
from engine.sampling import Sampler, make_generator
from engine.sizes import GIB, choose_device, free_memory, place
from evaluate import evaluate, summarize
from grpo import (
    Passes,
    Rollout,
    collect_rollout,
    has_spread,
    is_out_of_memory,
    score_reference,
    sync_reference,
    update,
)
from harness import checkpoint
from harness.health import Health, StopSignal, Unhealthy, follow_the_parent, launcher_limit
from harness.memory import (
    Work,
    at_least,
    estimate,
    held,
    parameters_of,
    table,
    trained_bytes,
    trained_of,
    what_would_fit,
)
from harness.runlog import (
    Onlooker,
    RunError,
    RunLog,
    Stopwatch,
    Tracker,
    folders_of,
    new_run,
    peak_host_memory,
    read_description,
    read_lines,
    resumed_run,
)
from harness.terminal import never_fail
from rewards import SYSTEM_MESSAGE, Reward, make_prompt, score
from shapes import Example, make_example

UPDATE_KNOBS = ("loss", "inner_epochs", "temperature", "beta", "clip_eps", "clip_eps_high")
UPDATE_KNOBS += ("max_grad_norm", "max_new_tokens")
WORKER_TIMEOUT_S = 300  # a worker that could not hand over its batch would be waited for forever
RUNS_ANYWHERE = "What runs here: python main.py --preset tiny"
NO_ROOM = "What finds no room is left out. Less: --no-save-optimizer (no resuming)"
NOTHING = "nothing that takes a few flags only"
ADAM_EPS = 1e-8  # the gradient of one of 8 billion weights is about 1e-5 after clipping


# --- training ---------------------------------------------------------------------------


def train(config: Config, loaded: Loaded, log: RunLog, *, optimizer=None, steps_done=0) -> None:
    """Train the loaded policy in place, on `config.device`, and leave a run folder.

    A run that is resumed brings its optimizer and the number of steps it has done. Ends in
    `SystemExit` after Ctrl-C or SIGTERM, and raises `Unhealthy` for a run that should not go on.
    """
    optimizer = optimizer or make_optimizer(config, loaded.policy)
    sampler = make_sampler(config, loaded)
    passes = Passes(config.micro_batch, config.layers_to_checkpoint)
    health = Health(loaded.policy.dtype, read_lines(log.folder / "metrics.jsonl"))
    save = False
    with StopSignal() as stop:
        if steps_done == 0:
            evaluate_and_log(config, sampler, loaded.processor, log, steps_done=0)
        batches = iter(make_batches(config, loaded.processor, first_step=steps_done))
        steps = range(steps_done, config.steps)
        progress = tqdm(
            steps,
            unit="step",
            desc=log.folder.name,
            initial=steps_done,
            total=config.steps,
            disable=None if is_main() else True,  # None: where there is no terminal
        )
        for step in progress:
            examples, rollout, metrics = take_step(
                config, step, batches, sampler, loaded, optimizer, passes
            )
            log_step(config, log, progress, metrics, examples, rollout)
            for warning in health.check(metrics):
                tqdm.write(warning)
            is_last = step + 1 == config.steps
            if is_due(step, config.eval_every) or is_last:
                evaluate_and_log(config, sampler, loaded.processor, log, steps_done=step + 1)
            signal_number = stop.agreed_number()
            save = save or is_due(step, config.save_every) or is_last or signal_number
            if save and (not metrics["skipped"] or signal_number or is_last):
                kept = config.keep + bool(metrics["skipped"])  # good gives way to sound only
                save_checkpoint(config, log, loaded, optimizer, steps_done=step + 1, keep=kept)
                save = False
            if signal_number and not is_last:
                leave(log, signal_number)
        health.check_end()
    checkpoint.save_final(log.folder, loaded, steps_done=config.steps, merge=config.merge)


def take_step(
    config: Config,
    step: int,
    batches: Iterator[tuple[list[Example], Prompts]],
    sampler: Sampler,
    loaded: Loaded,
    optimizer: torch.optim.Optimizer,
    passes: Passes,
) -> tuple[list[Example], Rollout, dict[str, float | str]]:
    """Roll out the next prompts, score, update; return examples, rollout and the step's metrics."""
    # host sync at every lap: a phase's seconds are those of its own device work
    watch = Stopwatch(torch.cuda.synchronize if config.device == "cuda" else lambda: None)
    set_learning_rate(optimizer, learning_rate(config, step))

    examples, prompts = next_batch(batches)
    watch.lap("prompts_s")
    rollout = collect_rollout(
        sampler,
        loaded.processor,
        prompts.to(config.device),
        partial(judge, config, examples),
        **pick(config, "group_size", "temperature"),
        divide_by_std=config.loss != "dr_grpo",
        generator=make_generator(config.device, config.seed, step),
    )
    watch.lap("rollout_s")
    if config.beta > 0:
        with loaded.as_reference() as reference:
            rollout = score_reference(
                reference, rollout, passes=passes, temperature=config.temperature
            )
    watch.lap("reference_s")
    stats = update(loaded.policy, optimizer, rollout, passes=passes, **pick(config, *UPDATE_KNOBS))
    # what was seen is used up, and would keep the vision tower's activations in memory
    rollout = dataclasses.replace(rollout, prompts=rollout.prompts.unseen())
    if is_due(step, config.sync_reference_every):
        sync_reference(loaded.policy, loaded.reference, mix=config.reference_mix)
    watch.lap("update_s")
    stats["micro_batch"] = passes.micro_batch
    return examples, rollout, step_metrics(config, step, rollout, stats, watch.seconds)


def next_batch(
    batches: Iterator[tuple[list[Example], Prompts]],
) -> tuple[list[Example], Prompts]:
    """Return a step's examples and prompts. Raises `RunError` if the loader has failed."""
    try:
        return next(batches)
    except RuntimeError as error:
        raise RunError(f"the next plots could not be had: {first_line(error)}") from error


def save_checkpoint(
    config: Config,
    log: RunLog,
    loaded: Loaded,
    optimizer: torch.optim.Optimizer,
    *,
    steps_done: int,
    keep: int,
) -> None:
    """Save the run's state, or say why that was left out: the run itself goes on."""
    begin = time.perf_counter()
    try:
        with checkpoint.failing_together():  # nothing could be resumed without its steps' lines
            log.sync()
        saved = checkpoint.save(
            log.folder,
            loaded,
            optimizer,
            steps_done=steps_done,
            keep=keep,
            **what_is_saved(config),
        )
    except (OSError, checkpoint.CheckpointError) as error:
        tqdm.write(f"step {steps_done - 1}: no checkpoint was saved: {error}")
    else:
        tqdm.write(f"{saved}: saved in {time.perf_counter() - begin:.1f} s")


def what_is_saved(config: Config) -> dict[str, bool]:
    """Return which parts a checkpoint has beside the policy: a fixed reference is the model."""
    return {
        "with_optimizer": config.save_optimizer,
        "with_reference": config.sync_reference_every > 0,
    }


def how_to_go_on(run: Path) -> str:
    """Return what to type after a run has ended before its time."""
    saved = checkpoint.checkpoints_of(run)
    command = f"python main.py --resume {shlex.quote(str(run))}"
    if not saved:
        return f"No checkpoint yet: {command} starts the run again"
    if not checkpoint.has_optimizer(saved[-1]):
        return f"{last_checkpoint(run)}, from which a new run can start (--model)"
    return f"{last_checkpoint(run)}. To go on: {command}"


def last_checkpoint(run: Path) -> str:
    """Return which one it is, in a few words."""
    saved = checkpoint.checkpoints_of(run)
    return f"Last checkpoint: {saved[-1]}" if saved else "There is no checkpoint"


def leave(log: RunLog, signal_number: int) -> None:
    """End the process after a signal, with the exit code a shell expects."""
    log.close()
    tqdm.write(f"{log.folder}: stopped. {how_to_go_on(log.folder)}")
    sys.exit(128 + signal_number)


def pick(config: Config, *names: str) -> dict:
    """Return some knobs as keyword arguments."""
    return {name: getattr(config, name) for name in names}


def make_optimizer(config: Config, policy) -> torch.optim.Optimizer:
    """Return AdamW; on bf16 weights it adds Kahan summation, or small updates would be lost.

    Several processes share its state out: each updates some parameters and sends them to all.
    """
    options = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": ADAM_EPS,
        "weight_decay": config.weight_decay,
        "triton": trust_triton(trainable(policy)[0]),
    }
    if process_count() == 1:
        return optimi.AdamW(trainable(policy), **options)
    return ZeroRedundancyOptimizer(trainable(policy), optimizer_class=optimi.AdamW, **options)


def learning_rate(config: Config, step: int) -> float:
    """Return the rate of a step (from 0): linear warm-up, never zero, then constant."""
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class Batches(Dataset):
    """The plots of every step and their model inputs; each is made when it is asked for.

    Step i's are numbers i * Q to (i + 1) * Q - 1 of the training split, whoever makes them; each
    process takes its share of them, in the order of the processes.
    """

    def __init__(self, config: Config, processor) -> None:
        self.config, self.processor = config, processor
        self.count = prompts_here(config)
        self.offset = process_index() * self.count  # asked here: a loader's worker would not know

    def __getitem__(self, step: int) -> tuple[list[Example], Prompts]:
        config = self.config
        options = pick(config, "seed", "image_size")
        first = step * config.prompts_per_step + self.offset
        examples = [
            make_example(config.spec, split="train", index=index, **options)
            for index in range(first, first + self.count)
        ]
        images = [example.image for example in examples]
        prompt = make_prompt(config.reasoning_tag)
        return examples, encode(self.processor, images, system=SYSTEM_MESSAGE, prompt=prompt)


def prompts_here(config: Config) -> int:
    """Return how many of a step's prompts are this process's own."""
    return config.prompts_per_step // process_count()


def make_batches(config: Config, processor, *, first_step: int = 0) -> DataLoader:
    """Return the steps' examples and prompts in order, made ahead by `config.workers` processes."""
    return DataLoader(
        Batches(config, processor),
        sampler=range(first_step, config.steps),
        batch_size=None,  # an item is a step's batch already
        num_workers=config.workers,
        worker_init_fn=follow_the_parent,
        timeout=WORKER_TIMEOUT_S if config.workers else 0,
        pin_memory=config.device == "cuda",
    )


def make_sampler(config: Config, loaded: Loaded) -> Sampler:
    """Return what draws the policy's completions, in training and in evaluation."""
    pad_id = loaded.processor.tokenizer.pad_token_id
    return Sampler(loaded.policy, max_new_tokens=config.max_new_tokens, pad_id=pad_id)


def judge(config: Config, examples: list[Example], text: str, prompt_index: int) -> Reward:
    """Return the rewards of one completion of prompt `prompt_index`."""
    area = examples[prompt_index].area
    return score(text, area, **pick(config, "reasoning_tag", "correctness"))


def is_due(step: int, every: int) -> bool:
    """Return whether something done every n steps is due after this step; never if n is 0."""
    return every > 0 and (step + 1) % every == 0


# --- what is logged ---------------------------------------------------------------------


def step_metrics(
    config: Config, step: int, rollout: Rollout, stats: dict, seconds: dict[str, float]
) -> dict[str, float]:
    """Return one line of metrics.jsonl; the README's glossary says what each value means."""
    rewards, lengths = everyone(rollout.rewards), everyone(rollout.lengths)
    truncated = everyone(rollout.truncated.tolist())  # host sync
    totals = torch.tensor([reward.total for reward in rewards]).view(-1, config.group_size)
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
        "truncated_share": statistics.fmean(truncated),
        "no_spread_share": 1.0 - has_spread(totals).float().mean().item(),
        **seconds,
        "step_s": step_s,
        "tokens_per_s": sum(lengths) / step_s,
        "peak_gib": max(everyone([peak_memory()])) / GIB,
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
        "area": example.area,
        "shape": dataclasses.asdict(example.shape),
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
        batch_size=prompts_here(config) * config.group_size,  # the sampler's buffers stay
        **pick(config, "seed", "image_size", "reasoning_tag", "correctness"),
    )
    summary = summarize(everyone(list(answers)))
    log.write("evaluations", {"steps_done": steps_done, **summary})
    tqdm.write(
        f"held out, after {steps_done} steps: area {summary['area_correctness_reward']:.3f}"
        f" | median error {100 * summary['relative_error_median']:.1f} %"
        f" | two decimals {100 * summary['two_decimals']:.0f} %"
        f" | strict XML {100 * summary['strict_xml']:.0f} %"
    )


def peak_memory() -> int:
    """Return the most bytes this process has held: on the GPU if there is one, else in RAM."""
    is_on_gpu = torch.cuda.is_initialized()
    return torch.cuda.max_memory_allocated() if is_on_gpu else peak_host_memory()


def device_name(device: str) -> str:
    """Return what the run computes on, for its config.json."""
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {threads} threads"
    return name if process_count() == 1 else f"{process_count()} x {name}"


# --- new runs, and runs that go on ------------------------------------------------------


def choose_folders(config: Config, preset: str | None) -> Iterable[Path]:
    """Return the folders that the new run may have, in order; with a --name there is one.

    Raises `ValueError` if it exists or cannot be made.
    """
    runs = Path(config.runs)
    existing = next(path for path in (runs, *runs.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"--runs {runs}: cannot write to {existing}")
    if not config.name:
        return folders_of(runs, preset or Path(config.model).resolve().name)
    folder = runs / config.name
    if Path(config.name).name != config.name:
        raise ValueError(f"--name {config.name}: must be the name of a folder in {runs}")
    if folder.exists():
        raise ValueError(f"--name {config.name}: {folder} exists; runs are never overwritten")
    return [folder]


def checkpoint_to_resume(run: Path, config: Config) -> Path | None:
    """Return the checkpoint a run goes on from; None if it died before its first.

    Raises `ValueError` where there is nothing left to do, or no optimizer state.
    """
    saved = checkpoint.checkpoints_of(run)
    if not saved:
        check_first_model(run, config)
        return None
    done = checkpoint.steps_of(saved[-1])
    is_final = checkpoint.steps_of(run / "final") == done
    is_to_merge = config.merge and (run / "final" / "adapter_config.json").is_file()
    if config.steps < done or (config.steps == done and is_final and not is_to_merge):
        raise ValueError(
            f"--resume {run}: {done} steps are done; must be more: --steps {config.steps}"
        )
    if config.steps > done and not checkpoint.has_optimizer(saved[-1]):
        raise ValueError(
            f"--resume {run}: {saved[-1].name} has no optimizer state (--no-save-optimizer). A new "
            f"run can start from its weights: --model {shlex.quote(str(saved[-1]))}"
        )
    return saved[-1]


def check_first_model(run: Path, config: Config) -> None:
    """Raise `ValueError` for another model where no checkpoint can say that it is the same."""
    before = read_description(run)["config"]["model"]
    if config.model != before and os.path.isdir(before):
        raise ValueError(
            f"--model {config.model}: the run has {before}, and no checkpoint yet by whose "
            f"checksums the two could be told to be the same"
        )


def resume(
    config: Config, loaded: Loaded, run: Path, saved: Path | None
) -> tuple[RunLog, torch.optim.Optimizer, int]:
    """Return a run's log, optimizer and number of steps done, as of a checkpoint.

    The policy, and the reference if it moves, get its weights. Raises `RunError` or
    `CheckpointError`, with nothing in the folder touched.
    """
    optimizer, steps_done = make_optimizer(config, loaded.policy), 0
    if saved is not None:
        steps_done = checkpoint.restore(saved, loaded, optimizer)
    if not is_main():
        everyone([])  # waits until the main one has cut its lines
        return Onlooker(run), optimizer, steps_done
    tracker = make_tracker(config, run, resumed_at=steps_done)
    log = resumed_run(
        run,
        config=described(config),
        device=device_name(config.device),
        steps_done=steps_done,
    )
    log.tracker = tracker
    checkpoint.clear_leftovers(run)
    everyone([])
    print(f"{run}: goes on after {steps_done} steps")
    if (run / "final").is_dir() and steps_done < config.steps:
        print(f"{run / 'final'}: is of an earlier step, until the run has come to its end again")
    return log, optimizer, steps_done


# --- what it will take ------------------------------------------------------------------


def work_of(config: Config) -> Work:
    """Return what decides the run's memory; "auto" is a GPU unless the model is small."""
    count = parameters_of(config.model)
    device, dtype = choose_device(count, device=config.device, dtype=config.dtype)
    sizes = ("model", "prompts_per_step", "group_size", "max_new_tokens", "image_size")
    return Work(
        **pick(config, *sizes, "micro_batch", "layers_to_checkpoint"),
        **pick(config, "lora_rank", "freeze_vision"),
        processes=process_count(),
        device=device,
        dtype=dtype,
        reference=config.beta > 0,
    )


def report_needs(config: Config, place: Path) -> bool:
    """Print what memory and disk a run takes; return whether this machine has the memory."""
    work = work_of(config)
    has_device = work.device == "cpu" or torch.cuda.is_available()
    free = free_memory(torch.device(work.device))[0] if has_device else 0
    found = estimate(work, free=free)
    print(
        f"{config.model} in {work.dtype} on {work.device}: {work.prompts_per_step} prompts x "
        f"{work.group_size} completions of up to {work.max_new_tokens} tokens, "
        f"{work.prompts_in_a_pass} prompts per backward pass"
        + (f", each of {work.processes} processes" if work.processes > 1 else "")
    )
    print(table(found))
    print(f"  {'free':<40}" + (f"{free / GIB:>9.2f} GiB" if has_device else "   no CUDA GPU found"))
    needs, has_room = disk_needs(config, place)
    print(needs if has_room else f"{needs}. {NO_ROOM}")
    if has_device and found.total <= free:
        print("It fits.")
    elif has_device:
        print(f"It does not fit. What would: {what_would_fit(work, free) or NOTHING}")
    else:
        print(f"It takes a CUDA GPU with {math.ceil(found.total / GIB)} GiB free. {RUNS_ANYWHERE}")
    return has_device and found.total <= free


def disk_needs(config: Config, place: Path) -> tuple[str, bool]:
    """Return what a run writes, in one line, and whether there is room for it at some place."""
    work = work_of(config)
    sizes, parts = held(work), what_is_saved(config)
    saved = trained_bytes(work) if config.lora_rank else sizes["weights"]
    each = saved + parts["with_optimizer"] * sizes["optimizer"] * work.processes
    each += parts["with_reference"] * sizes["weights"]
    final = saved + config.merge * sizes["weights"]
    saves = math.ceil(config.steps / config.save_every) if config.save_every else 1
    at_once = min(config.keep + 1, saves)  # an old one goes when the new one is whole
    folders = (place.absolute(), *place.absolute().parents)
    free = shutil.disk_usage(next(folder for folder in folders if folder.exists())).free
    text = (
        f"Disk: {each / GIB:.2f} GiB a checkpoint, up to {at_once} at once, and "
        f"{final / GIB:.2f} GiB for final/; {free / GIB:.2f} GiB are free"
    )
    return text, at_once * each + final <= free


# --- main -------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, refuse what cannot work before anything is loaded, and train."""
    never_fail()
    prepare_gpu()
    parser = make_parser(__doc__)
    parsed = parser.parse_args(arguments)
    run, optimizer, steps_done, number = getattr(parsed, "resume", None), None, 0, 0
    try:
        number, _ = launched()
        config = make_config(parsed)
        meet(config)
        folders = [run] if run else choose_folders(config, getattr(parsed, "preset", None))
        saved = checkpoint_to_resume(run, config) if run else None
        check_use(config.model, image_size=config.image_size, lora_rank=config.lora_rank)
        if getattr(parsed, "dry_run", False):
            print(check_files(config.model))
            sys.exit(0 if report_needs(config, run or Path(config.runs)) else 2)
        config = placed(config)
        loaded = load(
            config.model,
            reference=config.beta > 0,
            **pick(config, "device", "dtype", "freeze_vision", "lora_rank", "seed"),
        )
        if run:
            log, optimizer, steps_done = resume(config, loaded, run, saved)
        else:
            log = begin(config, folders)
    except (ValueError, OSError, ModelError, RunError, checkpoint.CheckpointError) as error:
        if isinstance(error, ValueError) and number > 0:
            sys.exit(2)  # a flag that all refuse is told by one
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    needs, has_room = disk_needs(config, log.folder)
    if not has_room:
        print(f"{needs}. {NO_ROOM}")
    run_to_the_end(config, loaded, log, optimizer=optimizer, steps_done=steps_done)
    quoted = shlex.quote(str(log.folder))
    print(
        f"{log.folder}: done. Next: python plot_rewards.py {quoted} ; python evaluate.py {quoted}"
    )


def meet(config: Config) -> None:
    """Join the processes that `accelerate launch` has started; all but the main one fall silent.

    Raises `ValueError` if the step's prompts cannot be shared out evenly: see also `launched`.
    """
    join(on_cpu=config.device == "cpu" or not torch.cuda.is_available())
    if config.prompts_per_step % process_count():
        raise ValueError(
            f"--prompts-per-step {config.prompts_per_step}: must be a multiple of the "
            f"{process_count()} processes"
        )
    if not is_main():
        disable_progress_bar()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    elif warning := launcher_limit():
        print(warning)


def begin(config: Config, folders: Iterable[Path]) -> RunLog:
    """Make a new run's folder, the first that is free, and return its log.

    Raises `RunError`, and leaves no folder then; the other processes end with the main one.
    """
    log, problem = None, None
    if is_main():
        try:
            log = make_run(config, folders)
        except RunError as error:
            problem = error
    folder = everyone([log.folder if log else None])[0]  # all wait until it is made
    if problem:
        raise problem
    if folder is None:
        sys.exit(2)  # the main process has said why
    return log or Onlooker(folder)


def make_run(config: Config, folders: Iterable[Path]) -> RunLog:
    """Make the folder, and show the run in a tool for watching if asked. Raises `RunError`."""
    log = new_run(folders, config=described(config), device=device_name(config.device))
    try:
        log.tracker = make_tracker(config, log.folder)
    except BaseException:
        log.close()
        shutil.rmtree(log.folder)
        raise
    return log


def make_tracker(config: Config, folder: Path, resumed_at: int | None = None) -> Tracker | None:
    """Return what shows the run in the tool of --report-to, if any. Raises `RunError`."""
    if config.report_to == "none":
        return None
    on_cpu = config.device == "cpu"
    options = {"config": dataclasses.asdict(config), "on_cpu": on_cpu, "resumed_at": resumed_at}
    return Tracker(config.report_to, folder, **options)


def described(config: Config) -> dict:
    """Return the knobs as config.json keeps them: a folder's name is true from anywhere."""
    model = os.path.abspath(config.model) if os.path.isdir(config.model) else config.model
    return dataclasses.asdict(config) | {"model": model}


def placed(config: Config) -> Config:
    """Return the knobs with device and dtype settled.

    Raises `ModelError` if what is counted exactly does not fit; warns if the estimate does not.
    """
    device, dtype = place(
        config.model,
        device=config.device,
        dtype=config.dtype,
        trained=trained_of(config.model, config.lora_rank, config.freeze_vision),
        reference=config.beta > 0 and not config.lora_rank,
        processes=process_count(),
        command_that_runs="python main.py --preset tiny",
    )
    config = dataclasses.replace(config, device=device, dtype=dtype)
    work, (free, _) = work_of(config), free_memory(torch.device(device))
    about = estimate(work, free=free).total
    if about > free:
        flags = what_would_fit(work, free) or NOTHING
        told = f"GiB, {free / GIB:.1f} are free on {device}. What would fit: {flags}"
        if at_least(work) > free:
            raise ModelError(f"this run takes at least {at_least(work) / GIB:.1f} {told}")
        print(f"This run takes about {about / GIB:.1f} {told}")
    is_alone_on_cpu = device == "cpu" and process_count() == 1
    if is_alone_on_cpu and (warning := threads_beside_others(torch.get_num_threads())):
        print(warning)
    return config


def run_to_the_end(config: Config, loaded: Loaded, log: RunLog, **state) -> None:
    """Train; where that cannot go on, exit with one line that says why and what to do."""
    try:
        train(config, loaded, log, **state)
        log.close()
    except Unhealthy as error:  # it would come to the same end again
        sys.exit(f"main.py: {log.folder}: {error}. {last_checkpoint(log.folder)}")
    except RunError as error:
        problem = str(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        work = dataclasses.replace(work_of(config), micro_batch=1)  # smaller passes were tried
        found = estimate(work, free=None)
        tenth = (found.total - found.sizes["libraries"]) // 10
        less = what_would_fit(work, found.total - tenth) or NOTHING
        problem = f"out of GPU memory. What takes a tenth less: {less}"
    except (OSError, checkpoint.CheckpointError) as error:
        problem = f"cannot be written: {error}"
    else:
        return
    sys.exit(f"main.py: {log.folder}: {problem}. {how_to_go_on(log.folder)}")


if __name__ == "__main__":
    main()
