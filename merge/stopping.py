"""Being asked to stop, by SIGTERM or Ctrl-C: what is done is kept, and the exit code says which of them it was."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """Ends the program as a shell knows it of the signal: with 143 after SIGTERM, with 130 after Ctrl-C."""

    def __init__(self, number: int, message: str = "interrupted") -> None:
        super().__init__(128 + number)
        self.message = message


@dataclass
class Wish:
    """What has been asked for so far."""

    number: int | None = None
    """The signal that came first; None: go on."""


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """While this lasts, a signal ends the work where it is.

    Raises:
        Stopped: a signal came.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handled(handle):
        yield


@contextlib.contextmanager
def noted() -> Iterator[Wish]:
    """While this lasts, a signal is only noted, as the work has to be brought into order first.

    A second Ctrl-C ends the process on the spot: like a kill, it loses what was done since the journal was last saved.

    Raises:
        Stopped: at the end, when a signal was noted and the work did not end for it.
    """
    wish = Wish()

    def handle(number: int, frame: FrameType | None) -> None:
        wish.number = wish.number or number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with _handled(handle):
        yield wish
    if wish.number is not None:
        raise Stopped(wish.number)


@contextlib.contextmanager
def _handled(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals go to `handle`, but for those that the process was started to ignore."""
    if threading.current_thread() is not threading.main_thread():  # no other may, and no signal comes there
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
