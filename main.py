"""Train a vision-language model with GRPO to read the area of a shape off a plot.

python main.py                       # Qwen2.5-VL-7B-Instruct on one H200
python main.py --preset tiny         # the bundled tiny model on a CPU, in minutes
python main.py --rotate              # variants of the task
python main.py --min-size 5 --max-size 35
python main.py --dry-run             # check the flags, show the memory and disk a run needs
python main.py --resume runs/RUN     # continue a run that was stopped or killed
accelerate launch main.py            # on all GPUs of this machine, or on several machines
"""

import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import optimi
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import Config, make_config, make_parser, saved_form, with_device, workload_of
from engine.fastpath import prepare_gpu, verify_triton
from engine.loading import Loaded, check_compatible, check_files, load, trainable
from engine.machine import threads_beside_others
from engine.model_files import ModelError
from engine.parallel import gather, is_main, process_count, process_index, rank_and_world_size
from engine.passes import PassSize
from engine.prompts import Prompts, encode_prompts
from engine.sampling import Sampler, make_generator, token_texts
from evaluate import evaluate, summarize
from grpo import (
    Rollout,
    add_reference_logprobs,
    collect_rollout,
    sync_reference,
    token_stories,
    update,
)
from harness import checkpoint, metrics, runs
from harness.health import Health, StopSignal
from harness.loader import make_loader, next_batch
from harness.memory import check_memory, disk_needs, flags_for_less, print_needs
from harness.runlog import RunError, RunLog, read_lines
from harness.terminal import ignore_output_errors
from rewards import SYSTEM_MESSAGE, Reward, make_prompt, score
from shapes import Example, make_example

UPDATE_OPTIONS = ("loss", "inner_epochs", "temperature", "beta", "clip_eps", "clip_eps_high")
UPDATE_OPTIONS += ("max_grad_norm", "max_new_tokens")
ADAM_EPS = 1e-8  # after clipping, the gradient of one of 8 billion weights is about 1e-5


# --- training ---------------------------------------------------------------------------


def train(config: Config, loaded: Loaded, log: RunLog, *, optimizer=None, steps_done=0) -> None:
    """Train the loaded policy in place, on `config.device`, and leave a run folder.

    A resumed run passes its optimizer and the number of steps done. Raises `SystemExit` after
    Ctrl-C or SIGTERM, and `Unhealthy` for a run that should not continue.
    """
    optimizer = optimizer or make_optimizer(config, loaded.policy)
    sampler = make_sampler(config, loaded)
    pass_size = PassSize(config.micro_batch, config.layers_to_checkpoint)
    health = Health(loaded.policy.dtype, read_lines(log.folder / "metrics.jsonl"))
    save = False
    with StopSignal() as stop:
        if steps_done == 0:
            evaluate_and_log(config, sampler, loaded.processor, log, steps_done=0)
        batches = iter(make_batches(config, loaded.processor, first_step=steps_done))
        progress = tqdm(
            range(steps_done, config.steps),
            unit="step",
            desc=log.folder.name,
            initial=steps_done,
            total=config.steps,
            disable=None if is_main() else True,  # None: only where there is a terminal
        )
        for step in progress:
            examples, rollout, numbers = take_step(
                config, step, batches, sampler, loaded, optimizer, pass_size
            )
            log_step(config, log, progress, numbers)
            if step % config.sample_every == 0:
                log_sample(config, step, log, loaded, pass_size, examples[0], rollout)
            for warning in health.check(numbers):
                tqdm.write(warning)
            is_last = step + 1 == config.steps
            if is_due(step, config.eval_every) or is_last:
                evaluate_and_log(config, sampler, loaded.processor, log, steps_done=step + 1)
            signal_number = stop.agreed_number()
            save = save or is_due(step, config.save_every) or is_last or signal_number
            if save and (not numbers["skipped"] or signal_number or is_last):
                keep = config.keep + bool(numbers["skipped"])  # the last good one is kept beside it
                parts = {"steps_done": step + 1, "keep": keep, **config.checkpoint_parts}
                runs.save_checkpoint(log, loaded, optimizer, **parts)
                save = False
            if signal_number and not is_last:
                runs.stop_run(log, signal_number)
        health.check_end()
    checkpoint.save_final(log.folder, loaded, steps_done=config.steps, merge=config.merge)


