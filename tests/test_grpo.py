"""grpo.py: against numbers by hand, by enumeration, and end to end on a small random model."""

import copy
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import optimi
import pytest
import torch
from conftest import random_completions, scored

import grpo
from engine.passes import ALL_LAYERS, PassSize
from engine.sampling import Sampler
from grpo import (
    LOSSES,
    Rollout,
    add_reference_logprobs,
    backward,
    collect_rollout,
    group_advantages,
    grpo_loss,
    has_spread,
    k3_kl,
    sync_reference,
    token_stories,
    token_weights,
    update,
)

OPTIONS = {
    "loss": "grpo",
    "inner_epochs": 1,
    "pass_size": PassSize(micro_batch=3, checkpoint_layers=0),
    "temperature": 0.8,
    "beta": 0.1,
    "clip_eps": 0.2,
    "clip_eps_high": 0.2,
    "max_grad_norm": 1e9,
    "max_new_tokens": 16,
}


def collect(loaded, prompts, *, reward=None, temperature=0.8, divide_by_std=True) -> Rollout:
    """Return a rollout of 3 prompts x 2 completions; a row's reward defaults to its number."""
    numbers = iter(range(100))
    reward = reward or (lambda text, q: next(numbers))
    return collect_rollout(
        Sampler(loaded.policy, max_new_tokens=8, pad_id=0),
        loaded.processor,
        prompts,
        lambda text, q: SimpleNamespace(total=float(reward(text, q))),
        group_size=2,
        temperature=temperature,
        divide_by_std=divide_by_std,
        generator=torch.Generator().manual_seed(0),
    )


def rollout_of(prompts, *, advantages=None, **tensors) -> Rollout:
    """Return a rollout of random ragged completions, 2 per prompt, with the given tensors."""
    ids, mask = random_completions(prompts)
    generator = torch.Generator().manual_seed(5)
    if advantages is None:
        advantages = torch.randn(len(prompts), 2, generator=generator, dtype=torch.float64)
    return Rollout(
        prompts=prompts,
        completion_ids=ids,
        completion_mask=mask,
        lengths=mask.sum(1).tolist(),
        sampled_logprobs=torch.zeros(ids.shape),
        truncated=torch.zeros(len(ids), dtype=torch.bool),
        texts=[""] * len(ids),
        rewards=[None] * len(ids),
        advantages=advantages,
        **tensors,
    )


def assert_same_weights(policy, state: dict) -> None:
    assert all(torch.equal(value, state[name]) for name, value in policy.state_dict().items())


# --- advantages ---------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0]])  # mean 3, sample variance (4+1+0+9)/3
    std = math.sqrt(14 / 3) + 1e-4
    expected = torch.tensor([[-2 / std, -1 / std, 0.0, 3 / std]])
    torch.testing.assert_close(group_advantages(rewards), expected)
    torch.testing.assert_close(
        group_advantages(rewards, divide_by_std=False), torch.tensor([[-2.0, -1.0, 0.0, 3.0]])
    )


def test_groups_do_not_see_each_other():
    alone = group_advantages(torch.tensor([[1.0, 2.0]]))
    beside = group_advantages(torch.tensor([[1.0, 2.0], [50.0, -3.0]]))
    assert torch.equal(alone, beside[:1])


def test_equal_rewards_give_exactly_zero():
    values = torch.linspace(-3, 4, 1000)[:, None].expand(-1, 7).contiguous()
    rounding = values - values.mean(1, keepdim=True)
    assert rounding.abs().max() > 0  # or the test would prove nothing
    assert not group_advantages(values).any()
    assert not group_advantages(values, divide_by_std=False).any()
    assert not has_spread(values).any()


# --- token weights ------------------------------------------------------------------------


def test_token_weights_by_hand():
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    expected = {
        "grpo": [[1 / 8] * 4, [1 / 2, 0, 0, 0]],  # each row counts 1/2
        "dapo": [[1 / 5] * 4, [1 / 5, 0, 0, 0]],  # each token counts 1/5
        "dr_grpo": [[1 / 20] * 4, [1 / 20, 0, 0, 0]],  # 2 rows of at most 10 tokens
    }
    for loss, weights in expected.items():
        actual = token_weights(mask, loss=loss, max_new_tokens=10)
        torch.testing.assert_close(actual, torch.tensor(weights))
    with pytest.raises(ValueError, match="must be one of grpo, dapo, dr_grpo"):
        token_weights(mask, loss="ppo", max_new_tokens=10)


