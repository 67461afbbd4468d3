"""Export of a checkpoint, and the check that the exported file computes the same."""

from yolokd.exporter.export_model import export

__all__ = ["export"]
