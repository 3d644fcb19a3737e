"""warmup/seeing.py: what each visual token is taught to say of a shape."""

import numpy as np
import pytest
import torch

from shapes import Shape, ShapeSpec, make_example
from warmup.seeing import DenseHead, bounding_box, dense_loss, dense_targets


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
    """Of a head that says nothing: log 4 for the class, |x| - 0.05 for each number."""
    head = DenseHead(8)
    torch.nn.init.zeros_(head.linear.weight), torch.nn.init.zeros_(head.linear.bias)
    targets = torch.tensor([2]), torch.tensor([[10.0, 20.0]]), torch.full((1, 9, 4), 5.0)
    loss = dense_loss(head, torch.randn(1, 9, 8), targets)
    assert loss.item() == pytest.approx(np.log(4) + 0.5 * 14.95 + 0.25 * 4.95)
