"""Slow references in plain NumPy, written from the equations alone, position by position."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def attention(maps: Array) -> Array:
    """A(F) = H·W·softmax(mean_c |F|) for one image (C, H, W)."""
    c, h, w = maps.shape
    means = [[sum(abs(maps[k, i, j]) for k in range(c)) / c for j in range(w)] for i in range(h)]
    top = max(max(row) for row in means)
    exps = [[math.exp(v - top) for v in row] for row in means]
    total = sum(sum(row) for row in exps)
    return np.array([[h * w * v / total for v in row] for row in exps])


def dfd(
    teacher: Array,
    student: Array,
    transformed: Array,
    alpha: float,
    beta: float,
    regions: str = "both",
    constraint: str = "mixed",
) -> float:
    """DFD's loss of a batch (B, C, H, W); `student` is adapted, `transformed` is f_trans of it."""
    b, c, h, w = teacher.shape
    total = 0.0
    for n in range(b):
        disparity = np.abs(attention(teacher[n]) - attention(student[n]))
        threshold = sum(disparity[i, j] for i in range(h) for j in range(w)) / (h * w)
        high = low = 0.0
        for i in range(h):
            for j in range(w):
                is_high = disparity[i, j] >= threshold
                through = {"mixed": is_high, "plain": False, "transformed": True, "swapped": not is_high}[constraint]
                f = transformed if through else student
                error = sum((teacher[n, k, i, j] - f[n, k, i, j]) ** 2 for k in range(c))
                high, low = (high + error, low) if is_high else (high, low + error)
        if regions == "high":
            low = 0.0
        if regions == "low":
            high = 0.0
        total += (alpha * high + beta * low) / (c * h * w)
    return total / b


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def disagreement(teacher: Array, student: Array, distance: str) -> Array:
    """D of one image from (K, H, W) logits."""
    k, h, w = teacher.shape
    out = np.zeros((h, w))
    for i in range(h):
        for j in range(w):
            for c in range(k):
                p, q = sigmoid(teacher[c, i, j]), sigmoid(student[c, i, j])
                if distance == "l2":
                    out[i, j] += (p - q) ** 2
                elif distance == "l1":
                    out[i, j] += abs(p - q)
                else:
                    out[i, j] += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return out


def pdf(
    teacher: Array,
    student: Array,
    teacher_logits: Array,
    student_logits: Array,
    distance: str = "l2",
    weighting: str = "soft",
) -> float:
    """PDF-Distil's loss of a batch; `student` is adapted."""
    b, c, h, w = teacher.shape
    total = 0.0
    for n in range(b):
        d = disagreement(teacher_logits[n], student_logits[n], distance)
        if weighting == "uniform":
            d = np.ones((h, w))
        elif weighting != "soft":
            kept = max(round((0.25 if weighting.endswith("25") else 0.5) * h * w), 1)
            order = sorted(range(h * w), key=lambda i: d.flat[i], reverse=weighting.startswith("most"))
            d = np.array([1.0 if i in order[:kept] else 0.0 for i in range(h * w)]).reshape(h, w)
        weights = h * w * d / d.sum() if d.sum() else np.ones((h, w))
        for i in range(h):
            for j in range(w):
                error = sum((teacher[n, k, i, j] - student[n, k, i, j]) ** 2 for k in range(c))
                total += weights[i, j] * error / (h * w * c)
    return total / b


def sl2(teacher: Array, student: Array, logits: Array) -> float:
    """SL2 of a batch (B, C, H, W); `student` is projected, `logits` are the teacher's (B, K, H, W)."""
    b, c, h, w = teacher.shape
    weighted = weights = 0.0
    for n in range(b):
        for i in range(h):
            for j in range(w):
                scores = [sigmoid(logits[n, k, i, j]) for k in range(logits.shape[1])]
                weights += max(scores)
                weighted += max(scores) * sum((teacher[n, k, i, j] - student[n, k, i, j]) ** 2 for k in range(c))
    return weighted / (c * weights + 1e-9)
