"""plot_rewards.py on run folders as they are, whole and damaged."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import rc_context
from PIL import Image

import plot_rewards
from plot_rewards import (
    REWARDS,
    PlotError,
    averages,
    curve,
    each_once,
    moving_average,
    read_metrics,
    seeds_of,
)


@pytest.fixture
def run(tmp_path):
    def make(name: str, *, steps: int = 30, tail: str = ""):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = [
            json.dumps({"step": i, "prompts": 4 * (i + 1), **dict.fromkeys(REWARDS, i / 50)})
            for i in range(steps)
        ]
        (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines) + tail)
        return folder

    return make


@pytest.mark.parametrize("window", [2, 7, 100])
def test_moving_average_equals_a_plain_loop(window):
    values = np.random.default_rng(0).normal(size=50)
    values[[3, 20]] = np.nan
    expected = [np.nanmean(values[max(0, i - window + 1) : i + 1]) for i in range(50)]
    np.testing.assert_allclose(moving_average(values, window), expected)


def test_moving_average_of_nothing_known_is_unknown():
    assert np.isnan(moving_average(np.array([np.nan, np.nan, 1.0]), 2)).tolist() == [1, 1, 0]


def test_one_run_gives_three_figures(run, capsys):
    folder = run("base")
    plot_rewards.main([str(folder)])
    for key in REWARDS:
        assert Image.open(folder / f"{key}.png").size == (960, 540)
    _, change, *paths = capsys.readouterr().out.splitlines()
    assert [path.rsplit("/")[-1] for path in paths] == [f"{key}.png" for key in REWARDS]
    assert "area_correctness_reward 0.19 -> 0.39" in change  # of 0.00, 0.02, ... 0.58


def test_several_runs_give_one_figure(run, tmp_path):
    plot_rewards.main([str(run("base")), str(run("rotated")), "--out", str(tmp_path)])
    assert (tmp_path / "area_correctness_reward_variations.png").exists()


def test_other_metrics_are_drawn_on_request(run, tmp_path, capsys):
    others = {"kl": 0.5, "lr": 3e-5, "not_finite": "", "flag": True, "loss": 10**400, "../x": 1}
    tail = json.dumps({"step": 30, "prompts": 124, **others}) + "\n"
    one, other = run("a", tail=tail), run("b", tail=tail)
    plot_rewards.main([str(one), "--metrics", "kl,lr,kl"])
    assert {path.name for path in one.glob("*.png")} == {"kl.png", "lr.png"}
    assert "kl nan -> 0.5, lr nan -> 3e-05" in capsys.readouterr().out
    plot_rewards.main([str(one), str(other), "--metrics", "kl", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.glob("*.png")] == ["kl_variations.png"]
    for wrong in ("loss", "not_finite", "flag", "", "kl,", "step", "../x"):
        with pytest.raises(SystemExit):
            plot_rewards.main([str(one), "--metrics", wrong])
        told = capsys.readouterr().err
        key = wrong.split(",")[-1]
        assert f"--metrics {key!r}: {one} has no such number; it has: area_corr" in told


def test_the_ancestor_is_dots_in_the_figure_of_the_area_only(run, tmp_path, drawn, capsys):
    folder = run("base")
    plot_rewards.main([str(folder), "--ancestor"])
    assert [len(axes.lines) for axes in drawn] == [5, 2, 2]
    assert [line.get_linestyle() for line in drawn[0].lines] == ["-", "-", "None", "None", "None"]
    assert legend_of(drawn[0])[-1] == "the ancestor, 7B: sizes 5 to 35"
    for flags in (["--axis", "steps"], ["--metrics", "area_format_reward"]):
        with pytest.raises(SystemExit):
            plot_rewards.main([str(folder), "--ancestor", *flags])
        told = capsys.readouterr().err
        assert "--ancestor: its numbers are the area reward by prompts, not area_" in told


def test_values_beyond_a_reward_s_range_are_in_the_figure(run, drawn):
    folder = run("base", tail='{"step": 30, "prompts": 124, "area_correctness_reward": 7.5}\n')
    plot_rewards.main([str(folder), "--window", "1"])
    low, high = drawn[0].get_ylim()
    assert low < -3 and high > 7.5
    assert drawn[1].get_ylim()[1] == pytest.approx(0.5, abs=0.2)


def test_seeds_are_averaged_step_by_step_as_far_as_all_of_them_go(tmp_path):
    runs = [tmp_path / f"wide-seed{seed}" for seed in (0, 1)]
    for run, rewards in zip(runs, ([0, 1, 2, 3], [2, 3, 4]), strict=True):
        run.mkdir()
        steps = [{"step": i, "prompts": i + 1, "r": reward} for i, reward in enumerate(rewards)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert labels([*runs, tmp_path / "wide"]) == ["wide, 3 seeds"]
    x, y = averages(runs, "r", window=2, axis="prompts")
    assert x.tolist() == [1, 2, 3]
    assert y.tolist() == [[0, 0.5, 1.5], [2, 2.5, 3.5]]


def test_the_band_goes_from_the_lowest_seed_to_the_highest(run):
    _, axes = plot_rewards.new_axes("", "", "")
    runs = [run("a-seed0"), run("a-seed1", steps=20), run("b")]
    key = "area_correctness_reward"
    (runs[1] / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "prompts": 4 * i + 4, key: 1}) + "\n" for i in range(20))
    )
    plot_rewards.draw_seeds(axes, runs, key, window=1, axis="steps")
    means, (band,) = [line.get_ydata() for line in axes.lines], axes.collections
    np.testing.assert_allclose(means[0], (np.arange(20) / 50 + 1) / 2)  # of i / 50 and 1
    assert len(means[1]) == 30
    box = band.get_paths()[0].get_extents()
    assert (box.y0, box.y1) == (0, 1)


# --- names and labels ---------------------------------------------------------------------


def labels(runs) -> list[str]:
    return [label for label, _ in seeds_of(runs)]


@pytest.fixture
def drawn(monkeypatch):
    """The axes of each figure that is written."""
    axes, save = [], plot_rewards.Figure.savefig

    def keep(figure, path):
        save(figure, path)
        axes.append(figure.axes[0])

    monkeypatch.setattr(plot_rewards.Figure, "savefig", keep)
    return axes


def legend_of(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_runs_of_one_name_have_a_curve_each(run, tmp_path, drawn):
    runs = [run(name) for name in ("x/tiny", "y/tiny", "base")]
    plot_rewards.main([*map(str, runs), "--out", str(tmp_path)])
    assert legend_of(drawn[0]) == ["x/tiny", "y/tiny", "base"]
    assert len(drawn[0].lines) == 3


def test_seeds_of_one_name_in_two_folders_are_two_groups(run):
    runs = [run(f"{folder}/1/wide-seed{seed}") for folder in "xy" for seed in (0, 1)]
    assert seeds_of(runs) == [("x/1/wide, 2 seeds", runs[:2]), ("y/1/wide, 2 seeds", runs[2:])]


def test_a_label_is_no_longer_than_it_needs_to_be(tmp_path):
    names = ("a/b", "b/b", "c", "d/c-seed1", "wide-seed0", "x-seed0", "x-seed1", "x-seed0-seed0")
    short = ["a/b", "b/b", "c", "c-seed1", "wide-seed0", "x, 2 seeds", "x-seed0-seed0"]
    assert labels([tmp_path / name for name in names]) == short


def test_a_run_counts_once_however_often_and_however_it_is_named(run, tmp_path, monkeypatch):
    base, other = run("base-seed0"), run("x/base-seed1")
    (tmp_path / "link-seed1").symlink_to(base)
    monkeypatch.chdir(base)
    names = ["../base-seed0", ".", str(base), "../x/../base-seed0/", "../link-seed1", str(other)]
    assert [str(path) for path in each_once(list(map(type(base), names)))] == [names[0], str(other)]
    plot_rewards.main([str(base), "."])  # that is one run
    assert {path.stem for path in base.glob("*.png")} == REWARDS.keys()


def test_the_working_folder_has_a_name(run, monkeypatch, drawn):
    other = run("b")
    monkeypatch.chdir(run("a"))
    plot_rewards.main(["."])
    assert [axes.get_title().split(": ")[1] for axes in drawn] == ["a"] * 3
    plot_rewards.main([".", "../b"])
    assert legend_of(drawn[3]) == labels([other.parent / "a", other]) == ["a", "b"]
    assert labels([other.parent / "b" / ".." / "a"]) == ["a"]


@pytest.mark.parametrize(
    "name", ["a$_^$b", "a$b$c", "_a", "a\\b", "\\alpha{_^", "a\udcff", "ü%~#&"]
)
def test_a_name_is_no_markup(run, tmp_path, drawn, name):
    folder = run(name)
    plot_rewards.main([str(folder)])
    plot_rewards.main([str(folder), str(run("b")), "--out", str(tmp_path)])
    shown = name.replace("\udcff", "\\udcff")
    assert [axes.title.get_text().split(": ")[1] for axes in drawn[:3]] == [shown] * 3
    assert legend_of(drawn[3]) == [shown, "b"]
    for text in (*(axes.title for axes in drawn), *drawn[3].get_legend().get_texts()):
        assert not (text.get_parse_math() or text.get_usetex())


# --- numbers first, each figure for itself ------------------------------------------------


def test_a_figure_that_cannot_be_written_costs_that_figure(run, capsys):
    folder = run("base")
    (folder / "area_format_reward.png").mkdir()
    with pytest.raises(SystemExit) as stop:
        plot_rewards.main([str(folder)])
    assert stop.value.code == 2
    told = capsys.readouterr()
    broken = folder / "area_format_reward.png"
    assert told.err == f"{broken}: cannot be written: Is a directory\n"
    assert "area_correctness_reward 0.19 -> 0.39" in told.out.splitlines()[1]
    assert {path.stem for path in folder.glob("*.png") if path.is_file()} == REWARDS.keys() - {
        broken.stem
    }


def test_a_style_that_fails_costs_the_figures(run, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no LaTeX there
    with rc_context({"text.usetex": True}), pytest.raises(SystemExit) as stop:
        plot_rewards.main([str(run("base"))])
    assert stop.value.code == 2
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 3
    assert "area_correctness_reward 0.19 -> 0.39" in told.out


@pytest.mark.parametrize("out", ["base/metrics.jsonl", "missing", "read-only"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_read(
    run, tmp_path, capsys, monkeypatch, out
):
    folder = run("base")
    (tmp_path / "read-only").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    monkeypatch.setattr(plot_rewards, "read_metrics", None)
    with pytest.raises(SystemExit) as stop:
        plot_rewards.main([str(folder), "--out", str(tmp_path / out)])
    assert stop.value.code == 2
    told = f"error: --out {tmp_path / out}: must be a folder that can be written to\n"
    assert capsys.readouterr().err.endswith(told)


def test_output_that_cannot_be_written_costs_no_figure(run):
    folder = run("my_ü")
    command = [sys.executable, plot_rewards.__file__, folder]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, env=environment, stdout=full, stderr=full).returncode == 0
    assert len(list(folder.glob("*.png"))) == 3
    assert "my_\\xfc: area" in subprocess.check_output(command, env=environment, text=True)


# --- reading ------------------------------------------------------------------------------


def test_axis_counts_prompts_or_steps(run):
    steps = read_metrics(run("base", steps=3))
    assert curve(steps, "area_format_reward", "prompts")[0].tolist() == [4, 8, 12]
    assert curve(steps, "area_format_reward", "steps")[0].tolist() == [1, 2, 3]


def test_a_line_being_written_is_left_out(run):
    assert len(read_metrics(run("half", tail='{"step": 30, "prom'))) == 30


@pytest.mark.parametrize(
    ("tail", "steps", "message"),
    [
        ("", 0, "no step has been logged yet"),
        ('{"step": 0', 0, "no step has been logged yet"),
        ("not json\n", 2, "line 3 is not a step of a run"),
        ("[1]\n", 0, "line 1 is not a step of a run"),
        ('{"step": 1}\n', 0, "line 1 is not a step of a run"),
        ('{"step": Infinity, "prompts": 1}\n', 0, "line 1 is not a step of a run"),
    ],
)
def test_damaged_runs_are_named(run, tail, steps, message):
    with pytest.raises(PlotError, match=message):
        read_metrics(run("damaged", steps=steps, tail=tail))


def test_values_that_are_missing_leave_a_gap(run):
    folder = run("gap", steps=2, tail='{"step": 2, "prompts": 12, "kl": null}\n')
    _, values = curve(read_metrics(folder), "kl", "steps")
    assert np.isnan(values).all()
    plot_rewards.main([str(folder)])


@pytest.mark.parametrize("flags", [["missing"], ["a\nb"], ["missing", "--window", "0"], []])
def test_bad_input_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        plot_rewards.main(flags)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
