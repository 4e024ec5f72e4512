"""What every method does with its data: mixtures, what is left out, what is kept of it on disk, what records share."""

import json

import pytest
from toy import says, train, user, values_of, write

from temper.checks import examine
from temper.config import build
from temper.methods import load
from temper.methods.base import Batching, Window, asked, offline
from temper.methods.reward import count_records
from temper.models.load import load_policy
from temper.runs import Run


def prepare(method, folder, values):
    settings = build(load(method).settings(method), values)
    return load(method).prepare(settings, Run.claim(folder, {"method": method}))


SYSTEM = {"role": "system", "content": "You know the boats of the harbour and their colours, and answer."}


def test_a_mixture_is_trained_in_its_proportions(toy, tmp_path):
    more = write(tmp_path / "more.jsonl", [{"messages": [*user("Hi"), says(f"Hello {k}.")]} for k in range(20)])
    spec = f"{toy.chats}=1,{more}=2"
    train("sft", tmp_path / "sft", model=toy.base, data=spec, held_out=0, batch=8)
    run = Run(tmp_path / "sft")
    assert "an epoch: 10 of 168 rows of " in run.stage["card"]["mixture"]
    assert ", 20 of 20 rows of " in run.stage["card"]["mixture"]
    assert run.stage["summary"]["steps"] == 4


def test_every_row_that_is_left_out_is_listed(toy, tmp_path):
    rows = [{"messages": [*user(f"{k}" * (900 if k % 5 == 3 else 1)), says("Yes." if k else "")]} for k in range(40)]
    train(
        "sft", tmp_path / "sft", model=toy.base, data=str(write(tmp_path / "a.jsonl", rows)), skip_bad=True, too_long="drop", held_out=0.2
    )
    run = Run(tmp_path / "sft")
    listed = [json.loads(line) for line in (run.folder / "left_out.jsonl").read_text().splitlines()]
    assert listed[0]["what"] == "skipped"
    assert sorted(int(row["why"].split("a.jsonl:")[1].split(":")[0]) for row in listed[1:]) == [4, 9, 14, 19, 24, 29, 34, 39]
    assert run.stage["card"]["left_out"] == "9 rows, listed in left_out.jsonl"


@pytest.mark.parametrize("method", ["sft", "pretrain"])
def test_what_is_tokenised_is_found_again(toy, tmp_path, method, monkeypatch):
    values = {
        "sft": {"model": toy.base, "data": toy.chats},
        "pretrain": {"data": toy.text, "width": 16, "layers": 1, "heads": 2, "vocab": 330},
    }
    first = train(method, tmp_path / "one", epochs=0.1, **values[method])
    monkeypatch.setattr("temper.data.store._encode", lambda *_: pytest.fail("tokenised again"))
    monkeypatch.setattr("temper.methods.pretrain.train_tokenizer", lambda *_, **__: pytest.fail("trained again"))
    again = train(method, tmp_path / "two", epochs=0.1, **values[method])
    assert again["last"]["loss"] == first["last"]["loss"]
    assert (tmp_path / "one/model/tokenizer.json").read_bytes() == (tmp_path / "two/model/tokenizer.json").read_bytes()


