"""The teacher's forward on a CUDA stream of its own, beside the student's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from yolokd.models.teachers.outputs import TeacherOutput


class SideStream:
    """Runs the teacher on a CUDA stream of its own, so that it overlaps the student's forward.

    `start` queues one run and returns at once. `collect` lets the current stream wait for that run, and returns its
    output. No memory is freed while a stream may still use it.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._images: Tensor | None = None
        self._output: TeacherOutput | None = None

    def start(self, images: Tensor, run: Callable[[], TeacherOutput]) -> None:
        """Queue `run` on the teacher's stream, after the work that made `images`."""
        self.discard()  # frees its memory before the next run needs some
        self._stream = self._stream or torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(self._stream):
            self._images, self._output = images, run()
        images.record_stream(self._stream)  # keeps their memory until the teacher has read them

    def collect(self, images: Tensor) -> TeacherOutput | None:
        """Return the output for these images, or None if the last `start` was not given the same tensor."""
        output = self._output if self._images is images else None
        self.discard()
        if output is None or self._stream is None:
            return None
        current = torch.cuda.current_stream(images.device)
        current.wait_stream(self._stream)
        for values in vars(output).values():
            for tensor in values.values():
                tensor.record_stream(current)  # allocated on the teacher's stream, used on this one
        return output

    def discard(self) -> None:
        """Forget what was started and not collected."""
        self._images = self._output = None
