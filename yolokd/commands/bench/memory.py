"""Measures the peak memory of a candidate in a process of its own."""

from __future__ import annotations

from dataclasses import replace

import torch

from yolokd.commands.apart import ProcessFailure, call_apart
from yolokd.commands.bench.candidate import BenchSetting, Candidate
from yolokd.patches.no_loggers import no_loggers
from yolokd.runtime.console import CONSOLE, warnings_only
from yolokd.runtime.memory import peak_resident_mib


def peak_mib(setting: BenchSetting, candidate: Candidate) -> float | None:
    """Return the peak memory in MiB of a new process that runs two steps: resident on CPUs, reserved on CUDA.

    Returns None, and prints why, if that fails; the memory may not suffice for two processes.
    """
    apart = replace(setting, folder=f"{setting.folder}/memory")  # the candidate's own trainer has locked its run folder
    try:
        return call_apart(_peak_of_two_steps, apart, candidate.method, candidate.trainer.args.amp)
    except ProcessFailure as e:
        CONSOLE.print(f"{candidate.method}: peak memory was not measured: {e}")
        return None


def _peak_of_two_steps(setting: BenchSetting, method: str, amp: object) -> float:
    """Run two steps in this process and return its peak memory in MiB."""
    with warnings_only(), no_loggers():
        candidate = Candidate(setting, method, amp)
        for _ in range(2):
            candidate.step()
    if candidate.trainer.device.type == "cuda":
        return torch.cuda.max_memory_reserved(candidate.trainer.device) / 2**20
    return peak_resident_mib()