# --- KL -----------------------------------------------------------------------------------


def test_the_mean_of_k3_is_the_exact_kl():
    torch.manual_seed(0)
    policy = torch.randn(6, dtype=torch.float64).log_softmax(0)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(0)
    every_token = k3_kl(policy, reference)  # enumeration instead of sampling
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * every_token).sum(), exact)
    assert (every_token >= 0).all()


def test_k3_by_hand_and_at_its_limits():
    value = k3_kl(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)]))
    torch.testing.assert_close(value, torch.tensor([0.5 + math.log(2) - 1]))
    far = k3_kl(torch.tensor([-1000.0, 0.0]), torch.tensor([0.0, -1000.0]))
    assert torch.isfinite(far).all()


# --- loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.6, True),  # clipped at 1 + 0.3
        (0.5, 2.0, -1.0, False),  # the minimum is the unclipped one
        (0.5, -2.0, 1.6, True),  # clipped at 1 - 0.2
        (1.5, -2.0, 3.0, False),
    ],
)
def test_the_clipped_ratio_by_hand(prompts, ratio, advantage, expected, clipped):
    old = torch.full((2, 1), -1.0, dtype=torch.float64)
    rollout = replace(
        rollout_of(prompts[:1], advantages=torch.full((1, 2), advantage, dtype=torch.float64)),
        completion_mask=torch.ones(2, 1, dtype=torch.bool),
        sampled_logprobs=old,
        old_logprobs=old,
    )
    loss, stats = grpo_loss(
        old + math.log(ratio),
        rollout,
        torch.full((2, 1), 0.5),
        beta=0.0,
        clip_eps=0.2,
        clip_eps_high=0.3,
    )
    assert loss.item() == pytest.approx(expected)
    assert stats["clip_fraction"].item() == (2 if clipped else 0)
    assert stats["ratio"].item() == pytest.approx(2 * ratio)


def test_on_policy_the_ratio_is_one_and_the_gradient_is_reinforce(prompts):
    rollout = rollout_of(prompts)
    logprobs = -torch.rand(rollout.completion_ids.shape, dtype=torch.float64)
    logprobs.requires_grad_()
    weights = token_weights(rollout.completion_mask, loss="dapo", max_new_tokens=16).double()
    loss, stats = grpo_loss(logprobs, rollout, weights, beta=0.0, clip_eps=0.2, clip_eps_high=0.2)
    loss.backward()
    assert stats["ratio"].item() == rollout.completion_mask.sum()
    assert stats["clip_fraction"].item() == 0
    torch.testing.assert_close(logprobs.grad, -weights * rollout.advantages.flatten()[:, None])


def test_the_kl_term_pulls_towards_the_reference(prompts):
    rollout = rollout_of(prompts, advantages=torch.zeros(3, 2, dtype=torch.float64))
    reference = -torch.rand(rollout.completion_ids.shape, dtype=torch.float64)
    logprobs = (reference - 0.5).requires_grad_()  # too unlikely everywhere
    weights = token_weights(rollout.completion_mask, loss="dapo", max_new_tokens=16).double()
    rollout = replace(rollout, ref_logprobs=reference)
    loss, _ = grpo_loss(logprobs, rollout, weights, beta=0.1, clip_eps=0.2, clip_eps_high=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0.1 * (math.exp(0.5) - 1.5))
    torch.testing.assert_close(logprobs.grad, 0.1 * weights * (1 - math.exp(0.5)))


# --- rollout ------------------------------------------------------------------------------


def test_a_rollout_belongs_together(loaded, prompts):
    seen = []

    def reward(text, q):
        seen.append((text, q))
        return len(seen) ** 2

    rollout = collect(loaded, prompts, reward=reward)
    assert [q for _, q in seen] == [0, 0, 1, 1, 2, 2]
    assert [text for text, _ in seen] == rollout.texts
    totals = torch.tensor([[1.0, 4.0], [9.0, 16.0], [25.0, 36.0]])
    torch.testing.assert_close(rollout.advantages, group_advantages(totals))


