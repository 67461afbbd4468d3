"""What a teacher predicts on the student's grid, and the means over several teachers that teach at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ByStride = dict[int, Tensor]

TINY = torch.finfo(torch.float32).tiny  # no mean probability counts as smaller: its logarithm stays finite


@dataclass(frozen=True)
class Predictions:
    """A teacher's predictions on the student's grid, each by stride; empty if no method wants them.

    logits, mean_logits: (B, K, H, W) for the K classes that teacher and student share. boxes: (B, 4, H, W) distances in
    cells. box_logits: (B, 4, bins, H, W).
    """

    logits: ByStride = field(default_factory=dict)
    mean_logits: ByStride = field(default_factory=dict)
    boxes: ByStride = field(default_factory=dict)
    box_logits: ByStride = field(default_factory=dict)


def average_predictions(
    teachers: Sequence[Predictions], classes: Sequence[Tensor], count: int
) -> Sequence[Predictions]:
    """Return the predictions of teachers that teach together, each averaged over those that know the same classes.

    Each teacher gets, for each of its classes, the mean probability over all teachers that know the class, and the mean
    box over all that know any. Those that share no class with the student, and so have one objectness channel instead,
    are averaged among themselves. One teacher alone keeps its predictions to the bit.

    classes: for each teacher, the (K,) indices of its classes in the student's head; empty for objectness. count: the
    number of the student's classes.
    """
    averaged = list(teachers)
    knowing = [bool(len(indices)) for indices in classes]
    for knows in (True, False):
        group = [i for i, known in enumerate(knowing) if known is knows]
        if len(group) > 1:
            indices = [classes[i] if knows else classes[i].new_zeros(1) for i in group]
            means = _averaged_group([teachers[i] for i in group], indices, count if knows else 1)
            for i, mean in zip(group, means, strict=True):
                averaged[i] = mean
    return averaged


def _averaged_group(teachers: Sequence[Predictions], classes: Sequence[Tensor], count: int) -> list[Predictions]:
    parts = (
        _mean_logits([t.logits for t in teachers], classes, count),
        _mean_logits([t.mean_logits for t in teachers], classes, count),
        _means([t.boxes for t in teachers], _mean),
        _means([t.box_logits for t in teachers], _mean_distribution),
    )
    return [Predictions(*of_teacher) for of_teacher in zip(*parts, strict=True)]


def _mean_logits(logits: Sequence[ByStride], classes: Sequence[Tensor], count: int) -> list[ByStride]:
    """Return the logits of each class's mean probability over the teachers that know it, for each teacher's classes."""
    strides = {stride for by_stride in logits for stride in by_stride}
    of_all = {
        stride: _mean_logits_of_all(
            [(t[stride], indices) for t, indices in zip(logits, classes, strict=True) if stride in t], count
        )
        for stride in strides
    }
    return [{s: of_all[s].index_select(1, own) for s in t} for t, own in zip(logits, classes, strict=True)]


def _mean_logits_of_all(known: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Return (B, count, H, W) logits of mean probabilities. known: (B, K, H, W) logits and (K,) their classes."""
    first, _ = known[0]
    shape = len(first), count, *first.shape[2:]
    yes, no = (torch.zeros(shape, device=first.device) for _ in range(2))
    for logits, indices in known:
        yes.index_add_(1, indices, logits.float().sigmoid())
        no.index_add_(1, indices, (-logits.float()).sigmoid())
    # The number of teachers cancels in the difference of the logarithms.
    return yes.clamp(min=TINY).log() - no.clamp(min=TINY).log()


def _means(values: Sequence[ByStride], mean: Callable[[list[Tensor]], Tensor]) -> list[ByStride]:
    """Return for each teacher, at each of its strides, the mean over the teachers whose values have the same shape."""
    return [
        {s: mean([t[s] for t in values if s in t and t[s].shape == own.shape]) for s, own in teacher.items()}
        for teacher in values
    ]


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


def _mean_distribution(logits: list[Tensor]) -> Tensor:
    """Return the logits of a mean distribution over bins, whose distance is the mean distance; or that of one bin."""
    if logits[0].shape[2] == 1:
        return _mean(logits)
    return _mean([z.float().softmax(2) for z in logits]).clamp(min=TINY).log()
