"""evaluate.py: the numbers by hand, and the command on the bundled model."""

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, config_of
from PIL import Image

import evaluate
from evaluate import (
    Answer,
    groups_of,
    pass_at_k,
    passes,
    summarize,
    summary_table,
    wilson_interval,
    words_table,
)
from rewards import score
from shapes import Shape


def answered(text: str, *, side: float = 20.0, kind: str = "square") -> Answer:
    shape = Shape(kind, side, side, (25, 25), (), (0, 0, 0))
    return Answer(shape, shape.area, text, score(text, shape.area, kind=kind))


def xml(number: str) -> str:
    return f"<reasoning>r</reasoning><answer>{number}</answer>"


def test_summary_by_hand():
    answers = [
        answered(xml("400.00")),
        answered(xml("380.00")),  # 5 % off
        answered(xml("480")),  # 20 % off
        answered("no idea"),
    ]
    summary = summarize(answers)
    assert summary["examples"] == 4
    assert summary["relative_error_mean"] == pytest.approx((0 + 0.05 + 0.2 + 1) / 4)
    assert summary["relative_error_median"] == pytest.approx(0.125)
    assert summary["within_5_percent"] == 0.5
    assert summary["within_10_percent"] == 0.5
    assert summary["two_decimals"] == 0.5
    assert summary["strict_xml"] == 0.75
    assert summary["readable"] == 0.75
    assert summary["area_correctness_reward"] == pytest.approx((3 + 2.7 + 1.8 - 3) / 4)


def test_the_words_are_summarized_where_they_can_be_judged():
    answers = [
        answered("<reasoning>square, side 20: 20 * 20</reasoning><answer>400.00</answer>"),
        answered("<reasoning>circle, 20 * 20</reasoning><answer>300.00</answer>"),
        answered("<reasoning>a shape</reasoning><answer>400.00</answer>"),
    ]
    summary = summarize(answers)
    for name in ("shape_named", "answer_follows", "arithmetic_right"):
        assert (summary[name], summary[f"{name}_judged"]) == (0.5, pytest.approx(2 / 3))
    header, line, silent = words_table(
        {"all": summary, "none": summarize(answers[2:])}
    ).splitlines()
    assert header.split("  ")[-1].strip() == "arithmetic right %"
    assert line.split() == ["all", *(3 * ["50.0", "of", "2"])]
    assert silent.split() == ["none", *(3 * ["-", "of", "0"])]


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_share_of_all_choices_that_hold_a_hit(samples):
    for hits in range(samples + 1):
        for k in range(1, samples + 1):
            choices = list(itertools.combinations(range(samples), k))
            holding = sum(any(sample < hits for sample in choice) for choice in choices)
            assert pass_at_k(samples, hits, k) == pytest.approx(holding / len(choices))


def test_passes_are_means_over_examples():
    right, wrong = answered(xml("400.00")), answered(xml("500.00"))
    found = passes([right, wrong, wrong, wrong] + 4 * [wrong] + [right], samples=4)
    assert found.keys() == {1, 4}  # the ninth answer's group was cut short
    assert found[1][0] == pytest.approx((0.25 + 0) / 2)
    assert found[4][0] == pytest.approx((1 + 0) / 2)
    assert found[4][1] == pytest.approx(1.959964 * 0.5)  # stdev of 1 and 0, over the root of 2
    assert passes([right], samples=4) == {}


