"""shapes.py: geometry by independent formulas, pictures by counting pixels."""

import math

import numpy as np
import pytest

import shapes
from shapes import GRID, KINDS, Canvas, Shape, ShapeSpec, make_example, sample_shape

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
    picture(seed=0, split="eval", index=0)  # what was drawn in between leaves no trace
    assert picture(**here) == first
    for other in ({"seed": 4}, {"split": "eval"}, {"split": "cold_start"}, {"index": 12}):
        assert picture(**{**here, **other}) != first


def test_a_reused_figure_draws_the_same_pixels_as_a_fresh_one():
    reused = Canvas(224)
    for shape in many(SPECS["wide rotated"], 20):
        assert reused.draw(shape).tobytes() == Canvas(224).draw(shape).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_agree_with_the_area(kind):
    """The edge is a line of some width: the mean of the area inside and with it is the area."""
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
        ({"max_size": 40, "max_rotation": 45}, "can be 56.6 wide"),
        ({"max_size": 49, "max_rotation": 5}, "can be 53.1 wide"),
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


@pytest.mark.parametrize("image_size", [0, -28, 100, 225])
def test_impossible_image_sizes_are_refused(image_size):
    with pytest.raises(ValueError, match="positive multiple of 28"):
        make_example(ShapeSpec(), seed=0, split="train", index=0, image_size=image_size)


def test_the_command_writes_its_pictures(tmp_path, capsys):
    shapes.main(["--out", str(tmp_path / "new" / "folder")])
    written = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert written == ["contact_sheet.png", "plain.png", "rotated.png", "small.png"]
    assert "area" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--image-size", "100"], ["--seed", "-1"], []])
def test_the_command_refuses_in_one_line(tmp_path, capsys, flags):
    out = ["--out", str(tmp_path)] if flags else []
    with pytest.raises(SystemExit) as stop:
        shapes.main([*out, *flags])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
