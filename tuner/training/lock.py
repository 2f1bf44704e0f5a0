"""One run to an output folder: a lock that the system releases when its holder dies, however it dies."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from tuner.errors import LockedError, ResourceError

NAME = ".lock"


def lock(folder: Path) -> IO[str]:
    """Take `folder` for this process, for as long as the answer stays open.

    Raises:
        LockedError: another process has it; the message names that process and its machine.
        ResourceError: the folder cannot be made, written or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / NAME).open("a+", encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"run.output: {folder} cannot be written ({error.strerror}); choose another") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise LockedError(f"run.output: {folder} is in use by {holder}; wait for it or choose another") from error
    except OSError as error:
        file.close()
        raise ResourceError(f"run.output: {folder} cannot be locked ({error.strerror}); choose another") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
