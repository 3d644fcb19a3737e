"""Group Relative Policy Optimization, by hand, in reading order: rollout, advantages, loss, update.

Nothing here knows the task: prompts and the reward function are arguments.

Dimension legend for all shape comments:
    Q  prompts per step
    G  completions per prompt (the group)
    B  = Q * G rows, group-major: row b belongs to prompt b // G
    P  tokens per prompt, the same for all prompts
    C  tokens per completion, right-padded to the longest one of the step
    V  vocabulary

References:
    GRPO     Shao et al. 2024, DeepSeekMath, arXiv:2402.03300
    DAPO     Yu et al. 2025, arXiv:2503.14476
    Dr. GRPO Liu et al. 2025, Understanding R1-Zero-Like Training, arXiv:2503.20783
    k3       Schulman 2020, Approximating KL Divergence, http://joschu.net/blog/kl-approx.html
    PPO      Schulman et al. 2017, arXiv:1707.06347 (the clipped ratio)
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.parallel import (
    all_reduce_gradients,
    all_reduce_max,
    all_reduce_sum,
    gather,
    process_count,
)
from engine.passes import PassSize, within_memory
from engine.prompts import Prompts, encode_images, send
from engine.sampling import Sampler, completion_texts, stop_ids
from engine.scoring import completion_logprobs

LOSSES = ("grpo", "dapo", "dr_grpo")
STD_EPS = 1e-4  # added to a group's standard deviation
MAX_LOG_RATIO = 20.0  # clamp before exp: e^20 is still finite in fp32


@dataclass(frozen=True)
class Rollout:
    """One step's completions, and everything the loss needs to know about them."""

    prompts: Prompts  # Q of them, with image features that hold until the next update
    completion_ids: Tensor  # (B, C)
    completion_mask: Tensor  # (B, C) bool, true up to and including the stop token
    lengths: list[int]  # B, tokens per row: the mask's row sums, on the host
    sampled_logprobs: Tensor  # (B, C) fp32, recorded by the sampler
    truncated: Tensor  # (B,) bool: hit the token limit without a stop token
    texts: list[str]  # B
    rewards: list  # B, whatever the reward function returns
    advantages: Tensor  # (Q, G)
    ref_logprobs: Tensor | None = None  # (B, C) under the reference; None when beta is 0
    old_logprobs: Tensor | None = None  # (B, C) before the first update; None until then

    def micro_batches(self, size: int) -> Iterator["Rollout"]:
        """Yield the rollout in parts of `size` prompts, each with all its completions."""
        group_size = self.advantages.shape[1]
        for start in range(0, len(self.prompts), size):
            prompts = slice(start, start + size)
            rows = slice(start * group_size, (start + size) * group_size)
            yield Rollout(
                prompts=self.prompts[prompts],
                completion_ids=self.completion_ids[rows],
                completion_mask=self.completion_mask[rows],
                lengths=self.lengths[rows],
                sampled_logprobs=self.sampled_logprobs[rows],
                truncated=self.truncated[rows],
                texts=self.texts[rows],
                rewards=self.rewards[rows],
                advantages=self.advantages[prompts],
                ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[rows],
                old_logprobs=None if self.old_logprobs is None else self.old_logprobs[rows],
            )


# --- rollout ----------------------------------------------------------------------------


