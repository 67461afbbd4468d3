"""Boxes on a grid and predicted boxes, compared with slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from ultralytics.nn.modules.block import DFL

from yolokd.pyramid.boxes import Labels, decode_distances, giou, inverse_areas, iou, resize_distances
from yolokd.pyramid.regions import valuable_region

share = st.floats(-0.5, 1.5, width=32)
box = st.tuples(st.integers(0, 2), share, share, share, share)


@settings(max_examples=200, deadline=None)
@given(st.lists(box, max_size=6), st.integers(1, 6), st.integers(1, 6))
def test_inverse_areas_equal_the_reference(boxes: list[tuple[float, ...]], h: int, w: int) -> None:
    image = torch.tensor([int(b[0]) for b in boxes], dtype=torch.long)
    corners = torch.tensor([b[1:] for b in boxes], dtype=torch.float32).view(-1, 4)
    ours = inverse_areas(Labels(image, corners), 3, h, w)
    theirs = reference.inverse_areas(
        image.tolist(), corners.numpy(), 3, h, w
    )  # float32 in both, so that edges are exact
    assert np.allclose(ours.numpy(), theirs, rtol=1e-6)


def test_the_weights_of_a_boxs_cells_sum_to_one() -> None:
    labels = Labels.from_centers(
        torch.tensor([[0.0], [1.0]]), torch.tensor([[0.5, 0.5, 0.01, 0.01], [0.4, 0.6, 0.7, 0.5]])
    )
    assert torch.allclose(inverse_areas(labels, 2, 20, 30).sum((1, 2)), torch.ones(2))


@pytest.mark.parametrize("cells", [20, 37, 40, 80])
def test_a_box_whose_edges_lie_on_cell_edges_covers_no_further_cell(cells: int) -> None:
    """Boxes two cells wide and high, at each place, rounded to six digits like labels."""
    for first in range(cells - 1):
        center = torch.tensor([[(first + 1) / cells] * 2 + [2 / cells] * 2]).mul(1e6).round().div(1e6)
        areas = inverse_areas(Labels.from_centers(torch.zeros(1, 1), center), 1, cells, cells)[0]
        expected = torch.zeros(cells, cells)
        expected[first : first + 2, first : first + 2] = 1 / 4
        assert torch.equal(areas, expected)


def test_many_boxes_at_once_give_the_same_as_one_after_the_other() -> None:
    g = torch.Generator().manual_seed(0)
    low = torch.rand(900, 2, generator=g)
    labels = Labels(torch.randint(0, 4, (900,), generator=g), torch.cat([low, low + 0.1], 1))
    one_by_one = [
        inverse_areas(Labels(labels.image[i : i + 1], labels.corners[i : i + 1]), 4, 20, 20) for i in range(900)
    ]
    assert torch.equal(inverse_areas(labels, 4, 20, 20), torch.stack(one_by_one).amax(0))


def test_distances_are_decoded_as_by_ultralytics() -> None:
    raw = torch.randn(2, 64, 3, 5)
    theirs = DFL(16)(raw.flatten(2)).view(2, 4, 3, 5)
    assert torch.allclose(decode_distances(raw, 16), theirs, atol=1e-5)
    assert torch.equal(decode_distances(raw[:, :4], 1), raw[:, :4])
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = decode_distances(raw, 16)
    assert under_autocast.dtype == torch.float32
    assert torch.allclose(under_autocast, theirs, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3000, 8000).map(lambda n: n / 1000), min_size=8, max_size=8))  # in cells
def test_iou_and_giou_equal_the_reference(values: list[float]) -> None:
    a, b = torch.tensor(values, dtype=torch.float32).view(2, 1, 4, 1, 1)
    expected = reference.iou(a.double().numpy().ravel(), b.double().numpy().ravel())
    assert float(iou(a, b)) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    generalized = reference.giou(a.double().numpy().ravel(), b.double().numpy().ravel())
    assert float(giou(a, b)) == pytest.approx(generalized, rel=1e-4, abs=1e-5)


def test_resized_distances_are_in_cells_of_the_new_grid() -> None:
    """At half the image size, a box is half as many cells wide."""
    small = torch.full((1, 4, 4, 6), 1.5)
    assert torch.allclose(resize_distances(torch.zeros(1, 1, 8, 12), small), torch.full((1, 4, 8, 12), 3.0))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), share, share, share, share), max_size=4), st.integers(0, 99))
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_the_valuable_region_equals_the_reference(stride: int, boxes: list[tuple[float, ...]], seed: int) -> None:
    image = torch.tensor([int(b[0]) for b in boxes], dtype=torch.long)
    corners = torch.tensor([b[1:] for b in boxes], dtype=torch.float32).view(-1, 4)
    # Off the cells' edges and centers, where several anchors would be equally near.
    corners += 0.003 * torch.rand(corners.shape, generator=torch.Generator().manual_seed(seed))
    arguments = 2, (64, 96), (8, 16, 32), stride, 0.25
    expected = reference.valuable_region(image.tolist(), corners.double().numpy(), *arguments)
    assert np.array_equal(valuable_region(Labels(image, corners), *arguments).numpy(), expected)


def test_labels_of_rotated_boxes_are_the_upright_boxes_around_them() -> None:
    """On images that are not square: a box is rotated in pixels, not in shares of width and height."""
    height, width = 100, 200
    for angle in (0.0, 0.3, torch.pi / 2, 2.0):
        box = torch.tensor([[0.5, 0.4, 60 / width, 20 / height, angle]])
        labels = Labels.from_centers(torch.zeros(1), box, height, width)
        across = torch.tensor([30 * math.cos(angle), 30 * math.sin(angle)])
        down = torch.tensor([-10 * math.sin(angle), 10 * math.cos(angle)])
        corners = torch.stack([across + down, across - down, -across - down, -across + down])
        corners = (corners + torch.tensor([100.0, 40.0])) / torch.tensor([width, height])
        expected = torch.cat([corners.amin(0), corners.amax(0)])
        assert torch.allclose(labels.corners[0], expected, atol=1e-5)
