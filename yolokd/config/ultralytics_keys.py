"""The keys and optimizers that Ultralytics accepts."""

from __future__ import annotations

from ultralytics.utils import DEFAULT_CFG_DICT

OPTIMIZERS = ("auto", "sgd", "musgd", "adam", "adamax", "adamw", "nadam", "radam", "rmsprop")  # Ultralytics' own


# Ultralytics still accepts these, with a warning: old names, and keys without effect.
DEPRECATED = frozenset(
    {"half", "int8", "end2end", "boxes", "hide_labels", "hide_conf", "line_thickness"}
    | {"label_smoothing", "save_hybrid", "crop_fraction", "keras"}
)


KNOWN_KEYS = frozenset(DEFAULT_CFG_DICT) | DEPRECATED | {"augmentations", "save_dir"}
