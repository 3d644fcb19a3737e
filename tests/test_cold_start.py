"""cold_start.py: its command line, its rounds, and what it leaves behind."""

import pytest
import torch
from conftest import TINY

import cold_start
from cold_start import check_arguments, fill_in_defaults, is_finished, make_parser
from engine.loading import load
from warmup import stages
from warmup.state import STATE, options_until

FEW = ["--batch-size", "2", "--image-size", "84"]
NEW = ["--from-scratch", *FEW, "--calculate-steps", "2", "--see-steps", "2"]
NEW += ["--speak-steps", "2", "--stumble-steps", "1"]


@pytest.fixture
def held_out(monkeypatch):
    monkeypatch.setattr(stages, "HELD_OUT", 2)


def replaced(monkeypatch, name: str, work) -> None:
    """Replace a stage by a function of the model and the lessons."""
    work.__name__ = name
    monkeypatch.setattr(cold_start, name, work)


def interrupted(*_):
    raise KeyboardInterrupt


def weights(folder) -> dict[str, torch.Tensor]:
    return load(str(folder), device="cpu", dtype="bfloat16").policy.state_dict()


# --- rounds -------------------------------------------------------------------------------


def test_a_stage_ends_when_its_target_is_met_or_its_rounds_are_over():
    new, old = (
        make_parser().parse_args([*start, "--out", "-"])
        for start in (["--from-scratch"], ["--model", "M"])
    )
    missed, met = ("see", False), ("see", True)
    assert not is_finished("see", [("calculate", True)], new)
    assert not is_finished("see", 2 * [missed], new)
    assert is_finished("see", 3 * [missed], new)
    assert is_finished("see", [missed, met], new)
    assert is_finished("see", [missed], old)


def test_no_two_rounds_share_a_plot(tmp_path, monkeypatch):
    """Two rounds of seeing, 2 x 2 plots each, behind one of calculating, which leaves them out."""
    rounds = []

    def recorded(met):
        def stage(model, lessons):
            rounds.append((lessons.rounds, lessons.plots))
            return next(met)

        return stage

    for name, met in {"calculate": [True], "see": [False, True], "speak": [True]}.items():
        replaced(monkeypatch, name, recorded(iter(met)))
    cold_start.main([*NEW, "--out", str(tmp_path / "x"), "--stumble-steps", "0"])
    assert rounds == [(0, 0), (1, 4), (2, 8), (3, 12)]


# --- what is left -------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (None, "not saved: ")])
def test_nothing_is_left_where_nothing_is_saved(tmp_path, monkeypatch, error, code):
    def spoiled(model, _):
        if error:
            raise error
        with torch.no_grad():
            model.lm_head.weight[0, 0] = float("nan")

    replaced(monkeypatch, "calculate", spoiled)
    with pytest.raises(SystemExit) as stop:
        cold_start.main(["--from-scratch", "--out", str(tmp_path / "one")])
    assert stop.value.code == code or code in stop.value.code
    assert not (tmp_path / "one").exists()


def test_an_interrupted_warm_up_goes_on_to_the_same_files(tmp_path, monkeypatch, capsys, held_out):
    """Bit for bit; the plots may be made by another process, and later stages may change."""
    one, two = tmp_path / "one", tmp_path / "two"
    cold_start.main([*NEW, "--out", str(one)])
    assert not (one / STATE).exists()
    with monkeypatch.context() as patch:
        replaced(patch, "speak", interrupted)
        with pytest.raises(SystemExit) as stop:
            cold_start.main([*NEW, "--out", str(two), "--lr", "1e-5"])
        assert stop.value.code == 130
    with pytest.raises(SystemExit):
        cold_start.main([*NEW, "--out", str(two), "--see-steps", "3"])
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--see-steps 3: the unfinished warm-up in {two} has --see-steps 2" in told
    cold_start.main([*NEW, "--out", str(two), "--workers", "1"])
    assert "continues after: calculate" in capsys.readouterr().out
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_full_disk_costs_the_state_and_not_the_model(tmp_path, monkeypatch, capsys):
    for name in ("calculate", "see", "speak", "stumble"):
        replaced(monkeypatch, name, lambda model, lessons: True)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    cold_start.main([*NEW, "--out", str(tmp_path / "x")])
    assert len(capsys.readouterr().err.strip().splitlines()) == 4  # a line per round
    assert (tmp_path / "x" / "model.safetensors").exists()


