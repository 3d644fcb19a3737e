"""model_files.py, and loading.py on top of it: published folders, and damaged ones."""

import hashlib
import json
import math
import shutil
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from published import (
    BYTES,
    FILES,
    NAMES_SHA256,
    PROMPT_SHA256,
    PROMPT_TOKENS,
    TENSORS,
    published_layout,
    tensor_names,
)
from safetensors.torch import load_file, save_file
from test_main import SMALL
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

import evaluate
import main
from cold_start import main as cold_start
from engine import model_files
from engine.loading import check_files, load
from engine.model_files import ModelError, parameter_of
from engine.prompts import encode_prompts
from engine.sampling import stop_ids
from engine.sizes import empty_model, shape_config
from harness.memory import TEXT_TOKENS
from rewards import PROMPT, SYSTEM_MESSAGE

SEVEN = "Qwen/Qwen2.5-VL-7B-Instruct"
PLACE = {"device": "cpu", "dtype": "float32"}
TRAIN = [*SMALL, "--steps", "1", "--eval-every", "0", "--image-size", "84", "--lr", "1e-3"]
LAYER = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path) -> Path:
    return published_layout(tmp_path / "base")


def train(base: Path, *flags: str) -> Path:
    """Train for one step and return the run's folder."""
    run = base.parent / "run"
    main.main([*TRAIN, "--model", str(base), "--runs", str(run.parent), "--name", "run", *flags])
    return run


# --- as published -------------------------------------------------------------------------


def test_every_published_name_has_its_place_in_the_model():
    names, shapes = tensor_names(), empty_model(shape_config(SEVEN)).state_dict()
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == NAMES_SHA256
    assert sorted(map(parameter_of, names)) == sorted(shapes)
    assert len(names) == TENSORS
    assert sum(2 * math.prod(tensor.shape) for tensor in shapes.values()) == BYTES


def test_the_length_of_the_prompt_was_counted_with_the_published_tokenizer():
    text = hashlib.sha256((SYSTEM_MESSAGE + PROMPT).encode()).hexdigest()
    assert text.startswith(PROMPT_SHA256), "count the tokens of the new text: see TEXT_TOKENS"
    visual = (224 // 28) ** 2
    assert TEXT_TOKENS + visual == max(PROMPT_TOKENS.values()) == PROMPT_TOKENS["reasoning"]


def test_all_published_files_but_how_to_decode_are_kept():
    kept = {*model_files.KEPT_FILES, "generation_config.json"}
    assert kept >= FILES.keys()


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        ([], "final"),
        ([], "checkpoints/step-000001"),
        (["--lora-rank", "2"], "final"),
        (["--lora-rank", "2", "--merge"], "final"),
        (["--lora-rank", "2", "--merge"], "final/adapter"),
        (["--dtype", "bfloat16"], "final"),
    ],
    ids=["final", "checkpoint", "adapter", "merged", "adapter-beside", "bf16"],
)
def test_what_reads_the_base_reads_what_is_saved(base, flags, folder):
    """The base model's files are beside the new weights, byte for byte, and no others."""
    saved = train(base, *flags) / folder
    is_adapter = (saved / "adapter_config.json").exists()
    for name in FILES.keys() - {"generation_config.json", "config.json"}:
        assert (saved / name).read_bytes() == (base / name).read_bytes(), name
    assert (saved / "config.json").exists() != is_adapter
    if not is_adapter:
        config, before = (json.loads((at / "config.json").read_text()) for at in (saved, base))
        assert config.pop("torch_dtype") == ("bfloat16" if "--dtype" in flags else "float32")
        assert before.pop("torch_dtype") == "bfloat16"
        assert list(config.items()) == list(before.items())
        names, expected = (load_file(at / "model.safetensors").keys() for at in (saved, base))
        assert sorted(names) == sorted(expected)
    own = {"model.safetensors", "adapter_model.safetensors", "adapter_config.json", "state.json"}
    own |= {"optimizer.pt", "adapter"}
    assert {path.name for path in saved.iterdir()} <= FILES.keys() | own


