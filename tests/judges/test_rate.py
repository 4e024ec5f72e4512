"""`temper rate`: its figures are those of the rater; what cannot be rated is said."""

import json

import pytest
from toy import says, user, write

from temper.cli import main
from temper.config import UserError
from temper.judges import rate


def told(capsys, *argv):
    code = rate.main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": user(f"q{i}"), "chosen": "yes " * (i + 1), "rejected": "no", "answer": str(i)} for i in range(6)]
    return str(write(tmp_path / "pairs.jsonl", rows))


def test_pairs(capsys, pairs):
    code, found = told(capsys, "--reward", "format:words=2.. + 0.5*format:characters=..3", "--data", pairs, "--show", "2")
    assert code == 0
    assert found["answers"] == 12
    assert found["parts"]["format:words=2.."] == {
        "n": 12,
        "mean": 5 / 12,
        "std": pytest.approx((5 / 12 * 7 / 12) ** 0.5),
        "agrees": 5.5 / 6,
    }
    assert found["parts"]["format:characters=..3"]["mean"] == 7 / 12
    assert found["total"]["mean"] == pytest.approx(5 / 12 + 3.5 / 12)
    assert [row["reward"] for row in found["most"]] == [1, 1]
    assert [row["reward"] for row in found["least"]] == [0.5, 0.5]
    assert found["most"][0]["label"] == "chosen"
    assert found["most"][0]["parts"] == {"format:words=2..": 1, "format:characters=..3": 0}
    _, half = told(capsys, "--reward", "format:words=2..", "--data", pairs, "--rows", "3")
    assert half["answers"] == 6
    assert {row["at"].rpartition(":")[2] for row in half["most"] + half["least"]} <= {"1", "3", "5"}


def test_what_a_row_may_be(capsys, tmp_path):
    rows = [
        {"messages": [*user("1+1?"), says("2")], "meta": {"answer": "2"}},
        {"prompt": user("1+1?"), "answers": ["2", "two", "3"], "scores": [1.0, 0.0, 0.0], "meta": {"answer": "2"}},
        {"prompt": user("1+1?"), "answer": "3", "rating": 0.0, "meta": {"answer": "2"}},
        {"prompt": user("1+1?"), "steps": ["1+1", "= 2"], "labels": [1.0, 1.0], "meta": {"answer": "2"}},
    ]
    _, found = told(capsys, "--reward", "maths", "--data", str(write(tmp_path / "rows.jsonl", rows)))
    assert found["total"] == {"n": 6, "mean": 0.5, "std": 0.5, "agrees": 1.0}  # the two that tie in the row are not compared
    only = write(tmp_path / "prompts.jsonl", [{"messages": user("1+1?")}])
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: holds no answer to rate"):
        rate.main(["--reward", "maths", "--data", str(only)])


def test_in_the_terminal(capsys, pairs):
    assert rate.main(["--reward", "maths + format:^yes", "--data", pairs, "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert "maths" in out
    assert "agrees with the rows" in out
    assert "most 1.000" in out
    assert "least 0.000" in out


def test_nothing_to_rate(capsys, pairs):
    assert main(["rate", "--reward", "gold", "--data", pairs]) == 1
    assert "12: not a question of the embedded world" in " ".join(capsys.readouterr().out.split())


def test_a_mistake_is_one_line(capsys, pairs):
    assert main(["rate", "--reward", "mahts", "--data", pairs]) == 2
    assert capsys.readouterr().err == "temper: --reward 'mahts': no rater 'mahts' and no such folder; did you mean 'maths'?\n"
    assert main(["rate", "--reward", "maths", "--data", "none.jsonl"]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_gsm8k(capsys, real):
    """Its solutions are right; a reward by length alone says nothing of that."""
    code, found = told(capsys, "--reward", "maths + 0*format:words=..40", "--data", str(real / "gsm8k-test.jsonl"), "--rows", "200")
    assert (code, found["answers"]) == (0, 200)
    assert found["parts"]["maths"] == {"n": 200, "mean": 1.0, "std": 0.0}
    assert 0 < found["parts"]["format:words=..40"]["mean"] < 1
