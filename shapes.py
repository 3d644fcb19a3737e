"""The task: a plot of one shape on a 50 x 50 grid, and the shape's exact area.

`make_example(spec, seed=, split=, index=)` is a pure function of its arguments: nothing is
stored, any example can be made again on its own, and no two splits share one. The command draws a
few examples:

    python shapes.py --out DIR
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

if "IPython" not in sys.modules:  # a command started from a notebook inherits its MPLBACKEND,
    os.environ.pop("MPLBACKEND", None)  # and the import fails if that backend is not installed
from matplotlib import rc_context, rcParamsDefault
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure  # other modules import it from here, after the lines above
from matplotlib.patches import Circle, Polygon
from PIL import Image

from harness.terminal import check_folder, ignore_output_errors, write_file

GRID = 50.0  # both axes run from 0 to GRID, in grid units
KINDS = ("rectangle", "circle", "square", "triangle")
SPLITS = {"train": 0, "eval": 1, "cold_start": 2}  # part of the random seed
IMAGE_MULTIPLE = 28  # pixels: Qwen2.5-VL merges 2 x 2 patches of 14 x 14 pixels into one token
MAX_IMAGE_SIZE = 3584  # pixels: its square, 12,845,056, is Qwen2.5-VL's limit
MIN_SIDE_DIFFERENCE = 2.0  # grid units (7 pixels of 224): a rectangle must not pass for a square
FIGURE_INCHES = 2.24  # side of every figure; the image size only sets the dots per inch
AXES_BOX = (0.1, 0.09, 0.86, 0.86)  # left, bottom, width, height, as shares of the image


@dataclass(frozen=True, slots=True)
class ShapeSpec:
    """Which shapes to draw: sizes in grid units, the largest turn to either side in degrees.

    Raises `ValueError` for a range that is empty, not positive or too large for the grid. The
    message is one line, and names the command-line flags that set these values.
    """

    min_size: float = 20.0
    max_size: float = 35.0
    max_rotation: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min_size) and self.min_size > 0):
            raise ValueError(f"--min-size {self.min_size:g}: must be above 0")
        if not (math.isfinite(self.max_size) and self.max_size >= self.min_size):
            raise ValueError(
                f"--min-size {self.min_size:g}, --max-size {self.max_size:g}: the range is empty"
            )
        if not 0 <= self.max_rotation <= 180:
            raise ValueError(f"--max-rotation {self.max_rotation:g}: must be degrees from 0 to 180")
        if self.max_size - self.min_size < 2 * MIN_SIDE_DIFFERENCE:
            raise ValueError(
                f"--min-size {self.min_size:g}, --max-size {self.max_size:g}: the range must be at "
                f"least {2 * MIN_SIDE_DIFFERENCE:g} wide, or rectangles could pass for squares"
            )
        extent = largest_extent(self.max_size, self.max_rotation)
        if extent > GRID:
            raise ValueError(
                f"--max-size {self.max_size:g}, turned by up to {self.max_rotation:g} degrees: "
                f"a shape can be {extent:.1f} wide, and the grid is {GRID:g} x {GRID:g}"
            )


def largest_extent(size: float, max_rotation: float) -> float:
    """Return how wide a square of this side can get when turned by up to `max_rotation` degrees."""
    worst_angle = math.radians(min(max_rotation, 45.0))
    return size * (math.cos(worst_angle) + math.sin(worst_angle))


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape, in grid units. `width` and `height` are measured before it is turned.

    Square: both are the side. Circle: both are the diameter. Triangle: base and height.
    `vertices` are the corners of a polygon; a circle has none, only its `center`.
    """

    kind: str
    width: float
    height: float
    center: tuple[float, float]
    vertices: tuple[tuple[float, float], ...]
    color: tuple[float, float, float]

    @property
    def area(self) -> float:
        """Return the exact area in square grid units.

        >>> Shape("triangle", 30.0, 20.0, (25, 25), ((10, 15), (40, 15), (20, 35)), (0, 0, 0)).area
        300.0
        """
        if self.kind == "circle":
            return math.pi * self.width**2 / 4
        if self.kind == "triangle":
            return self.width * self.height / 2
        return self.width * self.height


