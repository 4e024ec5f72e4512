"""Exact and near duplicates: a row goes exactly where one that stays is alike."""

import numpy as np
import pytest
from data.quality.conftest import chat, text
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.config import UserError
from temper.data.quality.words import band_keys, banding, jaccard, ngrams, words


def said(rows):
    return [set(map(tuple, np.lib.stride_tricks.sliding_window_view(words(f"{r['prompt']} {r['completion']}"), 5))) for r in rows]


def test_exact_duplicates_go_whatever_their_white_space(look):
    rows = [chat("Q one", "A"), chat("Q two", "A"), chat("Q  one\n", "A "), chat("Q one", "a"), chat("Q one", "A")]
    found, _ = look("dedup", rows, near=None)
    assert {i: (v.reason, v.of.rpartition(":")[2]) for i, v in found.items()} == {2: ("exact duplicate", "1"), 4: ("exact duplicate", "1")}


def test_near_duplicates_go_and_say_of_what_and_how_near(look):
    base = text(100, 0).split()
    near, far = base.copy(), base.copy()
    near[50] = "other"
    for k in range(0, 100, 10):
        far[k] = "other"
    rows = [chat("Q", " ".join(w)) for w in (base, near, far)] + [chat("Q", text(100, 1))]
    found, report = look("dedup", rows)
    assert list(found) == [1]
    verdict = found[1]
    assert verdict.of.endswith(":1")
    assert " ".join(base) in verdict.like
    # 96 grams of the answer, of which 5 hold the word; the prompt is one gram of its own
    assert verdict.score == pytest.approx((96 - 5 + 1) / (96 + 5 + 1))
    assert report.numbers["recall"] >= 0.98
    assert list(look("dedup", rows, near=0.3)[0]) == [1, 2]


def test_every_row_that_goes_is_like_one_that_stays_and_those_that_stay_are_unlike(look):
    """A chain of small changes: like is like one that stays, not one that is like one that stays."""
    chain = [text(60, 3).split()]
    for k in range(40):
        chain.append([*chain[-1][: k % 60], f"w{k}", *chain[-1][k % 60 + 1 :]])
    rows = [chat(" ".join(w), "yes") for w in chain] + [chat(" ".join(chain[0]), "yes")]
    found, _ = look("dedup", rows, near=0.7)
    grams = [{("p", *g) for g in zip(*(words(r["prompt"])[k:] for k in range(5)), strict=False)} | {("yes",)} for r in rows]
    stay = [i for i in range(len(rows)) if i not in found]
    assert 3 < len(stay) < len(rows) - 3
    for i, verdict in found.items():
        other = int(verdict.of.rpartition(":")[2]) - 1
        assert other in stay
        assert len(grams[i] & grams[other]) / len(grams[i] | grams[other]) == pytest.approx(verdict.score)
        assert verdict.score >= 0.7
    for a in stay:
        for b in stay:
            assert a == b or len(grams[a] & grams[b]) / len(grams[a] | grams[b]) < 0.7


def test_a_pair_with_its_answers_exchanged_is_no_duplicate(look):
    a, b = text(50, 1), text(50, 2)
    rows = [{"prompt": "Q", "chosen": x, "rejected": y} for x, y in ((a, b), (b, a), (a, b))]
    assert list(look("dedup", rows)[0]) == [2]


def test_a_part_alone_can_be_compared(look):
    rows = [chat("Which is it?", "A"), chat("Which is it?", "B"), chat("Who?", "A")]
    assert list(look("dedup", rows)[0]) == []
    assert list(look("dedup", rows, part="prompt")[0]) == [1]
    assert list(look("dedup", rows, part="answer")[0]) == [2]


def test_signs_of_arithmetic_and_scripts_without_blanks_are_words():
    assert words("What is 3 + 4?", signs=True) == ["what", "is", "3", "+", "4"]
    assert words("What is 3 + 4?") == words("what IS 3 - 4") == ["what", "is", "3", "4"]
    assert words("Grüße, 世界! ﬁn") == ["grüße", "世", "界", "fin"]


def test_hashes_are_the_same_in_every_process():
    """Values of a first run: Python's own hash differs between processes."""
    assert ngrams(["the", "harbour"], 2).tolist() == [852939869074451662]
    assert ngrams(["the"], 5).tolist() == ngrams(["the"], 1).tolist()
    assert len(ngrams([], 3)) == 0


def test_minhash_bands_find_pairs_as_often_as_they_say():
    """Over 400 pairs of known similarity; binomial error is 0.02 at most."""
    shape = banding(0.8)
    assert shape.bands * shape.rows <= 128
    draw = np.random.default_rng(0)
    for size, shared in ((90, 80), (100, 40)):
        expected = shared / (2 * size - shared)
        hits = 0
        for _ in range(400):
            all_of = draw.integers(1 << 63, size=2 * size - shared, dtype=np.uint64)
            a, b = np.sort(all_of[:size]), np.sort(all_of[size - shared :])
            assert jaccard(a, b) == pytest.approx(expected)
            hits += bool((band_keys(a, shape) == band_keys(b, shape)).any())
        assert hits / 400 == pytest.approx(1 - (1 - expected**shape.rows) ** shape.bands, abs=0.06)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.3, 1.0))
def test_bands_reach_their_recall(threshold):
    shape = banding(threshold)
    assert shape.recall >= 0.98
    assert shape.recall == 1 - (1 - threshold**shape.rows) ** shape.bands


@pytest.mark.slow
def test_helping_processes_find_the_same(look, monkeypatch):
    rows = [chat(f"Q {k}", text(30, k % 290)) for k in range(600)] + [{"oops": 1}]
    alone = look("dedup", rows[:-1])[0]
    monkeypatch.setattr("temper.data.ahead.ALONE", 1)
    monkeypatch.setattr("temper.data.quality.rows.cores", lambda: 2)
    assert look("dedup", rows[:-1])[0] == alone
    assert len(alone) > 200
    with pytest.raises(UserError, match=r"x\.jsonl:601: a row of no known format"):
        look("dedup", rows)
