"""Collecting preferences: which answers are compared, by whom, and that it can be repeated."""

import pytest
from toy import train, values_of

from temper.config import UserError
from temper.data.sources import read
from temper.judges.annotators import Annotators, ceiling
from temper.methods.collect import differing
from temper.records import Pair, Prompt
from temper.runs import Run


def rows(folder):
    return [Pair.model_validate_json(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def test_pairs_are_two_different_finished_answers_labelled_by_the_panel(toy, tmp_path):
    train("collect", tmp_path / "c", **(values_of("collect", toy) | {"prompts": "world:prompts?n=40&seed=2", "seed": 5}))
    found, card = rows(tmp_path / "c"), Run(tmp_path / "c").stage["card"]
    prompts = [r.messages for r in read("world:prompts?n=40&seed=2", "prompts").records]
    assert card["prompts"] == 40
    assert card["pairs"] == len(found)
    assert card["pairs"] + card["alike"] == 40
    assert card["ceiling"] == pytest.approx(ceiling(found))
    raters, index = Annotators("town", 5), -1
    for pair in found:
        index = prompts.index(pair.prompt, index + 1)  # in the order of the prompts
        assert pair.chosen != pair.rejected
        assert pair.chosen.strip() == pair.chosen != ""
        asked = Prompt(messages=pair.prompt, meta=pair.meta)
        labels = [raters.label(asked, *two, index=index) for two in ((pair.chosen, pair.rejected), (pair.rejected, pair.chosen))]
        assert pair in labels  # who chose, how sure the panel is, and all


def test_the_same_seed_the_same_file(toy, tmp_path):
    files = []
    for name, seed, rows_at_once in ("a", 0, 256), ("b", 0, 3), ("c", 1, 256):
        train("collect", tmp_path / name, **(values_of("collect", toy) | {"seed": seed, "rows": rows_at_once}))
        files.append((tmp_path / name / "pairs.jsonl").read_bytes())
    assert files[0] == files[1] != files[2]


def test_differing():
    assert differing(["a", "a", "b", "c"]) == ("a", "b")
    assert differing(["a", "a"]) is None


def test_what_cannot_be_compared(toy, tmp_path):
    with pytest.raises(UserError, match=r"prompts.jsonl:1: not a prompt of the embedded world"):
        train("collect", tmp_path / "c", **(values_of("collect", toy) | {"prompts": toy.prompts}))
    with pytest.raises(UserError, match="no prompt got two different answers that ended; raise --temperature"):
        train("collect", tmp_path / "c", **(values_of("collect", toy) | {"max_new": 1}))
    assert not (tmp_path / "c").exists()
    with pytest.raises(UserError, match=r"panel|annotator"):
        train("collect", tmp_path / "c", **(values_of("collect", toy) | {"panel": "nobody"}))
