"""Rivals on held-out rows of the toy's data: who reads what, what is measured, and what stops with one line."""

import json

import pytest
import torch
from toy import says, user, write

from temper.advise import training
from temper.advise.command import read
from temper.advise.rivals import Trial, Way, answer_nll, divide, look, put, same, with_shots, with_system
from temper.cli import main
from temper.config import UserError
from temper.data.split import opening
from temper.models.load import load_policy
from temper.records import Chat, Message

QUICK = ["--threads", "1", "--json", "--held-out", "8", "--learn-from", "16", "--epochs", "2", "--max-new", "8", "--rates", "1e-2"]
FEW = ["--rivals", "zero-shot", "few-shot", "lora"]


def chat(ask, answer="It is red.", system=None):
    before = [Message(role="system", content=system)] if system else []
    return Chat(messages=[*before, Message(role="user", content=ask), Message(role="assistant", content=answer)])


CHATS = [chat(f"What colour is boat {k}?") for k in range(60)]


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(training, "PROBE", 0.0)


def test_no_opening_stands_on_two_sides():
    rows, long = divide([*CHATS, *CHATS], Trial(held_out=20, learn_from=30), lambda c: opening(c)[-2] != "9")
    sides = [{opening(c) for c in part} for part in (rows.learn, rows.dev, rows.test)]
    assert all(sides)
    assert len(set.union(*sides)) == sum(map(len, sides))
    assert {opening(c) for c in rows.shots} <= sides[0]
    assert long
    with pytest.raises(UserError, match="too few for a trial: 6 rows"):
        divide(CHATS[:6], Trial(), lambda c: True)


def test_prompts_of_the_rivals():
    one = chat("What?", system="Be kind.")
    assert [m.content for m in with_system(one.messages[:-1], "Be short.")] == ["Be short.\nBe kind.", "What?"]
    assert [m.content for m in with_shots(one.messages[:-1], CHATS[:1])] == ["Be kind.", "What colour is boat 0?", "It is red.", "What?"]


def test_the_likelihood_is_of_the_answers_text(toy):
    """By hand: the answer's tokens one after the other, and not the end of turn."""
    model, tokenizer = load_policy(toy.sft)
    asked = put(tokenizer, CHATS[0], CHATS[0].messages[:-1])
    ((segment,), n) = asked.tree, len(asked.ids)
    assert list(segment.tokens[:n]) == asked.ids
    assert tokenizer.decode(segment.tokens[n:]) == "It is red."
    with torch.no_grad():
        logp = model(torch.tensor([segment.tokens])).logits[0].log_softmax(-1)
    want = -sum(logp[t - 1, segment.tokens[t]] for t in range(n, len(segment.tokens))) / (len(segment.tokens) - n)
    longer = put(tokenizer, CHATS[1], with_shots(CHATS[1].messages[:-1], CHATS[2:4])).tree
    assert answer_nll(model, [longer, asked.tree], 4096)[1] == pytest.approx(float(want), abs=1e-5)


def test_as_many_shots_as_fit(toy):
    _, tokenizer = load_policy(toy.sft)
    one = len(put(tokenizer, CHATS[9], with_shots(CHATS[9].messages[:-1], CHATS[:1])).ids)
    way = Way("few-shot", "", CHATS[:4], room=one + 20, max_new=20)
    assert way(tokenizer, CHATS[9]).shots == 1
    assert Way("few-shot", "", CHATS[:4], None, 20)(tokenizer, CHATS[9]).shots == 4


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("Red.", " red", True),
        ("red boat", "red  Boat", True),
        ("red", "blue", False),
        ('{"a": 1}', '{ "a":1 }', True),
        ("[1]", "[2]", False),
    ],
)
def test_equal_answers(a, b, equal):
    assert same(a, b) == equal


@pytest.mark.parametrize(
    ("row", "shows"),
    [
        ({"messages": [*user("a?"), says('{"x": 1}')]}, {"format": "json"}),
        ({"messages": [*user("a?"), says("Red.")]}, {"format": "short"}),
        ({"messages": [*user("a?"), says("word " * 30)]}, {"format": "free"}),
        ({"question": "1 + 1?", "answer": "It is two.\n#### 2"}, {"format": "short", "feedback": ["verifiable"]}),
        ({"prompt": user("a?"), "chosen": "b " * 30, "rejected": "c"}, {"format": "free", "feedback": ["pairs"]}),
        ({"prompt": user("a?"), "completion": "b " * 30, "label": True}, {"format": "free", "feedback": ["thumbs"]}),
    ],
)
def test_what_a_file_shows(tmp_path, row, shows):
    rows, chats = look(str(write(tmp_path / "d.jsonl", [row] * 3)), False)
    assert rows["shows"] == {"examples": 3, **shows}
    assert len(chats) == 3


