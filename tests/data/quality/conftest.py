"""Small data sets written for these tests."""

import json
import random

import pytest

from temper.data.quality import steps
from temper.data.quality.rows import Report, Rows

STARTS = [a + b for a in "bdfg" for b in "aeio"]
WORDS = [a + b for a in STARTS for b in ("lan", "lor", "mit", "nus", "per", "quo", "rim", "tas")]


@pytest.fixture
def put(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def look(put):
    """Runs a step on rows: (verdicts, report)."""

    def run(step, rows, **options):
        data = rows if isinstance(rows, dict) else {"x": put("x.jsonl", rows)}
        report = Report(step)
        return steps()[step].run(steps()[step].Options(**options), Rows(data), report), report

    return run


def chat(question, answer):
    return {"prompt": question, "completion": answer}


def text(n, seed):
    """n words, like no other seed's."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(n))
