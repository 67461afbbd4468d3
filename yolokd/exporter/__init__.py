"""Export of a checkpoint, and the check that the exported file gives the same results."""

from yolokd.exporter.export_model import export

__all__ = ["export"]
