"""Measures the peak memory of a candidate in a process of its own."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from typing import Any

import torch

from yolokd.commands.bench.candidate import BenchSetting, Candidate
from yolokd.patches.no_loggers import no_loggers
from yolokd.patches.safe_imports import safe_imports
from yolokd.runtime.console import warnings_only
from yolokd.runtime.memory import peak_resident_mib


def peak_mib(setting: BenchSetting, candidate: Candidate) -> float | None:
    """Return the peak memory in MiB of a new process that runs two steps: resident on CPUs, reserved on CUDA.

    Returns None if that process dies; the memory may not suffice for two processes.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    apart = replace(setting, folder=f"{setting.folder}/memory")  # the candidate's own trainer has locked its run folder
    process = context.Process(target=_report_peak, args=(sender, apart, candidate.method, candidate.trainer.args.amp))
    with safe_imports():
        process.start()
    sender.close()
    try:
        return float(receiver.recv())
    except EOFError:
        return None
    finally:
        process.join()


def _report_peak(sender: Any, setting: BenchSetting, method: str, amp: object) -> None:
    """Run two steps in this process and send its peak memory in MiB."""
    with warnings_only(), no_loggers():
        candidate = Candidate(setting, method, amp)
        for _ in range(2):
            candidate.step()
    if candidate.trainer.device.type == "cuda":
        sender.send(torch.cuda.max_memory_reserved(candidate.trainer.device) / 2**20)
        return
    sender.send(peak_resident_mib())
