"""A shape of your own, worked out: ellipses, which the bundled model has never seen.

    python docs/ellipse.py --preset tiny --name ellipse

All flags are those of main.py. Keep --workers at 0, because the shape is added in this process, and
do not resume such a run with main.py. In shapes.py and rewards.py themselves, the same takes four
small changes: a name in KINDS, a case each in `Shape.area` and `corners`, a word in CLASS_WORDS.
"""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))

import main
import rewards
import shapes

CORNERS = 180  # of the polygon that is drawn: its area is 0.02 % smaller than the ellipse's
area_of_others, corners_of_others = shapes.Shape.area.fget, shapes.corners


def area(shape: shapes.Shape) -> float:
    """Return the exact area: pi / 4 times width times height for an ellipse."""
    if shape.kind == "ellipse":
        return math.pi * shape.width * shape.height / 4
    return area_of_others(shape)


def corners(kind: str, width: float, height: float, rng: np.random.Generator) -> np.ndarray:
    """Return the outline around the origin, (corners, 2)."""
    if kind != "ellipse":
        return corners_of_others(kind, width, height, rng)
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    return np.stack([width / 2 * np.cos(angles), height / 2 * np.sin(angles)], axis=1)


def add_ellipses() -> None:
    """Let a fifth of all plots show an ellipse, in this process."""
    shapes.KINDS = (*shapes.KINDS, "ellipse")
    shapes.Shape.area, shapes.corners = property(area), corners
    rewards.CLASS_WORDS["ellipse"] = r"\bellip(?:ses?|tical)\b"


if __name__ == "__main__":
    add_ellipses()
    main.main()