@dataclass(frozen=True, slots=True)
class Example:
    """An RGB image of one shape; `index` is its place in the split."""

    image: Image.Image
    shape: Shape
    index: int

    @property
    def area(self) -> float:
        """Return the exact area in square grid units."""
        return self.shape.area


def make_example(
    spec: ShapeSpec, *, seed: int, split: str, index: int, image_size: int = 224
) -> Example:
    """Return example `index` of split "train", "eval" or "cold_start"; `image_size` in pixels."""
    rng = np.random.default_rng([seed, SPLITS[split], index])
    shape = sample_shape(spec, rng)
    return Example(image=canvas_of(image_size).draw(shape), shape=shape, index=index)


def sample_shape(spec: ShapeSpec, rng: np.random.Generator) -> Shape:
    """Return a random shape that lies inside the grid; all kinds are equally likely."""
    kind = KINDS[rng.integers(len(KINDS))]
    width, height = sample_size(kind, spec, rng)
    outline = corners(kind, width, height, rng)
    angle = spec.max_rotation * rng.uniform(-1, 1)
    if kind != "circle":
        outline = turned(outline, angle)
    low = -outline.min(axis=0)  # the shape is inside the grid with its center from here ...
    high = GRID - outline.max(axis=0)  # ... to here
    center = rng.uniform(low, high)
    color = rng.uniform(0.1, 0.9, size=3)
    vertices = [] if kind == "circle" else (outline + center).tolist()
    return Shape(
        kind=kind,
        width=width,
        height=height,
        center=tuple(center.tolist()),
        vertices=tuple(map(tuple, vertices)),
        color=tuple(color.tolist()),
    )


def sample_size(kind: str, spec: ShapeSpec, rng: np.random.Generator) -> tuple[float, float]:
    """Return width and height, uniform in the range; a rectangle's differ visibly."""
    if kind in ("square", "circle"):
        side = rng.uniform(spec.min_size, spec.max_size)
        return side, side
    while True:
        width, height = rng.uniform(spec.min_size, spec.max_size, size=2).tolist()
        if kind == "triangle" or abs(width - height) >= MIN_SIDE_DIFFERENCE:
            return width, height


def corners(kind: str, width: float, height: float, rng: np.random.Generator) -> np.ndarray:
    """Return the outline around the origin, (corners, 2); for a circle, the bounding box."""
    x, y = width / 2, height / 2
    if kind == "triangle":
        apex = rng.uniform(-x, x)  # anywhere above the base: the height stays the same
        return np.array([[-x, -y], [x, -y], [apex, y]])
    return np.array([[-x, -y], [x, -y], [x, y], [-x, y]])


def turned(outline: np.ndarray, degrees: float) -> np.ndarray:
    """Return the outline, (corners, 2), turned counter-clockwise around the origin."""
    angle = math.radians(degrees)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return outline @ rotation.T


def check_image_size(image_size: int) -> None:
    """Raise `ValueError` unless the image has whole tokens, and no more than the model accepts."""
    if not IMAGE_MULTIPLE <= image_size <= MAX_IMAGE_SIZE or image_size % IMAGE_MULTIPLE:
        raise ValueError(
            f"--image-size {image_size}: must be a multiple of {IMAGE_MULTIPLE} "
            f"from {IMAGE_MULTIPLE} to {MAX_IMAGE_SIZE:,} pixels"
        )


def default_style(**settings):
    """Return a context with matplotlib's own defaults and `settings`, and none of the user's."""
    return rc_context({**rcParamsDefault, **settings})


