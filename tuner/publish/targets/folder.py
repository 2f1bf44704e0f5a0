"""A folder on this machine or a mounted disk."""

from dataclasses import dataclass
from pathlib import Path

from tuner.publish.release import release_files
from tuner.publish.targets.base import Target
from tuner.weights.writer import resource_error, whole_file


@dataclass(frozen=True, kw_only=True)
class LocalFolder:
    """Copy the files into a folder. Others that lie there stay."""

    path: Path
    """Made if it is not there."""

    def publish(self, release: Path) -> str:
        for name in release_files(release):
            place = self.path / name
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise resource_error(place.parent, error) from error
            with (release / name).open("rb") as source, whole_file(place, (release / name).stat().st_size) as file:
                while block := source.read(1 << 20):
                    file.write(block)
        return str(self.path)


SPEC: type[Target] = LocalFolder