def take_step(
    config: Config,
    step: int,
    batches: Iterator[tuple[list[Example], Prompts]],
    sampler: Sampler,
    loaded: Loaded,
    optimizer: torch.optim.Optimizer,
    pass_size: PassSize,
) -> tuple[list[Example], Rollout, dict[str, float | str]]:
    """Roll out the next prompts and update; return examples, rollout and the step's metrics."""
    # host sync at every lap: the seconds of a phase include its own device work and no other
    watch = metrics.Stopwatch(torch.cuda.synchronize if config.device == "cuda" else lambda: None)
    lr = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    examples, prompts = next_batch(batches)
    watch.lap("prompts_s")
    rollout = collect_rollout(
        sampler,
        loaded.processor,
        prompts.to(config.device),
        partial(judge, config, examples),
        **config.pick("group_size", "temperature"),
        divide_by_std=config.loss != "dr_grpo",
        generator=make_generator(config.device, config.seed, step),
    )
    watch.lap("rollout_s")
    if config.beta > 0:
        options = {"pass_size": pass_size, "temperature": config.temperature}
        with loaded.as_reference() as reference:
            rollout = add_reference_logprobs(reference, rollout, **options)
    watch.lap("reference_s")
    options = config.pick(*UPDATE_OPTIONS)
    rollout, stats = update(loaded.policy, optimizer, rollout, pass_size=pass_size, **options)
    if is_due(step, config.sync_reference_every):
        sync_reference(loaded.policy, loaded.reference, mix=config.reference_mix)
    watch.lap("update_s")
    numbers = metrics.step_metrics(
        step,
        rewards=rollout.rewards,
        lengths=rollout.lengths,
        truncated=rollout.truncated.tolist(),  # host sync
        stats={**stats, "micro_batch": pass_size.micro_batch},
        lr=lr,
        seconds=watch.seconds,
        **config.pick("prompts_per_step", "group_size"),
    )
    return examples, rollout, numbers


def make_optimizer(config: Config, policy) -> torch.optim.Optimizer:
    """Return AdamW; on bf16 weights it adds Kahan summation, or small updates would be lost.

    Several processes shard its state: each updates some parameters and broadcasts them.
    """
    options = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": ADAM_EPS,
        "weight_decay": config.weight_decay,
        "triton": verify_triton(trainable(policy)[0]),
    }
    if process_count() == 1:
        return optimi.AdamW(trainable(policy), **options)
    return ZeroRedundancyOptimizer(trainable(policy), optimizer_class=optimi.AdamW, **options)


def learning_rate(config: Config, step: int) -> float:
    """Return the rate of a step (from 0), never zero: linear warm-up, constant, linear decay."""
    warmup = (step + 1) / max(1, config.warmup_steps)
    decay = (config.steps - step) / max(1, config.decay_steps)
    return config.lr * min(1.0, warmup, decay)


def make_sampler(config: Config, loaded: Loaded) -> Sampler:
    """Return the sampler of the policy's completions, for training and for evaluation."""
    pad_id = loaded.processor.tokenizer.pad_token_id
    return Sampler(loaded.policy, max_new_tokens=config.max_new_tokens, pad_id=pad_id)


def judge(config: Config, examples: list[Example], text: str, prompt_index: int) -> Reward:
    """Return the rewards of one completion of prompt `prompt_index`."""
    example = examples[prompt_index]
    options = config.pick("reasoning_tag", "correctness", "weights")
    return score(text, example.area, kind=example.shape.kind, **options)


def is_due(step: int, every: int) -> bool:
    """Return whether something done every n steps is due after this step; never if n is 0."""
    return every > 0 and (step + 1) % every == 0


# --- plots and prompts --------------------------------------------------------------------


def make_batch(config: Config, processor, process: int, step: int) -> tuple:
    """Return the plots of a step, list of `Example`, and the model inputs they make, `Prompts`.

    Step i uses examples i * Q to (i + 1) * Q - 1 of the training split; of several processes each
    makes its own share of them.
    """
    count = config.prompts_per_step // process_count()
    first = step * config.prompts_per_step + process * count
    options = config.pick("seed", "image_size")
    examples = [
        make_example(config.spec, split="train", index=index, **options)
        for index in range(first, first + count)
    ]
    images = [example.image for example in examples]
    prompt = make_prompt(config.reasoning_tag)
    return examples, encode_prompts(processor, images, system=SYSTEM_MESSAGE, prompt=prompt)


def make_batches(config: Config, processor, *, first_step: int = 0) -> DataLoader:
    """Return the steps' examples and prompts in order, made ahead by `config.workers` processes."""
    return make_loader(
        partial(make_batch, config, processor, process_index()),
        range(first_step, config.steps),
        workers=config.workers,
        pin_memory=config.device == "cuda",
    )


# --- logs ---------------------------------------------------------------------------------


def log_step(config: Config, log: RunLog, progress: tqdm, numbers: dict) -> None:
    """Write the step's metrics, and every few steps a line on the terminal."""
    log.write("metrics", numbers)
    progress.set_postfix(reward=f"{numbers['reward_mean']:.2f}", kl=f"{numbers['kl']:.4f}")
    if numbers["step"] % config.log_every == 0 or numbers["step"] + 1 == config.steps:
        tqdm.write(metrics.terminal_line(numbers, config.steps))