def collect_rollout(
    sampler: Sampler,
    processor,
    prompts: Prompts,
    reward_fn: Callable[[str, int], object],
    *,
    group_size: int,
    temperature: float,
    divide_by_std: bool,
    generator: torch.Generator,
) -> Rollout:
    """Return G sampled completions of each prompt, with their rewards and advantages.

    `reward_fn(text, q)` scores one completion of prompt q; the reward is its result's `total`.
    Images are encoded once, here, for every pass of the policy until its next update.
    """
    prompts = encode_images(sampler.model, prompts)  # keeps the graph: the update backpropagates
    completions = sampler.generate(
        prompts, group_size=group_size, temperature=temperature, generator=generator
    )
    texts = completion_texts(processor, completions, stop_ids(sampler.model))
    rewards = [reward_fn(text, row // group_size) for row, text in enumerate(texts)]
    totals = torch.tensor([reward.total for reward in rewards])
    totals = send(totals, completions.ids.device).view(-1, group_size)
    return Rollout(
        prompts=prompts,
        completion_ids=completions.ids,
        completion_mask=completions.mask,
        lengths=completions.lengths,
        sampled_logprobs=completions.logprobs,
        truncated=completions.truncated,
        texts=texts,
        rewards=rewards,
        advantages=group_advantages(totals, divide_by_std=divide_by_std),
    )


@torch.no_grad()
def add_reference_logprobs(
    reference, rollout: Rollout, *, pass_size: PassSize, temperature: float
) -> Rollout:
    """Return the rollout with the log-probs of its tokens under the frozen reference."""
    prompts = rollout.prompts
    if prompts.image_features is None or prompts.image_features.requires_grad:
        prompts = prompts.without_image_features()  # the reference has a vision tower of its own
    ref_logprobs = within_memory(
        rollout_logprobs,
        reference,
        replace(rollout, prompts=prompts),
        pass_size=pass_size,
        temperature=temperature,
    )
    return replace(rollout, ref_logprobs=ref_logprobs)


def rollout_logprobs(model, rollout: Rollout, *, pass_size: PassSize, temperature: float) -> Tensor:
    """Return the log-probs of a rollout's tokens under a model, (B, C)."""
    logprobs = [
        completion_logprobs(
            model, part.prompts, part.completion_ids, part.lengths, temperature=temperature
        )[0]
        for part in rollout.micro_batches(pass_size.micro_batch)
    ]
    return torch.cat(logprobs)


# --- advantages -------------------------------------------------------------------------


def group_advantages(rewards: Tensor, *, divide_by_std: bool = True) -> Tensor:
    """Return `(r - mean(group)) / (std(group) + 1e-4)`, (Q, G), from rewards (Q, G).

    Uses the sample standard deviation (G - 1); Dr. GRPO does not divide by it. A group of equal
    rewards gives exactly zero: dividing must not turn the mean's rounding error into a signal.

    >>> group_advantages(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]), divide_by_std=False)
    tensor([[-1.,  0.,  1.],
            [ 0.,  0.,  0.]])
    """
    centered = rewards - rewards.mean(1, keepdim=True)
    scale = rewards.std(1, keepdim=True) + STD_EPS if divide_by_std else 1.0
    return torch.where(has_spread(rewards)[:, None], centered / scale, 0.0)


def has_spread(rewards: Tensor) -> Tensor:
    """Return whether the rewards (Q, G) of each group differ, (Q,): equal ones teach nothing."""
    return rewards.amax(1) > rewards.amin(1)


# --- loss -------------------------------------------------------------------------------


def token_weights(completion_mask: Tensor, *, loss: str, max_new_tokens: int) -> Tensor:
    """Return the weight of each token in the step's loss, (B, C): how the loss averages tokens.

    grpo     1 / (B * length of the row): mean over tokens, then over rows (DeepSeekMath, eq. 3)
    dapo     1 / tokens of the step: every token counts the same (DAPO, eq. 8)
    dr_grpo  1 / (B * max_new_tokens): a constant, so length does not matter (Dr. GRPO, sec. 3.2)

    The weights come from the whole step, before the first backward pass. A micro-batch's loss is a
    weighted sum over tokens, so micro-batches add up to the exact gradient of one batch. So do the
    parts of several processes: B and the tokens of the step count all of them.
    """
    mask = completion_mask.float()
    rows = len(mask) * process_count()
    if loss == "grpo":
        return mask / (rows * mask.sum(1, keepdim=True))
    if loss == "dapo":
        return mask / all_reduce_sum(mask.sum())
    if loss == "dr_grpo":
        return mask / (rows * max_new_tokens)
    raise ValueError(f"loss {loss!r}: must be one of {', '.join(LOSSES)}")


def k3_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return Schulman's k3 estimate of KL(policy || reference) per token, never negative.

    `exp(d) - d - 1` with d = log ref - log policy. Its mean under the policy is the exact KL.

    >>> k3_kl(torch.tensor([-1.0]), torch.tensor([-1.0]))
    tensor([0.])
    """
    difference = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(difference) - difference


def grpo_loss(
    logprobs: Tensor,
    rollout: Rollout,
    weights: Tensor,
    *,
    beta: float,
    clip_eps: float,
    clip_eps_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, a weighted sum over tokens, and statistics, each a sum over tokens.

    Per token, with ratio = exp(logprob - old logprob) and the row's advantage A:
        `-min(ratio * A, clip(ratio, 1 - clip_eps, 1 + clip_eps_high) * A) + beta * k3`

    All tensors are (B, C). Until the first update the old log-probs are the policy's own, detached:
    the ratio is exactly 1, and only its gradient matters. The loss is then close to zero, because
    advantages cancel within a group. That is normal.
    """
    mask = rollout.completion_mask
    old_logprobs = logprobs.detach() if rollout.old_logprobs is None else rollout.old_logprobs
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    advantages = rollout.advantages.flatten()[:, None]  # (B, 1): shared by all tokens of a row
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    kl = torch.zeros_like(logprobs)
    if rollout.ref_logprobs is not None:
        kl = k3_kl(logprobs, rollout.ref_logprobs)
    loss = (weights * (beta * kl - surrogate)).sum()
    with torch.no_grad():
        is_clipped = surrogate < ratio * advantages
        gap = (logprobs - rollout.sampled_logprobs).abs()
        stats = {
            "kl": (kl * mask).sum(),
            "ratio": (ratio * mask).sum(),
            "clip_fraction": (is_clipped & mask).sum(),
            "sampler_gap_mean": (gap * mask).sum(),
            "sampler_gap_max": (gap * mask).max(),
        }
    return loss, stats


# --- update -----------------------------------------------------------------------------


def update(
    policy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    *,
    pass_size: PassSize,
    loss: str,
    inner_epochs: int,
    temperature: float,
    beta: float,
    clip_eps: float,
    clip_eps_high: float,
    max_grad_norm: float,
    max_new_tokens: int,
) -> tuple[Rollout, dict[str, float | str]]:
    """Take `inner_epochs` optimizer steps on one rollout; return it and the last one's statistics.

    The rollout gains its old log-probs, and loses its image features: they are out of date now.
    Statistics are token means; the sampler's gap is the first epoch's, by the policy that sampled.
    An update with a number that is not finite is `skipped`; `not_finite` names the number.
    """
    weights = token_weights(rollout.completion_mask, loss=loss, max_new_tokens=max_new_tokens)
    skipped, not_finite, first_stats = 0, "", {}
    for _ in range(inner_epochs):
        logprobs, stats = within_memory(
            backward,
            policy,
            rollout,
            weights,
            pass_size=pass_size,
            temperature=temperature,
            beta=beta,
            clip_eps=clip_eps,
            clip_eps_high=clip_eps_high,
        )
        all_reduce_gradients(policy.parameters())
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        if wrong := non_finite_names(rollout, loss=stats["loss"], gradient=grad_norm):
            skipped, not_finite = skipped + 1, wrong
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        first_stats = first_stats or stats
        if rollout.old_logprobs is None:
            prompts = rollout.prompts.without_image_features()
            rollout = replace(rollout, prompts=prompts, old_logprobs=logprobs)
    gap = {name: value for name, value in first_stats.items() if name.startswith("sampler_gap")}
    stats = {**stats, **gap, "grad_norm": grad_norm}
    numbers = {name: float(value) for name, value in stats.items()}  # host sync
    return rollout, {**numbers, "skipped": skipped, "not_finite": not_finite}


def non_finite_names(rollout: Rollout, **numbers: Tensor) -> str:
    """Return which of the rewards and `numbers` are nan or infinite, by name; "" if none are.

    The rewards need a check of their own: a group with a nan among them has advantages of 0.
    """
    rewards_are_finite = all(math.isfinite(reward.total) for reward in rollout.rewards)
    wrong = [] if all(gather([rewards_are_finite])) else ["reward"]
    wrong += [name for name, number in numbers.items() if not number.isfinite()]  # host sync
    return ", ".join(wrong)


def backward(
    policy,
    rollout: Rollout,
    weights: Tensor,
    *,
    pass_size: PassSize,
    temperature: float,
    **loss_options,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a step's gradient from scratch; return log-probs (B, C), detached, and statistics.

    All micro-batches share the image features as one leaf, so that its summed gradient goes back
    through the vision tower only once.
    """
    policy.zero_grad(set_to_none=True)
    features = encode_images(policy, rollout.prompts).image_features
    leaf = features.detach().requires_grad_(features.requires_grad)
    rollout = replace(rollout, prompts=replace(rollout.prompts, image_features=leaf))
    parts = list(rollout.micro_batches(pass_size.micro_batch))
    all_logprobs, all_stats = [], []
    for part, part_weights in zip(parts, weights.split([len(p.texts) for p in parts]), strict=True):
        logprobs, entropy = completion_logprobs(
            policy,
            part.prompts,
            part.completion_ids,
            part.lengths,
            temperature=temperature,
            checkpoint_layers=pass_size.checkpoint_layers,
        )
        loss, stats = grpo_loss(logprobs, part, part_weights, **loss_options)
        loss.backward()
        all_logprobs.append(logprobs.detach())
        all_stats.append({"loss": loss.detach(), "entropy": entropy.sum(), **stats})
    if leaf.requires_grad:
        features.backward(leaf.grad, retain_graph=True)  # for a second try if memory runs out
    return torch.cat(all_logprobs), combine(all_stats, tokens=rollout.completion_mask.sum())


def combine(parts: list[dict[str, Tensor]], *, tokens: Tensor) -> dict[str, Tensor]:
    """Return a step's statistics, token means over all micro-batches and processes."""
    columns = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    sums = {name: all_reduce_sum(column.sum()) for name, column in columns.items()}
    whole = {name: value / all_reduce_sum(tokens) for name, value in sums.items()}
    whole["loss"] = sums["loss"]  # already divided, by the token weights
    whole["sampler_gap_max"] = all_reduce_max(columns["sampler_gap_max"].max())
    return whole


@torch.no_grad()
def token_stories(
    policy, rollout: Rollout, *, pass_size: PassSize, temperature: float, **weight_options
) -> dict[str, Tensor]:
    """Return what the update did to each token of the rollout's first group, (G, C) each.

    `new_logprobs` are those under the updated policy. They come from a pass of the same size as the
    old ones, which rounds most alike: in bf16 a small update is no larger than the rounding. `k3`
    and `weights` are those of the first epoch's loss. Without a reference, `ref_logprobs` and `k3`
    are left out.
    """
    weights = token_weights(rollout.completion_mask, **weight_options)
    part = next(rollout.micro_batches(pass_size.micro_batch))
    options = {"pass_size": pass_size, "temperature": temperature}
    stories = {
        "sampled_logprobs": rollout.sampled_logprobs,
        "old_logprobs": rollout.old_logprobs,
        "new_logprobs": within_memory(rollout_logprobs, policy, part, **options),
        "weights": weights,
    }
    if rollout.ref_logprobs is not None:
        stories["ref_logprobs"] = rollout.ref_logprobs
        stories["k3"] = k3_kl(rollout.old_logprobs, rollout.ref_logprobs)
    return {name: values[: rollout.advantages.shape[1]] for name, values in stories.items()}


@torch.no_grad()
def sync_reference(policy, reference, *, mix: float) -> None:
    """Move the reference towards the policy, in place: `mix * policy + (1 - mix) * reference`.

    As in TR-DPO (arXiv:2404.09656), but in fp32: bf16 would round small moves to nothing.
    """
    for new, old in zip(policy.parameters(), reference.parameters(), strict=True):
        old.copy_(torch.lerp(old.float(), new.float(), mix))
