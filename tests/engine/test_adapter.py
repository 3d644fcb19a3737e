"""Training a part of the weights: LoRA against stock transformers and peft in fp64, and a frozen
vision tower.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import (
    TINY,
    compiled_graphs,
    config_of,
    make_prompts,
    random_completions,
    scored,
    stock,
    stock_logits,
    stock_logprobs,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_faults import faults, refused, tree
from test_grpo import OPTIONS, collect
from test_main import SMALL, check_readable_as_any_new_file
from test_sampling import both_kinds, make_sampler, stock_generate
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

import main
from engine.loading import Loaded, add_adapter, load, trainable
from engine.model_files import ModelError
from engine.passes import PassSize
from engine.sizes import ADAPTED, shape_config, trained_count
from evaluate import main as evaluate
from grpo import add_reference_logprobs, backward, grpo_loss, token_weights, update
from harness.checkpoint import checkpoints_of
from harness.runlog import read_lines

RANK = 3
PLACE = {"device": "cpu", "dtype": "float32"}


@pytest.fixture
def adapted(model, processor) -> Loaded:
    """The small random model with adapters that change its output."""
    loaded = Loaded(model, None, processor, add_adapter(model, TINY, RANK, seed=0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    return loaded


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


# --- one step -----------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing(model, prompts, processor):
    ids, mask = random_completions(prompts)
    before = scored(model, prompts, ids, mask)
    add_adapter(model, TINY, RANK, seed=0)
    assert torch.equal(scored(model, prompts, ids, mask), before)


def test_adapters_stand_beside_the_language_models_linear_layers_alone(adapted):
    names = [name for name, parameter in adapted.policy.named_parameters() if is_adapter(name)]
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert len(names) == 2 * 2 * len(ADAPTED)  # layers, A and B
    trained = {name for name, p in adapted.policy.named_parameters() if p.requires_grad}
    assert trained == set(names)


def test_adapters_are_a_function_of_the_seed(processor):
    one, same, other = (
        [p.detach() for p in trainable(load(TINY, **PLACE, lora_rank=2, seed=seed).policy)]
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("checkpoint_layers", [0, 1])
def test_logprobs_and_gradients_equal_transformers_and_peft(adapted, prompts, checkpoint_layers):
    ids, mask = random_completions(prompts)
    factor = torch.randn(ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    twin = stock(adapted.policy)
    expected = stock_logprobs(twin, prompts, ids, mask, temperature=0.7)
    (expected * factor).sum().backward()
    options = {"temperature": 0.7, "checkpoint_layers": checkpoint_layers}
    own = scored(adapted.policy, prompts, ids, mask, **options)
    (own * factor).sum().backward()
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-10)
    both = zip(adapted.policy.named_parameters(), twin.parameters(), strict=True)
    for (name, parameter), other in both:
        if is_adapter(name):
            difference = (parameter.grad - other.grad).norm()
            assert difference <= 1e-9 * other.grad.norm() + 1e-12, name
        else:
            assert parameter.grad is None


@both_kinds
def test_greedy_ids_equal_transformers_and_peft(adapted, prompts, kind):
    own = make_sampler(adapted.policy, kind).generate(prompts, group_size=2, temperature=0.0)
    assert own.ids.tolist() == stock_generate(adapted.policy, prompts).tolist()
    with adapted.as_reference() as without:
        assert own.ids.tolist() != stock_generate(without, prompts).tolist()


def test_one_compiled_graph_fits_all_adapted_layers(adapted, prompts, compiled_layer):
    """Also after disabling them for the reference and enabling them again."""
    sampler = make_sampler(adapted.policy)
    sampler.run_layer = compiled_layer
    for _ in range(2):
        own = sampler.generate(prompts, group_size=2, temperature=0.0)
        assert own.ids.tolist() == stock_generate(adapted.policy, prompts).tolist()
        with adapted.as_reference() as without:
            scored(without, prompts, *random_completions(prompts))
    assert compiled_graphs() == 1


def test_the_reference_is_the_model_without_its_adapter(model, processor, prompts):
    ids, mask = random_completions(prompts)
    plain = copy.deepcopy(model)
    loaded = Loaded(model, None, processor, add_adapter(model, TINY, RANK, seed=0))
    for parameter in trainable(model):
        parameter.data.add_(0.1)
    with loaded.as_reference() as reference:
        assert torch.equal(scored(reference, prompts, ids, mask), scored(plain, prompts, ids, mask))
    assert not torch.equal(scored(model, prompts, ids, mask), scored(plain, prompts, ids, mask))
    assert len(trainable(model)) == 2 * 2 * len(ADAPTED)  # the adapters are still trainable


def test_an_update_moves_the_adapter_and_nothing_else(adapted, prompts):
    before = copy.deepcopy(adapted.policy.state_dict())
    optimizer = torch.optim.SGD(trainable(adapted.policy), lr=1e-2)
    rollout = collect(adapted, prompts)
    with adapted.as_reference() as reference:
        rollout = add_reference_logprobs(
            reference, rollout, pass_size=OPTIONS["pass_size"], temperature=OPTIONS["temperature"]
        )
    _, stats = update(adapted.policy, optimizer, rollout, **OPTIONS)
    assert stats["kl"] > 0.01
    assert stats["sampler_gap_max"] < 1e-9
    for name, tensor in adapted.policy.state_dict().items():
        assert torch.equal(tensor, before[name]) != is_adapter(name), name


# --- the vision tower ---------------------------------------------------------------------


def images_seen(model) -> list:
    """A list that grows by each image that the model's vision tower encodes."""
    images = []
    stock = model.model.visual.forward

    def forward(patches, grid_thw, **options):
        images.extend(grid_thw.tolist())
        return stock(patches, grid_thw, **options)

    model.model.visual.forward = forward
    return images


