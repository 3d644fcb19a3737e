"""The peers of our trainer: a GRPO step in stock transformers, and one in TRL.

Both do the work of `main.py --preset tiny` on a CPU in fp32: the same checkpoint, plots, rewards,
group size, lengths and loss. Run each in a process of its own:

    python benchmarks/peers.py naive --steps 4
    python benchmarks/peers.py static --steps 4  # naive, with a cache that compiles on a GPU
    python benchmarks/peers.py trl --steps 4
    python benchmarks/peers.py naive --device cuda --model DIR --prompts 4 --group-size 8 \\
        --max-new-tokens 250 --lr 1e-6

Prints one JSON line per step; the first step is a warm-up, so don't count it. On a GPU, weights are
bf16.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project is not an installed package

from rewards import SYSTEM_MESSAGE, Reward, make_prompt, score  # noqa: E402
from shapes import Example, ShapeSpec, make_example  # noqa: E402

STD_EPS = 1e-4  # added to the group's standard deviation
CLIP_EPS = 0.2  # of the ratio, on either side
MAX_GRAD_NORM = 1.0
ADAM = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
PHASES = ("prompts_s", "rollout_s", "reference_s", "update_s")
Report = Callable[[dict], None]  # is handed each step when it is done


@dataclass(frozen=True, slots=True)
class Task:
    """The work of one step. The defaults are those of the tiny preset."""

    model: str = str(ROOT / "tiny")
    prompts: int = 8
    group_size: int = 16
    max_new_tokens: int = 56
    image_size: int = 224
    beta: float = 0.05
    lr: float = 8e-5
    temperature: float = 1.0
    seed: int = 0
    rows_per_pass: int = 8  # per forward and backward pass: 8 % faster than all of 64 at once
    device: str = "cpu"

    @property
    def rows(self) -> int:
        """Return the number of completions per step."""
        return self.prompts * self.group_size

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16


def flags_of(task: Task) -> list[str]:
    """Return the command-line flags that describe this task, for `task_of`."""
    names = [field.name for field in dataclasses.fields(Task)]
    return [word for name in names for word in (flag_of(name), str(getattr(task, name)))]


def flag_of(name: str) -> str:
    """Return the flag of a field of Task."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, task: Task | None = None) -> None:
    """Add a flag for each field of Task; the defaults are `task`'s, or the tiny preset's."""
    for field in dataclasses.fields(Task):
        default = getattr(task or Task(), field.name)
        parser.add_argument(flag_of(field.name), type=field.type, default=default)


def task_of(args: argparse.Namespace) -> Task:
    """Return the task that a parsed command line describes."""
    return Task(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Task)})


def peak(task: Task) -> dict[str, float]:
    """Return the peak of allocated GPU memory; nothing on a CPU."""
    return {} if task.device == "cpu" else {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def now(task: Task) -> float:
    """Return the time, once the device has finished its work."""
    if task.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def draw(task: Task, index: int) -> Example:
    """Return example `index` of the training split; each step takes the next `task.prompts`."""
    options = {"seed": task.seed, "split": "train", "image_size": task.image_size}
    return make_example(ShapeSpec(), index=index, **options)


# --- stock transformers -----------------------------------------------------------------


def naive_steps(task: Task, steps: int, report: Report, *, cache: str = "dynamic") -> None:
    """Report the timings of GRPO steps in plain transformers; `cache` is that of its `generate`."""
    torch.manual_seed(task.seed)
    processor = AutoProcessor.from_pretrained(task.model)
    policy, reference = load(task), load(task).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=task.lr, **ADAM)
    temperature = task.temperature
    parts = [slice(a, a + task.rows_per_pass) for a in range(0, task.rows, task.rows_per_pass)]
    for step in range(steps):
        times = [now(task)]
        indices = range(step * task.prompts, (step + 1) * task.prompts)
        examples = [draw(task, index) for index in indices]
        prompts = encode_prompts(processor, examples, task.group_size)
        prompts = {name: value.to(task.device) for name, value in prompts.items()}
        times.append(now(task))

        batch, completions, mask = roll_out(policy, prompts, task, cache)
        rewards = judge(processor, completions, examples)
        totals = torch.tensor([reward.total for reward in rewards]).view(-1, task.group_size)
        advantages = group_advantages(totals).to(task.device)
        times.append(now(task))

        with torch.no_grad():
            scored = [
                token_logprobs(reference, inputs_of(batch, part), completions[part], temperature)
                for part in parts
            ]
        times.append(now(task))

        for part, ref_logprobs in zip(parts, scored, strict=True):
            inputs = inputs_of(batch, part)
            logprobs = token_logprobs(policy, inputs, completions[part], temperature)
            losses = row_losses(logprobs, ref_logprobs, advantages[part], mask[part], task.beta)
            (losses.sum() / task.rows).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        times.append(now(task))

        laps = [end - start for start, end in pairwise(times)]
        report(
            {
                "step_s": sum(laps),
                "completion_tokens": int(mask.sum()),
                "prompt_tokens": prompts["input_ids"].shape[1],
                **means(rewards),
                **dict(zip(PHASES, laps, strict=True)),
                **peak(task),
            }
        )


