"""The number of threads that the user set by OMP_NUM_THREADS, which other programs set, too.

Ultralytics sets OMP_NUM_THREADS=1 when it is imported and the user has set nothing, and torchrun does so for the
processes that it starts. So this module is imported before Ultralytics, and notes what the user has set in a variable
of the environment, which processes that this one starts inherit. It imports neither torch nor Ultralytics.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

OMP, OURS = "OMP_NUM_THREADS", "YOLOKD_OMP_NUM_THREADS"


def omp_text_of_user(environment: Mapping[str, str], ultralytics_is_imported: bool = False) -> str:
    """Return the user's OMP_NUM_THREADS out of the environment of a process; '' if there is none.

    A 1 does not count if it may be that of Ultralytics or torchrun. ultralytics_is_imported: whether Ultralytics was
    imported before yolokd.

    >>> omp_text_of_user({OMP: "4"}), omp_text_of_user({OMP: "1"}), omp_text_of_user({OMP: "1", OURS: ""})
    ('4', '1', '')
    """
    threads, noted = environment.get(OMP, ""), environment.get(OURS)
    from_torchrun = "TORCHELASTIC_RUN_ID" in environment
    unclear = noted == "" or (noted is None and (from_torchrun or ultralytics_is_imported))
    return "" if threads == "1" and unclear else threads


def note_users_threads() -> None:
    """Note the user's OMP_NUM_THREADS, for `threads_of_user` in this process and in those that it starts."""
    os.environ[OURS] = omp_text_of_user(os.environ, "ultralytics" in sys.modules)


def threads_of_user() -> int | None:
    """Return the number of threads that the user has set for a process, or None."""
    first = os.environ.get(OURS, "").partition(",")[0].strip()  # more numbers would be for nested parallel regions
    return int(first) if first.isdecimal() and int(first) > 0 else None


def set_threads(threads: int) -> None:
    """Set the number of threads for the processes that this one starts, as if the user had."""
    os.environ[OMP] = os.environ[OURS] = str(threads)
