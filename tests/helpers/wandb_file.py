"""The file in which Weights & Biases keeps a run that it has not uploaded."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768  # bytes; the file is a log as LevelDB's: a record is cut into parts where a block ends
FILE_HEADER, PART_HEADER = 7, 7  # bytes; of a part: checksum (4), length (2), kind (1)
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Record]:
    """Yield the records of a `run-*.wandb` file in their order."""
    content, at, parts = path.read_bytes(), FILE_HEADER, b""
    while at + PART_HEADER <= len(content):
        if BLOCK - at % BLOCK < PART_HEADER:  # zeros fill the rest of the block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        part = content[at + PART_HEADER : at + PART_HEADER + length]
        parts = part if kind in (WHOLE, FIRST) else parts + part
        at += PART_HEADER + length
        if kind in (WHOLE, LAST):
            yield Record.FromString(parts)
