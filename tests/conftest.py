"""What the tests of methods, ladder, evals and command line share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Files and trained stages (tests/toy.py); read-only."""
    from toy import make_toy

    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real files: tinyshakespeare.txt, alpaca-en-1000.json, hh-harmless-base-test.jsonl.gz."""
    folder = os.environ.get("TEMPER_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TEMPER_TEST_DATA does not name the folder of real files")
    return Path(folder)
