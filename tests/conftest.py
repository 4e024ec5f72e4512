"""What the tests of methods, ladder, evals and command line share."""

import pytest


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Files and trained stages (tests/toy.py); read-only."""
    from toy import make_toy

    return make_toy(tmp_path_factory.mktemp("toy"))
