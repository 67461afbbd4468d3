"""Distillation methods, by what they compare, and a registry that finds a method by its name."""

from yolokd.methods import features, responses
from yolokd.methods.base import Method, constants_model, register, registered

__all__ = ["Method", "constants_model", "features", "register", "registered", "responses"]
