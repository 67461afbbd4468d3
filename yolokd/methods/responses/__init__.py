"""Response distillation: losses on the outputs of both models' heads, one file per paper."""

from yolokd.methods.responses import bckd, crosskd, ld

__all__ = ["bckd", "crosskd", "ld"]