def test_micro_batches_are_the_rollout_in_parts(loaded, prompts):
    rollout = add_reference_logprobs(
        loaded.reference, collect(loaded, prompts), pass_size=PassSize(3), temperature=0.8
    )
    parts = list(rollout.micro_batches(2))
    assert [len(part.prompts) for part in parts] == [2, 1]
    for name in ("completion_ids", "sampled_logprobs", "advantages", "ref_logprobs"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(rollout, name))
    assert [text for part in parts for text in part.texts] == rollout.texts


def test_sampling_and_scoring_use_the_same_temperature(loaded, prompts):
    optimizer = torch.optim.SGD(loaded.policy.parameters(), lr=0.0)
    same, other = (
        update(
            loaded.policy,
            optimizer,
            collect(loaded, prompts, temperature=0.8),
            **{**OPTIONS, "temperature": temperature},
        )[1]
        for temperature in (0.8, 1.0)
    )
    assert same["sampler_gap_max"] < 1e-10
    assert other["sampler_gap_mean"] > 1e-2


def test_kl_is_exactly_zero_at_the_first_step(loaded, prompts):
    rollout = collect(loaded, prompts)
    rollout = add_reference_logprobs(
        loaded.reference, rollout, pass_size=PassSize(3), temperature=0.8
    )
    optimizer = torch.optim.SGD(loaded.policy.parameters(), lr=0.0)
    _, stats = update(loaded.policy, optimizer, rollout, **OPTIONS)
    assert stats["kl"] == 0.0
    assert stats["ratio"] == 1.0


# --- update -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_give_the_gradient_of_one_batch(model, prompts, loss):
    rollout = rollout_of(prompts)
    reference = -3 * torch.rand(rollout.completion_ids.shape, dtype=torch.float64)
    rollout = replace(rollout, ref_logprobs=reference)
    weights = token_weights(rollout.completion_mask, loss=loss, max_new_tokens=16).double()
    gradients, all_stats = [], []
    for micro_batch in (3, 2, 1):
        _, stats = backward(
            model,
            rollout,
            weights,
            pass_size=PassSize(micro_batch, checkpoint_layers=1),
            temperature=1.0,
            beta=0.1,
            clip_eps=0.2,
            clip_eps_high=0.2,
        )
        gradients.append([p.grad.clone() for p in model.parameters()])
        all_stats.append({name: float(value) for name, value in stats.items()})
    for other, stats in zip(gradients[1:], all_stats[1:], strict=True):
        assert stats == pytest.approx(all_stats[0], rel=1e-9)
        for one, many in zip(gradients[0], other, strict=True):
            assert (one - many).norm() <= 1e-9 * one.norm() + 1e-12


def test_the_gradient_waits_for_nothing(model, prompts):
    """Tensors on the meta device have no values, so reading one raises."""
    rollout = rollout_of(prompts)
    tensors = {
        name: getattr(rollout, name).to("meta")
        for name in ("completion_ids", "completion_mask", "sampled_logprobs", "advantages")
    }
    rollout = replace(rollout, prompts=prompts.to("meta"), **tensors)
    weights = token_weights(rollout.completion_mask, loss="grpo", max_new_tokens=16)
    options = {"temperature": 1.0, "beta": 0.1, "clip_eps": 0.2, "clip_eps_high": 0.2}
    pass_size = PassSize(micro_batch=2, checkpoint_layers=1)
    backward(model.to("meta"), rollout, weights, pass_size=pass_size, **options)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_equal_rewards_give_no_gradient(loaded, prompts):
    rollout = collect(loaded, prompts, reward=lambda text, q: 0.7)
    before = copy.deepcopy(loaded.policy.state_dict())
    optimizer = torch.optim.SGD(loaded.policy.parameters(), lr=1.0)
    _, stats = update(loaded.policy, optimizer, rollout, **OPTIONS)
    assert stats["grad_norm"] == 0.0
    assert_same_weights(loaded.policy, before)


def test_an_update_makes_the_better_completion_more_likely(loaded, prompts):
    rollout = collect(loaded, prompts)
    optimizer = torch.optim.SGD(loaded.policy.parameters(), lr=1e-4)
    update(loaded.policy, optimizer, rollout, **OPTIONS)
    with torch.no_grad():
        after = scored(
            loaded.policy,
            prompts,
            rollout.completion_ids,
            rollout.completion_mask,
            temperature=0.8,
        )
    weights = token_weights(rollout.completion_mask, loss="grpo", max_new_tokens=8)
    change = weights * (after - rollout.sampled_logprobs)
    assert (change * rollout.advantages.flatten()[:, None]).sum() > 0


