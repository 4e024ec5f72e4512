"""A million generated rows of about 200 tokens: deduplicated, tokenised and packed within 20 minutes and 6 GB on two cores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(rows: int, folder: Path) -> dict:
    done = subprocess.run([sys.executable, "-m", "load.million_rows", str(rows), str(folder)], cwd=Path(__file__).parents[1],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)  # shown where the test fails
    return json.loads(done.stdout)


def check(found: dict) -> None:
    assert found["found"]["exact duplicate"] == found["planted"]["exact duplicate"]
    assert 0.97 * found["planted"]["near duplicate"] <= found["found"]["near duplicate"] <= found["planted"]["near duplicate"]
    assert found["kept"] == found["rows"] - sum(found["found"].values())
    assert 150 < found["tokens_per_row"] < 300
    assert found["packed_share"] > 0.9


@pytest.mark.slow
def test_two_thousand_rows(tmp_path):
    check(run(2000, tmp_path))


@pytest.mark.load
def test_a_million_rows(tmp_path):
    found = run(1_000_000, tmp_path)
    check(found)
    assert found["peak_mb"] < 6000
    assert found["wall_s"] < 20 * 60
