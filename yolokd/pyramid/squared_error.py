"""The squared error of two maps, read in their own precision and computed in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def squared_error(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean over channels of w·(a − b)²: two (B, C, H, W) -> (B, H, W) float32.

    weights: w, (B, C) float32 without gradient; 1 if None. For maps in half precision no map in float32 is kept for the
    backward pass: it reads the maps themselves once more.
    """
    if in_half_precision(a, b):
        error: Tensor = _HalfPrecisionError.apply(a, b, weights)
        return error
    errors = F.mse_loss(a.float(), b.float(), reduction="none")
    return (errors if weights is None else weights[:, :, None, None] * errors).mean(1)


def mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean of (a − b)² of two (B, C, H, W) maps, a float32 scalar, as `squared_error` computes it."""
    return squared_error(a, b).mean() if in_half_precision(a, b) else F.mse_loss(a.float(), b.float())


def in_half_precision(*maps: Tensor) -> bool:
    """Return whether one of the maps is in half precision."""
    return any(m.dtype in HALF for m in maps)


class _HalfPrecisionError(torch.autograd.Function):
    """The autograd function of `squared_error` for maps in half precision: only one map in float32 exists at a time."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b, weights)
        errors = _difference(a, b).square_()
        return (errors if weights is None else errors.mul_(weights[:, :, None, None])).mean(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b, weights = ctx.saved_tensors
        slope = _difference(a, b).mul_((gradient * 2 / a.shape[1])[:, None])
        if weights is not None:
            slope.mul_(weights[:, :, None, None])
        needs_a, needs_b, _ = ctx.needs_input_grad
        return slope.to(a.dtype) if needs_a else None, -slope.to(b.dtype) if needs_b else None, None


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Return a new map a − b in float32; a GPU converts the values as it reads them."""
    return a.float().sub_(b) if a.dtype in HALF else a - b