def test_later_inner_epochs_compare_with_the_policy_that_sampled(loaded, prompts):
    rollout = collect(loaded, prompts)
    optimizer = torch.optim.SGD(loaded.policy.parameters(), lr=1e-3)
    _, stats = update(loaded.policy, optimizer, rollout, **{**OPTIONS, "inner_epochs": 2})
    assert stats["ratio"] != 1.0
    assert stats["sampler_gap_max"] < 1e-10  # of the first epoch


def test_the_rollout_comes_back_with_its_old_logprobs_and_without_features(loaded, prompts):
    rollout = collect(loaded, prompts)
    optimizer = torch.optim.SGD(loaded.policy.parameters(), lr=1e-3)
    updated, _ = update(loaded.policy, optimizer, rollout, **{**OPTIONS, "inner_epochs": 2})
    mask = rollout.completion_mask
    torch.testing.assert_close(updated.old_logprobs[mask], rollout.sampled_logprobs[mask])
    assert updated.prompts.image_features is None
    assert updated.completion_ids is rollout.completion_ids


@pytest.mark.parametrize("loss", LOSSES)
def test_the_story_of_a_group_is_the_first_order_change_of_its_loss(loaded, prompts, loss):
    """A step of plain gradient descent lowers a loss by rate x (norm of its gradient) squared.

    With one prompt and no reference, the loss changes by the sum of -weight x advantage x change.
    """
    rollout, rate = collect(loaded, prompts[:1]), 1e-6
    optimizer = torch.optim.SGD(loaded.policy.parameters(), lr=rate)
    rollout, stats = update(loaded.policy, optimizer, rollout, **{**OPTIONS, "loss": loss})
    stories = token_stories(
        loaded.policy,
        rollout,
        pass_size=PassSize(micro_batch=3),
        **{name: OPTIONS[name] for name in ("temperature", "max_new_tokens")},
        loss=loss,
    )
    assert stories.keys() == {"sampled_logprobs", "old_logprobs", "new_logprobs", "weights"}
    change = stories["new_logprobs"] - stories["old_logprobs"]
    lowered = (stories["weights"] * rollout.advantages.view(-1, 1) * change).sum()
    assert lowered.item() == pytest.approx(rate * stats["grad_norm"] ** 2, rel=1e-3)


def test_the_stories_are_those_of_the_first_group(loaded, prompts):
    with torch.no_grad():
        loaded.reference.lm_head.weight.mul_(1.1)  # so that the KL is not 0
    rollout = add_reference_logprobs(
        loaded.reference, collect(loaded, prompts), pass_size=PassSize(3), temperature=0.8
    )
    optimizer = torch.optim.SGD(loaded.policy.parameters(), lr=1e-3)
    rollout, stats = update(loaded.policy, optimizer, rollout, **{**OPTIONS, "loss": "dapo"})
    scoring = {"pass_size": PassSize(micro_batch=2), "temperature": 0.8}
    stories = token_stories(loaded.policy, rollout, **scoring, loss="dapo", max_new_tokens=8)
    ids, mask = rollout.completion_ids[:2], rollout.completion_mask[:2]
    with torch.no_grad():
        new = scored(loaded.policy, prompts[:1], ids, mask, temperature=0.8)
        ref = scored(loaded.reference, prompts[:1], ids, mask, temperature=0.8)
    torch.testing.assert_close(stories["new_logprobs"][mask], new[mask])
    torch.testing.assert_close(stories["ref_logprobs"][mask], ref[mask])
    assert (stories["new_logprobs"] - stories["old_logprobs"])[mask].abs().max() > 1e-6
    assert all(values.shape == ids.shape for values in stories.values())
    assert stories["weights"][mask].unique().tolist() == [pytest.approx(1 / sum(rollout.lengths))]
    kl = k3_kl(rollout.old_logprobs, rollout.ref_logprobs)  # of all groups: its mean is logged
    assert kl[rollout.completion_mask].mean().item() == pytest.approx(stats["kl"])
    assert torch.equal(stories["k3"], kl[:2])


