"""Peak memory of a contender, in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path
from typing import Any

import torch

from yolokd.commands.bench.candidate import BenchSetting, Candidate, quiet


def peak_mib(setting: BenchSetting, contender: Candidate) -> float | None:
    """Peak memory of a process of its own that makes two steps: resident on CPUs, allocated on CUDA.

    None where it does not come back: beside this process there may be no room for another.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(sender, setting, contender.method, contender.trainer.args.amp))
    process.start()
    sender.close()
    try:
        return float(receiver.recv())
    except EOFError:
        return None
    finally:
        process.join()


def _report_peak(sender: Any, setting: BenchSetting, method: str, amp: object) -> None:
    with quiet():
        contender = Candidate(setting, method, amp)
        for _ in range(2):
            contender.step()
    if contender.trainer.device.type == "cuda":
        sender.send(torch.cuda.max_memory_allocated(contender.trainer.device) / 2**20)
        return
    sender.send(_peak_resident_mib())


def _peak_resident_mib() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # Linux' getrusage would count what the parent process held before this one was started
        line = next(text for text in status.read_text().splitlines() if text.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes, as on macOS