def load(task: Task) -> Qwen2_5_VLForConditionalGeneration:
    """Return the task's model, in evaluation mode: it has no dropout anyway."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(task.model, dtype=task.dtype)
    return model.to(task.device).eval()


def chat(prompt: str) -> list[dict]:
    """Return the chat messages of one prompt with one image."""
    question = [{"type": "image"}, {"type": "text", "text": prompt}]
    return [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": question}]


def encode_prompts(processor, examples: list[Example], group_size: int) -> dict[str, Tensor]:
    """Return the model inputs of all rows: each prompt and its image, repeated for its group."""
    messages = chat(make_prompt())
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [example.image for example in examples]
    inputs = processor(
        text=[text] * len(images),
        images=images,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    # the processor joins the patches of all images; with an image axis they repeat like the rest
    inputs["pixel_values"] = inputs["pixel_values"].unflatten(0, (len(images), -1))
    return {name: value.repeat_interleave(group_size, 0) for name, value in inputs.items()}


def inputs_of(batch: dict[str, Tensor], rows: slice = slice(None)) -> dict[str, Tensor]:
    """Return some rows in the model's format: with the patches of all images joined again."""
    some = {name: value[rows] for name, value in batch.items()}
    return {**some, "pixel_values": some["pixel_values"].flatten(0, 1)}


