"""The recipe as its users start it, in a process of its own, against a Hub of ours."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes import lora
from recipes import publish as recipe
from tests.fake_hub import TOKEN, FakeHub, Repository
from tests.tuner.publish.test_release import RELEASED, make_run
from tuner import cli
from tuner.config.loader import load

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def publish(run: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    clean["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "publish.py"), f"release={run}", *arguments],
        capture_output=True, text=True, timeout=120, cwd=run.parent, env=clean | environment,
    )  # fmt: skip
    assert TOKEN not in done.stdout + done.stderr
    return done


HUB = ('target.type="hub"', 'target.repo="me/robot"')


def test_a_release_goes_to_the_hub_private_and_nothing_else_does(run: Path, tmp_path: Path) -> None:
    with FakeHub() as hub:
        done = publish(run, *HUB, "license=cc-by-4.0", "trigger=sks robot", **hub.environment(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        assert f"published: {hub.url}/me/robot" in done.stdout
        repository = hub.repositories["me/robot"]
        assert repository.private and len(repository.commits) == 1 and not hub.unknown
        assert sorted(repository.files) == RELEASED
        for name, content in repository.files.items():
            assert content == (run / "release" / name).read_bytes()
        assert "license: cc-by-4.0" in repository.files["README.md"].decode()

        code = (
            "from huggingface_hub import ModelCard, snapshot_download; import pathlib\n"
            "folder = pathlib.Path(snapshot_download('me/robot'))\n"
            "print(sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()))\n"
            "print(ModelCard.load('me/robot').data.instance_prompt)"
        )
        environment = os.environ | hub.environment(tmp_path / "home2")
        got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
        assert got.stdout.splitlines() == [str(RELEASED), "sks robot"], got.stderr

        again = publish(run, *HUB, **hub.environment(tmp_path / "home"))
        assert again.returncode == 0, again.stderr
        assert len(repository.commits) == 2
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_check_lists_the_files_and_sends_none(run: Path, tmp_path: Path) -> None:
    with FakeHub() as hub:
        done = publish(run, *HUB, "--check", **hub.environment(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        assert [line.split()[-1] for line in done.stdout.splitlines()[:-1]] == RELEASED
        assert "me/robot" in done.stdout and "private=True" in done.stdout
        assert not hub.requests
    assert not (run / "release").exists()


def test_a_public_repository_is_not_used_for_a_private_release(run: Path, tmp_path: Path) -> None:
    with FakeHub(repositories={"me/robot": Repository(private=False)}) as hub:
        done = publish(run, *HUB, **hub.environment(tmp_path / "home"))
        assert done.returncode == 2 and "target.private: me/robot is public" in done.stderr
        assert not hub.repositories["me/robot"].files
        done = publish(run, *HUB, "target.private=false", **hub.environment(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        assert sorted(hub.repositories["me/robot"].files) == RELEASED


def test_what_the_hub_refuses_is_said_in_one_line(run: Path, tmp_path: Path) -> None:
    with FakeHub(refuse=True) as hub:
        done = publish(run, *HUB, **hub.environment(tmp_path / "home"))
    assert done.returncode == 5 and "me/robot: the Hub refused" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def test_without_network_or_token_it_fails_at_once(run: Path, tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    cases = {
        (5, "cannot be reached"): nowhere,
        (5, "HF_HUB_OFFLINE"): nowhere | {"HF_HUB_OFFLINE": "1"},
        (2, "hf auth login"): {name: value for name, value in nowhere.items() if name != "HF_TOKEN"},
    }
    for (code, message), environment in cases.items():
        start = time.perf_counter()
        done = publish(run, *HUB, **environment)
        assert done.returncode == code and message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert time.perf_counter() - start < 30  # the retries of the library take longer


def test_bad_values_are_named(run: Path, tmp_path: Path) -> None:
    for arguments, message in {
        ('target.type="hub"', "target.repo=robot"): "owner/name",
        (*HUB, "license=free"): "license: no 'free'",
        ('target.type="nowhere"',): "nowhere",
        (f"release={tmp_path / 'none'}", *HUB): "release.json",
    }.items():
        done = publish(run, *arguments)
        assert done.returncode in (2, 3) and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


SAID = {
    "title": "A tin robot",
    "description": "Robots made of tin.",
    "author": "Ada",
    "usage_hint": "best at 0.8",
    "trigger": "sks robot",
    "license": "cc-by-4.0",
}


def test_what_is_said_of_a_release_is_in_headers_on_the_card_and_what_inspect_shows(run: Path, capsys) -> None:
    arguments = [f"{key}={text}" for key, text in SAID.items()]
    target = ('target.type="folder"', f"target.path='{run / 'out'}'", "tags=['tin toy','robot']")
    assert cli.main(["publish", f"release={run}", *target, *arguments]) == 0
    card = (run / "out" / "README.md").read_text()
    capsys.readouterr()
    for name in ("robot", "robot-diffusers"):
        assert cli.main(["inspect", str(run / "out" / f"{name}.safetensors")]) == 0
        shown = capsys.readouterr().out
        keys = {"trigger": "trigger_phrase"}
        for key, text in SAID.items():
            assert re.search(rf"modelspec\.{keys.get(key, key)} +{re.escape(text)}\n", shown), key
        assert re.search(r"modelspec\.tags +tin toy, robot\n", shown)
        assert re.search(r"modelspec\.thumbnail +image/jpeg, \d+ bytes\n", shown)
    assert "- tin toy\n- robot\n" in card and "best at 0&#46;8" in card
    assert "Robots made of tin" in card and "By Ada" in card


@pytest.mark.parametrize(
    ("argument", "said"), [("tags=['a,b']", "a tag is a word"), ("negative=true", "only new words")]
)
def test_what_cannot_be_said_is_refused(argument: str, said: str, run: Path, capsys) -> None:
    target = ('target.type="folder"', f"target.path='{run / 'out'}'")
    assert cli.main(["publish", f"release={run}", *target, argument]) == 2
    assert said in capsys.readouterr().err and not (run / "out").exists()


def test_init_writes_a_config_for_what_init_lora_trains(tmp_path):
    file = tmp_path / "release.toml"
    assert cli.main(["init", "publish", "--out", str(file)]) == 0
    trained = lora.starter("pocket", "pictures")["run"]
    assert isinstance(trained, dict) and load(recipe.Config, file).release == Path(trained["output"])