class Canvas:
    """A reusable figure: it draws the empty grid once, and each shape on a copy of that.

    All canvases in all processes draw the same pixels, whatever a matplotlibrc or the calling
    program has set: everything that reads matplotlib's settings is created here, under its
    defaults.
    """

    def __init__(self, image_size: int) -> None:
        check_image_size(image_size)
        with default_style():
            self.set_up(image_size)

    def set_up(self, image_size: int) -> None:
        """Draw the empty grid, and create the two patches that `draw` moves and colors."""
        figure = Figure(figsize=(FIGURE_INCHES, FIGURE_INCHES), dpi=image_size / FIGURE_INCHES)
        self.canvas = FigureCanvasAgg(figure)
        self.axes = figure.add_axes(AXES_BOX, xlim=(0, GRID), ylim=(0, GRID))
        self.axes.set_xticks(np.arange(0, GRID + 1, 10))
        self.axes.set_yticks(np.arange(0, GRID + 1, 10))
        self.axes.set_xticks(np.arange(0, GRID + 1, 5), minor=True)
        self.axes.set_yticks(np.arange(0, GRID + 1, 5), minor=True)
        self.axes.tick_params(labelsize=7, pad=2, width=0.6, length=3)
        self.axes.tick_params(which="minor", width=0.4, length=1.5)
        self.axes.grid(which="major", linewidth=0.6, color="0.65")
        self.axes.grid(which="minor", linewidth=0.4, color="0.85")
        self.canvas.draw()
        self.empty_grid = self.canvas.copy_from_bbox(figure.bbox)
        edge = {"edgecolor": "black", "linewidth": 1.0}
        self.circle = self.axes.add_patch(Circle((0, 0), 1, **edge))
        self.polygon = self.axes.add_patch(Polygon([(0, 0)], joinstyle="miter", **edge))

    def draw(self, shape: Shape) -> Image.Image:
        """Return an RGB picture of one shape."""
        if shape.kind == "circle":
            patch = self.circle
            patch.set(center=shape.center, radius=shape.width / 2)
        else:
            patch = self.polygon
            patch.set_xy(shape.vertices)
        patch.set_facecolor(shape.color)
        self.canvas.restore_region(self.empty_grid)
        self.axes.draw_artist(patch)
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())


canvas_of = lru_cache(maxsize=4)(Canvas)  # one canvas per image size and process


# --- command ---------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Write the example pictures: one per task variant and a contact sheet of 16."""
    ignore_output_errors()
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description="Draw example pictures of the task."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--image-size", type=int, default=224, metavar="N", help="side in pixels; default: 224"
    )
    args = parser.parse_args(arguments)
    try:
        if args.seed < 0:
            raise ValueError(f"--seed {args.seed}: must be 0 or above")
        check_image_size(args.image_size)
        with suppress(OSError):
            args.out.mkdir(parents=True, exist_ok=True)
        check_folder("--out", args.out)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    written = []
    for name, caption, image in examples(seed=args.seed, image_size=args.image_size):
        print(f"{args.out / name}: {caption}")
        written.append(write_file(args.out / name, image.save))
    if not all(written):
        sys.exit(2)


def examples(*, seed: int, image_size: int) -> Iterator[tuple[str, str, Image.Image]]:
    """Yield the file name, caption and image of three pictures and a contact sheet."""
    variants = {  # with seed 0: a square, a rectangle, a triangle
        "plain": (ShapeSpec(), 2),
        "rotated": (ShapeSpec(max_rotation=45.0), 3),
        "small": (ShapeSpec(min_size=5.0, max_size=12.0), 5),
    }
    for name, (spec, index) in variants.items():
        example = make_example(spec, seed=seed, split="eval", index=index, image_size=image_size)
        yield f"{name}.png", f"{example.shape.kind}, area {example.area:.2f}", example.image
    sheet = Image.new("RGB", (4 * image_size, 4 * image_size))
    spec = ShapeSpec(min_size=5.0, max_size=35.0, max_rotation=45.0)
    for i in range(16):
        example = make_example(spec, seed=seed, split="eval", index=i, image_size=image_size)
        sheet.paste(example.image, (i % 4 * image_size, i // 4 * image_size))
    yield "contact_sheet.png", "16 rotated shapes, sizes 5 to 35", sheet


if __name__ == "__main__":
    main()
