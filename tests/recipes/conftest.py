import pytest

from tests import runs


@pytest.fixture(scope="session")
def ground(tmp_path_factory) -> runs.Ground:
    return runs.make(tmp_path_factory.mktemp("ground"))
