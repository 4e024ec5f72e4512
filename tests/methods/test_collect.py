"""Collecting preferences: which answers are ranked, by whom, and that it can be repeated."""

import pytest
from toy import train, values_of

from temper.config import UserError
from temper.data.sources import read
from temper.judges.annotators import Annotators, ceiling, extremes
from temper.records import Pair, Prompt, Ranked, read_jsonl
from temper.runs import Run


def test_rankings_are_of_the_different_finished_answers_by_the_panel(toy, tmp_path):
    values = values_of("collect", toy) | {"prompts": "world:prompts?n=40&seed=2", "seed": 5, "samples_per_prompt": 6}
    train("collect", tmp_path / "c", **values)
    found, card = read_jsonl(tmp_path / "c" / "rankings.jsonl", Ranked), Run(tmp_path / "c").stage["card"]
    prompts = [r.messages for r in read("world:prompts?n=40&seed=2", "prompts").records]
    assert card["prompts"] == 40
    assert card["rankings"] == len(found)
    assert card["rankings"] + card["alike"] == 40
    assert card["comparisons"] == sum(len(r.answers) * (len(r.answers) - 1) // 2 for r in found)
    assert card["ceiling"] == pytest.approx(ceiling(found))
    assert "ties" not in card
    assert {len(r.answers) for r in found} >= {2, 3}
    assert max(len(r.answers) for r in found) <= 6
    raters, index = Annotators("town", 5), -1
    for r in found:
        index = prompts.index(r.prompt, index + 1)  # in the order of the prompts
        assert len(set(r.answers)) == len(r.answers)
        assert all(answer.strip() == answer != "" for answer in r.answers)
        asked = Prompt(messages=r.prompt, meta=r.meta)
        again = raters.rank(asked, r.answers, index=index)  # the same member, with the answers shown in another order
        assert again.meta["annotator"] == r.meta["annotator"]
        assert dict(zip(again.answers, again.meta["gold"], strict=True)) == dict(zip(r.answers, r.meta["gold"], strict=True))


def test_a_sampled_answer_that_comes_again_is_ranked_once_and_what_did_not_end_not_at_all(toy, tmp_path, monkeypatch):
    """What reaches the rater, against what was sampled."""
    from temper.methods import collect

    groups, ranked = [], []

    def sample(*args, inner=collect.sample, **kwargs):
        groups.extend(inner(*args, **kwargs))
        return groups

    def rank(self, prompt, answers, index, inner=Annotators.rank):
        ranked.append((index, answers))
        return inner(self, prompt, answers, index)

    monkeypatch.setattr(collect, "sample", sample)
    monkeypatch.setattr(Annotators, "rank", rank)
    train(
        "collect", tmp_path / "c", **(values_of("collect", toy) | {"prompts": "world:prompts?n=40", "samples_per_prompt": 6, "max_new": 9})
    )
    _, tokenizer = collect.load_policy(toy.sft)
    expected = {}
    for i, answers in enumerate(groups):
        texts = [tokenizer.decode(a.tokens, skip_special_tokens=True).strip() for a in answers if a.finish == "stop"]
        different = [text for k, text in enumerate(texts) if text and text not in texts[:k]]
        if len(different) > 1:
            expected[i] = different
    assert dict(ranked) == expected
    assert any(a.finish != "stop" for answers in groups for a in answers)
    assert any(len(answers) < 6 for answers in expected.values())


def test_the_pairs_are_the_best_and_the_worst_of_the_rankings(toy, tmp_path):
    train("collect", tmp_path / "c", **(values_of("collect", toy) | {"prompts": "world:prompts?n=40", "samples_per_prompt": 6}))
    rankings, pairs = (read_jsonl(tmp_path / "c" / f"{name}.jsonl", kind) for name, kind in (("rankings", Ranked), ("pairs", Pair)))
    assert pairs == [extremes(r) for r in rankings]
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [(r.prompt, r.answers[0], r.answers[-1]) for r in rankings]


def test_the_same_seed_the_same_files(toy, tmp_path):
    files = []
    for name, seed, rows_at_once in ("a", 0, 256), ("b", 0, 3), ("c", 1, 256):
        train("collect", tmp_path / name, **(values_of("collect", toy) | {"seed": seed, "rows": rows_at_once}))
        files.append([(tmp_path / name / f"{what}.jsonl").read_bytes() for what in ("rankings", "pairs")])
    assert files[0] == files[1]
    assert all(a != c for a, c in zip(files[0], files[2], strict=True))


def test_what_cannot_be_compared(toy, tmp_path):
    with pytest.raises(UserError, match=r"prompts.jsonl:1: not a prompt of the embedded world"):
        train("collect", tmp_path / "c", **(values_of("collect", toy) | {"prompts": toy.prompts}))
    with pytest.raises(UserError, match="no prompt got two different answers that ended; raise --temperature"):
        train("collect", tmp_path / "c", **(values_of("collect", toy) | {"max_new": 1}))
    assert not (tmp_path / "c").exists()
    with pytest.raises(UserError, match=r"panel|annotator"):
        train("collect", tmp_path / "c", **(values_of("collect", toy) | {"panel": "nobody"}))
