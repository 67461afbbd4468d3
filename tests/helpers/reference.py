"""Slow references of the losses in plain NumPy, written from the papers' equations alone, position by position."""

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
                compared = {
                    "mixed": [transformed if is_high else student],
                    "plain": [student],
                    "transformed": [transformed],
                    "swapped": [student if is_high else transformed],
                    "low_both": [transformed] if is_high else [transformed, student],
                }[constraint]
                error = sum((teacher[n, k, i, j] - f[n, k, i, j]) ** 2 for f in compared for k in range(c))
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
                if distance in ("l2", "euclidean"):
                    out[i, j] += (p - q) ** 2
                elif distance == "l1":
                    out[i, j] += abs(p - q)
                else:
                    out[i, j] += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
            if distance == "euclidean":
                out[i, j] = math.sqrt(out[i, j])
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


def pdf_over_the_batch(levels: list[tuple[Array, Array, Array, Array]], distance: str, weighting: str) -> list[float]:
    """PDF-Distil's losses of a batch, with weights over all positions of all levels; arrays of a level as for `pdf`.

    Their mean is the sum over all positions of weight times error, where the weights sum to 1.
    """
    errors, weights, level_of = [], [], []
    for k, (teacher, student, teacher_logits, student_logits) in enumerate(levels):
        for n in range(len(teacher)):
            weights += list(disagreement(teacher_logits[n], student_logits[n], distance).flat)
            errors += list(((teacher[n] - student[n]) ** 2).mean(0).flat)
            level_of += [k] * teacher[n, 0].size
    if weighting.startswith(("most", "least")):
        kept = max(round((0.25 if weighting.endswith("25") else 0.5) * len(weights)), 1)
        order = sorted(range(len(weights)), key=lambda i: weights[i], reverse=weighting.startswith("most"))
        weights = [1.0 if i in set(order[:kept]) else 0.0 for i in range(len(weights))]
    if weighting == "uniform" or sum(weights) == 0:
        weights = [1.0] * len(weights)
    totals = [0.0] * len(levels)
    for k, weight, error in zip(level_of, weights, errors, strict=True):
        totals[k] += len(levels) * weight / sum(weights) * error
    return totals


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


def convolved(maps: Array, weight: Array, bias: Array) -> Array:
    """A convolution of (B, C, H, W) that keeps the size, zeros around it; weight: (D, C, k, k), k odd."""
    b, c, h, w = maps.shape
    d, _, k, _ = weight.shape
    out = np.zeros((b, d, h, w))
    for n, o, i, j in np.ndindex(b, d, h, w):
        out[n, o, i, j] = bias[o]
        for y, x in np.ndindex(k, k):
            at, to = i + y - k // 2, j + x - k // 2
            if 0 <= at < h and 0 <= to < w:
                out[n, o, i, j] += sum(weight[o, q, y, x] * maps[n, q, at, to] for q in range(c))
    return out


def generator(maps: Array, first: tuple[Array, Array], second: tuple[Array, Array]) -> Array:
    """MGD's G: 3x3, ReLU, 3x3, each given as weight and bias."""
    return convolved(np.maximum(convolved(maps, *first), 0), *second)


def global_context(
    maps: Array,
    key: tuple[Array, Array],
    narrow: tuple[Array, Array],
    norm: tuple[Array, Array],
    wide: tuple[Array, Array],
) -> Array:
    """FGD's R, GCNet's block: F + wide(ReLU(LayerNorm(narrow(sum over positions of softmax(key(F)) F))))."""
    b, c, h, w = maps.shape
    out = maps.copy()
    for n in range(b):
        attention = softmax([float(v) for v in convolved(maps[n : n + 1], *key).flat])
        places = list(np.ndindex(h, w))
        context = [sum(a * maps[n, k, i, j] for a, (i, j) in zip(attention, places, strict=True)) for k in range(c)]
        hidden = [float(row[:, 0, 0] @ context) + float(bias) for row, bias in zip(*narrow, strict=True)]
        mean = sum(hidden) / len(hidden)
        variance = sum((v - mean) ** 2 for v in hidden) / len(hidden)
        normal = [(v - mean) / math.sqrt(variance + 1e-5) for v in hidden]
        active = [max(float(g) * v + float(s), 0) for v, g, s in zip(normal, *(p.ravel() for p in norm), strict=True)]
        for k in range(c):
            out[n, k] += float(wide[0][k, :, 0, 0] @ active) + float(wide[1][k])
    return out


