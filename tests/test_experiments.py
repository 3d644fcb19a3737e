"""experiments/: ablations remove what they say, and the tables in docs/ are those of results/."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, config_of
from test_main import SMALL

import grpo
import main
import shapes
from experiments import ablate, figures
from harness import health
from harness.runlog import read_lines

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # last, because it has a memory.py too

import growth  # noqa: E402


@pytest.fixture
def take_out(monkeypatch):
    """`ablate.take_out`, undone after the test."""
    for module, name, _ in ablate.ABLATIONS.values():
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(health, "check_sampler_gap", health.check_sampler_gap)
    return ablate.take_out


# --- ablations ----------------------------------------------------------------------------


def test_without_std_advantages_are_only_centered(take_out):
    rewards = torch.tensor([[1.0, 3.0]])
    assert grpo.group_advantages(rewards).abs().max() < 1  # 1 / sqrt(2)
    take_out("std")
    assert grpo.group_advantages(rewards, divide_by_std=True).tolist() == [[-1.0, 1.0]]


def test_with_the_std_of_the_batch_groups_keep_their_size_beside_each_other(take_out):
    rewards = torch.tensor([[1.0, 3.0], [2.0, 2.0], [-4.0, 4.0]])
    take_out("batch-std")
    advantages = grpo.group_advantages(rewards, divide_by_std=True)
    scale = rewards.flatten().std() + grpo.STD_EPS
    torch.testing.assert_close(advantages * scale, torch.tensor([[-1.0, 1], [0, 0], [-4, 4]]))


def test_of_rloo_the_baseline_is_the_mean_of_the_others(take_out):
    """RLOO by hand: 1 against (2 + 6) / 2, and so on: G / (G - 1) times the centered reward."""
    rewards = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    centered = grpo.group_advantages(rewards, divide_by_std=False)
    take_out("rloo")
    advantages = grpo.group_advantages(rewards, divide_by_std=True)
    assert advantages.tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(advantages, 3 / 2 * centered)


LOSS_OPTIONS = {"beta": 0.0, "clip_eps": 0.2, "clip_eps_high": 0.2}


def loss_of(logprobs: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    """The loss of two completions of 2 and 3 tokens, with advantages 1 and -1."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rollout = SimpleNamespace(
        completion_mask=mask,
        advantages=torch.tensor([[1.0, -1.0]]),
        old_logprobs=old,
        ref_logprobs=None,
        sampled_logprobs=torch.zeros(2, 3),
    )
    weights = grpo.token_weights(mask, loss="grpo", max_new_tokens=3)
    return grpo.grpo_loss(logprobs, rollout, weights, **LOSS_OPTIONS)[0]


def test_of_gspo_a_completion_has_the_geometric_mean_of_its_ratios(take_out):
    """GSPO by hand: ratios 1.1 and 1.3 make sqrt(1.43) = 1.196, which is not clipped at 1.2."""
    logprobs = torch.log(torch.tensor([[1.1, 1.3, 9.0], [1.0, 1.0, 1.0]]))
    old = torch.zeros(2, 3)
    assert loss_of(logprobs, old).item() == pytest.approx(-(1.1 + 1.2) / 4 + 1 / 2)
    take_out("gspo")
    assert loss_of(logprobs, old).item() == pytest.approx(-(1.43**0.5) / 2 + 1 / 2)


def test_while_a_rollout_is_used_once_both_ratios_have_the_same_gradient(take_out):
    gradients = []
    for _ in ("token ratios", "their mean"):
        logprobs = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -3.0, -1.0]], requires_grad=True)
        loss_of(logprobs, None).backward()
        gradients.append(logprobs.grad)
        take_out("gspo")
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(gradients[0], torch.tensor([[-1 / 4, -1 / 4, 0], [1 / 6] * 3]))


