"""What a target is: a place that a release goes to."""

from pathlib import Path
from typing import Annotated, Protocol

from tuner.plugins import Folder


class Target(Protocol):
    """Where a release goes."""

    def publish(self, release: Path) -> str:
        """Put the files of the folder `release` there that are meant for everybody; the answer is where they are.

        Raises:
            UnsafeError: something in the folder is a symbolic link.
            ConfigError: the place cannot be used as it is configured.
            ResourceError: the place cannot be reached or written.
        """
        ...


AnyTarget = Annotated[Target, Folder("tuner.publish.targets")]
