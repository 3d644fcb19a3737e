"""warmup/stages.py: what each stage trains, and when its target is met."""

import re

import pytest
import torch

from cold_start import fill_in_defaults, make_parser
from shapes import Shape
from warmup import stages
from warmup.lessons import Lessons
from warmup.models import new_model
from warmup.stages import optimizers_of_new, warmup_cosine

FEW = ["--batch-size", "2", "--image-size", "84"]


def lessons_of(processor, *flags: str) -> Lessons:
    args = make_parser().parse_args(["--from-scratch", "--out", "-", *flags])
    fill_in_defaults(args)
    return Lessons(processor, args)


def changed_by(stage, loaded, lessons) -> set[str]:
    """Return the names of the weights that a stage changes."""
    before = {name: tensor.clone() for name, tensor in loaded.policy.state_dict().items()}
    stage(loaded.policy, lessons)
    after = loaded.policy.state_dict()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def test_the_tower_learns_to_see_and_nothing_else_changes(capsys, monkeypatch):
    monkeypatch.setattr(stages, "HELD_OUT", 32)
    off = {}
    for steps in (1, 60):
        loaded = new_model(0)
        flags = ["--batch-size", "16", "--image-size", "84", "--see-steps", str(steps)]
        changed = changed_by(stages.see, loaded, lessons_of(loaded.processor, *flags))
        assert changed == {n for n in loaded.policy.state_dict() if n.startswith("model.visual.")}
        said = capsys.readouterr().out
        off[steps] = sum(float(value) for value in re.findall(r"off by ([\d.]+) units", said))
    assert off[60] < 0.8 * off[1]


def test_the_language_model_learns_to_calculate_and_nothing_else_changes(capsys, monkeypatch):
    """One calculation, so that few steps suffice."""
    monkeypatch.setattr(stages, "HELD_OUT", 8)
    square = Shape("square", 20.0, 20.0, (0.0, 0.0), (), (0, 0, 0))
    monkeypatch.setattr("warmup.lessons.random_shape", lambda spec, rng: square)
    loaded = new_model(0)
    lessons = lessons_of(loaded.processor, "--batch-size", "2", "--calculate-steps", "40")
    changed = changed_by(stages.calculate, loaded, lessons)
    assert not any(name.startswith("model.visual.") for name in changed)
    assert any(name.startswith("model.language_model.") for name in changed)
    assert "100.0 % of 8 calculations right" in capsys.readouterr().out


def test_new_calculations_are_none_of_the_taught_ones(monkeypatch):
    """Of two dimensions: there are few squares and circles, and all of them are taught."""
    loaded = new_model(0)
    lessons = lessons_of(loaded.processor, *FEW, "--calculate-steps", "3")
    asked = []
    monkeypatch.setattr(
        loaded.policy, "generate", lambda input_ids, **_: asked.append(input_ids) or input_ids
    )
    assert stages.share_calculated(loaded.policy, lessons) == 0.0  # nothing was written
    decode = loaded.processor.tokenizer.batch_decode
    new = {text.removesuffix("<answer>") for text in decode(asked[0], skip_special_tokens=True)}
    taught = [
        text.split("<answer>")[0]
        for step in range(3)
        for text in decode(lessons.calculations(step)[0], skip_special_tokens=True)
    ]
    assert len(taught) == 24
    assert sum("height" in text for text in new) > 100
    assert not {text for text in new & set(taught) if "height" in text}


@pytest.mark.parametrize(
    ("seen", "met"),
    [
        ([(0.97, 0.4), (1.0, 0.1)], True),
        ([(0.96, 0.4), (1.0, 0.1)], False),
        ([(0.97, 0.4), (1.0, 0.41)], False),
    ],
)
def test_the_target_of_seeing_holds_for_upright_and_turned_plots(monkeypatch, seen, met):
    loaded = new_model(0)
    lessons = lessons_of(loaded.processor, *FEW, "--see-steps", "1")
    each = iter(seen)
    monkeypatch.setattr(stages, "sight", lambda *_: next(each))
    assert stages.see(loaded.policy, lessons) == met


@pytest.mark.parametrize(("right", "met"), [(0.98, True), (0.97, False)])
def test_the_target_of_calculating(monkeypatch, right, met):
    loaded = new_model(0)
    lessons = lessons_of(loaded.processor, *FEW, "--calculate-steps", "1")
    monkeypatch.setattr(stages, "share_calculated", lambda *_: right)
    assert stages.calculate(loaded.policy, lessons) == met


GOOD = {"shape_named": 0.97, "answer_follows": 0.98, "relative_error_mean": 0.04, "strict_xml": 0.9}


BETTER = {"shape_named": 0.99, "answer_follows": 0.995, "relative_error_mean": 0.02}


@pytest.mark.parametrize(
    ("worse", "better", "met"),
    [
        ({}, {}, True),
        ({"shape_named": 0.96, "answer_follows": 0.97, "relative_error_mean": 0.05}, BETTER, True),
        ({"shape_named": 0.96}, {}, False),
        ({"shape_named": None}, {}, False),
        ({"answer_follows": 0.97}, {}, False),
        ({"relative_error_mean": 0.05}, {}, False),
    ],
)
def test_the_target_of_speaking_holds_for_all_tags_and_tasks_together(
    monkeypatch, worse, better, met
):
    """The last of the four may be worse, and the first may make up for it."""
    loaded = new_model(0)
    lessons = lessons_of(loaded.processor, *FEW)
    found = iter([{**GOOD, **better}, GOOD, GOOD, {**GOOD, **worse}])
    asked = []
    monkeypatch.setattr(
        stages,
        "greedy_answers",
        lambda sampler, lessons, spec, tag: asked.append((tag, spec.max_rotation)) or next(found),
    )
    assert stages.judge(loaded.policy, lessons, "speak") == met
    assert asked == [(tag, turn) for tag in ("reasoning", "think") for turn in (0.0, 45.0)]


def test_muon_has_the_matrices_and_adamw_the_rest():
    model = new_model(0).policy
    embeddings = model.get_input_embeddings().weight
    muon, adamw = optimizers_of_new(list(model.parameters()), embeddings)
    matrices, others = (
        [parameter for group in each.param_groups for parameter in group["params"]]
        for each in (muon, adamw)
    )
    assert {parameter.ndim for parameter in matrices} == {2}
    assert {parameter.ndim for parameter in others} == {1, 2, 5}  # the patches' weight has 5
    assert [p is embeddings for p in others if p.ndim == 2] == [True]
    assert len(matrices) + len(others) == len(list(model.parameters()))


def test_the_learning_rate_rises_and_falls():
    factors = [warmup_cosine(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2)
    assert max(factors) == pytest.approx(factors[5], abs=0.01)
    assert 0 < factors[-1] < 0.001
