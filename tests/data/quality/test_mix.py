"""Exact proportions without repeats."""

import pytest
from data.quality.conftest import chat
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.config import UserError, build
from temper.data.quality.mix import Options, counts


def test_counts_by_largest_remainder():
    assert counts({"a": 1, "b": 1, "c": 1}, {"a": 9, "b": 9, "c": 9}, 10) == {"a": 4, "b": 3, "c": 3}
    assert counts({"a": 0.7, "b": 0.3}, {"a": 70, "b": 100}, None) == {"a": 70, "b": 30}
    assert counts({"a": 3, "b": 0}, {"a": 5, "b": 5}, None) == {"a": 5, "b": 0}
    with pytest.raises(UserError, match="5 rows of 'a' are its share of 10, it has 4; ask for at most 8"):
        counts({"a": 1, "b": 1}, {"a": 4, "b": 9}, 10)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 5), st.integers(1, 50)), min_size=1, max_size=5))
def test_the_most_rows_without_repeats_keep_the_proportions(parts):
    weights, have = {str(i): w for i, (w, _) in enumerate(parts)}, {str(i): n for i, (_, n) in enumerate(parts)}
    try:
        out = counts(weights, have, None)
    except UserError:
        return
    total, whole = sum(out.values()), sum(weights.values())
    assert all(n <= have[name] and abs(n - total * weights[name] / whole) < 1 for name, n in out.items())


def test_rows_are_taken_by_seed_and_the_effect_is_shown(look, put):
    a, b = put("a.jsonl", [chat(f"a{k}", "A") for k in range(30)]), put("b.jsonl", [chat(f"b{k}", "B") for k in range(10)])
    found, report = look("mix", {"a": a, "b": b}, weights={"a": 1, "b": 1})
    assert {k: v["taken"] for k, v in report.sources.items()} == {"a": 10, "b": 10}
    assert report.sources["a"]["share"] == "75.0%"
    assert len(found) == 20
    assert all(i < 30 for i in found)
    again, _ = look("mix", {"a": a, "b": b}, weights={"a": 1, "b": 1})
    assert again == found
    assert look("mix", {"a": a, "b": b}, weights={"a": 1, "b": 1}, seed=1)[0].keys() != found.keys()


def test_weights_name_all_data_and_nothing_else(look, put):
    path = put("a.jsonl", [chat("Q", "A")])
    with pytest.raises(UserError, match="no data set 'c'; there are a, b"):
        look("mix", {"a": path, "b": path}, weights={"a": 1, "c": 1})
    with pytest.raises(UserError, match="'b' has no weight"):
        look("mix", {"a": path, "b": path}, weights={"a": 1})
    assert build(Options, {"weights": "a=0.7,b=3"}).weights == {"a": 0.7, "b": 3.0}
    for wrong in ("a=x", "a=1,a=2", "a=-1", "a=0"):
        with pytest.raises(UserError, match="weights"):
            build(Options, {"weights": wrong})
