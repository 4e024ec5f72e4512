"""What the tests of methods, ladder, evals and command line share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Files and trained stages (tests/toy.py); read-only. The processes of a run of the tests share them: the first makes them."""
    import torch
    from filelock import FileLock
    from toy import Toy, make_toy

    torch.set_num_threads(1)
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "toy"
    with FileLock(f"{folder}.lock"):
        if not folder.with_suffix(".made").exists():
            folder.mkdir()
            make_toy(folder)
            folder.with_suffix(".made").touch()
    return Toy(folder)


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real files: tinyshakespeare.txt, alpaca-en-1000.json, hh-harmless-base-test.jsonl.gz."""
    folder = os.environ.get("TEMPER_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TEMPER_TEST_DATA does not name the folder of real files")
    return Path(folder)
