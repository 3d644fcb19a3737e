"""config.py: every option, and the values that the command line accepts."""

import dataclasses
from pathlib import Path

import pytest
from conftest import config_of

import main
from config import PRESETS, Config, check_same_run, make_parser

ROOT = Path(__file__).resolve().parent.parent


def test_every_option_is_in_the_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # so that no default is wrapped
    text = make_parser().format_help()
    for option in dataclasses.fields(Config):
        assert "--" + option.name.replace("_", "-") in text
        assert f"default: {option.default}" in text


def test_reward_weights_are_three_numbers():
    assert config_of().weights == (1.0, 1.0, 1.0)
    assert config_of("--reward-weights", "2, 0,0.5").weights == (2.0, 0.0, 0.5)
    for wrong in ("1,1", "1,1,1,1", "a,b,c", "", "0,0,0", "-1,1,1", "nan,1,1", "inf,1,1"):
        with pytest.raises(ValueError, match=f"--reward-weights {wrong}: must be three numbers"):
            config_of(f"--reward-weights={wrong}")


def test_the_papers_defaults():
    config = config_of()
    assert config.model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert (config.steps, config.prompts_per_step, config.group_size) == (750, 4, 8)
    assert (config.lr, config.adam_beta1, config.adam_beta2) == (2e-6, 0.9, 0.99)
    assert (config.beta, config.clip_eps, config.max_grad_norm) == (0.05, 0.2, 1.0)
    assert (config.temperature, config.max_new_tokens, config.warmup_steps) == (1.0, 512, 20)


def test_every_float_has_limits():
    """Values too large for fp32 are refused at the start, not by a traceback during the run."""
    for option in dataclasses.fields(Config):
        if option.type is float and option.name not in ("min_size", "max_size"):  # ShapeSpec checks
            with pytest.raises(ValueError, match="must be"):
                config_of("--" + option.name.replace("_", "-"), "1e38")


def test_flags_win_over_the_preset_and_the_preset_over_defaults():
    assert config_of("--preset", "tiny").lr == PRESETS["tiny"]["lr"]
    assert config_of("--preset", "tiny", "--lr", "3e-5").lr == 3e-5
    assert config_of("--lr", "3e-5", "--preset", "tiny").lr == 3e-5
    assert config_of("--preset", "tiny", "--beta", "0").beta == 0.0


def test_layers_to_checkpoint_are_a_number_or_chosen():
    assert config_of().layers_to_checkpoint is None
    assert config_of("--checkpoint-layers", "0").layers_to_checkpoint == 0
    assert config_of("--checkpoint-layers", "28").layers_to_checkpoint == 28


def test_booleans_can_be_switched_both_ways():
    assert config_of("--rotate").rotate is True
    assert config_of("--no-rotate").rotate is False
    assert config_of("--rotate").spec.max_rotation == 45.0
    assert config_of().spec.max_rotation == 0.0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--steps many", "--steps"),
        ("--group-size 1", "--group-size 1: must be at least 2"),
        ("--temperature 0", "--temperature 0.0: must be at least 0.01"),
        (
            "--temperature nan",
            "--temperature nan: must be at least 0.01 and at most 100, and finite",
        ),
        ("--lr inf", "--lr inf: must be above 0 and at most 1, and finite"),
        ("--temperature 1e39", "--temperature 1e+39: must be at least 0.01 and at most 100"),
        ("--clip-eps-high 1e300", "--clip-eps-high 1e+300: must be above 0 and at most 1,000"),
        ("--beta 1e300", "--beta 1e+300: must be at least 0 and at most 1,000"),
        ("--lr 1e30", "--lr 1e+30: must be above 0 and at most 1"),
        ("--image-size 28", "--image-size 28: the model's image processor would resize it to 56 x"),
        (
            "--preset tiny --image-size 1008",
            "would resize it to 980 x 980; it accepts 3,136 to 1,003,520 pixels",
        ),
        ("--beta -1", "--beta -1.0: must be at least 0"),
        ("--clip-eps 2", "--clip-eps 2.0: must be above 0 and at most 1"),
        ("--loss ppo", "--loss"),
        ("--workers -1", "--workers -1: must be at least 0"),
        (
            "--checkpoint-layers some",
            "--checkpoint-layers some: must be a number of layers or auto",
        ),
        ("--checkpoint-layers -1", "--checkpoint-layers -1: must be a number of layers or auto"),
        ("--reasoning-tag thoughts", "--reasoning-tag"),
        ("--image-size 225", "multiple of 28"),
        ("--min-size 40", "the range is empty"),
        ("--rotate --max-size 40", "can be 56.6 wide"),
        ("--max-rotation 30", "has no effect without --rotate"),
        ("--reference-mix 0.5", "has no effect without --sync-reference-every"),
        ("--beta 0 --sync-reference-every 10", "there is no reference with --beta 0"),
        ("--preset huge", "--preset"),
        ("--rotate False", "unrecognized arguments: False"),
        ("--learning-rate 1", "unrecognized arguments"),
        ("--model no/such/folder", "no such folder"),
        (f"--model {ROOT / 'tests'}", "no config.json in this folder"),
    ],
)
def test_bad_input_is_one_line(flags, told, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main.main([*flags.split(), "--runs", str(tmp_path / "runs")])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert told in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_run_whose_rate_decays_keeps_its_steps():
    saved = Config(steps=5, decay_steps=2)
    with pytest.raises(ValueError, match="--steps 7: the run has 5, and its learning rate"):
        check_same_run(saved, {"steps": 7})
    check_same_run(saved, {"steps": 5})
    check_same_run(Config(steps=5), {"steps": 7})
