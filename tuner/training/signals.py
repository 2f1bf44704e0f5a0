"""Being asked to stop: SIGTERM and Ctrl-C end a run after the update at hand, with a checkpoint."""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass, field
from types import FrameType

import tuner
from tuner.errors import PeerError

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@dataclass
class StopSignal:
    """Ends the program at once while nothing would be lost; while it is `patient`, notes the first signal instead.

    Also a patient one ends the program at once on another Ctrl-C.
    """

    patient: bool = False
    """Whether updates are being made, of which the last is to be finished and saved."""
    number: int | None = None
    _before: dict[int, object] = field(default_factory=dict[int, object])

    def listen(self) -> None:
        """Begin to note signals, also the death of a launcher that forwards none.

        Raises:
            PeerError: the launcher is dead already.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
            # `accelerate launch` of one process passes no signal on; when it dies of one, its worker is told here
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            process, parent = tuner.STARTED
            if os.getpid() == process and os.getppid() != parent:  # it died while the libraries were loaded
                raise PeerError("the launcher of this process has died; start it again")

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
        if not self.patient or (self.asked and number == signal.SIGINT):
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.number = self.number or number
        os.write(2, b"\nstopping after this update; a checkpoint follows\n")  # `print` may be in the middle of its own
