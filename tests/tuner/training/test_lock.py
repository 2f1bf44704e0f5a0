import os
import subprocess
import sys
import time

import pytest

from tuner.errors import LockedError, ResourceError
from tuner.training.lock import lock

HOLDER = """
import sys, time
from pathlib import Path
from tuner.training.lock import lock
held = lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_in_use_is_refused_at_once_naming_its_holder(holder, tmp_path):
    begun = time.monotonic()
    with pytest.raises(LockedError, match=f"is in use by process {holder.pid} on .*; wait for it or choose another"):
        lock(tmp_path)
    assert time.monotonic() - begun < 2


def test_a_lock_that_a_kill_left_does_not_block(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").read_text().startswith(f"process {holder.pid} ")
    with lock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")
    lock(tmp_path).close()  # and one that was let go does not either


def test_a_folder_that_cannot_be_made_is_the_users_to_change(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"run\.output: .*file cannot be written .*; choose another"):
        lock(tmp_path / "file")
