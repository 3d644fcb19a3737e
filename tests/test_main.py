"""main.py: the inputs of a step, and whole small runs as a user would start them."""

import ast
import dataclasses
import inspect
import json
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, config_of, make_prompts, random_completions, scored
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

import evaluate
import main
from config import Config, workload_of
from engine.attention import IMPLEMENTATION
from engine.loading import load, use_own_attention
from engine.passes import PassSize
from harness.runlog import create_run, read_lines
from main import learning_rate
from shapes import ShapeSpec, make_example

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--device",
    "cpu",
    "--preset",
    "tiny",
    "--prompts-per-step",
    "2",
    "--group-size",
    "2",
    "--eval-examples",
    "2",
    "--decay-steps",
    "0",
]


# --- steps --------------------------------------------------------------------------------


def test_every_option_is_read():
    """Each field occurs as `config.name`, or by name in a call of `config.pick`."""
    tree = ast.parse("".join(map(inspect.getsource, (main, Config, workload_of))))
    read = set(main.UPDATE_OPTIONS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in ("config", "self"):
            read.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "pick":
            read |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    assert {option.name for option in dataclasses.fields(Config)} - read == set()


@pytest.mark.parametrize(
    "flags",
    [
        ["--inner-epochs", "2"],
        ["--lora-rank", "2"],
        ["--beta", "0", "--loss", "dapo"],
        ["--dtype", "bfloat16"],
        ["--prompts-per-step", "3", "--micro-batch", "2"],
    ],
)
def test_the_sample_tells_how_the_update_moved_each_token(tmp_path, flags):
    options = ["--steps", "1", "--eval-every", "0", "--lr", "1e-2", "--warmup-steps", "0"]
    run = run_main(tmp_path, *options, *flags, "--name", "my_ü")
    (sample,) = read_lines(run / "samples.jsonl")
    told = {"texts", "sampled_logprobs", "old_logprobs", "new_logprobs", "weights"}
    if "--beta" not in flags:
        told |= {"ref_logprobs", "k3"}
    for completion in sample["completions"]:
        tokens = completion["tokens"]
        assert tokens.keys() == told
        assert {len(values) for values in tokens.values()} == {len(tokens["texts"])}
        assert "".join(tokens["texts"]).startswith(completion["text"])
        assert tokens["new_logprobs"] != tokens["old_logprobs"]
        gap = max(map(operator.sub, tokens["sampled_logprobs"], tokens["old_logprobs"]), key=abs)
        assert abs(gap) < (0.2 if "bfloat16" in flags else 1e-3)


def test_a_step_lets_go_of_what_it_has_seen():
    """Otherwise the vision tower's activations of two steps would be in memory at once."""
    config = config_of(*SMALL, "--image-size", "84", "--max-new-tokens", "4")
    loaded = load(TINY, device="cpu", dtype="float32", reference=True)
    _, rollout, _ = main.take_step(
        config,
        0,
        iter(main.make_batches(config, loaded.processor)),
        main.make_sampler(config, loaded),
        loaded,
        main.make_optimizer(config, loaded.policy),
        PassSize(micro_batch=1),
    )
    assert len(rollout.texts) == 4
    assert rollout.prompts.image_features is None


def test_a_run_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit):
        main.main([*SMALL, "--runs", str(tmp_path), "--name", "mine"])
    assert "runs are never overwritten" in capsys.readouterr().err


