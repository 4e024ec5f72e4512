"""Best of n: what the curve says, who chooses and who reports, and what is left out."""

import json

import numpy as np
import pytest
from toy import train, values_of

from temper.config import UserError, build
from temper.judges.rating import Answer
from temper.methods.best_of_n import Sampled, best, curve, rated
from temper.methods.best_of_n import settings as settings_of
from temper.records import Chat, Prompt, Ranked, read_jsonl
from temper.runs import Run
from temper.stats.best_of_n import kl_bound, kl_exact, policy

TEXTS, P = ["a", "b", "c", "d"], np.array([0.4, 0.3, 0.2, 0.1])


def prompt(k):
    return Prompt(messages=[{"role": "user", "content": f"q{k}"}], meta={"at": f"p:{k}"})


def group(k, drawn):
    return [Sampled(Answer(prompt(k), [1], [i], TEXTS[i], True), float(np.log(P[i]))) for i in drawn]


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("best") / "b"
    train("best-of-n", out, **(values_of("best-of-n", toy) | {"report": toy.reward}))
    return out


def test_the_curve_is_the_exact_policys_in_the_mean():
    """400 prompts with one known distribution over four answers: reward, report and KL against their exact values."""
    rng = np.random.default_rng(0)
    drawn = [rng.choice(4, size=16, p=P) for _ in range(400)]
    score, gold = np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 0.0, 5.0, -5.0])
    groups = [group(k, d) for k, d in enumerate(drawn)]
    rows = curve(groups, [score[d].tolist() for d in drawn], [gold[d].tolist() for d in drawn], plain=True)
    assert [row["n"] for row in rows] == [1, 2, 4, 8, 16]
    for row in rows:
        q = policy(P, score, row["n"])
        for name, want in ("reward", q @ score), ("report", q @ gold):
            half = (row[name]["high"] - row[name]["low"]) / 2
            assert abs(row[name]["mean"] - want) < 1.7 * half + 1e-9  # 1.7 half-widths are 3.3 standard errors
        assert row["kl"]["mean"] == pytest.approx(kl_exact(P, score, row["n"]), abs=0.03)
        assert row["bound"] == kl_bound(row["n"])
    assert rows[-1]["kl"]["mean"] < rows[-1]["bound"] - 0.1


def test_the_one_who_reports_does_not_choose():
    groups, reward, report = [group(0, [0, 1, 2, 3])], [[0.0, 3.0, 1.0, 2.0]], [[9.0, -1.0, 5.0, 5.0]]
    rows = curve(groups, reward, report, plain=True)
    assert (rows[-1]["reward"]["mean"], rows[-1]["report"]["mean"]) == (3.0, -1.0)
    s = build(settings_of("best-of-n"), {"model": "m", "prompts": "p", "reward": "r", "report": "g"})
    (chat,) = best(s, groups, reward, report)
    assert chat.messages[-1].content == "b"
    assert chat.meta == {"at": "p:0", "model": "m", "rater": "r", "of": 4, "reward": 3.0, "mean": 1.5, "report": -1.0}


def test_what_has_no_rating_is_left_out_and_never_zero():
    class Moody:
        name = "moody"

        def rate(self, answers):
            return [None if a.text == "a" else float("nan") if a.text == "b" else -1.0 for a in answers]

    groups = [group(0, [0, 1, 2, 3]), group(1, [2, 3, 3, 2])]
    ratings = rated(Moody(), groups)
    assert ratings == [[None, None, -1.0, -1.0], [-1.0] * 4]
    rows = curve(groups, ratings, None, plain=True)
    assert {row["reward"]["n"] for row in rows} == {1}  # the first prompt has too few for n = 4, so no n counts it
    assert all(row["reward"]["mean"] == -1.0 for row in rows)
    s = build(settings_of("best-of-n"), {"model": "m", "prompts": "p", "reward": "r"})
    assert [c.messages[-1].content for c in best(s, groups, ratings, None)] == ["c", "c"]
    with pytest.raises(UserError, match="no prompt has 4 answers that could be rated"):
        curve(groups[:1], ratings[:1], None, plain=True)

    class Short(Moody):
        def rate(self, answers):
            return [1.0]

    with pytest.raises(UserError, match="moody: 1 ratings for 6 answers"):
        rated(Short(), groups)


def test_what_a_run_writes(toy, made):
    found = json.loads((made / "curve.json").read_text())
    card = Run(made).stage["card"]
    assert [row["n"] for row in found["rows"]] == [1, 2, 4, 8]
    reward = [row["reward"]["mean"] for row in found["rows"]]
    assert reward == sorted(reward)
    assert found["rows"][0]["kl"]["mean"] == pytest.approx(0, abs=1e-9)
    assert all(row["kl"]["mean"] <= row["bound"] + 1e-9 for row in found["rows"])
    assert reward == [row["report"]["mean"] for row in found["rows"]]  # the same rater
    assert card["prompts"] == 18
    assert 0 <= card["again"] < 1
    assert "at n = 8" in card["reward"]
    chosen, rankings = read_jsonl(made / "chosen.jsonl", Chat), read_jsonl(made / "rankings.jsonl", Ranked)
    top = {r.prompt[-1].content: (r.answers[0], r.scores[0]) for r in rankings}
    assert len(chosen) >= len(rankings) > 0
    for chat in chosen:
        assert chat.meta["reward"] >= chat.meta["mean"]
        if chat.messages[0].content in top:
            assert (chat.messages[-1].content, chat.meta["reward"]) == top[chat.messages[0].content]


@pytest.mark.slow
def test_the_same_seed_the_same_files(toy, made, tmp_path):
    values = values_of("best-of-n", toy) | {"report": toy.reward}
    train("best-of-n", tmp_path / "a", **values, rows=3)
    train("best-of-n", tmp_path / "b", **values, seed=1)
    for name in "chosen.jsonl", "rankings.jsonl":
        assert (tmp_path / "a" / name).read_text() != (tmp_path / "b" / name).read_text()
    assert [c.messages for c in read_jsonl(tmp_path / "a" / "chosen.jsonl", Chat)] == [
        c.messages for c in read_jsonl(made / "chosen.jsonl", Chat)
    ]


def test_a_rater_that_is_not_there(toy, tmp_path):
    with pytest.raises(UserError, match=r"runs/no: no such folder|runs/no: .*no"):
        train("best-of-n", tmp_path / "x", **(values_of("best-of-n", toy) | {"reward": "runs/no"}))
    with pytest.raises(UserError, match="gold has no part 'beauty'"):
        train("best-of-n", tmp_path / "x", **(values_of("best-of-n", toy) | {"reward": "gold:beauty"}))
    with pytest.raises(UserError, match="--temperature 0: 8 answers to a prompt would all be"):
        train("best-of-n", tmp_path / "x", **(values_of("best-of-n", toy) | {"temperature": 0.0}))
    assert not (tmp_path / "x").exists()