def assert_skipped(loaded, rollout, named: str):
    before = copy.deepcopy(loaded.policy.state_dict())
    optimizer = torch.optim.SGD(loaded.policy.parameters(), lr=1.0)
    _, stats = update(loaded.policy, optimizer, rollout, **OPTIONS)
    assert (stats["skipped"], stats["not_finite"]) == (1, named)
    assert_same_weights(loaded.policy, before)


def test_a_loss_and_gradient_that_are_not_finite_are_named_and_change_nothing(loaded, prompts):
    rollout = replace(collect(loaded, prompts), advantages=torch.full((3, 2), torch.nan))
    assert_skipped(loaded, rollout, "loss, gradient")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_reward_that_is_not_finite_is_named_and_changes_nothing(loaded, prompts, value):
    """Its group would get advantages of 0 or nan, and zeros would go unnoticed."""
    rollout = collect(loaded, prompts, reward=lambda text, q: value if q == 1 else len(text))
    rollout = replace(rollout, advantages=rollout.advantages.nan_to_num())
    assert_skipped(loaded, rollout, "reward")


# --- memory -------------------------------------------------------------------------------


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")
NO_WORKSPACE = (
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
)


def out_of_memory(times: int, work, error=OUT_OF_MEMORY):
    """Return `work`, made to fail so many times from its second call on, and the list of calls."""
    seen = []

    def failing(model, part_prompts, ids, lengths, **options):
        seen.append((len(part_prompts), options.get("checkpoint_layers")))
        if len(seen) in range(2, 2 + times):  # by the second pass, the first has left a gradient
            raise error
        return work(model, part_prompts, ids, lengths, **options)

    return failing, seen


