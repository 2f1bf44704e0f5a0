"""What all tests share."""

import signal
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings

# Machines that test are busy; how long an example takes says nothing. The same examples each time, so that what fails
# is what was changed; --hypothesis-profile=searching looks for others.
settings.register_profile("searching", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("patient", settings.get_profile("searching"), derandomize=True)
settings.load_profile("patient")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background jobs begin so, and what they start, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny Stable Diffusion 1; not to be written into."""
    from tests import tiny

    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny.sd1().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{uuid4().hex}"))