def fitnet(teacher: Array, student: Array) -> float:
    """Mean squared error of a batch; `student` is adapted."""
    return float(sum((t - s) ** 2 for t, s in zip(teacher.flat, student.flat, strict=True)) / teacher.size)


def correlation_loss(teacher: Array, student: Array) -> float:
    """Half the mean squared error of maps that are standardized channel by channel: PKD's loss, and DFMSD's of R."""
    b, c, h, w = teacher.shape
    total = 0.0
    for k in range(c):
        normal = []
        for maps in (teacher, student):
            values = [float(maps[n, k, i, j]) for n in range(b) for i in range(h) for j in range(w)]
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / len(values)
            normal.append([(v - mean) / math.sqrt(variance + 1e-6) for v in values])
        total += sum((t - s) ** 2 for t, s in zip(*normal, strict=True)) / len(normal[0])
    return total / c / 2


def cwd(teacher: Array, student: Array, tau: float) -> float:
    """CWD's loss of a batch; `student` is adapted."""
    b, c, _, _ = teacher.shape
    total = 0.0
    for n in range(b):
        for k in range(c):
            p, q = (softmax([float(v) / tau for v in maps[n, k].flat]) for maps in (teacher, student))
            total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)
    return tau**2 * total / (b * c)


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [max(e / sum(exps), 1e-300) for e in exps]


def frs(
    teacher: Array, student: Array, teacher_logits: Array, student_logits: Array, alpha: float, beta: float
) -> float:
    """FRS's loss of a batch; `student` is adapted."""
    b, c, h, w = teacher.shape
    classes = teacher_logits.shape[1]
    feature = scores = richness = 0.0
    for n in range(b):
        for i in range(h):
            for j in range(w):
                p = [sigmoid(teacher_logits[n, k, i, j]) for k in range(classes)]
                rich = max(p)
                richness += rich
                feature += rich * sum((teacher[n, k, i, j] - student[n, k, i, j]) ** 2 for k in range(c)) / c
                for k in range(classes):
                    x = float(student_logits[n, k, i, j])
                    log_q, log_not_q = (-math.log1p(math.exp(-v)) if v > -30 else v for v in (x, -x))
                    scores -= rich * (p[k] * log_q + (1 - p[k]) * log_not_q)
    return (alpha * feature + beta * scores) / max(richness, 1e-9)


def bckd(logits: tuple[Array, Array], boxes: tuple[Array, Array], alpha_1: float, alpha_2: float) -> float:
    """BCKD's loss of a batch; `logits` and `boxes` are the teacher's and the student's."""
    b, classes, h, w = logits[0].shape
    total = 0.0
    for n in range(b):
        for i in range(h):
            for j in range(w):
                weights = []
                for k in range(classes):
                    p, x = sigmoid(logits[0][n, k, i, j]), float(logits[1][n, k, i, j])
                    weights.append(abs(p - sigmoid(x)))
                    log_q, log_not_q = (-math.log1p(math.exp(-v)) if v > -30 else v for v in (x, -x))
                    total -= alpha_1 * weights[-1] * (p * log_q + (1 - p) * log_not_q)
                total += alpha_2 * max(weights) * (1 - iou(*(maps[n, :, i, j] for maps in boxes)))
    return total / (b * h * w)


def covered(box: Array, h: int, w: int) -> list[tuple[int, int]]:
    """The cells that a box (x1, y1, x2, y2, relative to the image) overlaps by at least 1e-4, or begins in."""
    x1, y1, x2, y2 = box[0] * w, box[1] * h, box[2] * w, box[3] * h
    if not (x2 > x1 and y2 > y1):
        return []
    rows, columns = touched(y1, y2, h), touched(x1, x2, w)
    return [(i, j) for i in rows for j in columns]


def touched(low: float, high: float, cells: int) -> list[int]:
    """The cells of a line that a span overlaps by at least 1e-4 of a cell, or begins in."""
    inner = max(low, 0) + np.float32(1e-4)
    return [i for i in range(cells) if i + 1 > inner and (i < high - np.float32(1e-4) or i == math.floor(inner))]