def log_sample(
    config: Config,
    step: int,
    log: RunLog,
    loaded: Loaded,
    pass_size: PassSize,
    example: Example,
    rollout: Rollout,
) -> None:
    """Write a plot and its group to samples.jsonl, with what the update did to each token."""
    options = config.pick("temperature", "loss", "max_new_tokens")
    stories = token_stories(loaded.policy, rollout, pass_size=pass_size, **options)
    group = next(rollout.micro_batches(1))
    tokens = token_texts(loaded.processor, group.completion_ids, group.lengths)
    log.write("samples", metrics.group_sample(step, example, group, tokens, stories))


def evaluate_and_log(
    config: Config, sampler: Sampler, processor, log: RunLog, *, steps_done: int
) -> None:
    """Answer the held-out examples greedily and write one line of evaluations.jsonl."""
    if config.eval_every == 0:
        return
    rows = config.prompts_per_step // process_count() * config.group_size
    answers = evaluate(
        sampler,
        processor,
        config.spec,
        examples=config.eval_examples,
        batch_size=rows,  # as in training: the sampler keeps its buffers
        **config.pick("seed", "image_size", "reasoning_tag", "correctness"),
    )
    summary = summarize(gather(list(answers)))
    log.write("evaluations", {"steps_done": steps_done, **summary})
    tqdm.write(metrics.held_out_line(summary, steps_done))


# --- from the flags to the loop -----------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, refuse what cannot work before anything is loaded, and train."""
    ignore_output_errors()
    prepare_gpu()
    parser = make_parser(__doc__)
    parsed = parser.parse_args(arguments)
    process = 0
    try:
        process, _ = rank_and_world_size()
        config = make_config(parsed)
        config, loaded, log, resumed = prepare(config, parsed)
    except (ValueError, OSError, ModelError, RunError, checkpoint.CheckpointError) as error:
        if isinstance(error, ValueError) and process > 0:
            sys.exit(2)  # all processes refuse a wrong flag, one of them says so
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    with runs.one_line_errors(log.folder, lambda: flags_for_less(workload_of(config))):
        train(config, loaded, log, **resumed)
        log.close()
    run = shlex.quote(str(log.folder))
    print(f"{log.folder}: done. Next: python plot_rewards.py {run} ; python evaluate.py {run}")


def prepare(config: Config, parsed: Namespace) -> tuple[Config, Loaded, RunLog, dict]:
    """Return the options with device and dtype, the model, the run's log, and what it resumes with.

    The last is empty for a new run. Ends the process after a --dry-run. Raises `ValueError`,
    `OSError`, `ModelError`, `RunError` or `CheckpointError`, each one line for the user.
    """
    run, saved, folders = getattr(parsed, "resume", None), None, []
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    runs.connect_processes(config.prompts_per_step, on_cpu=on_cpu)
    if run:
        options = config.pick("steps", "decay_steps", "model", "merge")
        saved = runs.checkpoint_to_resume(run, **options)
    else:
        default_name = getattr(parsed, "preset", None) or Path(config.model).resolve().name
        folders = runs.candidate_folders(Path(config.runs), config.name, default_name=default_name)
    check_compatible(config.model, image_size=config.image_size, lora_rank=config.lora_rank)
    if getattr(parsed, "dry_run", False):
        print(check_files(config.model))
        disk = disk_needs(workload_of(config), run or Path(config.runs), **config.disk_options)
        sys.exit(0 if print_needs(workload_of(config), disk) else 2)
    config = with_device(config)
    check_memory(workload_of(config))
    alone = config.device == "cpu" and process_count() == 1
    if alone and (warning := threads_beside_others(torch.get_num_threads())):
        print(warning)
    options = config.pick("device", "dtype", "freeze_vision", "lora_rank", "seed")
    loaded = load(config.model, reference=config.beta > 0, **options)
    described = {"config": saved_form(config), **config.pick("report_to", "device")}
    if run:
        optimizer = make_optimizer(config, loaded.policy)
        steps_done = checkpoint.restore(saved, loaded, optimizer) if saved else 0
        log = runs.resume_run(run, steps_done=steps_done, **described)
        resumed = {"optimizer": optimizer, "steps_done": steps_done}
    else:
        log, resumed = runs.start_run(folders, **described), {}
    needs = disk_needs(workload_of(config), log.folder, **config.disk_options)
    if not needs.has_room:
        print(needs)
    return config, loaded, log, resumed


if __name__ == "__main__":
    main()
