"""The connection to a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

import yolokd
from yolokd.errors import UserError, first_line

CURRENT_CLUSTER = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")  # as `ray.init` documents
CONNECT_SECONDS = 10.0  # ours: how long a cluster may take to answer


@contextmanager
def connected() -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names or that this machine is part of; if there is none, start one here.

    A connection that the user's program has made is used, and kept. Raises UserError if the cluster does not answer.
    """
    if ray.is_initialized():
        yield
        return
    address = _find_cluster()
    try:
        # Ray lets the nodes' processes import from the working folder, which may have come from a stranger.
        with _working_folder(Path(yolokd.__file__).parents[1]), _keep_sigterm_handler():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError) as e:
        cure = "`ray status` shows whether the cluster works"
        raise UserError("launcher=ray", f"cannot connect to {address}: {first_line(e)}", cure) from e
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Keep the handler of SIGTERM over the block; Ray's aborts the process with a stack trace."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            signal.signal(signal.SIGTERM, handler)


def _find_cluster() -> str:
    """Return the address of the cluster to connect to; `local` if there is none.

    Raises UserError if RAY_ADDRESS names one that does not answer: Ray itself would try for minutes.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        if not _answers(address):
            cure = "start it by `ray start --head`, or unset RAY_ADDRESS"
            raise UserError(f"RAY_ADDRESS={address}", "no cluster answers there", cure)
        return address
    address = CURRENT_CLUSTER.read_text().strip() if CURRENT_CLUSTER.exists() else "local"
    return address if _answers(address) else "local"  # the file may be that of a cluster that has crashed


def _answers(address: str) -> bool:
    """Return whether something listens at HOST:PORT; True for addresses of other forms."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host:
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def _working_folder(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
