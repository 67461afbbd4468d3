"""Balanced gains: each method's gradient is a chosen multiple of the YOLO loss's gradient at each level."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Ours: about how many measurements a running mean covers. On blood cells the YOLO loss's gradient falls to a hundredth
# at some levels during training. Means over 10 measurements were then too large by a factor of 100, and no steadier
# elsewhere.
WINDOW = 3
# Ours: a gain is at most this multiple of the gain that the newest measurement alone would give. On blood cells 99 % of
# the YOLO loss's norms differ by less than a factor of 2.8 from the one before. So their chance hardly ever reaches it.
CEILING = 3.0
TINY = torch.finfo(torch.float32).tiny  # no mean is smaller: one of 0 would stay 0


class Balance(nn.Module):
    """Keeps running means of gradient norms at the student's neck maps, and computes gains from them.

        gain of method m at level l = target_l · G_l / G_ml

    G_l: the norm of the YOLO loss's gradient at level l's map. G_ml: the norm of the gradient of method m's loss of
    that level, before any gain. Both are geometric running means. target_l: the wanted ratio of the two gradients. So
    multiplying a method's loss by a number changes nothing.

    A finer map also gets gradients of the coarser levels' losses, because the coarser maps are computed from it. These
    come on top: in all, 1.0 to 1.4 times the target on blood cells with uniform weights.

    Means lag behind: where the YOLO loss's gradient falls, G_l is too large for a while, and with it the gain. After a
    fall to a hundredth, arithmetic means would make the gain 67, 45, 30 and 21 times too large at the next four
    measurements. Geometric means make it 22, 8, 4 and 2.5 times too large. On top of that, a measurement lowers G_l
    until the gain is at most CEILING times the gain of its own norms: 3, 2.1, 1.6 and 1.4 times.

    An end-to-end student's neck gets gradients of the one-to-many loss alone, whose weight Ultralytics lowers from 0.8
    to 0.1 over the training. G_l falls with that weight, and so do the gains.

    Like GradNorm (Chen et al., ICML 2018), this equalizes gradient norms, so that no loss drowns another. The
    differences: the gains have a closed form, and are not learned by gradient descent on a loss of their own. The YOLO
    loss is the reference and keeps its weight of 1; there is no term for training rates. The norms are taken at each
    level's map instead of one shared layer, because the ratios differ by orders of magnitude between levels.

    Buffers, all (M, L) float32 for M methods and L levels: task, the means G_l; pull, the means G_ml; seen, the number
    of measurements in each.
    """

    task: Tensor
    pull: Tensor
    seen: Tensor

    def __init__(self, methods: int, levels: int) -> None:
        super().__init__()
        self.register_buffer("task", torch.zeros(methods, levels))
        self.register_buffer("pull", torch.zeros(methods, levels))
        self.register_buffer("seen", torch.zeros(methods, levels))

    def update(self, task: Tensor, pull: Tensor) -> None:
        """Add one measurement to the running means: norms of the YOLO loss, (L,), and of the methods' losses, (M, L).

        Where one of the two norms is 0 or not finite, the means, and so the gain, stay as they are.
        """
        task = task.expand_as(pull)
        usable = torch.isfinite(task) & torch.isfinite(pull) & (task > 0) & (pull > 0)
        self.seen += usable
        weight = 1 / self.seen.clamp(1, WINDOW)
        new_pull = geometric_mean(self.pull, pull, weight)
        highest = CEILING * task * (new_pull / pull)
        new_task = geometric_mean(self.task, task, weight).minimum(highest).clamp(min=TINY)
        self.task.copy_(torch.where(usable, new_task, self.task))
        self.pull.copy_(torch.where(usable, new_pull, self.pull))

    @property
    def newest_weight(self) -> Tensor:
        """Return the weight, a scalar tensor, that the newest measurement of the step has in a running mean."""
        return 1 / self.seen.max().clamp(1, WINDOW)

    def gains(self, target: Tensor, fixed: Tensor) -> Tensor:
        """Return (M, L) gains for the target ratios, (L,); and `fixed` gains, (M, L), where nothing is measured yet."""
        return torch.where(self.seen > 0, target * self.task / self.pull, fixed)


def geometric_mean(mean: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """Return mean^(1 − weight) · new^weight, element by element; `new` itself where the weight is 1.

    Written with the ratio of the two, so that multiplying both by a power of two changes no other bit of the result.
    """
    ratio = (new / mean).clamp(TINY, 1 / TINY)
    return torch.where(weight < 1, (mean * ratio**weight).clamp(min=TINY), new)
