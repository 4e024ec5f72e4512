import pytest

from tests.report.synthetic import make


@pytest.fixture
def run(tmp_path):
    """A whole run."""
    return make(tmp_path / "harbour")
