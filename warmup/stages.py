"""The four stages of a warm-up: each trains a part of the model, and says what it reached.

A function of a stage trains one round, prints held-out figures, and returns whether they meet the
stage's target.
"""

import math
from collections.abc import Callable
from functools import partial
from statistics import fmean

import optimi
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine.fastpath import verify_triton
from engine.prompts import Prompts, encode_images, send
from engine.sampling import Sampler
from engine.scoring import completion_logprobs
from evaluate import evaluate, summarize
from harness.loader import make_loader
from rewards import CORRECTNESS, REASONING_TAGS, parse_area, score
from shapes import ShapeSpec
from warmup.answers import Flaws
from warmup.lessons import IGNORED, Lessons, random_answers
from warmup.seeing import DenseHead, dense_loss, dense_targets

HELD_OUT = 256  # calculations or plots that a round is judged by
NEW_LR = 2e-3  # of weights that start at random
STUMBLE_LR = 0.2  # times --lr: flaws must not cost what was learned
CALCULATED = 0.98  # targets: share of calculations right within 1 %
NAMED = 0.97  # share of classes named
OFF = 0.4  # grid units: mean error of a dimension that the tower reads
FOLLOWS, AREA_ERROR = 0.98, 0.04  # share of answers that follow; their mean relative error
JUDGED = ("relative_error_mean", "shape_named", "answer_follows", "strict_xml")


def calculate(model, lessons: Lessons) -> bool:
    """Teach the language model what the taught calculations give; return whether it knows."""
    args, language_model = lessons.args, model.model.language_model
    embeddings = language_model.embed_tokens

    def loss_of(ids: Tensor, labels: Tensor) -> Tensor:
        ids, labels = send(ids, model.device), send(labels, model.device)
        hidden = language_model(inputs_embeds=embeddings(ids), use_cache=False).last_hidden_state
        logits = hidden[:, :-1] @ embeddings.weight.T
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)

    parameters = list(language_model.parameters())
    optimizers = optimizers_of_new(parameters, embeddings.weight)
    batches = make_loader(lessons.calculations, range(args.calculate_steps), workers=args.workers)
    train(batches, loss_of, parameters, optimizers, lr=NEW_LR, name="calculate")
    right = share_calculated(model, lessons)
    print(f"calculate: {100 * right:.1f} % of {HELD_OUT} calculations right within 1 %", flush=True)
    return right >= CALCULATED


@torch.no_grad()
def share_calculated(model, lessons: Lessons) -> float:
    """Return the share of fresh random calculations whose greedy result is right within 1 %."""
    tokenizer = lessons.processor.tokenizer
    unseen = lessons.args.calculate_steps  # the step after the last
    answers = random_answers(lessons.specs[0], HELD_OUT, lessons.rng(unseen))
    texts = ["".join(answer.partition("<answer>")[:2]) for answer in answers]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    ids = model.generate(**prompts.to(model.device), max_new_tokens=16, do_sample=False)
    written = tokenizer.batch_decode(ids, skip_special_tokens=True)  # host sync
    pairs = zip(written, answers, strict=True)
    right = [score(text, parse_area(answer)).relative_error <= 0.01 for text, answer in pairs]
    return sum(right) / HELD_OUT


def see(model, lessons: Lessons) -> bool:
    """Teach the vision tower what each visual token can say; return whether it sees."""
    args, visual = lessons.args, model.model.visual
    torch.manual_seed(args.seed)
    head = DenseHead(visual.config.out_hidden_size).to(model.device)

    def loss_of(prompts: Prompts, targets: tuple[Tensor, ...]) -> Tensor:
        features = encode_images(model, prompts.to(model.device)).image_features
        return dense_loss(head, features, targets)

    parameters = [*visual.parameters(), *head.parameters()]
    batches = make_loader(lessons.looks, range(args.see_steps), workers=args.workers)
    train(batches, loss_of, parameters, optimizers_of_new(parameters), lr=NEW_LR, name="see")
    seen = [sight(model, head, lessons, spec) for spec in lessons.specs]
    for task, (named, off) in zip(("upright", "turned"), seen, strict=True):
        print(
            f"see: {task}, class {100 * named:.1f} %, dimensions off by {off:.2f} units", flush=True
        )
    return all(named >= NAMED and off <= OFF for named, off in seen)


@torch.no_grad()
def sight(model, head: DenseHead, lessons: Lessons, spec: ShapeSpec) -> tuple[float, float]:
    """Return the share of classes that are right, and the mean error of a dimension.

    Of held-out plots; the mean of what the tokens say counts.
    """
    named, errors = [], []
    for examples in lessons.held_out(spec, HELD_OUT):
        prompts = lessons.encode(examples).to(model.device)
        outputs = head(encode_images(model, prompts).image_features)
        logits, size, _ = (output.mean(1).cpu() for output in outputs)  # host sync
        classes, sizes, _ = dense_targets(examples, lessons.args.image_size)
        named.append(logits.argmax(-1) == classes)
        errors.append((size - sizes).abs())
    return torch.cat(named).float().mean().item(), torch.cat(errors).mean().item()