def roll_out(
    policy: Qwen2_5_VLForConditionalGeneration, prompts: dict[str, Tensor], task: Task, cache: str
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the inputs of a pass over prompts and completions, the completions and their mask."""
    sequences = policy.generate(
        **inputs_of(prompts),
        do_sample=True,
        temperature=task.temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=task.max_new_tokens,
        # the passes would look for an image that belongs to it; TRL excludes it too
        suppress_tokens=[policy.config.image_token_id],
        cache_implementation=cache,
    )
    completions = sequences[:, prompts["input_ids"].shape[1] :]
    stop_ids = torch.tensor(policy.generation_config.eos_token_id, device=completions.device)
    is_stop = torch.isin(completions, stop_ids).long()
    mask = (is_stop.cumsum(1) - is_stop) == 0  # no stop token before this one
    no_images = torch.zeros_like(completions)
    batch = {
        **prompts,
        "input_ids": sequences,
        "attention_mask": torch.cat([prompts["attention_mask"], mask.long()], 1),
        "mm_token_type_ids": torch.cat([prompts["mm_token_type_ids"], no_images], 1),
    }
    return batch, completions, mask


def judge(processor, completions: Tensor, examples: list[Example]) -> list[Reward]:
    """Return the rewards of all rows."""
    texts = processor.batch_decode(completions, skip_special_tokens=True)
    group_size = len(texts) // len(examples)
    areas = [example.area for example in examples for _ in range(group_size)]
    return [score(text, area) for text, area in zip(texts, areas, strict=True)]


def means(rewards: list[Reward]) -> dict[str, float]:
    """Return the mean of a step's rewards, and of its area rewards."""
    return {
        "reward_mean": statistics.fmean(reward.total for reward in rewards),
        "area_reward": statistics.fmean(reward.area_correctness for reward in rewards),
    }


def group_advantages(rewards: Tensor) -> Tensor:
    """Return each row's advantage, (rows, 1), from rewards (prompts, group size)."""
    centered = rewards - rewards.mean(1, keepdim=True)
    return (centered / (rewards.std(1, keepdim=True) + STD_EPS)).view(-1, 1)


def token_logprobs(
    model: Qwen2_5_VLForConditionalGeneration,
    inputs: dict[str, Tensor],
    completions: Tensor,
    temperature: float,
) -> Tensor:
    """Return the log-probs of the completions' tokens, in the shape of `completions`."""
    logits = model(**inputs, use_cache=False).logits
    logits = logits[:, -completions.shape[1] - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0]


def row_losses(
    logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """Return each row's clipped surrogate loss with the KL penalty, averaged over its tokens."""
    ratio = (logprobs - logprobs.detach()).exp()  # 1, because each rollout is used once
    clipped = ratio.clamp(1 - CLIP_EPS, 1 + CLIP_EPS)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    difference = ref_logprobs - logprobs
    kl = difference.exp() - difference - 1
    losses = (beta * kl - surrogate) * mask
    return losses.sum(1) / mask.sum(1)


# --- TRL --------------------------------------------------------------------------------


def trl_steps(task: Task, steps: int, report: Report) -> None:
    """Report the timings of optimizer steps of TRL's GRPOTrainer."""
    from datasets import IterableDataset  # imported here: the other peer needs neither package
    from trl import GRPOConfig, GRPOTrainer

    log = StepLog(task, report)
    rows = {"task": task, "count": steps * task.prompts}
    # stdout is for the results, and the run must leave no files behind
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=task.model,
            reward_funcs=log.reward,
            args=GRPOConfig(output_dir=folder, **trl_settings(task, steps)),
            train_dataset=IterableDataset.from_generator(trl_rows, gen_kwargs=rows),
            callbacks=[log],
        )
        trainer.train()


def trl_settings(task: Task, steps: int) -> dict:
    """Return the settings that make TRL's step the same work, and those that make it fast."""
    return {
        "max_steps": steps,
        "num_generations": task.group_size,
        "max_completion_length": task.max_new_tokens,
        "temperature": task.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "loss_type": "grpo",
        "beta": task.beta,
        "use_bias_correction_kl": False,  # plain k3, as in DeepSeekMath
        "num_iterations": 1,
        "epsilon": CLIP_EPS,
        "learning_rate": task.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": ADAM["betas"][0],
        "adam_beta2": ADAM["betas"][1],
        "adam_epsilon": ADAM["eps"],
        "weight_decay": ADAM["weight_decay"],
        "max_grad_norm": MAX_GRAD_NORM,
        "shuffle_dataset": False,
        "seed": task.seed,
        "use_cpu": task.device == "cpu",
        "bf16": False,  # no autocast: on a GPU the weights themselves are bf16
        "model_init_kwargs": {"dtype": task.dtype},
        # for speed: no recomputing, saving or reporting; TRL samples all rows at once anyway
        "per_device_train_batch_size": task.rows_per_pass,
        "gradient_accumulation_steps": task.rows // task.rows_per_pass,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "log_multimodal": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def trl_rows(task: Task, count: int) -> Iterator[dict]:
    """Yield the rows of the dataset, drawn on demand; TRL repeats each row for its group."""
    messages = chat(make_prompt())
    for index in range(count):
        example = draw(task, index)
        yield {"prompt": messages, "image": example.image, "area": example.area}


class StepLog(TrainerCallback):
    """Times from the end of one optimizer step to the end of the next, which covers a whole step.

    It is also the reward function, the only hook that sees a step's completions.
    """

    def __init__(self, task: Task, report: Report) -> None:
        self.task, self.report = task, report
        self.rollout: dict = {}
        self.tokens_seen = 0
        self.last = 0.0

    def reward(self, completions, completion_ids, area, trainer_state, **_) -> list[float]:
        """Return the rewards of a step's completions."""
        texts = [messages[-1]["content"] for messages in completions]
        rewards = [score(text, truth) for text, truth in zip(texts, area, strict=True)]
        tokens = sum(map(len, completion_ids))
        new_tokens = trainer_state.num_input_tokens_seen - self.tokens_seen
        self.tokens_seen += new_tokens
        self.rollout = {
            "completion_tokens": tokens,
            "prompt_tokens": (new_tokens - tokens) // len(texts),
            **means(rewards),
        }
        return [reward.total for reward in rewards]

    def on_train_begin(self, args, state, control, **_) -> None:
        """Start the clock."""
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **_) -> None:
        """Report a step."""
        end = now(self.task)
        self.report({"step_s": end - self.last, **self.rollout, **peak(self.task)})
        self.last = end


# --- command line -----------------------------------------------------------------------


PEERS = {
    "naive": naive_steps,
    "static": partial(naive_steps, cache="static"),
    "trl": trl_steps,  # with a static cache too it would not compile: TRL disables that
}


def main(arguments: list[str] | None = None) -> None:
    """Print one JSON line per step of a peer."""
    parser = argparse.ArgumentParser(description="Time a peer of our trainer on the tiny task.")
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="default: 4")
    add_flags(parser)
    args = parser.parse_args(arguments)
    stdout = sys.stdout  # TRL's own prints go to stderr meanwhile
    report = partial(print, file=stdout, flush=True)
    PEERS[args.peer](task_of(args), args.steps, lambda step: report(json.dumps(step)))


if __name__ == "__main__":
    main()
