"""Processes that end with the one that started them, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # of Linux


def end_with_parent(number: signal.Signals, parent: int) -> None:
    """Let the kernel send this process a signal when its parent ends. On other systems than Linux: nothing.

    Args:
        number: the signal.
        parent: process id of the parent; if it has ended already, this process is signalled now.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)