def test_a_state_depends_on_the_options_of_the_stages_before_it():
    assert "lr" not in options_until("see")
    assert {"seed", "see_steps", "lr"} <= set(options_until("speak"))
    args = make_parser().parse_args(["--from-scratch", "--out", "-"])
    assert set(options_until("stumble")) == vars(args).keys() - {
        *("from_scratch", "model", "out", "workers", "device"),
    }


def test_a_model_that_exists_gets_perfect_answers_and_is_judged_when_it_is_saved(
    tmp_path, held_out, capsys, monkeypatch
):
    replaced(monkeypatch, "judge", interrupted)
    with pytest.raises(SystemExit):
        cold_start.main(["--model", TINY, "--out", str(tmp_path / "x"), *FEW, "--speak-steps", "2"])
    before, after = weights(TINY), weights(tmp_path / "x")
    assert before.keys() == after.keys()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert "saved; load it" in capsys.readouterr().out
    assert not (tmp_path / "x" / STATE).exists()


# --- bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from-scratch", "--out", TINY], "already exists"),
        (["--from-scratch", "--out", __file__], "already exists"),
        (["--from-scratch", "--model", TINY, "--out", "x"], "--model"),
        (["--from-scratch", "--out", "x", "--min-size", "40"], "--min-size 40"),
        (["--model", "missing", "--out", "x"], "missing"),
        (["--from-scratch", "--out", "/proc/x"], "/proc/x"),
        (["--from-scratch"], "--out"),
        (["--from-scratch", "--out", "x", "--calculate-steps", "-1"], "--calculate-steps -1"),
        (["--from-scratch", "--out", "x", "--see-steps", "-1"], "--see-steps -1"),
        (["--from-scratch", "--out", "x", "--speak-steps", "-1"], "--speak-steps -1"),
        (["--from-scratch", "--out", "x", "--stumble-steps", "-1"], "--stumble-steps -1"),
        (["--model", TINY, "--out", "x", "--speak-steps", "0"], "--speak-steps 0"),
        (["--from-scratch", "--out", "x", "--sloppy", "2"], "--sloppy 2"),
        (["--from-scratch", "--out", "x", "--mistakes", "-1"], "--mistakes -1"),
        (["--from-scratch", "--out", "x", "--misread", "nan"], "--misread nan"),
        (["--from-scratch", "--out", "x", "--stumble-steps", "0", "--misread", "1"], "--misread 1"),
        (["--model", TINY, "--out", "x", "--sloppy", "0.5"], "--sloppy 0.5"),
        (["--from-scratch", "--out", "x", "--lr", "0"], "--lr 0"),
        (["--from-scratch", "--out", "x", "--seed", "-1"], "--seed -1"),
        (["--from-scratch", "--out", "x", "--batch-size", "0"], "--batch-size 0"),
        (["--from-scratch", "--out", "x", "--workers", "-1"], "--workers -1"),
        (["--model", TINY, "--out", "x", "--size", "tiny"], "--size tiny"),
        (["--model", TINY, "--out", "x", "--see-steps", "5"], "--see-steps 5"),
        (["--model", TINY, "--out", "x", "--calculate-steps", "5"], "--calculate-steps 5"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cold_start.main(flags)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", ["no archive", "no keys", "other weights"])
def test_a_damaged_state_is_named(state, capsys, tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    args = make_parser().parse_args([*NEW, "--out", str(folder)])
    check_arguments(args)
    fill_in_defaults(args)
    options = {name: getattr(args, name) for name in options_until("stumble")}
    if state == "no archive":
        (folder / STATE).write_bytes(b"no zip file")
    elif state == "no keys":
        torch.save([1], folder / STATE)
    else:
        rounds, other = [("calculate", True)], {"x": torch.ones(1)}
        torch.save({"rounds": rounds, "options": options, "weights": other}, folder / STATE)
    with pytest.raises(SystemExit) as stop:
        cold_start.main([*NEW, "--out", str(folder)])
    assert stop.value.code == 2
    assert "is damaged; delete it" in capsys.readouterr().err


def test_a_folder_with_half_a_state_is_as_good_as_new(tmp_path, monkeypatch):
    (tmp_path / f"{STATE}.partial").write_bytes(b"half")
    replaced(monkeypatch, "calculate", interrupted)
    with pytest.raises(SystemExit) as stop:
        cold_start.main([*NEW, "--out", str(tmp_path)])
    assert stop.value.code == 130


def test_a_gpu_that_is_asked_for_must_be_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        cold_start.main(["--from-scratch", "--device", "cuda", "--out", str(tmp_path / "x")])
    assert "--device cuda: no CUDA GPU was found" in capsys.readouterr().err