def test_the_learning_rate_warms_up_from_the_first_step():
    config = config_of("--lr", "1.0", "--warmup-steps", "4")
    assert [learning_rate(config, step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert learning_rate(config_of("--lr", "1.0", "--warmup-steps", "0"), 0) == 1.0


def test_the_learning_rate_decays_over_the_last_steps():
    flags = ["--lr", "1.0", "--warmup-steps", "2", "--steps", "6", "--decay-steps", "4"]
    rates = [learning_rate(config_of(*flags), step) for step in range(6)]
    assert rates == [0.5, 1, 1, 0.75, 0.5, 0.25]


def test_each_step_has_its_own_examples(processor):
    config = config_of("--preset", "tiny", "--prompts-per-step", "3")
    batches = [main.make_batch(config, processor, 0, step) for step in range(2)]
    indices = [[example.index for example in examples] for examples, _ in batches]
    assert indices == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("workers", [1, 2])
def test_examples_do_not_depend_on_the_workers(processor, workers):
    flags = ["--preset", "tiny", "--prompts-per-step", "2", "--steps", "4", "--image-size", "84"]
    here = main.make_batches(config_of(*flags), processor)
    ahead = main.make_batches(config_of(*flags, "--workers", str(workers)), processor)
    count = 0
    for (examples, prompts), (others, other_prompts) in zip(here, ahead, strict=True):
        count += 1
        assert [example.shape for example in examples] == [example.shape for example in others]
        assert torch.equal(prompts.input_ids, other_prompts.input_ids)
        assert torch.equal(prompts.pixel_values, other_prompts.pixel_values)
    assert count == 4


def test_held_out_answers_are_judged_by_the_runs_own_reward(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "completion_texts", lambda *_: ["<answer>400.00</answer>"] * 4)
    flags = ["--steps", "1", "--eval-examples", "1", "--correctness", "root", "--image-size", "84"]
    main.main([*SMALL, *flags, "--runs", str(tmp_path), "--name", "run"])
    for line in read_lines(tmp_path / "run" / "evaluations.jsonl"):
        error = line["relative_error_mean"]
        assert 0 < error < 1
        assert line["area_correctness_reward"] == pytest.approx(3 - 6 * error**0.5)


def test_completions_are_judged_by_the_runs_own_reward(processor):
    examples, _ = main.make_batch(config_of("--preset", "tiny"), processor, 0, 0)
    half_off = f"<answer>{examples[1].area / 2:.2f}</answer>"
    for flags, expected in (((), 0.0), (("--correctness", "log"), -3.0)):
        reward = main.judge(config_of(*flags), examples, half_off, 1)
        assert reward.area_correctness == pytest.approx(expected, abs=0.01)


def test_the_sum_that_is_trained_on_has_the_runs_own_weights(processor):
    examples, _ = main.make_batch(config_of("--preset", "tiny"), processor, 0, 0)
    text = f"<reasoning>r</reasoning><answer>{examples[0].area:.2f}</answer>"
    reward = main.judge(config_of("--reward-weights", "0,2,4"), examples, text, 0)
    assert (reward.total, reward.area_format, reward.xml_format) == (3.0, 0.5, 0.5)


# --- whole runs ---------------------------------------------------------------------------


def run_main(tmp_path: Path, *flags: str) -> Path:
    command = [sys.executable, str(ROOT / "main.py"), *SMALL, "--runs", str(tmp_path), *flags]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with (tmp_path / "log").open("w") as log:
        options = {"stdout": log, "stderr": log, "env": environment, "cwd": tmp_path}
        assert subprocess.run(command, **options).returncode == 0, (tmp_path / "log").read_text()
    return tmp_path / "my_ü"


def train(config: Config, loaded, folder: Path):
    main.train(
        config, loaded, create_run([folder], config=dataclasses.asdict(config), device="cpu")
    )


def test_a_whole_run(tmp_path):
    flags = ["--steps", "3", "--eval-every", "2", "--sample-every", "2", "--log-every", "1"]
    run = run_main(tmp_path, *flags, "--name", "my_ü")
    log = (tmp_path / "log").read_text()  # in ASCII, which has no ü; `grep '^step'` finds all steps
    assert re.findall(r"^step \d", log, re.MULTILINE) == ["step 0", "step 1", "step 2"]
    assert "my_\\xfc: done" in log
    assert "\r" not in log  # no progress bars
    metrics = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert [line["prompts"] for line in metrics] == [2, 4, 6]
    assert metrics[0]["kl"] == 0.0
    assert metrics[2]["kl"] > 0.0
    assert all(line["ratio"] == 1.0 for line in metrics)
    assert all(line["sampler_gap_max"] < 1e-3 for line in metrics)
    assert all(-3 <= line["area_correctness_reward"] <= 3 for line in metrics)
    assert [line["lr"] for line in metrics] == pytest.approx([8e-6, 16e-6, 24e-6])
    assert [e["steps_done"] for e in read_lines(run / "evaluations.jsonl")] == [0, 2, 3]
    samples = read_lines(run / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0, 2]
    assert all(len(sample["completions"]) == 2 for sample in samples)
    for completion in samples[0]["completions"]:
        tokens = completion["tokens"]
        assert "".join(tokens["texts"]).removesuffix("<|im_end|>") == completion["text"]
        assert tokens["sampled_logprobs"] == pytest.approx(tokens["old_logprobs"], abs=1e-3)
        assert tokens["k3"] == [0.0] * len(tokens["texts"])  # the policy is still the reference
        assert tokens["weights"] == [pytest.approx(1 / (4 * len(tokens["texts"])))] * len(
            tokens["texts"]
        )
    drawn = make_example(ShapeSpec(), seed=0, split="train", index=samples[1]["index"])
    assert samples[1]["shape"] == json.loads(json.dumps(dataclasses.asdict(drawn.shape)))
    config = json.loads((run / "config.json").read_text())["config"]
    assert (config["steps"], config["device"], config["dtype"]) == (3, "cpu", "float32")

    policy = Qwen2_5_VLForConditionalGeneration.from_pretrained(run / "final")
    before = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    changed = zip(policy.parameters(), before.parameters(), strict=True)
    assert any(not torch.equal(new, old) for new, old in changed)
    assert AutoProcessor.from_pretrained(run / "final").tokenizer.eos_token == "<|im_end|>"
    check_what_servers_read(run / "final")


def check_what_servers_read(final: Path) -> None:
    """Assert class, weight names and files like the original checkpoint's, and nothing of ours."""
    config = json.loads((final / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    names, expected = (
        safe_open(Path(folder) / "model.safetensors", "pt").keys() for folder in (final, TINY)
    )
    assert sorted(names) == sorted(expected)
    names = {path.name for path in Path(TINY).iterdir()}
    assert {path.name for path in final.iterdir()} == names | {"state.json"}
    texts = [path.read_text() for path in final.glob("*.json")]
    assert not any(IMPLEMENTATION in text for text in texts)
    check_readable_as_any_new_file(final)


def check_readable_as_any_new_file(folder: Path) -> None:
    """Assert that no file, in folders below too, is kept from others who may read the rest."""
    (folder / "new").touch()
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert modes == {(folder / "new").stat().st_mode}


def test_final_gives_the_logits_of_the_trained_policy(tmp_path, processor):
    config = config_of(*SMALL, "--steps", "1", "--eval-every", "0", "--loss", "dr_grpo")
    loaded = main.load(TINY, device="cpu", dtype="float32", reference=True)
    train(config, loaded, tmp_path / "run")
    final = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "run" / "final").eval()
    use_own_attention(final)
    prompts = make_prompts(processor, 2)
    ids, mask = random_completions(prompts)
    with torch.no_grad():
        trained = scored(loaded.policy, prompts, ids, mask)
        reloaded = scored(final, prompts, ids, mask)
    assert torch.equal(trained, reloaded)


def test_two_runs_of_one_seed_are_the_same_run(tmp_path):
    curves = []
    for name in ("one", "two"):
        flags = ["--steps", "2", "--eval-every", "0", "--beta", "0", "--inner-epochs", "2"]
        config = config_of(*SMALL, *flags, "--checkpoint-layers", "2")
        loaded = main.load(TINY, device="cpu", dtype="float32")
        train(config, loaded, tmp_path / name)
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        timed = ("_s", "gib")
        curves.append([{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines])
    assert curves[0] == curves[1]
    assert curves[0][1]["ratio"] != 1.0
    assert curves[0][1]["kl"] == 0.0  # no reference, no KL


def test_the_reference_follows_the_policy_when_asked(tmp_path):
    flags = ["--steps", "3", "--eval-every", "0", "--sync-reference-every", "1"]
    config = config_of(*SMALL, *flags, "--reference-mix", "1")
    loaded = main.load(TINY, device="cpu", dtype="float32", reference=True)
    train(config, loaded, tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["kl"] for line in lines] == [0.0, 0.0, 0.0]
    (step,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert (step / "reference" / "model.safetensors").exists()
    check_readable_as_any_new_file(step)


# --- trackers -----------------------------------------------------------------------------


def test_a_tracker_gets_every_number_of_the_log(tmp_path):
    flags = [*SMALL, "--steps", "3", "--eval-every", "2", "--image-size", "84"]
    main.main([*flags, "--runs", str(tmp_path), "--name", "run", "--report-to", "tensorboard"])
    shown = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logs = {"metrics": ("step", 1, ""), "evaluations": ("steps_done", 0, "held_out/")}
    for file, (step, shift, prefix) in logs.items():
        lines = read_lines(tmp_path / "run" / f"{file}.jsonl")
        numbers = {key for key, value in lines[0].items() if not isinstance(value, str)}
        assert numbers > {"area_correctness_reward"}
        for key in numbers:
            known = [line for line in lines if line[key] is not None]  # a share of none is null
            expected = [(line[step] + shift, pytest.approx(line[key], rel=1e-6)) for line in known]
            points = shown.Scalars(prefix + key) if known else []
            assert [(point.step, point.value) for point in points] == expected  # by steps done


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("config.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--report-to wandb: needs its package: pip install wandb"):
        config_of("--report-to", "wandb")