def test_when_memory_runs_out_smaller_passes_give_the_same_gradient(loaded, prompts, monkeypatch):
    optimizer = torch.optim.SGD(loaded.policy.parameters(), lr=0.0)

    def scored_rollout():
        rollout = collect(loaded, prompts)
        return add_reference_logprobs(
            loaded.reference, rollout, pass_size=PassSize(3), temperature=0.8
        )

    _, expected = update(loaded.policy, optimizer, scored_rollout(), **OPTIONS)
    rollout = scored_rollout()
    failing, seen = out_of_memory(1, grpo.completion_logprobs)
    monkeypatch.setattr(grpo, "completion_logprobs", failing)
    pass_size = PassSize(micro_batch=2, checkpoint_layers=0)
    with pytest.warns(UserWarning, match="--micro-batch 1 and every layer checkpointed"):
        _, stats = update(loaded.policy, optimizer, rollout, **{**OPTIONS, "pass_size": pass_size})
    assert stats["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-9)
    assert seen == [(2, 0), (1, 0)] + [(1, ALL_LAYERS)] * 3
    assert (pass_size.micro_batch, pass_size.reduced) == (1, True)


def test_memory_may_run_out_in_the_vision_tower(loaded, prompts):
    """Its backward pass comes last, so everything before it is repeated with the same features."""
    optimizer = torch.optim.SGD(loaded.policy.parameters(), lr=0.0)
    _, expected = update(loaded.policy, optimizer, collect(loaded, prompts), **OPTIONS)
    rollout, times = collect(loaded, prompts), iter([1])

    def fail_once(gradient):
        for _ in times:
            raise torch.OutOfMemoryError("CUDA out of memory")

    loaded.policy.model.visual.patch_embed.proj.weight.register_hook(fail_once)
    pass_size = PassSize(micro_batch=2, checkpoint_layers=0)
    with pytest.warns(UserWarning, match="out of memory"):
        _, stats = update(loaded.policy, optimizer, rollout, **{**OPTIONS, "pass_size": pass_size})
    assert stats["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-9)


def test_the_reference_is_scored_in_smaller_passes_too(loaded, prompts, monkeypatch):
    rollout = collect(loaded, prompts)
    whole = add_reference_logprobs(
        loaded.reference, rollout, pass_size=PassSize(3), temperature=0.8
    )
    failing, seen = out_of_memory(1, grpo.completion_logprobs)
    monkeypatch.setattr(grpo, "completion_logprobs", failing)
    with pytest.warns(UserWarning, match="out of memory"):
        parts = add_reference_logprobs(
            loaded.reference, rollout, pass_size=PassSize(2), temperature=0.8
        )
    torch.testing.assert_close(parts.ref_logprobs, whole.ref_logprobs, rtol=0, atol=1e-12)
    assert [size for size, _ in seen] == [2, 1, 1, 1, 1]


def failing_once(loaded, prompts, monkeypatch, error):
    """Return the list of attempted passes, and a reference scoring whose second pass fails."""
    failing, seen = out_of_memory(1, grpo.completion_logprobs, error)
    monkeypatch.setattr(grpo, "completion_logprobs", failing)
    rollout, options = collect(loaded, prompts), {"pass_size": PassSize(2), "temperature": 0.8}
    return seen, partial(add_reference_logprobs, loaded.reference, rollout, **options)


@pytest.mark.parametrize("error", NO_WORKSPACE)
def test_a_library_without_room_for_its_workspace_is_out_of_memory(
    loaded, prompts, monkeypatch, error
):
    """A cache that cannot be emptied, as after a failed CUDA graph, does not end the run either."""

    def no_emptying():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "empty_cache", no_emptying)
    seen, score = failing_once(loaded, prompts, monkeypatch, error)
    with pytest.warns(UserWarning, match="out of memory"):
        score()
    assert len(seen) == 5


def test_other_errors_are_not_taken_for_it(loaded, prompts, monkeypatch):
    seen, score = failing_once(loaded, prompts, monkeypatch, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        score()
    assert len(seen) == 2


def test_memory_that_runs_out_again_is_an_error(loaded, prompts, monkeypatch):
    rollout = collect(loaded, prompts)
    failing, _ = out_of_memory(3, grpo.completion_logprobs)
    monkeypatch.setattr(grpo, "completion_logprobs", failing)
    warned = pytest.warns(UserWarning, match="out of memory")
    with warned, pytest.raises(torch.OutOfMemoryError):
        add_reference_logprobs(loaded.reference, rollout, pass_size=PassSize(2), temperature=0.8)


def test_the_gradient_norm_is_that_before_clipping(loaded, prompts):
    optimizer = torch.optim.SGD(loaded.policy.parameters(), lr=0.0)
    free, clipped = (
        update(
            loaded.policy,
            optimizer,
            collect(loaded, prompts),
            **{**OPTIONS, "max_grad_norm": largest},
        )[1]
        for largest in (1e9, 1e-6)
    )
    assert free["grad_norm"] == clipped["grad_norm"] > 0


# --- numbers ------------------------------------------------------------------------------


def test_the_reference_is_mixed_in_fp32():
    policy = torch.nn.Linear(64, 64).to(torch.bfloat16)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        policy.weight.mul_(1.03)
    expected = (0.6 * policy.weight.float() + 0.4 * reference.weight.float()).bfloat16()
    sync_reference(policy, reference, mix=0.6)
    assert torch.equal(reference.weight, expected)
    sync_reference(policy, reference, mix=1.0)
    assert torch.equal(reference.weight, policy.weight)


def test_kahan_adamw_on_bf16_follows_fp32_where_plain_adamw_does_not():
    """100 steps at lr 1e-6 on weights of size 0.02, where a plain bf16 weight cannot even move."""
    generator = torch.Generator().manual_seed(0)
    start = (0.02 * torch.randn(10_000, generator=generator)).bfloat16()
    drift = 0.3 * torch.randn(10_000, generator=generator)
    gradients = [
        1e-4 * (drift + torch.randn(10_000, generator=generator)).bfloat16() for _ in range(100)
    ]

    def trained(make_optimizer, dtype):
        weight = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = make_optimizer([weight])
        for gradient in gradients:
            weight.grad = gradient.to(dtype, copy=True)  # optimi overwrites it
            optimizer.step()
        compensation = optimizer.state[weight].get("kahan_comp")
        value = weight.detach().float()
        return value - start.float() + (0 if compensation is None else compensation.float())

    options = {"lr": 1e-6, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    exact = trained(lambda p: torch.optim.AdamW(p, **options), torch.float32)
    kahan = trained(lambda p: optimi.AdamW(p, **options), torch.bfloat16)
    plain = trained(lambda p: torch.optim.AdamW(p, **options), torch.bfloat16)

    def progress(change):  # projected on the fp32 change; 1: all of it
        return ((change * exact).sum() / exact.square().sum()).item()

    assert progress(kahan) == pytest.approx(1.0, abs=0.03)
    assert progress(plain) < 0.3