@pytest.mark.parametrize("frozen", [False, True])
def test_an_image_goes_through_a_vision_tower_once_a_step(loaded, prompts, frozen):
    """With micro-batches too. The reference encodes no image if both have the same tower."""
    loaded.policy.model.visual.requires_grad_(not frozen)
    by_policy, by_reference = images_seen(loaded.policy), images_seen(loaded.reference)
    options = OPTIONS | {"pass_size": PassSize(micro_batch=2, checkpoint_layers=0)}
    rollout = collect(loaded, prompts)
    rollout = add_reference_logprobs(
        loaded.reference,
        rollout,
        pass_size=options["pass_size"],
        temperature=OPTIONS["temperature"],
    )
    update(loaded.policy, torch.optim.SGD(trainable(loaded.policy)), rollout, **options)
    assert len(by_policy) == len(prompts)
    assert len(by_reference) == (0 if frozen else len(prompts))


@pytest.mark.parametrize("micro_batch", [3, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_was_seen_once_gives_the_gradients_of_a_look_in_every_pass(
    loaded, prompts, frozen, micro_batch
):
    policy = loaded.policy
    policy.model.visual.requires_grad_(not frozen)
    rollout = collect(loaded, prompts)
    mask = rollout.completion_mask
    weights = token_weights(mask, loss="grpo", max_new_tokens=16).double()
    options = {"beta": 0.0, "clip_eps": 0.2, "clip_eps_high": 0.2}
    pass_size = PassSize(micro_batch, checkpoint_layers=1)
    backward(policy, rollout, weights, pass_size=pass_size, temperature=0.7, **options)
    own = {name: parameter.grad for name, parameter in policy.named_parameters()}
    policy.zero_grad(set_to_none=True)
    without_image_features = rollout.prompts.without_image_features()
    logprobs = scored(policy, without_image_features, rollout.completion_ids, mask, temperature=0.7)
    grpo_loss(logprobs, rollout, weights, **options)[0].backward()
    for name, parameter in policy.named_parameters():
        if frozen and name.startswith("model.visual"):
            assert own[name] is parameter.grad is None
        else:
            difference = (own[name] - parameter.grad).norm()
            assert difference <= 1e-9 * parameter.grad.norm() > 0, name


# --- whole runs ---------------------------------------------------------------------------

LORA = [*SMALL, "--image-size", "84", "--eval-every", "0", "--lora-rank", "2", "--lr", "1e-2"]


def run(folder, *flags: str):
    main.main([*LORA, "--runs", str(folder.parent), "--name", folder.name, *flags])
    return folder


def logits_of(model, processor):
    prompts = make_prompts(processor, 2)
    ids, mask = random_completions(prompts)
    with torch.no_grad():
        return stock_logits(model.eval(), prompts, ids, mask)


def test_final_is_an_adapter_for_stock_peft_or_the_model_with_it(tmp_path, processor):
    run(tmp_path / "adapter", "--steps", "2")
    run(tmp_path / "merged", "--steps", "2", "--merge")
    final, merged = tmp_path / "adapter" / "final", tmp_path / "merged" / "final"
    assert tree(merged / "adapter").keys()
    check_readable_as_any_new_file(merged)
    assert not (final / "model.safetensors").exists()
    assert (final / "adapter_model.safetensors").read_bytes() == (
        merged / "adapter" / "adapter_model.safetensors"
    ).read_bytes()

    def base():
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)

    beside = logits_of(PeftModel.from_pretrained(base(), final).base_model.model, processor)
    stock_merged = Qwen2_5_VLForConditionalGeneration.from_pretrained(merged, dtype=torch.float32)
    torch.testing.assert_close(logits_of(stock_merged, processor), beside, rtol=0, atol=1e-4)
    assert (
        beside - logits_of(base(), processor)
    ).abs().max() > 0.1  # the adapter changes the logits
    own = load(str(final), **PLACE).policy  # as evaluate.py does
    torch.testing.assert_close(logits_of(stock(own), processor), beside, rtol=0, atol=1e-4)
    assert AutoProcessor.from_pretrained(final).tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("flags", [["--lora-rank", "2"], ["--lora-rank", "0", "--freeze-vision"]])
def test_such_runs_go_on_bit_for_bit(tmp_path, flags):
    whole = run(tmp_path / "whole", "--steps", "4", *flags)
    parts = run(tmp_path / "parts", "--steps", "2", *flags)
    main.main(["--resume", str(parts), "--steps", "4"])
    assert faults.curves(parts) == faults.curves(whole)
    weights = ("model.safetensors", "adapter_model.safetensors")
    (path,) = (path for path in (whole / "final").iterdir() if path.name in weights)
    assert path.read_bytes() == (parts / "final" / path.name).read_bytes()
    kl = [line["kl"] for line in read_lines(whole / "metrics.jsonl")]
    assert kl[0] == 0.0 < kl[3]


def test_a_run_with_an_adapter_is_evaluated(tmp_path, capsys):
    evaluate([str(run(tmp_path / "run", "--steps", "1")), "--examples", "2"])
    assert "all" in capsys.readouterr().out
    assert (tmp_path / "run" / "evaluation.png").exists()


def test_a_checkpoint_is_as_small_as_the_adapter(tmp_path):
    (saved,) = checkpoints_of(run(tmp_path / "run", "--steps", "1"))
    count = trained_count(shape_config(TINY), lora_rank=2)
    assert (saved / "adapter_model.safetensors").stat().st_size < 4 * count + 20_000
    assert not (saved / "model.safetensors").exists()


def test_damaged_adapters_are_told_in_one_line(tmp_path, capsys):
    final = run(tmp_path / "run", "--steps", "1") / "final"
    (final / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(final), **PLACE)
    (final / "adapter_config.json").write_text("{}")
    told = refused(capsys, *SMALL, "--model", str(final))
    assert "adapter_config.json: does not name the adapter's base model" in told


def rename(path: Path, names: dict[str, str]) -> None:
    """Rename an adapter's weights: `names` maps parts of names to new ones."""
    weights = load_file(path / "adapter_model.safetensors")
    for old, new in names.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    save_file(weights, path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("language_model.", "", "56 of its 56 weights match nothing in its base model, e.g. base_"),
        ("layers.3.mlp.up_proj", "layers.9.mlp.up_proj", r"2 of its 56 .*layers\.9\.mlp\.up_proj"),
    ],
)
def test_an_adapter_whose_names_fit_nowhere_is_not_taken_for_its_base(tmp_path, old, new, told):
    """Such as one saved before transformers named the language model; peft gives no warning."""
    final = run(tmp_path / "run", "--steps", "1") / "final"
    rename(final, {old: new})
    with pytest.raises(ModelError, match=told):
        load(str(final), **PLACE)


