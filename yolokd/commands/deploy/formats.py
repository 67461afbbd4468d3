"""The formats that `yolokd deploy` tries, by the names that a user gives them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralytics.engine.exporter import FP16_FORMATS, FP32_UNSUPPORTED_FORMATS, INT8_FORMATS, export_formats

from yolokd.config.arguments import did_you_mean
from yolokd.errors import UserError

NAMED_INT8 = frozenset({"litert", "onnx", "openvino"})  # the exporter adds _int8 to the names of these
QUANTIZE = {"float32": None, "float16": 16, "int8": 8}  # Ultralytics' `quantize` for a precision


@dataclass(frozen=True)
class Format:
    """One of Ultralytics' export formats (its `format` argument) in a precision."""

    argument: str
    precision: str

    @property
    def name(self) -> str:
        """Return what a user calls it: onnx, onnx-float16, onnx-int8."""
        return self.argument if self.precision == "float32" else f"{self.argument}-{self.precision}"

    @property
    def options(self) -> dict[str, Any]:
        """Return Ultralytics' export options for it."""
        quantize = QUANTIZE[self.precision]
        return {"format": self.argument} | ({"quantize": quantize} if quantize else {})

    def checkpoint_name(self, checkpoint: Path) -> str:
        """Return the checkpoint's name for the exporter, which names its file after it: each precision has its own."""
        named = self.precision == "float32" or (self.precision == "int8" and self.argument in NAMED_INT8)
        return f"{checkpoint.stem}{'' if named else f'_{self.precision}'}.pt"


def parse_formats(names: Iterable[str]) -> list[Format]:
    """Return the formats of their names, each once. Raises UserError for an unknown one.

    >>> [f.options for f in parse_formats(["onnx", "openvino-int8"])]
    [{'format': 'onnx'}, {'format': 'openvino', 'quantize': 8}]
    """
    known = known_formats()
    for name in names:
        if name not in known:
            cure = did_you_mean(name, known) or f"some of: {', '.join(known)}"
            raise UserError(f"formats={name}", "no such format", cure)
    return [known[name] for name in dict.fromkeys(names)]


def known_formats() -> dict[str, Format]:
    """Return all formats of Ultralytics in all precisions that it exports them in, by name."""
    float32 = set(export_formats()["Argument"]) - FP32_UNSUPPORTED_FORMATS
    precisions = {"float32": float32, "float16": FP16_FORMATS, "int8": INT8_FORMATS}
    formats = [
        Format(argument, precision)
        for argument in export_formats()["Argument"][1:]
        for precision, arguments in precisions.items()
        if argument in arguments
    ]
    return {each.name: each for each in formats}
