"""Distillation methods: one file per paper, found by name in the registry."""

from yolokd.methods import dfd, pdf, sl2
from yolokd.methods.base import Method, constants_model, register, registered

__all__ = ["Method", "constants_model", "dfd", "pdf", "register", "registered", "sl2"]
