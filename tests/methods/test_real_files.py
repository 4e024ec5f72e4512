"""The single stages on real files, each from the one before: a few steps of a tiny model, what is dropped and refused, what is held out."""

import math

import pytest
from toy import train

from temper.config import UserError
from temper.runs import Run

pytestmark = pytest.mark.slow
FEW = {"batch": 4, "lr": 1e-3}


@pytest.fixture(scope="module")
def base(real, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "base"
    size = {"width": 16, "layers": 1, "heads": 2, "context": 256, "vocab": 600}
    train("pretrain", out, data=str(real / "tinyshakespeare.txt"), epochs=0.01, **size, **FEW)
    return out


@pytest.fixture(scope="module")
def sft(real, base):
    out = base.with_name("sft")
    train("sft", out, model=str(base), data=str(real / "alpaca-en-1000.json"), too_long="drop", epochs=0.1, **FEW)
    return out


def evaluations(out):
    return [row["eval"] for row in Run(out).rows("metrics") if "eval" in row]


def test_pretraining(base):
    card = Run(base).stage["card"]
    assert card["source"].endswith("rows")
    assert card["documents"] + card["held_out"] > 100
    assert card["tokens"] > 300_000
    losses = [row["loss"] for row in Run(base).rows("metrics") if "loss" in row]
    assert losses[-1] < losses[0] < math.log(600) + 1
    assert evaluations(base)[-1]["held_out_loss"] < math.log(600)


def test_fine_tuning_counts_what_it_drops(sft):
    card = Run(sft).stage["card"]
    assert "999 of 999 rows" in card["source"]
    dropped = sum(int(card[kept].split(" dropped")[0].rpartition(" ")[2]) for kept in ("kept", "kept_held_out") if "dropped" in card[kept])
    assert dropped > 100
    assert card["records"] + card["held_out"] + dropped == 999
    assert "limit 256 tokens (the model's window)" in card["kept"]
    assert evaluations(sft)[-1]["held_out_loss"] > 0


@pytest.mark.parametrize("method", ["reward", "dpo"])
def test_comparisons(real, sft, tmp_path, method):
    """Four answers are empty, five prompts differ and four dialogues have two answers in a row: refused by their lines, or counted."""
    values = {"model": str(sft), "data": str(real / "hh-harmless-base-test.jsonl.gz"), "max_length": 128, "too_long": "drop"}
    with pytest.raises(UserError, match=r"gz:87: the chosen answer is empty \(and 12 more bad rows, lines 517, 668, 764, 926, 1104"):
        train(method, tmp_path / "out", epochs=0.1, **values, **FEW)
    assert not (tmp_path / "out").exists()
    train(method, tmp_path / "out", skip_bad=True, epochs=0.1, **values, **FEW)
    card = Run(tmp_path / "out").stage["card"]
    assert "2299 of 2312 rows; 13 skipped (line: why): 87: the chosen answer is empty" in card["source"]
    found = evaluations(tmp_path / "out")[-1]
    assert found["held_out_pairs"] == card["held_out"] > 10
    assert 0 <= found["held_out_accuracy"] <= 1
