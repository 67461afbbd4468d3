"""Feature distillation: losses on the neck maps of both models, one file per paper."""

from yolokd.methods.features import cwd, dfd, dfmsd, fgd, fitnet, frs, mgd, pdf, pkd, sl2

__all__ = ["cwd", "dfd", "dfmsd", "fgd", "fitnet", "frs", "mgd", "pdf", "pkd", "sl2"]
