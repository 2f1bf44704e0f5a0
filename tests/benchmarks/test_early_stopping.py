"""The trial trains, measures what was published anew, and does not call shown what is not."""

from dataclasses import replace

import pytest

from benchmarks import early_stopping
from benchmarks.early_stopping import Trial, table, trial
from tests import tiny

SHOWN = Trial(pictures=2, long={0: 0.9, 100: 0.5, 200: 0.4, 300: 0.6}, stopped=250, chosen=200, published=0.404)


def test_what_is_published_is_measured_from_its_file(tmp_path, monkeypatch):
    tiny.sd1().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(early_stopping, "BASE", str(tmp_path / "base"))
    monkeypatch.setattr(early_stopping, "EVERY", 8)
    found = trial(2, 24, 0, tmp_path / "trial")
    assert list(found.long) == [0, 8, 16, 24]
    assert found.best_at > 0  # it learns, so that the base itself is not what is published
    assert found.published == pytest.approx(found.long[found.chosen], rel=1e-4) != found.long[0]


def test_a_trial_that_shows_it_has_no_fault():
    assert SHOWN.fault() is None
    assert "| 2 | 0.9000 | 0.4000, 200 | 0.6000, 300 | 250 | 0.4040, 200 | 1.010 |" in table([SHOWN])


@pytest.mark.parametrize(
    ("otherwise", "said"),
    [
        ({"published": 0.42}, "published 1.050 times the best"),
        ({"long": {0: 0.9, 100: 0.5, 200: 0.4, 300: 0.42}}, "not over-long"),
        ({"stopped": 300}, "patience did not end the run"),
    ],
)
def test_a_trial_that_shows_nothing_or_the_contrary_has_one(otherwise, said):
    assert said in (replace(SHOWN, **otherwise).fault() or "")