def test_a_bf16_run_keeps_config_json_byte_for_byte(base):
    final = train(base, "--dtype", "bfloat16") / "final"
    assert (final / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_warmed_up_model_keeps_the_files_too(base, tmp_path, monkeypatch):
    monkeypatch.setattr("warmup.stages.HELD_OUT", 2)
    flags = ["--speak-steps", "1", "--batch-size", "2", "--image-size", "84"]
    cold_start(["--model", str(base), "--out", str(tmp_path / "warm"), *flags])
    for name in FILES.keys() - {"generation_config.json"}:
        assert (tmp_path / "warm" / name).read_bytes() == (base / name).read_bytes(), name
    how = json.loads((tmp_path / "warm" / "generation_config.json").read_text())
    assert how["repetition_penalty"] == 1.0


# --- decoding by other tools --------------------------------------------------------------


def greedy_answers(target: Path, tmp_path: Path, count: int) -> list[str]:
    """The greedy answers of evaluate.py."""
    path = tmp_path / "answers.json"
    flags = ["--examples", str(count), "--max-new-tokens", "48", "--image-size", "84"]
    evaluate.main([str(target), *flags, "--json", str(path), "--plot", str(tmp_path / "x.png")])
    return [answer["text"] for answer in json.loads(path.read_text())["answers"]]


def served_answers(model, folder: Path, count: int) -> list[str]:
    """The answers of stock transformers' `generate`, with the folder's own settings."""
    processor = AutoProcessor.from_pretrained(folder)
    texts = []
    for index in range(count):
        example = evaluate.make_example(
            evaluate.ShapeSpec(), seed=0, split="eval", index=index, image_size=84
        )
        prompts = encode_prompts(
            processor,
            [example.image],
            system=SYSTEM_MESSAGE,
            prompt=PROMPT.format(tag="reasoning"),
        )
        out = model.generate(
            input_ids=prompts.input_ids,
            pixel_values=prompts.pixel_values.flatten(0, 1),
            mm_token_type_ids=prompts.mm_token_type_ids,
            image_grid_thw=prompts.image_grid_thw,
            max_new_tokens=48,
        )
        answer = out[0, prompts.input_ids.shape[1] :]
        texts.append(processor.tokenizer.decode(answer, skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "2", "--merge"]], ids=["final", "merged"])
def test_what_is_saved_decodes_as_it_was_measured(base, tmp_path, flags):
    """A repetition penalty of the base would change the answers; the published one is 1.05."""
    published = json.loads((base / "generation_config.json").read_text())
    assert published["repetition_penalty"] == 1.05  # too little for this model to mind
    penalty = {"repetition_penalty": 2.0}
    (base / "generation_config.json").write_text(json.dumps({**published, **penalty}))
    final = train(base, *flags) / "final"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(final).eval()
    measured = greedy_answers(final, tmp_path, 6)
    assert served_answers(model, final, 6) == measured
    model.generation_config.repetition_penalty = 2.0
    assert served_answers(model, final, 6) != measured


def test_all_stop_ids_and_the_padding_are_kept(base):
    before = json.loads((base / "generation_config.json").read_text())
    for flags in ([], ["--lora-rank", "2"]):
        saved = train(base, *flags) / "final"
        after = json.loads((saved / "generation_config.json").read_text())
        assert after["eos_token_id"] == before["eos_token_id"] == [2, 0]
        assert after["pad_token_id"] == before["pad_token_id"] == 0
        assert (after["temperature"], after["top_p"], after["repetition_penalty"]) == (1, 1, 1)
        assert after["do_sample"] is False
        shutil.rmtree(base.parent / "run")


def test_without_generation_config_both_stop_tokens_are_known(base, capsys):
    """transformers would use the single stop token of config.json."""
    (base / "generation_config.json").unlink()
    assert stop_ids(load(str(base), **PLACE).policy) == [2, 0]
    assert "has no eos_token_id; completions stop at <|im_end|> or" in capsys.readouterr().out


