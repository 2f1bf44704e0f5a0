"""Being asked to stop: SIGTERM and Ctrl-C end a run after the update at hand, with a checkpoint."""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass, field
from types import FrameType

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@dataclass
class StopSignal:
    """Notes the first signal; a second Ctrl-C ends the program at once."""

    number: int | None = None
    _before: dict[int, object] = field(default_factory=dict[int, object])

    def listen(self) -> None:
        """Begin to note signals, also the death of a launcher that forwards none."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
            # `accelerate launch` of one process passes no signal on; when it dies of one, its worker is told here
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def forget(self) -> None:
        """Handle signals as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._before.clear()

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """143 for SIGTERM, 130 for Ctrl-C, 0 if none has come."""
        return 0 if self.number is None else 128 + self.number

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
        print("\nstopping after this update; a checkpoint follows", file=sys.stderr, flush=True)
