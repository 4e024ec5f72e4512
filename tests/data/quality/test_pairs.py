"""What labels follow besides quality."""

import pytest
from data.quality.conftest import chat, text

from temper.config import UserError
from temper.stats.intervals import win_rate


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_chosen_longer_is_the_win_rate_of_lengths_by_question(look):
    rows = [pair(f"Q{k // 2}", "a" * (3 + k % 3), "b" * 4) for k in range(30)]
    _, report = look("pairs", rows)
    expected = win_rate([3 + k % 3 for k in range(30)], [4] * 30, [k // 2 for k in range(30)])
    assert report.numbers["chosen_longer"] == pytest.approx(expected.to_dict())
    assert "10 of equal length count half" in report.notes[0]


def test_openings_that_labels_follow_are_named(look):
    rows = [pair(f"Q{k}", f"Sure, {text(4, k)}", f"No, {text(4, 100 + k)}") for k in range(30)]
    rows += [pair(f"R{k}", *(f"{w} {text(3, k)}" for w in (("Well", "Hm") if k % 2 else ("Hm", "Well")))) for k in range(40)]
    _, report = look("pairs", rows)
    assert set(report.numbers["openings"]) == {"sure", "no"}
    assert report.numbers["openings"]["sure"]["mean"] == 1.0
    assert report.numbers["openings"]["no"]["high"] < 0.2
    assert "2 of 4 openings are off half" in report.notes[-1]


def test_equal_answers_and_contradictory_labels_go(look):
    rows = [
        pair("Q", "a b", "c"),
        pair("Q", "x", "y"),
        pair("Q", "c", "a  b"),
        pair("Q", "z", " z"),
        pair("P", "c", "a b"),
        pair("Q", "a b", "c"),
    ]
    found, _ = look("pairs", rows)
    assert {i: v.reason for i, v in found.items()} == {
        0: "contradictory label",
        2: "contradictory label",
        3: "equal answers",
        5: "contradictory label",
    }
    assert found[0].of.endswith(":3")
    assert found[2].of.endswith(":1")


def test_other_records_are_refused(look):
    with pytest.raises(UserError, match=r"x\.jsonl:1: holds no pair"):
        look("pairs", [chat("Q", "A")])


def test_real_pairs(look, real):
    """In HH's harmless test set the chosen answer is the shorter one."""
    _, report = look("pairs", {"dpo": str(real / "dpo-sharegpt-299.json")})
    longer = report.numbers["chosen_longer"]
    assert longer["n"] == 299
    assert longer["low"] < longer["mean"] < longer["high"] < 0.5