# --- damaged files, found without loading -------------------------------------------------


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **changes) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor for name, tensor in (weights | changes).items() if tensor is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_vision(folder: Path, **changes) -> None:
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit(folder / "config.json", vision_config=vision | changes)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def point(path: Path) -> None:
    """Replace a file by its pointer, as in a clone without git-lfs."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 16584333312\n"
    path.write_text(pointer)


def split(folder: Path) -> None:
    """Split the weights into two files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + ('visual' in name)}-of-00002.safetensors" for name in weights}
    for file in set(where.values()):
        part = {name: tensor for name, tensor in weights.items() if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def split_and_lose_one(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def split_and_empty_the_index(folder: Path) -> None:
    split(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def quantize(**how):
    return lambda at: edit(at / "config.json", quantization_config=how)


BELONG = "weights and config.json do not match"
DAMAGE = {
    "no-weights": (lambda at: (at / "model.safetensors").unlink(), "has no weights"),
    "lost-shard": (split_and_lose_one, "model-00002-of-00002.safetensors: cannot be read: No such"),
    "empty-index": (split_and_empty_the_index, "lists no weight files"),
    "cut-off": (lambda at: cut(at / "model.safetensors"), "its header says .*: truncated"),
    "pointer": (lambda at: point(at / "model.safetensors"), "run git lfs pull"),
    "tokenizer-pointer": (
        lambda at: point(at / "tokenizer.json"),
        "tokenizer.json: is a git-lfs pointer",
    ),
    "config-pointer": (
        lambda at: point(at / "config.json"),
        "config.json: is a git-lfs pointer",
    ),
    "no-safetensors": (
        lambda at: (at / "model.safetensors").write_bytes(b"\xff" * 100),
        "damaged, or not safetensors",
    ),
    "shape": (
        lambda at: edit_weights(at, **{LAYER: torch.ones(3, 192)}),
        r"layers\.3\.mlp\.up_proj\.weight has shape \(3, 192\), but config.json asks for "
        r"\(512, 192\)",
    ),
    "missing": (lambda at: edit_weights(at, **{LAYER: None}), f"{BELONG}: 1 weights are missing"),
    "integers": (
        lambda at: edit_weights(at, **{LAYER: torch.ones(512, 192, dtype=torch.int8)}),
        r"up_proj\.weight has dtype I8",
    ),
    "fewer-layers": (
        lambda at: edit(at / "config.json", num_hidden_layers=3),
        rf"{BELONG}: 12 weights are not in the model, e.g. model\.language_model\.layers\.3\.",
    ),
    "fewer-blocks": (
        lambda at: edit_vision(at, depth=2, fullatt_block_indexes=[1]),
        rf"{BELONG}: 24 weights are not in the model, e.g. model\.visual\.blocks\.2\.",
    ),
    "more-layers": (
        lambda at: edit(at / "config.json", num_hidden_layers=5),
        rf"{BELONG}: 12 weights are missing, e.g. model\.language_model\.layers\.4\.",
    ),
    "awq": (
        quantize(quant_method="awq", bits=4),
        r"quantized \(awq\) and cannot be trained or merged; use unquantized weights",
    ),
    "gptq": (quantize(quant_method="gptq"), r"quantized \(gptq\)"),
    "fp8": (quantize(quant_method="fp8"), r"quantized \(fp8\)"),
    "bitsandbytes": (quantize(quant_method="bitsandbytes"), r"quantized \(bitsandbytes\)"),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told_by_a_dry_run_and_by_loading(base, damage, told, capsys):
    damage(base)
    with pytest.raises(ModelError, match=told) as refusal:
        load(str(base), **PLACE)
    assert "\n" not in str(refusal.value)
    with pytest.raises(SystemExit) as stop:
        main.main([*TRAIN, "--model", str(base), "--runs", str(base / "runs"), "--dry-run"])
    assert stop.value.code == 2
    assert "fits" not in capsys.readouterr().out
    assert not (base / "runs").exists()


def test_a_dry_run_says_what_it_has_checked(base, capsys):
    split(base)
    with pytest.raises(SystemExit) as stop:
        main.main([*TRAIN, "--model", str(base), "--dry-run"])
    assert stop.value.code == 0
    assert f"{base}: 104 weights in 2 files; names and shapes match" in capsys.readouterr().out
    assert "not on disk; its files are checked after the download" in check_files(SEVEN)


def test_weights_that_are_computed_or_shared_may_be_in_the_files_too(base):
    embeddings = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    idle = {"lm_head.weight": embeddings.clone(), "model.rotary_emb.inv_freq": torch.ones(16)}
    idle |= {"visual.rotary_pos_emb.inv_freq": torch.ones(8), "v_head.weight": torch.ones(1)}
    edit_weights(base, **idle)
    assert "in 1 files" in check_files(str(base))


def test_what_is_checked_is_what_is_loaded(base):
    """transformers, too, ignores an index left beside a single weight file."""
    where = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(where))
    assert "104 weights in 1 files" in check_files(str(base))
    load(str(base), **PLACE)
    edit_weights(base, **{LAYER: None})
    with pytest.raises(ModelError, match="1 weights are missing"):
        check_files(str(base))


def test_a_pointer_that_nobody_reads_does_not_matter(base):
    point(base / "training_args.bin")
    load(str(base), **PLACE)


@pytest.mark.parametrize(
    ("width", "original"), [(2048, "3B"), (3584, "7B"), (5120, "32B"), (8192, "72B")]
)
def test_the_unquantized_model_is_named(width, original):
    config = {"hidden_size": width, "quantization_config": {"quant_method": "awq"}}
    with pytest.raises(ModelError, match=rf"such as Qwen/Qwen2\.5-VL-{original}-Instruct$"):
        model_files.check_quantized("some", config)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(base, value, capsys):
    edit_weights(base, **{LAYER: torch.full((512, 192), value)})
    told = r"1 of its weights are not finite .* e.g. model\.language_model\.layers\.3\.mlp\.up_proj"
    with pytest.raises(ModelError, match=told):
        load(str(base), **PLACE)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(base), "--examples", "1"])
    assert stop.value.code == 2
    assert "not finite" in capsys.readouterr().err


# --- the hub ------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty hub cache; a request to the hub is an error."""
    snapshot = tmp_path / "snapshot"

    def snapshot_download(model, *, local_files_only=False, **_):
        if local_files_only and snapshot.is_dir():
            return str(snapshot)
        raise LocalEntryNotFoundError("Got: ConnectError: Name or service not known\nmore of it")

    monkeypatch.setattr(model_files, "snapshot_download", snapshot_download)
    return snapshot


def test_a_model_in_the_cache_is_loaded_without_the_network(cache, monkeypatch):
    """It once sent a request per file, with retries: seven silent minutes."""
    published_layout(cache)

    def ask(*_, **__):
        raise AssertionError("a request to the hub")

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    monkeypatch.setattr(socket.socket, "connect", ask)
    assert load("Some/Model", **PLACE).processor.tokenizer.eos_token == "<|im_end|>"
    assert "104 weights in 1 files" in check_files("Some/Model")


def test_a_model_that_is_nowhere_is_told_at_once_and_what_is_waited_for_is_said(cache, capsys):
    with pytest.raises(ModelError, match="the download failed: Got: ConnectError"):
        load("Some/Model", **PLACE)
    assert capsys.readouterr().out == "Some/Model: not on disk; downloading it from the hub\n"


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_part_of_a_model_in_the_cache_is_not_taken_for_the_whole(cache, lost):
    published_layout(cache)
    (cache / lost).unlink()
    (cache / "vocab.json").unlink()
    with pytest.raises(ModelError, match="hub"):
        load("Some/Model", **PLACE)
