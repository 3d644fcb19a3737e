"""Learning to see: what each visual token can say about the shape, as lessons for a new tower."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.prompts import send
from shapes import AXES_BOX, GRID, IMAGE_MULTIPLE, KINDS, Example, Shape

SMALL = 0.1  # grid units: a third of a pixel, below which errors are squared


class DenseHead(torch.nn.Module):
    """Reads off each visual token what it can know of the shape: the lessons of a vision tower.

    The class, width and height, and how far the four sides of the shape's bounding box are from the
    token's own center, as an anchor-free detector does (FCOS, Tian et al. 2019, arXiv:1904.01355):
    64 lessons a plot instead of one answer. It is thrown away afterwards.
    """

    OUTPUTS = (len(KINDS), 2, 4)  # logits of the classes; size; sides
    SCALES = (1.0, 10.0, 20.0)  # grid units: so large are the values, about

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.linear = torch.nn.Linear(width, sum(self.OUTPUTS))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (Q, tokens, 4), sizes (Q, tokens, 2), sides (Q, tokens, 4), grid units."""
        outputs = self.linear(self.norm(features)).split(self.OUTPUTS, -1)
        return tuple(scale * output for scale, output in zip(self.SCALES, outputs, strict=True))


def token_centers(image_size: int) -> Tensor:
    """Return the centers of an image's visual tokens in grid units, (tokens, 2), row by row.

    A token is a square of 28 pixels; the first row is at the top of the plot.

    >>> token_centers(56).round().int().tolist()
    [[9, 38], [38, 38], [9, 9], [38, 9]]
    """
    left, bottom, width, height = AXES_BOX
    across = (torch.arange(0, image_size, IMAGE_MULTIPLE) + IMAGE_MULTIPLE / 2) / image_size
    x, y = GRID * (across - left) / width, GRID * (1 - across - bottom) / height
    return torch.stack([x.repeat(len(y)), y.repeat_interleave(len(x))], 1)


def bounding_box(shape: Shape) -> list[float]:
    """Return left, bottom, right and top of a shape, in grid units."""
    if shape.kind == "circle":
        (x, y), radius = shape.center, shape.width / 2
        return [x - radius, y - radius, x + radius, y + radius]
    xs, ys = zip(*shape.vertices, strict=True)
    return [min(xs), min(ys), max(xs), max(ys)]


def dense_targets(examples: list[Example], image_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return classes (Q,), sizes (Q, 2), and every token's distances to the sides, (Q, tokens, 4).

    Left, bottom, right, top: positive inside the bounding box.
    """
    shapes = [example.shape for example in examples]
    classes = torch.tensor([KINDS.index(shape.kind) for shape in shapes])
    sizes = torch.tensor([[shape.width, shape.height] for shape in shapes])
    boxes = torch.tensor([bounding_box(shape) for shape in shapes])[:, None]
    centers = token_centers(image_size)
    return classes, sizes, torch.cat([centers - boxes[..., :2], boxes[..., 2:] - centers], -1)


def dense_loss(head: DenseHead, features: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
    """Return the loss of what the head reads off image features (Q, tokens, hidden).

    Cross-entropy of the class, and smooth L1 losses of sizes and distances, linear beyond SMALL.
    """
    logits, size, sides = head(features)
    classes, sizes, distances = (send(target, features.device) for target in targets)
    tokens = features.shape[1]
    return (
        F.cross_entropy(logits.flatten(0, 1), classes.repeat_interleave(tokens))
        + 0.5 * F.smooth_l1_loss(size, sizes[:, None].expand_as(size), beta=SMALL)
        + 0.25 * F.smooth_l1_loss(sides, distances, beta=SMALL)
    )