def speak(model, lessons: Lessons) -> bool:
    """Teach to write down what is seen, and to calculate with that; return whether it does."""
    args = lessons.args
    teach_answers(model, lessons, Flaws(), args.speak_steps, lr=args.lr, name="speak")
    return not args.from_scratch or judge(model, lessons, "speak")


def stumble(model, lessons: Lessons) -> bool:
    """Teach some flawed answers; how far that goes is set by the number of steps alone."""
    args = lessons.args
    flaws, lr = Flaws(args.sloppy, args.mistakes, args.misread), STUMBLE_LR * args.lr
    teach_answers(model, lessons, flaws, args.stumble_steps, lr=lr, name="stumble")
    if args.from_scratch:
        judge(model, lessons, "stumble")
    return True


def teach_answers(
    model, lessons: Lessons, flaws: Flaws, steps: int, *, lr: float, name: str
) -> None:
    """Train the whole model on answers to plots, with cross-entropy over all answer tokens."""

    def loss_of(prompts: Prompts, ids: Tensor, lengths: list[int]) -> Tensor:
        logprobs, _ = completion_logprobs(
            model, prompts.to(model.device), send(ids, model.device), lengths, temperature=1.0
        )
        return -logprobs.sum() / sum(lengths)

    parameters = list(model.parameters())
    triton = verify_triton(parameters[0])
    options = {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.01, "triton": triton}
    batches = make_loader(
        partial(lessons.answers, flaws=flaws), range(steps), workers=lessons.args.workers
    )
    train(batches, loss_of, parameters, [optimi.AdamW(parameters, **options)], lr=lr, name=name)


def judge(model, lessons: Lessons, name: str) -> bool:
    """Print what greedy answers to held-out plots are worth; return whether the target is met.

    Both tasks and both tags count together: one alone has too few answers to be sure of a percent.
    """
    all_found = []
    for tag in REASONING_TAGS:
        sampler = Sampler(model, max_new_tokens=64, pad_id=lessons.processor.tokenizer.pad_token_id)
        for task, spec in zip(("upright", "turned"), lessons.specs, strict=True):
            found = greedy_answers(sampler, lessons, spec, tag)
            all_found.append({key: found[key] or 0.0 for key in JUDGED})
            error, named, follows, strict_xml = (100 * value for value in all_found[-1].values())
            print(
                f"{name}: {task}, <{tag}>, area off by {error:.1f} %, class named {named:.1f} %, "
                f"answer follows {follows:.1f} %, strict XML {strict_xml:.1f} %",
                flush=True,
            )
    error, named, follows, _ = (fmean(found[key] for found in all_found) for key in JUDGED)
    return named >= NAMED and follows >= FOLLOWS and error <= AREA_ERROR


def greedy_answers(
    sampler: Sampler, lessons: Lessons, spec: ShapeSpec, tag: str
) -> dict[str, float]:
    """Return the summary of greedy answers to held-out plots of a task."""
    args = lessons.args
    answers = evaluate(
        sampler,
        lessons.processor,
        spec,
        examples=HELD_OUT,
        seed=args.seed,
        image_size=args.image_size,
        reasoning_tag=tag,
        correctness=CORRECTNESS[0],
        batch_size=min(HELD_OUT, args.batch_size),
    )
    return summarize(list(answers))


# --- training ---------------------------------------------------------------------------


def train(
    batches: DataLoader,
    loss_of: Callable[..., Tensor],
    parameters: list[Parameter],
    optimizers: list[torch.optim.Optimizer],
    *,
    lr: float,
    name: str,
) -> None:
    """Minimize `loss_of(*batch)`; the rate warms up over 5 % of the batches and decays to 0."""
    progress = tqdm(batches, unit="step", desc=name, disable=None)
    for step, batch in enumerate(progress):
        loss = loss_of(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * warmup_cosine(step, len(batches))
            optimizer.step()
            optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")  # host sync


def warmup_cosine(step: int, steps: int) -> float:
    """Return the learning-rate factor: linear warm-up over the first 5 %, cosine decay to 0."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)


def optimizers_of_new(
    parameters: list[Parameter], embeddings: Parameter | None = None
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of weights that start at random: Muon for their matrices.

    Muon (Jordan et al. 2024) gives every direction of an update the same length; scaled to the
    size of AdamW's updates (Liu et al. 2025, arXiv:2502.16982), both share one rate.
    """
    matrices = [each for each in parameters if each.ndim == 2 and each is not embeddings]
    others = [each for each in parameters if each.ndim != 2 or each is embeddings]
    decay = {"lr": NEW_LR, "weight_decay": 0.01}
    return [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **decay),
        torch.optim.AdamW(others, betas=(0.9, 0.99), **decay),
    ]
