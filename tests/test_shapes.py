"""shapes.py: geometry against independent formulas, pictures by counting pixels."""

import math
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context, rcParams, rcParamsDefault

import shapes
from shapes import (
    GRID,
    KINDS,
    MAX_IMAGE_SIZE,
    Canvas,
    Shape,
    ShapeSpec,
    check_image_size,
    make_example,
    sample_shape,
)

ROOT = Path(__file__).resolve().parent.parent
INLINE = "module://matplotlib_inline.backend_inline"  # MPLBACKEND of `!python ...` in a notebook
HOSTILE_RC = """
axes.facecolor: black
figure.facecolor: black
axes.edgecolor: white
axes.grid: True
axes.prop_cycle: cycler(color=["red"])
xtick.color: white
xtick.direction: in
ytick.left: False
lines.antialiased: False
patch.antialiased: False
text.antialiased: False
text.usetex: True
text.hinting: none
font.size: 20
path.sketch: 5, 50, 5
path.simplify: False
agg.path.chunksize: 3
image.cmap: gray
figure.autolayout: True
savefig.dpi: 30
savefig.bbox: tight
"""
SPECS = {
    "plain": ShapeSpec(),
    "rotated": ShapeSpec(max_rotation=45.0),
    "wide": ShapeSpec(min_size=5.0),
    "wide rotated": ShapeSpec(min_size=5.0, max_rotation=45.0),
}


def many(spec: ShapeSpec, count: int = 800) -> list[Shape]:
    return [sample_shape(spec, np.random.default_rng([7, i])) for i in range(count)]


def shoelace(vertices) -> float:
    x, y = np.array(vertices).T
    return 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_areas_are_exact(spec):
    for shape in many(spec):
        if shape.kind == "circle":
            assert shape.area == pytest.approx(math.pi * (shape.width / 2) ** 2, rel=1e-12)
        else:
            assert shape.area == pytest.approx(shoelace(shape.vertices), rel=1e-9)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_shapes_stay_inside_the_grid(spec):
    for shape in many(spec):
        points = np.array(shape.vertices or [shape.center])
        margin = shape.width / 2 if shape.kind == "circle" else 0.0
        assert (points - margin >= -1e-9).all()
        assert (points + margin <= GRID + 1e-9).all()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_dimensions_are_in_range_and_kinds_are_what_they_are_called(spec):
    drawn = many(spec)
    for shape in drawn:
        assert spec.min_size <= shape.width <= spec.max_size
        assert spec.min_size <= shape.height <= spec.max_size
        assert all(0.1 <= channel <= 0.9 for channel in shape.color)
        if shape.kind == "rectangle":
            assert abs(shape.width - shape.height) >= 2.0
        if shape.kind in ("square", "circle"):
            assert shape.width == shape.height
    counts = [sum(shape.kind == kind for shape in drawn) for kind in KINDS]
    assert min(counts) > 150  # of 800, 200 expected


def test_rotation_turns_by_up_to_its_limit():
    def angle(shape):
        (x0, y0), (x1, y1) = shape.vertices[:2]
        return math.degrees(math.atan2(y1 - y0, x1 - x0))

    angles = [angle(s) for s in many(ShapeSpec(max_rotation=30.0)) if s.vertices]
    assert min(angles) < -28
    assert max(angles) > 28
    assert max(map(abs, angles)) <= 30 + 1e-9
    assert all(abs(angle(s)) < 1e-9 for s in many(ShapeSpec()) if s.vertices)


def test_an_example_is_a_function_of_seed_split_and_index():
    def picture(**place):
        example = make_example(SPECS["wide rotated"], **place)
        return example.shape, example.image.tobytes()

    here = {"seed": 3, "split": "train", "index": 11}
    first = picture(**here)
    picture(seed=0, split="eval", index=0)  # an example in between leaves no trace
    assert picture(**here) == first
    for other in ({"seed": 4}, {"split": "eval"}, {"split": "cold_start"}, {"index": 12}):
        assert picture(**{**here, **other}) != first


def test_a_reused_figure_draws_the_same_pixels_as_a_fresh_one():
    reused = Canvas(224)
    for shape in many(SPECS["wide rotated"], 20):
        assert reused.draw(shape).tobytes() == Canvas(224).draw(shape).tobytes()