def test_weights_that_an_adapter_lacks_are_named(tmp_path):
    final = run(tmp_path / "run", "--steps", "1") / "final"
    weights = load_file(final / "adapter_model.safetensors")
    name, _ = weights.popitem()
    save_file(weights, final / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=f"1 weights are missing, e.g. {name}"):
        load(str(final), **PLACE)


def test_an_adapter_of_another_rank_is_told_with_both_shapes(tmp_path):
    final = run(tmp_path / "run", "--steps", "1") / "final"
    config = json.loads((final / "adapter_config.json").read_text())
    (final / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(ModelError, match=r"size mismatch for .*\[2, 192\].*\[3, 192\]"):
        load(str(final), **PLACE)


def test_an_adapter_on_an_adapter_is_refused_and_a_merged_one_is_a_base(tmp_path, capsys):
    """Without the first adapter, the second would fit no model."""
    first = run(tmp_path / "run", "--steps", "1")
    flags = [*SMALL, "--lora-rank", "2", "--runs", str(tmp_path)]
    for part in ("final", "checkpoints/step-000001"):
        told = refused(capsys, *flags, "--model", str(first / part))
        assert "is an adapter" in told
        assert "--resume RUN --merge" in told
    main.main(["--resume", str(first), "--merge"])
    assert (first / "final" / "model.safetensors").exists()
    assert len(read_lines(first / "metrics.jsonl")) == 1
    merged = load(str(first / "final"), **PLACE).policy
    beside = load(str(first / "final" / "adapter"), **PLACE).policy
    assert all(map(torch.equal, merged.parameters(), beside.parameters()))
    assert "1 steps are done" in refused(capsys, "--resume", str(first))
    main.main([*flags, "--steps", "1", "--name", "second", "--model", str(first / "final")])
    config = json.loads((tmp_path / "second" / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(first / "final")


def test_a_base_that_is_gone_is_named_as_such(tmp_path, capsys):
    final = run(tmp_path / "run", "--steps", "1") / "final"
    config = json.loads((final / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/gone/tiny"
    (final / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        evaluate([str(tmp_path / "run")])
    told = capsys.readouterr().err
    assert "the adapter's base model is /gone/tiny, and there is no such folder" in told
    assert "base_model_name_or_path in this file" in told


# --- refused options, and parameter counts ------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--merge"], "--merge: has no effect without --lora-rank"),
        (["--lora-rank", "-1"], "--lora-rank -1: must be at least 0 and at most 1,024"),
        (["--lora-rank", "8", "--no-freeze-vision"], "trains the language model only"),
        (["--lora-rank", "8", "--sync-reference-every", "2"], "--sync-reference-every: with"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ValueError, match=message):
        config_of(*flags)


def test_without_peft_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr("config.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--lora-rank 8: needs peft: pip install peft"):
        config_of("--lora-rank", "8")


@pytest.mark.parametrize("options", [{}, {"freeze_vision": True}, {"lora_rank": 5}])
def test_the_trained_parameters_are_foreseen(options):
    loaded = load(TINY, **PLACE, **options)
    counted = sum(parameter.numel() for parameter in trainable(loaded.policy))
    assert trained_count(shape_config(TINY), **options) == counted