@pytest.mark.parametrize("method", ["best-of-n", "process-reward", "constitution", "grpo"])
def test_mixtures_and_what_is_left_out_where_prompts_or_steps_are_read(toy, tmp_path, method):
    """Of 18 prompts and 8 of another file, of which one is too long and one is broken, a mixture takes 6 of each."""
    asked = [{"messages": user(f"Hi {k}" + " boat" * (200 if k == 3 else 0))} for k in range(7)]
    solved = [
        {"prompt": user(f"Add {k}." + " boat" * (200 if k == 3 else 0)), "steps": ["So."], "labels": [1.0], "meta": {}} for k in range(7)
    ]
    steps = method == "process-reward"
    more = write(tmp_path / "more.jsonl", [*(solved if steps else asked), {"messages": [*user("Hi"), *user("Hi")]}])
    values = values_of(method, toy) | {"skip_bad": True, "too_long": "drop"}
    name = {"process-reward": "data", "constitution": "helpful"}.get(method, "prompts")
    spec = f"{values[name]}=1,{more}=1"
    job = prepare(method, tmp_path / "run", values | {name: spec} | ({"held_out": 0.0} if steps else {}))
    listed = [json.loads(line) for line in (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()]
    assert {(row["what"], row.get("at", row["why"].split(": ")[0])) for row in listed} == {
        ("skipped", f"{more}:8"),
        ("dropped", f"{more}:4"),
    }
    assert job.card["left_out"] == "2 rows, listed in left_out.jsonl"
    if method in ("best-of-n", "grpo"):
        assert job.card["mixture"] == f"an epoch: 6 of 18 rows of {toy.prompts}, 6 of 6 rows of {more}"


def test_prompts_of_a_mixture_come_in_its_proportions(toy, tmp_path):
    more = write(tmp_path / "more.jsonl", [{"messages": user(f"Hi {k}")} for k in range(40)])
    _, tokenizer = load_policy(toy.sft)
    run = Run(tmp_path / "run")
    found = asked(f"{toy.prompts}=1,{more}=3", run, tokenizer, load_policy(toy.sft)[0], Window(), room=8)
    assert (len(found.records), found.order.take) == (58, (13, 40))
    for step in range(5):
        texts = [found.records[i].messages[-1].content for i in found.order.rows(8, step)]
        assert 5 <= sum(text.startswith("Hi") for text in texts) <= 7
    records, ids = found.every()
    assert len(records) == len(ids) == 53
    assert all(tokenizer.decode(x).find(r.messages[-1].content) >= 0 for r, x in zip(records, ids, strict=True))


@pytest.mark.parametrize("method", ["dpo", "kto", "reward"])
def test_comparisons_are_read_from_disk_and_found_again(toy, tmp_path, method, monkeypatch):
    values = values_of(method, toy) | {"epochs": 1}
    first = train(method, tmp_path / "one", **values)
    monkeypatch.setattr("temper.data.store._encode", lambda *_: pytest.fail("tokenised again"))
    again = train(method, tmp_path / "two", **values)
    assert again["last"]["loss"] == first["last"]["loss"]
    assert len(list((tmp_path / ".tokens").iterdir())) == 1


@pytest.mark.parametrize("together", [False, True])
def test_a_shared_beginning_is_computed_once_and_the_loss_is_the_same(toy, tmp_path, together, monkeypatch):
    rows = [{"messages": [SYSTEM, *user(f"What colour is boat {k % 4}?"), says(f"It is {k}.")]} for k in range(16)]
    data = str(write(tmp_path / "a.jsonl", rows))
    shown = {}
    for joined in (True, False):
        if not joined:
            monkeypatch.setattr("temper.methods.base.shared", lambda trees, most: trees)
        out = tmp_path / str(joined)
        train("sft", out, model=toy.base, data=data, held_out=0, batch=4, epochs=1, together=together)
        shown[joined] = [row for row in Run(out).rows("metrics") if "loss" in row]
    for one, other in zip(shown[True], shown[False], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["tokens_learned"] == other["tokens_learned"]
        assert one["tokens"] < other["tokens"]


def test_joined_comparisons_count_their_records(chatml_pairs):
    trees = chatml_pairs
    (forest,) = offline(trees, Batching(batch=3, tokens_per_microbatch=4096), count_records, join=True)(0)
    assert forest.trees == 1
    assert forest.weights == {"records": 3.0}


@pytest.fixture
def chatml_pairs():
    from temper.forest import Segment

    prompt, none = list(range(40)), {"rank": -1.0, "soft": 0.0, "margin": 0.0}
    answer = [{"rank": float(rank), "soft": 1.0, "margin": 0.0} for rank in (0, 1)]
    return [
        [Segment(prompt, [0.0] * 40, labels=none), *(Segment([50 + k, 60 + rank], [1.0, 1.0], 0, labels=answer[rank]) for rank in (0, 1))]
        for k in range(3)
    ]


def test_checks_look_at_a_part_of_a_set_on_disk_and_know_the_size_of_all(toy, tmp_path, monkeypatch):
    """Their rows have their names, also behind a row that was dropped; no record is in memory before one is looked at."""
    monkeypatch.setattr("temper.methods.base.LOOKED", 20)
    rows = [{"messages": [*user(f"{k}" * (900 if k == 3 else 1)), says("Yes." * (1 + k % 7))]} for k in range(40)]
    rows[5] = rows[30] = {"messages": [*user("<|im_start|>"), says("Yes.")]}
    path = write(tmp_path / "a.jsonl", rows)
    more = write(tmp_path / "b.jsonl", [{"messages": [*user("<|im_end|>"), says("No.")]}])
    values = {"model": toy.base, "data": f"{path}=9,{more}=1", "held_out": 0.0, "too_long": "drop"}
    settings = build(load("sft").settings("sft"), values)
    job = load("sft").prepare(settings, Run(tmp_path / "out" / "run"))
    part, whole = job.prepared.corpus, job.prepared.whole
    assert (len(part.records), len(part.trees), len(whole.records), len(whole.trees)) == (21, 20, 41, 40)
    assert "_rows" not in vars(part.records)
    found = examine("sft", {**values, "batch": 4, "epochs": 1.0}, job.prepared, job.total)
    assert {row for f in found if f.check == "template-in-text" for row in f.rows} == {f"{path}:6", f"{more}:1"}
    assert [f.rows for f in found if f.check == "length" and f.severity == "warning"] == [(f"{path}:4",)]
    assert next(f.what for f in found if f.check == "batch").startswith("40 rows; ")
    assert "_rows" not in vars(whole.records)