def test_a_shape_that_cannot_be_drawn_leaves_no_trace_in_the_next():
    canvas = Canvas(56)
    triangle, circle = (next(s for s in many(ShapeSpec()) if s.kind == k) for k in KINDS[:0:-2])
    for shape in (triangle, circle):
        before = canvas.draw(shape).tobytes()
        broken = {"kind": shape.kind, "width": 1, "height": 1, "center": "x", "vertices": "x"}
        with pytest.raises((TypeError, ValueError)):
            canvas.draw(Shape(**broken, color=(0, 0, 0)))
        assert canvas.draw(shape).tobytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_agree_with_the_area(kind):
    """The outline has a width, so the area is the mean of the pixels inside it and up to it."""
    canvas = Canvas(896)
    empty = np.asarray(canvas.draw(Shape("square", 0, 0, (0, 0), ((-9, -9),) * 4, (1, 1, 1))))
    pixels_per_unit = 896 * shapes.AXES_BOX[2] / GRID
    drawn = [s for s in many(SPECS["rotated"], 60) if s.kind == kind]
    assert len(drawn) > 5
    for shape in drawn:
        image = np.asarray(canvas.draw(shape)).astype(int)
        inside = np.abs(image - np.round(255 * np.array(shape.color))).max(-1) <= 1
        covered = (image != empty).any(-1)
        pixels = (inside.sum() + covered.sum()) / 2
        assert pixels / pixels_per_unit**2 == pytest.approx(shape.area, rel=0.01)


@pytest.mark.parametrize("image_size", [56, 224, 448])
def test_image_size(image_size):
    image = make_example(ShapeSpec(), seed=0, split="train", index=0, image_size=image_size).image
    assert image.size == (image_size, image_size)
    assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_size": 30, "max_size": 20}, "the range is empty"),
        ({"min_size": 0}, "must be above 0"),
        ({"min_size": -5}, "must be above 0"),
        ({"min_size": float("nan")}, "must be above 0"),
        ({"min_size": 20, "max_size": 21}, "at least 4 wide"),
        ({"max_size": 51}, "the grid is 50 x 50"),
        ({"max_size": float("inf")}, "the range is empty"),
        ({"max_size": 40, "max_rotation": 45}, "a shape can be 56.6 wide"),
        ({"max_size": 49, "max_rotation": 5}, "a shape can be 53.1 wide"),
        ({"max_rotation": -1}, "degrees from 0 to 180"),
        ({"max_rotation": 181}, "degrees from 0 to 180"),
    ],
)
def test_impossible_specs_are_refused(values, message):
    with pytest.raises(ValueError, match=message) as refusal:
        ShapeSpec(**values)
    assert "\n" not in str(refusal.value)


def test_the_largest_shapes_that_fit_are_accepted():
    ShapeSpec(max_size=50.0)
    ShapeSpec(max_size=35.0, max_rotation=180.0)


@pytest.mark.parametrize("image_size", [0, -28, 100, 225, 3612, 28000])
def test_impossible_image_sizes_are_refused(image_size):
    message = f"^--image-size {image_size}: must be a multiple of 28 from 28 to 3,584 pixels$"
    with pytest.raises(ValueError, match=message):
        check_image_size(image_size)
    with pytest.raises(ValueError, match=message):
        make_example(ShapeSpec(), seed=0, split="train", index=0, image_size=image_size)


def test_the_largest_image_has_as_many_pixels_as_the_model_takes():
    check_image_size(MAX_IMAGE_SIZE)
    assert MAX_IMAGE_SIZE**2 == 12_845_056  # max_pixels of Qwen2.5-VL's preprocessor_config.json


def test_the_command_writes_its_pictures(tmp_path, capsys):
    shapes.main(["--out", str(tmp_path / "new" / "folder")])
    written = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert written == ["contact_sheet.png", "plain.png", "rotated.png", "small.png"]
    assert "area" in capsys.readouterr().out


def test_a_picture_that_cannot_be_written_costs_that_picture(tmp_path, capsys):
    (tmp_path / "rotated.png").mkdir()
    with pytest.raises(SystemExit) as stop:
        shapes.main(["--out", str(tmp_path), "--image-size", "56"])
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert output.err == f"{tmp_path / 'rotated.png'}: cannot be written: Is a directory\n"
    assert len(output.out.splitlines()) == 4
    assert sum(path.is_file() for path in tmp_path.iterdir()) == 3


