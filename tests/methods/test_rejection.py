"""Rejection sampling: what is kept, balanced and learned; that rounds start where they should and can be resumed."""

import pytest
import torch
from safetensors.torch import load_file
from toy import train, values_of

from temper.config import UserError, build
from temper.driver import Interrupted
from temper.judges.rating import Answer
from temper.ladder import stage
from temper.methods import rejection
from temper.methods.best_of_n import Sampled
from temper.methods.rejection import choose
from temper.records import Chat, Prompt, read_jsonl
from temper.runs import Run


def group(k, answers):
    ask = Prompt(messages=[{"role": "user", "content": f"q{k}"}], meta={"at": f"p:{k}"})
    return [Sampled(Answer(ask, [1], [ord(t[0])], t.rstrip("."), not t.endswith(".")), -2.0) for t in answers]


def of(**values):
    return build(rejection.Rejection, {"model": "m", "prompts": "p", "reward": "r", **values})


def kept(chosen):
    return [(c.messages[0].content, c.messages[-1].content) for c in chosen.chats]


def test_above_keeps_what_reaches_the_threshold_once_each_and_so_many_of_a_prompt():
    groups = [group(0, ["a", "b", "a", "c"]), group(1, ["a", "b", "c", "d"]), group(2, ["a", "b", "c", "d"])]
    ratings = [[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, None, 1.0, 0.5]]
    chosen = choose(of(keep="above", threshold=0.5, per_prompt=3), groups, ratings, 1)
    assert kept(chosen) == [("q0", "a"), ("q0", "b"), ("q2", "c"), ("q2", "d")]
    assert kept(choose(of(keep="above", threshold=0.5, per_prompt=1), groups, ratings, 1)) == [("q0", "a"), ("q2", "c")]
    m = chosen.metrics
    assert m["unrated"] == pytest.approx(1 / 12)
    assert m["good"] == pytest.approx(5 / 11)
    assert m["solved"] == pytest.approx(2 / 3)
    assert m["records"] == 4
    assert m["kept_reward"] == pytest.approx(3.5 / 4)
    assert chosen.chats[2].meta == {"at": "p:2", "model": "m", "rater": "r", "round": 1, "rating": 1.0, "good": 2, "of": 3}


def test_best_keeps_the_best_and_what_did_not_end_is_never_learned():
    groups = [group(0, ["a", "b.", "c"]), group(1, ["a.", "b."])]
    chosen = choose(of(), groups, [[0.0, 5.0, 1.0], [1.0, 2.0]], 2)
    assert kept(chosen) == [("q0", "c")]
    assert chosen.metrics["cut_off"] == pytest.approx(3 / 5)


def test_easy_prompts_are_at_most_their_share():
    """Eight prompts solved every time, two solved half of the time."""
    groups = [group(k, ["a", "b"]) for k in range(10)]
    ratings = [[1.0, 1.0] if k < 8 else [1.0, 0.0] for k in range(10)]
    for share, easy in (0.5, 2), (0.0, 0), (1.0, 8), (0.75, 6):
        chosen = choose(of(keep="above", threshold=1, easy_share=share), groups, ratings, 1)
        assert len(chosen.chats) == easy + 2
        assert {("q8", "a"), ("q9", "a")} <= set(kept(chosen))
        assert chosen.metrics["easy"] == pytest.approx(easy / (easy + 2))


def test_nothing_to_learn_says_why():
    with pytest.raises(UserError, match=r"p: round 1 has nothing to learn: 1 of 2 answers had a rating, 0 were good"):
        choose(of(keep="above", threshold=1), [group(0, ["a", "b"])], [[0.0, None]], 1)
    with pytest.raises(UserError, match="--keep above needs --threshold"):
        of(keep="above")


@pytest.mark.slow
def test_two_rounds_leave_their_records_and_learn_them(toy, tmp_path):
    train("rejection", tmp_path / "r", **values_of("rejection", toy))
    rows = Run(tmp_path / "r").rows("metrics")
    first, second = (read_jsonl(tmp_path / "r" / f"round_{k}.jsonl", Chat) for k in (1, 2))
    assert first
    assert second
    assert [c.messages for c in first] != [c.messages for c in second]
    assert {c.meta["round"] for c in second} == {2}
    steps = [row for row in rows if "eval" not in row]
    assert [row["phase"] for row in steps] == [1] * (len(steps) // 2) + [2] * (len(steps) // 2)
    assert steps[0]["records"] == len(first)
    assert steps[-1]["records"] == len(second)
    one = [row["loss"] for row in steps if row["phase"] == 1]
    assert one[-1] < one[0]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["first", "latest"])
def test_a_round_starts_where_it_is_told(toy, tmp_path, start, monkeypatch):
    """The weights at a round's first step, against those of the model given."""
    begun = []

    def fit(model, *args, inner=rejection.fit, **kwargs):
        begun.append({k: x.clone() for k, x in model.state_dict().items()})
        return inner(model, *args, **kwargs)

    monkeypatch.setattr(rejection, "fit", fit)
    train("rejection", tmp_path / "r", **(values_of("rejection", toy) | {"start": start, "epochs": 0.5}))
    assert len(begun) == 2
    same = all(torch.equal(begun[0][name], begun[1][name]) for name in begun[0])
    assert same == (start == "first")


@pytest.mark.slow
def test_interrupted_in_the_second_round_it_goes_on_to_the_same_bytes(toy, tmp_path, monkeypatch):
    values = values_of("rejection", toy)
    train("rejection", tmp_path / "whole", **values)
    total = len([r for r in Run(tmp_path / "whole").rows("metrics") if "eval" not in r])

    import contextlib

    from temper import driver

    count = 0

    @contextlib.contextmanager
    def signals():
        def stop():
            nonlocal count
            count += 1
            return count == total - 2

        yield stop

    with monkeypatch.context() as patched:
        patched.setattr(driver, "_signals", signals)
        with pytest.raises(Interrupted):
            train("rejection", tmp_path / "broken", **values)
    assert Run(tmp_path / "broken").rows("metrics")[-1]["phase"] == 2
    train("rejection", tmp_path / "broken", **values)
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert stage.input_fingerprint("model", str(tmp_path / "whole")) == stage.input_fingerprint("model", str(tmp_path / "broken"))
