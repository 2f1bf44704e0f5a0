"""The Hugging Face Hub."""

import re
import socket
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tuner.errors import ConfigError, ResourceError, UserError
from tuner.publish.release import release_files
from tuner.publish.targets.base import Target

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SECONDS_TO_ANSWER = 5
"""How long the Hub may take to accept a connection."""


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Upload the files to a repository on the Hub, in one commit; it is made if it is not there.

    The access token is the one that `hf auth login` stored, or the variable HF_TOKEN; no config holds it.
    """

    repo: str
    """`owner/name`."""
    private: bool = True
    """Only its owner sees the repository. A public one that exists already is then refused."""
    message: str = "Upload with tuner publish"
    """What the commit says."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", self.repo, re.ASCII):
            raise ValueError(f"repo is 'owner/name', got {self.repo!r}")

    def publish(self, release: Path) -> str:
        from huggingface_hub import HfApi, constants, get_token  # here, as nobody else needs it

        files = release_files(release)
        if constants.HF_HUB_OFFLINE:
            raise ResourceError(
                "target: the Hub is switched off by HF_HUB_OFFLINE; unset it, or use a folder as target"
            )
        token = get_token()
        if not token:
            raise ConfigError("target: no access to the Hub; run 'hf auth login', or set the variable HF_TOKEN")
        api = HfApi()
        _reach(api.endpoint)
        try:
            return self._upload(api, release, files)
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).replace(token, "…").split())[:300]
            raise ResourceError(
                f"target: {self.repo}: the Hub refused: {reason}; see whether the token may write"
            ) from None

    def _upload(self, api: "HfApi", release: Path, files: list[Path]) -> str:
        from huggingface_hub import CommitOperationAdd

        api.create_repo(self.repo, private=self.private, exist_ok=True)
        if self.private and not api.model_info(self.repo).private:
            raise ConfigError(f"target.private: {self.repo} is public; set it to false to publish there")
        api.create_commit(
            self.repo,
            [CommitOperationAdd(path_in_repo=name.as_posix(), path_or_fileobj=release / name) for name in files],
            commit_message=self.message,
        )
        return f"{api.endpoint}/{self.repo}"


def _reach(endpoint: str) -> None:
    """Fail at once where there is no network, rather than after the library's retries.

    Raises:
        ResourceError: nothing answers.
    """
    address = urlsplit(endpoint)
    if urllib.request.getproxies() or address.hostname is None:
        return  # a proxy may see more than this machine
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=SECONDS_TO_ANSWER).close()
    except OSError as error:
        reason = error.strerror or "no answer"
        raise ResourceError(
            f"target: {address.hostname} cannot be reached ({reason}); check the network, or use a folder as target"
        ) from error


SPEC: type[Target] = Hub