@pytest.mark.parametrize("out", ["file", "file/new", "read-only"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_drawn(
    tmp_path, capsys, monkeypatch, out
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    monkeypatch.setattr(shapes, "make_example", None)
    with pytest.raises(SystemExit) as stop:
        shapes.main(["--out", str(tmp_path / out)])
    assert stop.value.code == 2
    message = f"--out {tmp_path / out}: must be a folder that can be written to\n"
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.parametrize("flags", [["--image-size", "100"], ["--seed", "-1"], []])
def test_the_command_refuses_in_one_line(tmp_path, capsys, flags):
    out = ["--out", str(tmp_path)] if flags else []
    with pytest.raises(SystemExit) as stop:
        shapes.main([*out, *flags])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_output_that_cannot_be_written_costs_no_picture(tmp_path):
    command = [sys.executable, ROOT / "shapes.py", "--image-size", "56", "--out", tmp_path / "ü"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=environment, stdout=full, stderr=full)
    assert done.returncode == 0
    assert len(list((tmp_path / "ü").iterdir())) == 4


# --- the user's matplotlib settings change nothing ----------------------------------------


def other_settings() -> dict:
    """Return, for nearly every matplotlib setting, a valid value that is not the default."""
    values = (True, False, 1, "red", "in", "dashed", "none", ["red"], (3.0, 2.0), (5.0, 6.0, 7.0))
    others = {}
    with rc_context():
        for key in rcParamsDefault.keys() - {"backend", "backend_fallback"}:
            for value in values:
                with suppress(ValueError, TypeError, AttributeError):  # not a valid value
                    rcParams[key] = value
                if rcParams[key] != rcParamsDefault[key]:
                    others[key] = rcParams[key]
                    break
    return others


@pytest.mark.filterwarnings("ignore")
def test_no_setting_of_matplotlib_changes_a_pixel():
    settings = other_settings()
    assert len(settings) > 250
    drawn = many(SPECS["wide rotated"], 20)
    canvas = Canvas(56)
    expected = [canvas.draw(shape).tobytes() for shape in drawn]
    few = {shape.kind: i for i, shape in enumerate(drawn)}.values()  # one of each kind
    with rc_context(settings):
        fresh = Canvas(56)
        assert [fresh.draw(shape).tobytes() for shape in drawn] == expected
        assert [rcParams[key] for key in settings] == list(settings.values())  # left as they were
    for key, value in settings.items():
        with rc_context({key: value}):
            assert [canvas.draw(drawn[i]).tobytes() for i in few] == [expected[i] for i in few], key


def run(program: str, *arguments: str, cwd: Path = ROOT, **environment: str):
    command = [sys.executable, str(ROOT / program), *arguments]
    settings = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True)


def test_a_matplotlibrc_in_the_working_folder_changes_no_picture(tmp_path):
    for name in ("plain", "hostile"):
        (tmp_path / name).mkdir()
    (tmp_path / "hostile" / "matplotlibrc").write_text(HOSTILE_RC)
    for name in ("plain", "hostile"):
        done = run("shapes.py", "--out", ".", "--image-size", "56", cwd=tmp_path / name)
        assert (done.returncode, done.stderr) == (0, "")
    for picture in (tmp_path / "plain").iterdir():
        assert picture.read_bytes() == (tmp_path / "hostile" / picture.name).read_bytes()


@pytest.mark.parametrize(
    "program", ["shapes.py", "plot_rewards.py", "report.py", "experiments/figures.py"]
)
def test_a_notebook_s_backend_stops_no_command(program):
    done = run(program, MPLBACKEND=INLINE)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1  # about missing arguments


def test_in_a_notebook_itself_the_backend_stays():
    code = "import sys; sys.modules['IPython'] = sys; import shapes, matplotlib as m; print(m.{})"
    command = [sys.executable, "-c", code.format("rcParams['backend']")]
    settings = {**os.environ, "MPLBACKEND": "svg"}
    assert subprocess.check_output(command, cwd=ROOT, env=settings, text=True) == "svg\n"