def test_gspo_refuses_a_kl_term(take_out):
    take_out("gspo")
    rollout = SimpleNamespace(old_logprobs=None)
    with pytest.raises(SystemExit, match="needs --beta 0"):
        grpo.grpo_loss(torch.zeros(2, 3), rollout, None, **{**LOSS_OPTIONS, "beta": 0.05})


def test_paid_by_length_a_longer_answer_earns_more(take_out):
    text = "<reasoning>20 * 20</reasoning><answer>400.00</answer>"
    assert main.score(text, 400.0).area_correctness == 3.0
    take_out("paid-by-length")
    assert main.score(text, 400.0).area_correctness == pytest.approx(3.0 + 0.05 * len(text))


def test_an_answer_that_does_not_follow_earns_no_area(take_out):
    take_out("unfounded-answers")
    for words, area in (("20 * 20", 3.0), ("21 * 21", -3.0), ("many", -3.0)):
        text = f"<reasoning>square: {words}</reasoning><answer>400.00</answer>"
        reward = main.score(text, 400.0, kind="square")
        assert (reward.area_correctness, reward.xml_format) == (area, 0.5)


def test_without_uniform_sizes_half_of_the_sides_are_below_the_geometric_mean(take_out):
    spec = shapes.ShapeSpec(min_size=5.0, max_size=35.0)
    below = {}
    for part in ("whole", "uniform-sizes"):
        rng = np.random.default_rng(0)
        sizes = [shapes.sample_size("triangle", spec, rng) for _ in range(1000)]
        below[part] = np.mean(np.array(sizes) < 175**0.5)
        assert np.min(sizes) >= 5.0 and np.max(sizes) <= 35.0
        take_out("uniform-sizes")
    assert below["whole"] == pytest.approx((175**0.5 - 5) / 30, abs=0.03)
    assert below["uniform-sizes"] == pytest.approx(0.5, abs=0.03)


def test_without_the_stop_token_the_last_token_of_a_row_has_no_weight(take_out):
    mask = torch.tensor([[True, True, True], [True, False, False]])
    take_out("stop-token")
    weights = grpo.token_weights(mask, loss="grpo", max_new_tokens=3)
    torch.testing.assert_close(weights, torch.tensor([[1 / 6, 1 / 6, 0], [0, 0, 0]]))


def test_without_kahan_a_small_update_of_a_bf16_weight_is_lost(take_out):
    config = config_of("--lr", "1e-6", "--warmup-steps", "0")
    moved = {}
    for name in ("whole", "without"):
        weight = torch.nn.Parameter(torch.full((1,), 0.02, dtype=torch.bfloat16))
        optimizer = main.make_optimizer(config, SimpleNamespace(parameters=lambda w=weight: [w]))
        before = weight.item()
        for _ in range(500):  # 1e-6 each; the next bf16 number is 1.2e-4 away
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[name] = before - weight.item()
        take_out("kahan")
    assert moved["whole"] == pytest.approx(5e-4, abs=1.2e-4)
    assert moved["without"] == 0


@pytest.mark.parametrize(
    ("part", "least", "most"), [(None, 0.0, 1e-5), ("scored-temperature", 0.01, 1.0)]
)
def test_scoring_at_another_temperature_than_sampling_shows_in_the_gap(
    take_out, tmp_path, part, least, most
):
    if part:
        take_out(part)
    flags = ["--steps", "1", "--eval-every", "0", "--temperature", "0.6", "--name", "run"]
    main.main([*SMALL, *flags, "--runs", str(tmp_path)])
    (step,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert least <= step["sampler_gap_mean"] <= most


def test_a_part_that_is_not_known_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ablate.py", "everything"])
    with pytest.raises(SystemExit, match="one of: std, batch-std, rloo"):
        ablate.run()


# --- figures and reproduce.sh -------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(figures.ENTRIES))
def test_the_tables_in_the_docs_are_those_of_the_results(name):
    found = json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text())
    _, tabulate, _ = figures.ENTRIES[name]
    page = ROOT / "docs" / ("exercises.md" if name == "exercises" else "results.md")
    printed = (ROOT / "experiments" / "results" / f"{name}.txt").read_text()
    assert tabulate(found["numbers"]) in page.read_text()
    assert tabulate(found["numbers"]) in printed
    commits = {run["git_commit"] for run in [found["made_by"], *found["made_by"]["runs"].values()]}
    assert not any(commit.endswith("+changes") for commit in commits)


