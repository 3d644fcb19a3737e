"""cold_start.py: its synthetic answers, and the tiny model that it trains."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

import cold_start
from cold_start import (
    MISTAKES,
    DenseHead,
    Flaws,
    bounding_box,
    dense_loss,
    dense_targets,
    encode_answers,
    synthetic_answer,
    tiny_tokenizer,
    warmup_cosine,
)
from engine.loading import load
from engine.sizes import empty_model, numel
from rewards import score
from shapes import Shape, ShapeSpec, make_example

SPEC = ShapeSpec(min_size=5.0)


def answers_and_shapes(tag: str = "reasoning", **flaws: float):
    rng = np.random.default_rng(0)
    for i in range(200):
        shape = make_example(SPEC, seed=0, split="cold_start", index=i).shape
        yield synthetic_answer(shape, reasoning_tag=tag, flaws=Flaws(**flaws), rng=rng), shape


@pytest.mark.parametrize("tag", ["reasoning", "think"])
def test_an_answer_without_flaws_earns_everything(tag):
    for answer, shape in answers_and_shapes(tag):
        assert score(answer, shape.area, reasoning_tag=tag).total == pytest.approx(4.0, abs=0.01)


def test_a_sloppy_answer_lacks_format_but_has_an_area():
    rewards = [score(answer, shape.area) for answer, shape in answers_and_shapes(sloppy=1.0)]
    assert all(r.area_format + r.xml_format < 1.0 for r in rewards)
    assert all(r.relative_error < 0.05 for r in rewards)
    assert {(r.area_format, r.xml_format) for r in rewards} == {(0, 0), (0, 0.5), (0.5, 0)}


def test_a_mistake_is_well_formed_and_consistent():
    for answer, shape in answers_and_shapes(mistakes=1.0):
        formula, mistaken_area = MISTAKES[shape.kind]
        reward = score(answer, mistaken_area(shape))
        assert reward.total == pytest.approx(4.0, abs=0.01)
        assert f": {formula}</reasoning>" in answer


def test_area_noise_is_the_std_of_the_log():
    pairs = answers_and_shapes(area_noise=0.3)
    logs = [np.log(score(answer, shape.area).predicted / shape.area) for answer, shape in pairs]
    assert np.std(logs) == pytest.approx(0.3, abs=0.05)


def test_answers_end_in_the_stop_token(processor):
    ids, lengths = encode_answers(processor.tokenizer, ["12.50", "7"])
    stop = processor.tokenizer.eos_token_id
    assert [row[n - 1] for row, n in zip(ids, lengths, strict=True)] == [stop, stop]
    assert lengths == [6, 2]


def test_the_tokenizer_splits_digits_and_loses_nothing():
    tokenizer = tiny_tokenizer()
    assert tokenizer.tokenize("1234.50") == ["1", "2", "3", "4", ".", "5", "0"]
    for text in ("<answer>12.50</answer>", "größer ٤ 面积\n\t🙂", "You read geometric"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_bundled_tokenizer_is_the_one_that_is_made(processor):
    assert tiny_tokenizer().get_vocab() == processor.tokenizer.get_vocab()


def test_the_bundled_model_is_small():
    folder = Path(TINY)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 2_841_984), ("small", 163_721_728)])
def test_the_sizes_from_scratch(size, parameters, monkeypatch):
    monkeypatch.setattr(cold_start, "Qwen2_5_VLForConditionalGeneration", empty_model)
    monkeypatch.setattr(cold_start, "use_own_attention", lambda model: None)
    model = cold_start.new_model(0, size).policy
    assert numel(model) == parameters


def test_a_visual_token_is_inside_the_box_where_its_center_has_the_shapes_colour():
    """For squares that are not turned, pixels tell the same as the taught distances."""
    examples = [make_example(ShapeSpec(), seed=0, split="cold_start", index=i) for i in range(40)]
    squares = [example for example in examples if example.shape.kind in ("square", "rectangle")]
    assert len(squares) > 10
    _, sizes, distances = dense_targets(squares, 224)
    assert torch.allclose(distances[..., 0] + distances[..., 2], sizes[:, :1].expand(-1, 64))
    assert torch.allclose(distances[..., 1] + distances[..., 3], sizes[:, 1:].expand(-1, 64))
    for example, of_tokens in zip(squares, distances, strict=True):
        color = (255 * np.array(example.shape.color)).round()
        inside = (of_tokens > 0).all(-1).view(8, 8)
        clear = (of_tokens.abs() > 1).all(-1).view(8, 8)  # not on the outline
        pixels = np.asarray(example.image, dtype=float)[14::28, 14::28]
        colored = torch.tensor(np.abs(pixels - color).max(-1) <= 2)
        assert torch.equal(inside[clear], colored[clear])


def test_the_boxes_of_circles_and_turned_shapes_hold_their_outline():
    circle = Shape("circle", 10.0, 10.0, (20.0, 30.0), (), (0, 0, 0))
    assert bounding_box(circle) == [15.0, 25.0, 25.0, 35.0]
    triangle = Shape("triangle", 1, 1, (0, 0), ((1.0, 2.0), (8.0, 3.0), (4.0, 9.0)), (0, 0, 0))
    assert bounding_box(triangle) == [1.0, 2.0, 8.0, 9.0]


def test_the_dense_loss_by_hand():
    """Of a head that says nothing: log 4 for the class, |x| - 1/2 for each number."""
    head = DenseHead(8)
    torch.nn.init.zeros_(head.linear.weight), torch.nn.init.zeros_(head.linear.bias)
    targets = torch.tensor([2]), torch.tensor([[10.0, 20.0]]), torch.full((1, 9, 4), 5.0)
    loss = dense_loss(head, torch.randn(1, 9, 8), targets)
    assert loss.item() == pytest.approx(np.log(4) + 0.5 * 14.5 + 0.25 * 4.5)


def test_the_tower_learns_to_see_and_nothing_else_changes(capsys, monkeypatch):
    monkeypatch.setattr(cold_start, "SIGHT_EXAMPLES", 32)
    monkeypatch.setattr(cold_start, "SIGHT_EVERY", 20)
    flags = ["--from-scratch", "--out", "-", "--batch-size", "16", "--image-size", "84"]
    args = cold_start.make_parser().parse_args([*flags, "--see-steps", "60"])
    loaded = cold_start.new_model(0)
    before = {name: tensor.clone() for name, tensor in loaded.policy.state_dict().items()}
    cold_start.see(loaded, SPEC, args)
    changed = {
        name
        for name, tensor in loaded.policy.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {name for name in before if name.startswith("model.visual.")}
    off = [float(value) for value in re.findall(r"off by ([\d.]+) units", capsys.readouterr().out)]
    assert len(off) == 3
    assert off[-1] < off[0]


def test_the_learning_rate_rises_and_falls():
    factors = [warmup_cosine(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2)
    assert max(factors) == pytest.approx(factors[5], abs=0.01)
    assert 0 < factors[-1] < 0.001


@pytest.mark.parametrize(
    ("flags", "error", "code"),
    [
        ([], KeyboardInterrupt(), 130),
        (["--lr", "1", "--steps", "3"], None, "not saved: "),  # its weights are not finite
    ],
)
def test_nothing_is_left_where_nothing_is_saved(tmp_path, monkeypatch, flags, error, code):
    def spoiled(loaded, *_):
        if error:
            raise error
        with torch.no_grad():
            loaded.policy.lm_head.weight[0, 0] = float("nan")

    monkeypatch.setattr(cold_start, "supervise", spoiled)
    with pytest.raises(SystemExit) as stop:
        cold_start.main(["--from-scratch", "--out", str(tmp_path / "one"), *flags])
    assert stop.value.code == code or code in stop.value.code
    assert not (tmp_path / "one").exists()


def test_the_command_from_scratch_and_from_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(cold_start, "SIGHT_EXAMPLES", 2)
    flags = ["--steps", "2", "--batch-size", "2", "--image-size", "84"]
    new = ["--from-scratch", "--see-steps", "2", *flags]
    cold_start.main([*new, "--out", str(tmp_path / "one")])
    workers = ["--workers", "1"]  # the same plots and answers, made by another process
    cold_start.main([*new, "--out", str(tmp_path / "same"), *workers])
    cold_start.main(["--model", str(tmp_path / "one"), "--out", str(tmp_path / "two"), *flags])
    one, same, two = (
        load(str(tmp_path / name), device="cpu", dtype="bfloat16").policy.lm_head.weight
        for name in ("one", "same", "two")
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    "flags",
    [
        ["--from-scratch", "--out", TINY],
        ["--from-scratch", "--model", TINY, "--out", "x"],
        ["--from-scratch", "--out", "x", "--min-size", "40"],
        ["--model", "missing", "--out", "x"],
        ["--from-scratch", "--out", "/proc/x"],
        ["--from-scratch"],
        ["--from-scratch", "--out", "x", "--steps", "0"],
        ["--from-scratch", "--out", "x", "--sloppy", "2"],
        ["--from-scratch", "--out", "x", "--mistakes", "-1"],
        ["--from-scratch", "--out", "x", "--area-noise", "nan"],
        ["--from-scratch", "--out", "x", "--see-steps", "-1"],
        ["--from-scratch", "--out", "x", "--see-lr", "0"],
        ["--model", TINY, "--out", "x", "--see-steps", "5"],
    ],
)
def test_bad_input_is_one_line(flags, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cold_start.main(flags)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_asked_for_must_be_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        cold_start.main(["--from-scratch", "--device", "cuda", "--out", str(tmp_path / "x")])
    assert "--device cuda: no CUDA GPU was found" in capsys.readouterr().err
