"""Distillation methods: one file per paper, and a registry that finds a method by its name."""

from yolokd.methods import bckd, crosskd, cwd, dfd, dfmsd, fgd, fitnet, frs, ld, mgd, pdf, pkd, sl2
from yolokd.methods.base import Method, constants_model, register, registered

__all__ = [
    "Method",
    "bckd",
    "constants_model",
    "crosskd",
    "cwd",
    "dfd",
    "dfmsd",
    "fgd",
    "fitnet",
    "frs",
    "ld",
    "mgd",
    "pdf",
    "pkd",
    "register",
    "registered",
    "sl2",
]