def inverse_areas(image: list[int], corners: Array, b: int, h: int, w: int) -> Array:
    """One over the area of the smallest box over each cell."""
    out = np.zeros((b, h, w))
    for n, box in zip(image, corners, strict=True):
        cells = covered(box, h, w)
        for i, j in cells:
            out[n, i, j] = max(out[n, i, j], 1 / len(cells))
    return out


def fgd(
    teacher: Array,
    student: Array,
    contexts: tuple[Array, Array],
    inverse: Array,
    alpha: float,
    beta: float,
    gamma: float,
    lambda_: float,
    temperature: float,
) -> float:
    """FGD's loss of a batch; `student` is adapted, `contexts` are R(F_T) and R(F_S), `inverse` as inverse_areas."""
    b, c, h, w = teacher.shape
    total = 0.0
    for n in range(b):
        spatial = [attention(maps[n] / temperature) for maps in (teacher, student)]
        channel = []
        for maps in (teacher, student):
            means = [sum(abs(float(v)) for v in maps[n, k].flat) / (h * w) / temperature for k in range(c)]
            channel.append([c * v for v in softmax(means)])
        background = sum(1 for v in inverse[n].flat if v == 0)
        for i in range(h):
            for j in range(w):
                scale = alpha * inverse[n, i, j] if inverse[n, i, j] else beta / background
                for k in range(c):
                    error = (teacher[n, k, i, j] - student[n, k, i, j]) ** 2
                    total += scale * spatial[0][i, j] * channel[0][k] * error / c
        total += gamma * float(np.abs(spatial[0] - spatial[1]).mean())
        total += gamma * sum(abs(s - t) for s, t in zip(*channel, strict=True)) / c
    return total / b + lambda_ * fitnet(*contexts)