def test_a_summary_has_one_value_per_seed_and_counts_different_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "HELD_OUT", tmp_path)
    for seed in figures.SEEDS:
        answers = [{"reward": {"predicted": value}} for value in (1.0, 2.0, 1.0, None)]
        values = dict.fromkeys(figures.MEASURES, seed / 100)
        found = {"summaries": {"all": values, "small": {"relative_error_mean": 0.5}}}
        text = json.dumps({**found, "answers": answers})
        (tmp_path / f"x-seed{seed}-on-wide-at-1.json").write_text(text)
    found = figures.summaries("x", "wide", "sampled")
    assert found["shape_named"] == [0.0, 0.01, 0.02, 0.03, 0.04]
    assert found["error_of_small"] == [0.5] * 5
    assert found["different_answers"] == [2] * 5


def test_a_difference_is_that_of_paired_seeds():
    run, baseline = ({"relative_error_mean": values} for values in ([0.02, 0.04], [0.01, 0.05]))
    assert figures.measured(run, "relative_error_mean") == "3.0 ± 12.7"
    # differences 1 and -1: mean 0, standard deviation 1.414, times 12.706 / 1.414
    shown = figures.measured(run, "relative_error_mean", baseline)
    assert shown == "3.0 ± 12.7 (+0.0 ± 12.7)"
    worse = {"relative_error_mean": [0.03, 0.07]}
    assert "(\N{MINUS SIGN}2.0 ± 12.7)" in figures.measured(run, "relative_error_mean", worse)


def test_the_parts_of_an_error_are_found_in_its_words():
    """A rectangle of 20.2 x 10.3 units: each column by hand, relative to its area of 208.06."""
    text = "<reasoning>rectangle, width 21.0, height 10.5: 21.0 * 10.5 / 2</reasoning>"
    answer = {
        "shape": {"kind": "rectangle", "width": 20.2, "height": 10.3},
        "text": f"{text}<answer>110</answer>",
        "reward": {"predicted": 110.0, "relative_error": 0.47},
    }
    areas = (20 * 10, 20 * 10.5, 21 * 10.5, 21 * 10.5 / 2, 110.0)
    expected = [abs(area - 208.06) / 208.06 for area in areas]
    assert figures.parts_of(answer) == pytest.approx([*expected, 0.47])


@pytest.mark.parametrize("text", ["no number", "<reasoning>a square</reasoning><answer></answer>"])
def test_an_answer_without_words_has_all_of_its_error_in_the_format(text):
    shape = {"kind": "square", "width": 20.0, "height": 20.0}
    answer = {"shape": shape, "text": text, "reward": {"predicted": None, "relative_error": 1.0}}
    assert figures.parts_of(answer) == [0, 0, 0, 0, 0, 1.0]


@pytest.fixture
def an_entry(tmp_path, monkeypatch):
    """The results folder of an entry with one number and a figure that cannot be drawn."""

    def fail(_):
        raise RuntimeError("latex could not be found\nHere is its log")

    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    made = {"command": "figures.py x", "git_commit": "0"}
    monkeypatch.setattr(figures, "made_by", lambda names, seeds: made)
    monkeypatch.setitem(figures.ENTRIES, "x", (lambda: {"a": 1.0}, str, fail))
    monkeypatch.setattr("sys.argv", ["figures.py", "x"])
    return tmp_path


