"""Gains that balance themselves: each method pulls at each level as a chosen share of the YOLO loss does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Ours: of how many measurements the running means are, about. On blood cells the YOLO loss's gradient falls a
# hundredfold at levels that go quiet: means of 10 lagged behind by as much there, and were no steadier elsewhere.
WINDOW = 3


class Balance(nn.Module):
    """Running means of gradient norms at the student's neck maps, and the gains that follow from them.

    With G_l the norm of the YOLO loss's gradient at level l's map and G_ml that of method m's own loss of that level,
    unscaled, both running means, method m gets the gain share · G_l / G_ml there: multiplying a method's loss by a
    number changes nothing. What coarser levels' losses add to a finer map, which theirs are computed from, comes on
    top: with uniform weights, on blood cells, 1.0 to 1.4 times the share in all.

    Like GradNorm (Chen et al., ICML 2018) it equals gradient norms so that no loss drowns another. Unlike it, the
    gains follow in closed form instead of by gradient descent on a loss of their own; the YOLO loss is the measure
    and keeps its weight of 1, with no term for rates of training; and norms are taken at each level's map, not at one
    shared layer, because the ratios differ by orders of magnitude between levels.
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
        """Take in norms of the YOLO loss, (L,), and of the unscaled methods, (M, L).

        What is not finite, or 0, is left out, and leaves the gain as it was.
        """
        task = task.expand_as(pull)
        usable = torch.isfinite(task) & torch.isfinite(pull) & (task > 0) & (pull > 0)
        self.seen += usable
        step = 1 / self.seen.clamp(1, WINDOW)
        for mean, new in ((self.task, task), (self.pull, pull)):
            mean += torch.where(usable, (new - mean) * step, 0)

    def gains(self, share: Tensor, fixed: Tensor) -> Tensor:
        """(M, L) gains: for a target share, (L,); and the fixed ones, (M, L), where nothing was measured yet."""
        return torch.where(self.seen > 0, share * self.task / self.pull, fixed)