def most_attended(values: list[float], fraction: float) -> set[int]:
    """Indices of the highest values, `fraction` of all; among equal values the first."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return set(order[: round(fraction * len(values))])


def dfmsd_masks(teacher: Array, inverse: Array, rho_s: float, rho_inside: float, rho_c: float) -> tuple[Array, Array]:
    """M^S (B, H, W) and M^C (B, C): 0 where masked."""
    b, c, h, w = teacher.shape
    spatial, channel = np.ones((b, h, w)), np.ones((b, c))
    for n in range(b):
        at = [float(sum(abs(teacher[n, k, i, j]) for k in range(c)) / c) for i in range(h) for j in range(w)]
        low, high = most_attended(at, rho_s), most_attended(at, rho_inside)
        for place in range(h * w):
            i, j = divmod(place, w)
            if place in low or (place in high and inverse[n, i, j] > 0):
                spatial[n, i, j] = 0
        means = [float(np.abs(teacher[n, k]).mean()) for k in range(c)]
        for k in most_attended(means, rho_c):
            channel[n, k] = 0
    return spatial, channel


def iou(a: Array, b: Array) -> float:
    """IoU of two boxes, each given as distances left, top, right, bottom from one point."""
    sides = [max(min(a[k], b[k]) + min(a[k + 2], b[k + 2]), 0) for k in (0, 1)]
    areas = [max(x[0] + x[2], 0) * max(x[1] + x[3], 0) for x in (a, b)]
    union = sum(areas) - sides[0] * sides[1]
    return sides[0] * sides[1] / union if union > 0 else 0.0


def giou(a: Array, b: Array) -> float:
    """GIoU of two boxes, each given as distances left, top, right, bottom from one point."""
    areas = [max(x[0] + x[2], 0) * max(x[1] + x[3], 0) for x in (a, b)]
    common = math.prod(max(min(a[k], b[k]) + min(a[k + 2], b[k + 2]), 0) for k in (0, 1))
    hull = math.prod(max(max(a[k], b[k]) + max(a[k + 2], b[k + 2]), 0) for k in (0, 1))
    return iou(a, b) - ((hull - sum(areas) + common) / hull if hull > 0 else 0)


def crosskd(
    logits: tuple[Array, Array], box_distance: Array, region: Array, alpha: float, beta: float, gamma: float
) -> float:
    """CrossKD's loss of a batch. logits: the teacher's own and the crossed. box_distance, region: (b, h, w)."""
    b, classes, h, w = logits[0].shape
    total = 0.0
    for n in range(b):
        for i in range(h):
            for j in range(w):
                for k in range(classes):
                    p, x = sigmoid(logits[0][n, k, i, j]), float(logits[1][n, k, i, j])
                    log_q, log_not_q = (-math.log1p(math.exp(-v)) if v > -30 else v for v in (x, -x))
                    total -= alpha * abs(p - sigmoid(x)) ** gamma * (p * log_q + (1 - p) * log_not_q)
                total += beta * region[n, i, j] * box_distance[n, i, j]
    return total / (b * h * w)


def decoded(raw: Array) -> Array:
    """The distances that box distributions mean: (b, 4, bins, h, w) -> (b, 4, h, w)."""
    b, sides, _, h, w = raw.shape
    out = np.zeros((b, sides, h, w))
    for n, side, i, j in np.ndindex(*out.shape):
        out[n, side, i, j] = sum(k * p for k, p in enumerate(softmax([float(v) for v in raw[n, side, :, i, j]])))
    return out


def box_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """IoU of two boxes x1, y1, x2, y2."""
    common = math.prod(max(min(a[k + 2], b[k + 2]) - max(a[k], b[k]), 0) for k in (0, 1))
    return common / (sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - common)


def valuable_region(
    image: list[int], corners: Array, b: int, size: tuple[int, int], strides: tuple[int, ...], stride: int, gamma: float
) -> Array:
    """LD's valuable localization region on the grid of one stride, position by position: (b, h, w) of 0 or 1."""
    out = np.zeros((b, size[0] // stride, size[1] // stride))

    def anchors(s: int) -> list[tuple[float, ...]]:
        cells = [(i, j) for i in range(size[0] // s) for j in range(size[1] // s)]
        return [((j - 3.5) * s, (i - 3.5) * s, (j + 4.5) * s, (i + 4.5) * s) for i, j in cells]

    def distance(a: tuple[float, ...], b: tuple[float, ...]) -> float:
        return sum(((a[k] + a[k + 2]) / 2 - (b[k] + b[k + 2]) / 2) ** 2 for k in (0, 1))

    for n, relative in zip(image, corners, strict=True):
        box = tuple(float(v) * size[(k + 1) % 2] for k, v in enumerate(relative))
        if not (all(map(math.isfinite, box)) and box[2] > box[0] and box[3] > box[1]):
            continue
        nearest = [a for s in strides for a in sorted(anchors(s), key=lambda a: distance(a, box))[:9]]
        overlaps = [box_iou(a, box) for a in nearest]
        upper = np.mean(overlaps) + (np.std(overlaps, ddof=1) if len(overlaps) > 1 else 0)
        for position, anchor in enumerate(anchors(stride)):
            hull = [max(anchor[k + 2], box[k + 2]) - min(anchor[k], box[k]) for k in (0, 1)]
            diou = box_iou(anchor, box) - distance(anchor, box) / (hull[0] ** 2 + hull[1] ** 2)
            if gamma * upper <= diou <= upper:
                out[n].flat[position] = 1
    return out


def box_divergence(teacher: Array, student: Array, tau: float) -> Array:
    """τ² times the KL divergence of box distributions, the mean over sides: (b, 4, bins, h, w) -> (b, h, w)."""
    b, _, bins, h, w = teacher.shape
    out = np.zeros((b, h, w))
    for n in range(b):
        for i in range(h):
            for j in range(w):
                for side in range(4):
                    p, q = (softmax([float(v) / tau for v in z[n, side, :, i, j]]) for z in (teacher, student))
                    kl = sum(p[k] * math.log(p[k] / q[k]) for k in range(bins) if p[k] > 0)
                    out[n, i, j] += tau**2 * kl / 4
    return out


def ld(
    teacher: Array, student: Array, assigned: Array, valuable: Array, tau: float, weights: tuple[float, float]
) -> float:
    """LD's loss of a batch. assigned, valuable: (b, h, w) of 0 or 1. weights: of the two regions."""
    divergence = box_divergence(teacher, student, tau)
    return float(np.mean((weights[0] * assigned + weights[1] * valuable) * divergence))
