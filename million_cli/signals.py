"""Ctrl-C, TERM and HUP become one exception, so that a job that is stopped leaves its record."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports it: 130, 143, 129."""
        return 128 + self.number


@contextmanager
def stopping() -> Iterator[None]:
    """Raise `Stopped` in the body at the first of the signals, and ignore those that follow.

    A terminal that closes sends HUP twice; the second one must not interrupt the saving of the record.
    Signals that were ignored on entry (`nohup`) stay ignored.  Does nothing outside the main thread.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for each in STOPPING:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