@pytest.mark.parametrize("name", figures.ENTRIES)
def test_without_runs_a_figure_says_what_makes_them(name, tmp_path, monkeypatch):
    for folder in ("RUNS", "HELD_OUT"):
        monkeypatch.setattr(figures, folder, tmp_path)
    monkeypatch.setattr("sys.argv", ["figures.py", name])
    with pytest.raises(SystemExit, match=f"what makes it: .*reproduce.sh {name}$") as stop:
        figures.main()
    assert "\n" not in str(stop.value)


def failing(call, capsys) -> tuple[str, str]:
    """Return stdout and stderr of a command that must exit with code 2."""
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    return capsys.readouterr()


def test_a_figure_that_cannot_be_drawn_costs_no_number(an_entry, capsys):
    out, err = failing(figures.main, capsys)
    assert out == "{'a': 1.0}\n"
    assert err == f"{an_entry / 'x.png'}: cannot be written: latex could not be found\n"
    assert json.loads((an_entry / "x.json").read_text())["numbers"] == {"a": 1.0}


def test_a_file_that_cannot_be_written_costs_no_table(an_entry, capsys):
    (an_entry / "x.json").mkdir()
    out, err = failing(figures.main, capsys)
    assert out == "{'a': 1.0}\n"
    assert len(err.splitlines()) == 2


def test_the_picture_of_growth_py_costs_no_number(tmp_path, capsys, monkeypatch):
    seconds = dict.fromkeys(("step_s", *growth.PHASES), 1.0)
    monkeypatch.setattr(growth, "measure", lambda task: seconds)
    measured = ["--model", TINY, "--group-sizes", "2", "--lengths", "3"]
    growth.main([*measured, "--picture", str(tmp_path / "p")])
    assert (tmp_path / "p").read_bytes().startswith(b"\x89PNG")  # without a suffix too
    assert f"picture: {tmp_path / 'p'}\n" in capsys.readouterr().out
    out, err = failing(lambda: growth.main([*measured, "--picture", str(tmp_path)]), capsys)
    assert [line[:3] for line in out.splitlines()].count("| 2") == 1
    assert len(err.splitlines()) == 1
    monkeypatch.setattr(growth, "measure", None)
    nowhere = str(tmp_path / "missing" / "p.png")
    out, err = failing(lambda: growth.main([*measured, "--picture", nowhere]), capsys)
    assert (out, len(err.splitlines())) == ("", 1)


def commands() -> dict[str, list[str]]:
    """Return the table of reproduce.sh with its abbreviations expanded: run -> command."""
    script = 'source <(sed "/^for entry/,$ d; /^mkdir/d" reproduce.sh); echo "$runs"'
    lines = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=ROOT / "experiments", check=True
    ).stdout.splitlines()
    assert lines, "reproduce.sh prints no runs"
    return {line.split()[0]: line.split()[1:] for line in lines if line}


def test_each_run_of_reproduce_sh_has_flags_that_are_accepted():
    for program, *flags in commands().values():
        if program == "experiments/ablate.py":
            assert flags.pop(0) in ablate.ABLATIONS
        else:
            assert program in ("main.py", "docs/ellipse.py", "docs/perimeter.py")
        config_of("--preset", "tiny", *flags)


def test_what_is_compared_is_what_reproduce_sh_makes():
    text = (ROOT / "experiments" / "reproduce.sh").read_text()
    (seeds,) = re.findall(r'^seeds="(.*)"$', text, re.M)
    assert tuple(map(int, seeds.split())) == figures.SEEDS
    compared = {
        "models_of_tasks": figures.TASKS.keys(),
        "rate": figures.RATE.values(),
        "wide": figures.WIDE.values(),
        "exercises": figures.EXERCISES.values(),
    }
    for entry, names in compared.items():
        (body,) = re.findall(rf"^{entry}\(\) {{(.*?)^}}", text, re.S | re.M)
        assert set(names) <= set(re.findall(r"[\w-]+", body)) & commands().keys()