def test_the_rivals_run(toy, tmp_path, capsys):
    """SFT's model and its own data: trained rivals, a curve, costs and advice; the same figures in the file and on the page."""
    assert main(["advise", "--model", toy.sft, "--data", toy.chats, *QUICK, *FEW, "--out", str(tmp_path / "o")]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out == json.loads((tmp_path / "o" / "advice.json").read_text())
    rivals = {r["name"]: r for r in out["rivals"]}
    assert list(rivals) == ["zero-shot", "few-shot", "lora"], out["not_measured"]
    assert out["rows"]["held_out"] == 8
    for r in rivals.values():
        assert r["measures"]["nll"]["n"] == 8
        assert r["measures"].keys() == {"nll", "exact", "ended"}
    assert rivals["few-shot"]["shots"] > 0
    cost = out["costs"]["lora"]
    assert cost["bytes"]["states"] == 16 * cost["trained"] < 16 * cost["parameters"]
    assert cost["tokens_per_second"]["mean"] > 0
    assert out["decision"]["chosen"] in rivals
    assert out["answers"]["examples"] == {"value": 168, "from": "the data"}
    assert [len(a["reasons"]) > 0 for a in out["advice"]] == [True] * 4
    assert out["advice"][0]["choice"] in (tmp_path / "o" / "advice.html").read_text()


@pytest.mark.slow
def test_training_wins_where_there_is_something_to_learn(toy, tmp_path, capsys):
    """A code that the base model never saw: only what is trained can know it; JSON that fits a schema is seen to fit."""
    rows = [{"messages": [*user(f"Code of {a}{b}?"), says(json.dumps({"code": a}))]} for a in "pqrs" for b in range(25)]
    schema = tmp_path / "s.json"
    schema.write_text('{"type": "object", "required": ["code"]}')
    more = ["--schema", str(schema), "--epochs", "40", "--rates", "2e-2", "--learn-from", "64", "--max-new", "24"]
    data = write(tmp_path / "d.jsonl", rows)
    assert main(["advise", "--model", toy.sft, "--data", str(data), *QUICK, *more]) == 0
    out = json.loads(capsys.readouterr().out)
    rivals = {r["name"]: r["measures"] for r in out["rivals"]}
    assert rivals["zero-shot"]["schema"]["mean"] == 0
    assert rivals["full"]["schema"]["mean"] > 0.5
    assert {"exact", "schema", "json"} < rivals["full"].keys()
    assert out["decision"]["chosen"] in ("lora", "full")
    assert out["curve"]["rows"] == [16, 64]
    assert out["rows"]["unfit"] == 0
    assert out["costs"]["full"]["trained"] == out["costs"]["full"]["parameters"] > out["costs"]["lora"]["trained"]


@pytest.mark.slow
def test_speed_and_memory_without_data(toy, capsys):
    assert main(["advise", "--model", toy.sft, "--rivals", "lora", "--examples", "100", *QUICK]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["costs"].keys() == {"lora"}
    assert out["rivals"] == []
    assert "rows of random tokens" in out["not_measured"][0]


def test_nothing_but_answers(capsys):
    assert main(["advise", "--task", "style", "--examples", "40", "--feedback", "thumbs"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "How to adapt the model: LoRA (not measured)" in out
    assert "Which preference method: KTO on the thumbs" in out
    assert "Not measured: rivals, speed and memory: give --model (and --data)." in out


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["--task", "cooking"], "--task: got 'cooking'"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--model", "./nowhere"], "./nowhere: no such folder"),
        (["--schema", "s.json"], "--schema: is checked on answers to held-out rows; give --data and --model too"),
        (["--feedback", "none", "pairs"], "none stands alone"),
        (["--hardware", "0"], "--hardware 0: "),
        (["--hardware", "gpu"], "--hardware: got 'gpu'"),
        (["--examples", "-1"], "--examples: got"),
        (["--rates", "0"], "--rates 0: "),
        (["--shot", "2"], "did you mean --shots?"),
    ],
)
def test_wrong_flags(argv, what):
    with pytest.raises(UserError) as caught:
        read(argv)
    assert what in str(caught.value)


def test_wrong_files(toy, tmp_path, capsys):
    texts = write(tmp_path / "t.jsonl", [{"text": "a"}])
    few = write(tmp_path / "f.jsonl", [{"messages": [*user(f"{k}?"), says("b")]} for k in range(5)])
    bad = write(tmp_path / "s.json", [])
    for argv, what in (
        (["--data", texts], "plain text"),
        (["--data", few, "--model", toy.sft], "too few for a trial: 5 rows"),
        (["--data", toy.chats, "--model", toy.sft, "--schema", bad], "no JSON Schema"),
        (["--data", toy.chats, "--model", toy.reward], "scoring model"),
    ):
        assert main(["advise", *map(str, argv), "--out", str(tmp_path / "o"), *QUICK]) == 2
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1
        assert what in err[0]
    assert not (tmp_path / "o").exists()
