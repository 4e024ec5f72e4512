"""Rows that hold something of an evaluation set."""

import pytest
from data.quality.conftest import chat, text

from temper.config import UserError

QUESTION = text(30, 7)
LONG, SHORT, TINY = QUESTION, "How do I kill a Python process safely now", "What is money laundering?"


@pytest.fixture
def against(put):
    return [put("bench.jsonl", [{"turns": [LONG, "And why?"], "id": 1}, {"turns": [SHORT], "id": 2}, {"turns": [TINY], "id": 3}])]


def kinds(found):
    return {i: (v.reason, int(v.of.rpartition(":")[2])) for i, v in found.items()}


def test_a_run_of_words_in_common_is_found_wherever_it_stands(look, against):
    run = LONG.split()
    rows = [
        chat("Q", f"Well: {' '.join(run[5:18]).upper()}!"),  # 13 words in an answer, dressed differently
        chat(" ".join(run[5:17]), "12 words only"),
        chat(f"Please. {SHORT}?", "A short question stands whole in a prompt"),
        chat("what is MONEY laundering", "a turn that says just that"),
        chat("Tell me: what is money laundering?", "A"),
        chat(text(40, 8), text(40, 9)),
    ]
    found, report = look("decontaminate", rows, against=against)
    assert kinds(found) == {0: ("copy", 1), 2: ("copy", 2), 3: ("copy", 3)}
    assert " ".join(run[5:18]) in found[0].detail
    assert found[0].like == LONG
    assert report.sources["bench"] == {"texts": 4 - 1, "rows that hold them": 3}  # "And why?" is too short to be told
    assert kinds(look("decontaminate", rows, against=against, ngram=12)[0])[1] == ("copy", 1)


def test_a_text_said_a_little_otherwise_is_found(look, against):
    run = LONG.split()
    changed = [w if k % 10 else "other" for k, w in enumerate(run)]  # no 13 words in a row; 28 3-grams, of which 7 are changed
    rows = [chat(" ".join(changed), "A"), chat(" ".join(reversed(run)), "A")]
    found, _ = look("decontaminate", rows, against=against, near=0.75)
    assert kinds(found) == {0: ("near copy", 1)}
    assert found[0].score == pytest.approx(21 / 28)
    assert not look("decontaminate", rows, against=against)[0]
    assert not look("decontaminate", rows, against=against, near=None)[0]


def test_system_turns_and_meta_of_an_evaluation_set_are_no_texts(look, put):
    system = {"role": "system", "content": "You answer every question in a single short sentence, please"}
    bench = put("e.jsonl", [{"messages": [system, {"role": "user", "content": LONG}], "meta": {"note": SHORT}}])
    found, report = look("decontaminate", [chat(system["content"], SHORT)], against=[f"mine={bench}"])
    assert not found
    assert report.sources == {"mine": {"texts": 1, "rows that hold them": 0}}


@pytest.mark.slow
def test_the_worlds_own_evaluation_is_found_and_its_training_prompts_mostly_are_not(look):
    found, _ = look("decontaminate", {"e": "world:evaluation?n=30"}, against=["world:evaluation?n=30"])
    assert len(found) > 25
    found, _ = look("decontaminate", {"p": "world:prompts?n=200"}, against=["world:evaluation?n=200"], near=None)
    assert len(found) < 10


@pytest.mark.parametrize(
    ("rows", "match"),
    [([{"id": 3}], "holds no text of 3 words or more"), (None, "no such file")],
)
def test_an_evaluation_set_that_says_nothing_is_refused(look, put, tmp_path, rows, match):
    path = put("e.jsonl", rows) if rows else str(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match=match):
        look("decontaminate", [chat("Q", "A")], against=[path])


def test_two_sets_of_one_name_are_refused(look, against):
    with pytest.raises(UserError, match="a second data set of the name 'bench'"):
        look("decontaminate", [chat("Q", "A")], against=[*against, *against])


@pytest.mark.slow
def test_real_sets(look, real):
    """XSTest questions that stand in HH; GSM8K's test set in itself; nothing of MT-Bench in Alpaca."""
    sets = [str(real / name) for name in ("mt-bench-questions.jsonl", "xstest-prompts.csv", "gsm8k-test.jsonl")]
    found, _ = look("decontaminate", {"alpaca": str(real / "alpaca-en-1000.json")}, against=sets)
    assert not found
    found, _ = look("decontaminate", {"self": str(real / "gsm8k-test.jsonl")}, against=sets[2:])
    assert len(found) == 1319
