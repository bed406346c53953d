"""Signals that ask a run to save and leave."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STOPPED = 75
"""Exit status of a run that saved and left when it was asked to: run the command again to go on
(sysexits.h: a temporary failure, try again)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""A scheduler's, Slurm's before preemption, Ctrl-C."""


class StopRequest:
    """Whether one of `SIGNALS` has come to this process."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within the block a signal is noted instead of ending the process; it may come twice, as from
    Ctrl-C and from the launcher that passes it on."""
    request, process = StopRequest(), os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if os.getpid() == process:
            request.received = signal.Signals(number)
        elif number == signal.SIGTERM:  # a forked data worker inherits this, and its end is asked
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():
        yield request  # Python takes signals in the main thread only
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