def test_several_samples_of_each_example(tmp_path, capsys):
    flags = ["--examples", "3", "--samples", "4", "--temperature", "1", "--batch-size", "8"]
    flags += ["--show", "0", "--plot", str(tmp_path / "e.png"), "--json", str(tmp_path / "e.json")]
    evaluate.main([TINY, *flags, "--image-size", "84", "--max-new-tokens", "24"])
    out = capsys.readouterr().out
    assert re.search(r"within 5 % in 1 of 4 samples: +\d", out)
    numbers = json.loads((tmp_path / "e.json").read_text())
    assert len(numbers["answers"]) == 12
    assert numbers["summaries"]["all"]["examples"] == 3
    assert numbers["pass_at_k"].keys() == {"1", "4"}
    assert all(len(mean_and_half) == 2 for mean_and_half in numbers["pass_at_k"].values())
    shapes = [answer["shape"] for answer in numbers["answers"]]
    assert all(shapes[i] == shapes[i // 4 * 4] for i in range(12))
    assert len({json.dumps(shape) for shape in shapes}) == 3


def test_several_greedy_samples_are_refused(capsys):
    with pytest.raises(SystemExit):
        evaluate.main([TINY, "--samples", "4"])
    assert "--samples 4: greedy answers are all equal; --temperature 1" in capsys.readouterr().err


def test_wilson_interval_solves_its_equation():
    """Each end p satisfies |hits/n - p| = 1.96 standard errors of p itself."""
    for hits, trials in ((0, 10), (3, 10), (10, 10), (77, 256)):
        low, high = wilson_interval(hits, trials)
        assert 0 <= low < high <= 1
        assert low - 1e-12 <= hits / trials <= high + 1e-12
        for end in (low, high):
            if 1e-9 < end < 1 - 1e-9:
                error = abs(hits / trials - end) / (end * (1 - end) / trials) ** 0.5
                assert error == pytest.approx(1.959964, rel=1e-6)


def test_groups_are_the_classes_and_the_thirds_by_area():
    answers = [answered(xml("1.00"), side=float(side)) for side in range(5, 12)]
    answers += [answered(xml("1.00"), kind="circle", side=30.0)]
    groups = groups_of(answers)
    assert {name: len(group) for name, group in groups.items()} == {
        "all": 8,
        "circle": 1,
        "square": 7,
        "small": 2,
        "medium": 3,
        "large": 3,
    }
    assert max(a.shape.area for a in groups["small"]) < min(a.shape.area for a in groups["large"])
    lines = summary_table({name: summarize(group) for name, group in groups.items()}).splitlines()
    assert len(lines) == 7
    assert len({len(line) for line in lines}) == 1


def test_the_command(tmp_path, capsys):
    write_results, picture = tmp_path / "write_results.json", tmp_path / "picture.png"
    flags = ["--examples", "6", "--batch-size", "4", "--rotate", "--max-new-tokens", "48"]
    evaluate.main([TINY, *flags, "--json", str(write_results), "--plot", str(picture)])
    numbers = json.loads(write_results.read_text())
    assert numbers["summaries"]["all"]["examples"] == len(numbers["answers"]) == 6
    assert {"shape", "area", "text", "reward"} == numbers["answers"][0].keys()
    assert "max_rotation=45.0" in capsys.readouterr().out
    assert Image.open(picture).size == (720, 720)


@pytest.mark.parametrize(
    "arguments",
    [
        ["missing/folder/x"],
        [TINY, "--examples", "0"],
        [TINY, "--batch-size", "many"],
        [TINY, "--temperature", "-1"],
        [TINY, "--temperature", "1e39"],
        [TINY, "--temperature", "nan"],
        [TINY, "--image-size", "1008"],
        [TINY, "--max-rotation", "10"],
        [TINY, "--min-size", "30", "--max-size", "20"],
        [TINY, "--image-size", "100"],
        [TINY, "--json", "/no/such/folder/x.json"],
        [TINY, "--reasoning-tag", "thoughts"],
        [],
    ],
)
def test_bad_input_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.fixture
def wide_run(tmp_path) -> Path:
    """A run on another task, with another reward formula, whose final model is tiny/."""
    shutil.copytree(TINY, tmp_path / "run" / "final")
    shutil.copytree(TINY, tmp_path / "run" / "checkpoints" / "step-000002")
    flags = ["--rotate", "--min-size", "5", "--reasoning-tag", "think", "--correctness", "root"]
    config = config_of("--preset", "tiny", *flags, "--image-size", "84", "--seed", "7")
    description = json.dumps({"config": dataclasses.asdict(config)})
    (tmp_path / "run" / "config.json").write_text(description)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    return tmp_path / "run"


@pytest.mark.parametrize("part", ["", "final", "checkpoints/step-000002"])
def test_a_model_in_a_run_is_asked_the_runs_own_task(wide_run, part, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "completion_texts", lambda *_: [xml("400.00")] * 8)
    path = wide_run.parent / "numbers.json"
    evaluate.main([str(wide_run / part), "--examples", "8", "--json", str(path)])
    numbers = json.loads(path.read_text())
    asked = {name: numbers["arguments"][name] for name in ("rotate", "min_size", "reasoning_tag")}
    assert asked == {"rotate": True, "min_size": 5.0, "reasoning_tag": "think"}
    asked = {name: numbers["arguments"][name] for name in ("image_size", "seed", "max_new_tokens")}
    assert asked == {"image_size": 84, "seed": 7, "max_new_tokens": 56}
    assert numbers["run"] == str(wide_run)
    errors = [answer["reward"]["relative_error"] for answer in numbers["answers"]]
    assert any(0 < error < 1 for error in errors)  # otherwise all formulas would agree
    for answer in numbers["answers"]:
        error = answer["reward"]["relative_error"]
        assert answer["reward"]["area_correctness"] == pytest.approx(3 - 6 * error**0.5)
    assert (wide_run / "evaluation.png").exists()
    told = capsys.readouterr().out
    assert f"the task of {wide_run}" in told
    assert "root area reward" in told


def test_turned_off_the_largest_turn_has_no_effect(wide_run, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([str(wide_run), "--no-rotate", "--max-rotation", "10"])
    assert "--max-rotation: has no effect without --rotate" in capsys.readouterr().err


def test_a_model_outside_of_a_run_has_the_defaults(wide_run, monkeypatch):
    """Even if the working folder is a run folder and the model lies elsewhere."""
    monkeypatch.chdir(wide_run)
    shutil.copytree(TINY, wide_run.parent / "model")
    for target in ("../model", "Qwen/Qwen2.5-VL-7B-Instruct"):
        assert evaluate.find_target(target).run is None


class Interrupted:
    """Answers that end with an error in the third one."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *_, **__):
        yield answered(xml("400.00"))
        yield answered(xml("380.00"))
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "stopped after 2 of 9 answers"),
        (torch.OutOfMemoryError("out of memory"), 2, "out of GPU memory (try a smaller"),
    ],
)
def test_answers_that_are_there_are_not_lost(tmp_path, monkeypatch, capsys, error, code, told):
    monkeypatch.setattr(evaluate, "evaluate", Interrupted(error))
    path, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    with pytest.raises(SystemExit) as stop:
        flags = ["--json", str(path), "--plot", str(picture), "--examples", "9"]
        evaluate.main([TINY, *flags])
    assert stop.value.code == code
    assert json.loads(path.read_text())["summaries"]["all"]["examples"] == 2
    output = capsys.readouterr()
    assert "all          2" in output.out
    assert told in output.err


def test_each_output_fails_alone(tmp_path, monkeypatch, capsys):
    """First the plot fails, then the numbers: all other output is still written."""
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: iter([answered(xml("400.00"))]))
    path, picture = tmp_path / "numbers.json", tmp_path / "a$_^$b.png"
    evaluate.main([TINY, "--json", str(path), "--plot", str(picture)])
    assert picture.exists()  # its title is not parsed as a formula
    for name in ("plot_answers", "write_json"):
        with monkeypatch.context() as broken:
            broken.setattr(evaluate, name, lambda *_, **__: 1 / 0)
            path.unlink(), picture.unlink()
            with pytest.raises(SystemExit) as stop:
                evaluate.main([TINY, "--json", str(path), "--plot", str(picture)])
        output = capsys.readouterr()
        assert stop.value.code == 2
        assert "all          1" in output.out
        assert "cannot be written: division by zero" in output.err
        assert [path.exists(), picture.exists()] == [name == "plot_answers", name == "write_json"]
        path.touch(), picture.touch()


@pytest.mark.parametrize("name", ["--json", "--plot"])
def test_outputs_are_checked_before_anything_is_loaded(tmp_path, capsys, name, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)
    for path, told in (
        (tmp_path / "folder.png", "is a folder; must be a file"),
        (tmp_path / "missing" / "x.png", "its folder"),
    ):
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        with pytest.raises(SystemExit):
            evaluate.main([TINY, name, str(path)])
        assert told in capsys.readouterr().err
    if name == "--plot":
        with pytest.raises(SystemExit):
            evaluate.main([TINY, name, str(tmp_path / "p")])
        assert ".pdf, .pgf, .png" in capsys.readouterr().err


def test_a_run_without_a_final_model_says_so(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path)])
    assert "neither final/ nor a checkpoint yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("{", "not readable"),
        ('{"config": []}', "not readable"),
        ('{"config": {"min_size": "many"}}', "min_size cannot be 'many'"),
        ('{"config": {"rotate": 1}}', "rotate cannot be 1"),
    ],
)
def test_a_damaged_config_is_told_in_one_line(tmp_path, capsys, config, told):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "final").mkdir()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(tmp_path)])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert told in error
    assert len(error.splitlines()) == 1
