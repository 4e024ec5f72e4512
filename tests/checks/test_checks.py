"""Each check finds the fault that is planted for it, and names the row; and nothing where there is none."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from temper.checks import CHECKS, Case, examine_stage, foresee, run_checks
from temper.checks.machine import arithmetic, parameters
from temper.checks.registry import lengths, listed
from temper.checks.rows import mojibake
from temper.checks.tokens import histogram
from temper.cli import main
from temper.config import UserError, build
from temper.data import sources, trees
from temper.data.store import label
from temper.data.trees import chat_trees, comparison_trees
from temper.forest import Segment
from temper.ladder.graph import make
from temper.ladder.recipe import read_recipe
from temper.methods import load
from temper.methods.base import Batching, Corpus, Prepared, Window
from temper.models.load import parameters_in
from temper.models.tokenizer import train_tokenizer
from temper.records import Chat, Function, Message, Pair, Prompt, Rated, ToolCall
from temper.runs import Run

FISH = ("herring", "cod", "eel", "pike", "perch", "carp", "bream", "trout", "salmon", "tench", "ruffe", "smelt")
VALUES = {"max_length": None, "too_long": "error", "skip_bad": False, "batch": 8, "tokens_per_microbatch": 512}


def chat(k, question="What is the price of {}?", answer="The {} costs {} crowns.", **meta):
    fish = f"{FISH[k % 12]}{k}"
    messages = [Message(role="user", content=question.format(fish)), Message(role="assistant", content=answer.format(fish, k))]
    return Chat(messages=messages, meta={"at": f"f:{k + 1}", **meta})


def pair(k, chosen="yes.", rejected="no."):
    ask = [Message(role="user", content=f"Is {FISH[k % 12]}{k} fresh?")]
    return Pair(prompt=ask, chosen=chosen, rejected=rejected, meta={"at": f"f:{k + 1}"})


def case_of(records, tokenizer=None, unread=(), planted=None, **more):
    """A case of records; of trees too, where a tokenizer is given. planted(trees) may spoil them."""
    prepared = None
    if tokenizer is not None:
        make = comparison_trees if isinstance(records[0], Pair) else chat_trees
        made, kept = make(tokenizer, records, None, Window(skip_bad=True))
        if planted:
            planted(made)
        prepared = Prepared(Corpus(records, made, sources.Report("f"), kept), tokenizer, nn.Linear(2, 2))
    return Case("sft", VALUES | more.pop("settings", {}), "f", records, unread, prepared, **more)


def found(name, *args, **more):
    return [(f.severity, f.rows, f.what) for f in run_checks(case_of(*args, **more), [name])]


def spoil_target(k, how):
    def spoil(made):
        made[k][-1].target = how(list(made[k][-1].target))

    return spoil


def spoil_tokens(k, how):
    def spoil(made):
        made[k] = [Segment(how(list(made[k][0].tokens)), how(list(made[k][0].target)))]

    return spoil


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(special, template, eos, bos=None, pad=None):
    tokenizer = train_tokenizer(["What is the price of herring?"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = bos, eos, pad
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chatml():
    return make_tokenizer(["<|im_start|>", "<|im_end|>"], CHATML, eos="<|im_end|>", pad="<|im_end|>")


@pytest.fixture(scope="module")
def with_bos():
    return make_tokenizer(["<|im_start|>", "<|im_end|>"], "{{ bos_token }}" + CHATML, bos="<|begin|>", eos="<|im_end|>")


CHATS = [chat(k) for k in range(40)]


def test_every_check_says_why_and_what_to_do():
    assert len(CHECKS) >= 20
    assert all(one.why and one.do for one in CHECKS.values())


def test_a_clean_file_is_clean(chatml):
    case = case_of(CHATS, chatml)
    case.prepared.loss = None
    assert {f.severity for f in run_checks(case)} == {"note"}


@pytest.mark.parametrize(
    ("name", "how", "severity"),
    [
        ("mask", lambda t: [0.0] * len(t), "error"),
        ("mask", lambda t: [1.0] * len(t), "error"),
        ("end-of-turn", lambda t: [*t[:-1], 0.0], "error"),
        ("pad", lambda t: [*t[:-1], 0.0], "error"),
        ("mask-place", lambda t: [*t[2:], 0.0, 0.0], "error"),
    ],
)
def test_a_spoiled_target(chatml, name, how, severity):
    bad = [f for f in found(name, CHATS, chatml, planted=spoil_target(6, how)) if f[0] != "note"]
    assert [(f[0], f[1]) for f in bad] == [(severity, ("f:7",))]


def test_a_question_that_is_learned_too(chatml):
    """Not every token is learned: the template's marks are not. It is the user's words that give it away."""

    def asked(target):
        return [0.0, *[1.0] * (len(target) - 1)]

    ((severity, rows, what),) = found("mask-place", CHATS, chatml, planted=spoil_target(6, asked))
    assert (severity, rows) == ("error", ("f:7",))
    assert "the question is learned too" in what


def test_rows_that_the_template_refuses(chatml):
    no_eels = "{% if 'eel' in messages[0].content %}{{ raise_exception('no eels') }}{% endif %}"
    picky = make_tokenizer(["<|im_start|>", "<|im_end|>"], no_eels + CHATML, eos="<|im_end|>")
    ((severity, rows, what),) = found("template", CHATS, picky)
    assert (severity, rows) == ("error", ("f:3", "f:15", "f:27", "f:39"))
    assert what.startswith("4 rows that cannot be rendered: ")
    assert "no eels" in what


def test_calls_of_tools_are_answers():
    mark = "{{ '<|im_end|>' + '\n' }}"
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name ~ (c.function.arguments | tojson) }}{% endfor %}"
    listed_tools = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    called = listed_tools + CHATML.replace(" + '<|im_end|>' + '\n' }}", " }}" + calls + mark)
    tokenizer = make_tokenizer(["<|im_start|>", "<|im_end|>"], called, eos="<|im_end|>")
    price = Message(role="assistant", content="", tool_calls=(ToolCall(function=Function(name="price", arguments={"of": "eel"})),))
    tools = [{"type": "function", "function": {"name": "price", "parameters": {}}}]
    talks = [c.model_copy(update={"messages": [c.messages[0], price, Message(role="tool", content="5"), c.messages[1]]}) for c in CHATS]
    talks[7] = CHATS[7].model_copy(update={"messages": [CHATS[7].messages[0], price]})
    rows = [c.model_copy(update={"tools": tools}) for c in talks]
    assert {f.severity for f in run_checks(case_of(rows, tokenizer))} == {"note"}


def test_two_templates_in_a_folder(chatml, tmp_path):
    chatml.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    case = case_of(CHATS, AutoTokenizer.from_pretrained(tmp_path))
    assert run_checks(case, ["template"]) == []
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": CHATML.replace("<|im_end|>", "<|im_end|> ")}))
    (differing,) = run_checks(case, ["template"])
    assert differing.severity == "warning"
    assert "two chat templates that differ" in differing.what


def test_pad_that_is_the_end_token_is_harmless_where_it_is_learned(chatml):
    ((severity, _, what),) = found("pad", CHATS, chatml)
    assert severity == "note"
    assert "'<|im_end|>'" in what


@pytest.mark.parametrize(("how", "what"), [(lambda t: [t[0], *t], "two beginning tokens"), (lambda t: t[1:], "no beginning token")])
def test_the_beginning_token(with_bos, how, what):
    assert found("beginning", CHATS, with_bos) == []
    assert found("beginning", CHATS, with_bos, planted=spoil_tokens(4, how)) == [("error", ("f:5",), f"1 row with {what}")]


def test_a_template_that_doubles_the_beginning(with_bos):
    doubled = make_tokenizer(["<|im_start|>", "<|im_end|>"], "{{ bos_token }}{{ bos_token }}" + CHATML, bos="<|begin|>", eos="<|im_end|>")
    case = case_of(CHATS, with_bos)
    case.prepared.tokenizer = doubled
    assert "doubled" in run_checks(case, ["beginning"])[0].what


@pytest.mark.parametrize(
    ("name", "why", "rows"),
    [
        ("unreadable-row", "not JSON (column 3)", ["f:9"]),
        ("unreadable-row", "message 3 (assistant) follows an assistant turn", ["f:9"]),
        ("unreadable-row", "the prompts of chosen and rejected differ from turn 1 on", ["f:9"]),  # one alone is no shifted column
        ("empty-answer", "message 2 (assistant) is empty", ["f:9"]),
        ("equal-answers", "the rejected answer is the same as the chosen answer", ["f:9"]),
        ("swapped-roles", "message 1 (assistant) opens the conversation", ["f:9"]),
        ("shifted-column", "the prompts of chosen and rejected differ from turn 1 on", [f"f:{i}" for i in range(20, 30)]),
    ],
)
def test_rows_that_could_not_be_read(name, why, rows):
    unread = [(at, why) for at in rows]
    assert [f[:2] for f in found(name, CHATS, unread=unread)] == [("error", tuple(rows))]
    assert [f[:2] for f in found(name, CHATS, unread=unread, settings={"skip_bad": True})] == [("note", tuple(rows))]
    assert [other for other in CHECKS if found(other, CHATS, unread=unread)] == [name]


def test_rows_of_one_file_name_it_once():
    assert listed(["a/b.json:3", "a/b.json:7 = a/b.json:5", "c.json:1"]) == "a/b.json:3, 7 = 5, c.json:1"
    assert listed(["a:3 = t:1", "a:4 = t:2", "a:5 = u:2", "a:1:7 = u:3"]) == "a:3 = t:1, 4 = 2, 5 = u:2, 1:7 = 3"
    assert listed([f"b:{i}" for i in range(9)]) == "b:0, 1, 2, 3, 4, ... (9 in all)"
    assert listed(["window 1", "window 2"]) == "window 1, window 2"


def at(name, records, **more):
    """Row names without what they are compared with."""
    return [row.split(" ")[0] for _, rows, _ in found(name, records, **more) for row in rows]


def test_copies():
    near = chat(40, answer="The " + " ".join(FISH) + " cost {1} crowns and {0} is not the cheapest of them at all today.")
    nearly = near.model_copy(update={"messages": [near.messages[0], Message(role="assistant", content=near.messages[1].content + " Yes.")]})
    rows = [*CHATS, chat(3), near, nearly.model_copy(update={"meta": {"at": "f:43"}})]
    rows[40] = rows[40].model_copy(update={"meta": {"at": "f:41"}})
    assert at("duplicate", rows) == ["f:41", "f:43"]
    assert ["exact" in what for _, _, what in found("duplicate", rows)] == [True, False]
    assert at("duplicate", rows, thorough=False) == ["f:41"]
    asks = [Prompt(messages=row.messages[:1], meta=row.meta) for row in rows]
    assert {severity for severity, _, _ in found("duplicate", asks)} == {"note"}  # each is answered anew


def test_a_leaked_question(tmp_path):
    question = "How many herring can a boat of twenty metres carry home from the bank in a night of storm?"
    rows = [*CHATS, chat(40, question="Please: " + question.upper())]
    (tmp_path / "boats.jsonl").write_text(json.dumps({"question": question}) + "\n")
    sets = [str(tmp_path / "boats.jsonl")]
    assert at("overlap", rows, evaluation_sets=sets) == ["f:41"]
    assert at("overlap", CHATS, evaluation_sets=sets) == []


@pytest.mark.parametrize(
    ("name", "test"),
    [("gsm8k-test.jsonl", True), ("mt_bench.jsonl", True), ("hh.eval.jsonl.gz", True), ("contest.jsonl", False), ("latest.jsonl", False)],
)
def test_a_test_set_by_its_name(name, test):
    case = case_of(CHATS)
    case.spec = f"data/{name}"
    assert [f.severity for f in run_checks(case, ["overlap"])] == ["warning"] * test


def test_pairs():
    rows = [pair(0), pair(1, "Yes.", " yes"), pair(2, "yes.", "no."), pair(3)]
    rows[3] = Pair(prompt=rows[2].prompt, chosen="no.", rejected="yes.", meta={"at": "f:4"})
    assert at("equal-answers", rows) == ["f:2"]
    assert at("contradiction", rows) == ["f:4"]
    thumbs = [Rated(prompt=rows[0].prompt, answer="a", rating=r, meta={"at": f"f:{i}"}) for i, r in enumerate((1, 1, 0), 1)]
    assert at("contradiction", thumbs) == ["f:3"]


@pytest.mark.parametrize("lag", [1, -1])
def test_answers_of_other_rows(lag):
    said = [c.messages[1] for c in CHATS]
    rows = [c.model_copy(update={"messages": [c.messages[0], said[(k - lag) % 40] if k >= 10 else said[k]]}) for k, c in enumerate(CHATS)]
    ((severity, named, what),) = found("shifted-column", rows)
    assert severity == "error"
    assert named[0] in ("f:10", "f:11", "f:12")
    assert ("before" if lag == 1 else "after") in what
    assert found("shifted-column", CHATS) == []


def test_labels_of_other_rows():
    good = [k * k % 7 < 3 for k in range(120)]
    texts = [f"{'fresh and shiny' if g else 'old and dull'} {FISH[k % 12]}" for k, g in enumerate(good)]
    ask = [Message(role="user", content="How is it?")]
    for shift, want in ((0, 0), (1, 1)):
        rows = [Rated(prompt=ask, answer=t, rating=float(good[k - shift]), meta={"at": f"f:{k}"}) for k, t in enumerate(texts)]
        assert len(found("shifted-column", rows)) == want


def test_roles():
    ask, answer = CHATS[7].messages
    swapped = CHATS[7].model_copy(
        update={"messages": [Message(role="user", content=answer.content), Message(role="assistant", content=ask.content)]}
    )
    assert at("swapped-roles", [*CHATS[:7], swapped, *CHATS[8:]]) == ["f:8"]
    assert at("swapped-roles", CHATS) == []
    first = CHATS[3].model_copy(update={"messages": [Message(role="assistant", content="Hello."), *CHATS[3].messages]})
    assert at("swapped-roles", [*CHATS[:3], first, *CHATS[4:]]) == ["f:4"]
    twice = CHATS[3].model_copy(update={"messages": [Message(role="user", content="Hello."), *CHATS[3].messages]})
    assert at("swapped-roles", [*CHATS[:3], twice, *CHATS[4:]]) == ["f:4"]


@pytest.mark.parametrize("good", ["café “so” – naïve’s", "Ärger über Öl", "価格 €5 ½ É—", "Привет, мир"])
def test_mojibake(good):
    assert mojibake(good) == ""
    assert mojibake(good.encode().decode("latin-1")) != ""
    rows = [*CHATS, chat(40, answer="Caf\u00c3\u00a9")]
    assert at("mixed-encoding", rows) == ["f:41"]


def test_sizes_and_cuts():
    cut = "This one was cut in the middle of a very long sentence about the fish of the harbour and their prices in wint"
    rows = [*CHATS, *(chat(40 + k, answer=cut) for k in range(3)), chat(43, answer="x" * 200_000)]
    assert at("cut-answer", rows) == ["f:41", "f:42", "f:43"]
    assert at("huge-row", rows) == ["f:44"]
    marked = [*CHATS, chat(40, question="[INST] {} [/INST]")]
    assert at("template-in-text", marked) == ["f:41"]


def test_one_answer_that_ends_where_the_window_does(chatml):
    cut = "This one was cut in the middle of a very long sentence about the fish of the harbour and their prices in wint"
    case = case_of([*CHATS, chat(40, answer=cut)], chatml)
    assert run_checks(case, ["cut-answer"]) == []
    case.prepared.corpus.kept.limit = max(lengths(case.prepared.corpus.trees[-1]))
    assert [f.rows for f in run_checks(case, ["cut-answer"])] == [("f:41",)]
    case.prepared.corpus.kept.cut[40] = "f:41: its prompt was cut, so that it fills the window"
    assert run_checks(case, ["cut-answer"]) == []


def test_rows_that_do_not_fit(chatml):
    case = case_of(CHATS, chatml)
    kept = trees.Report(rows=40, limit=9, dropped={3: "f:4: 12 tokens"}, cut={5: "f:6: 12 tokens, 3 cut"}, long={3: 12, 5: 12})
    whole = case.prepared.corpus
    case.prepared.corpus = whole._replace(kept=kept, trees=whole.trees[:-1])
    found = run_checks(case, ["length"])
    assert [(f.severity, f.rows) for f in found[:2]] == [("error", ("f:4",)), ("note", ("f:6",))]
    assert "1 row of more than 9 tokens, the longest 12: refused by --too-long error" in found[0].what
    assert histogram([1, 2, 3, 9], [9])[1].split() == ["2-3", "#" * 30, "2"]
    assert histogram([1, 2, 3, 9], [9])[3].split(None, 2) == ["8-15", "x" * 15, "1, 1 beyond the limit"]


def test_batch_arithmetic_in_words(chatml):
    case = case_of(CHATS, chatml)
    case.steps = Batching(batch=8, epochs=2).steps(40)
    text = arithmetic(case)
    tokens = round(sum(len(t[0].tokens) for t in case.prepared.corpus.trees) / 5)
    assert f"40 rows; each optimiser step reads 8 of them, about {tokens:,} tokens" in text
    assert "5.0 steps are a pass over the rows, 10 optimiser steps in all (2 passes)" in text


def test_a_backbone_that_roles_share_is_counted_once():
    backbone = nn.Linear(2, 3).requires_grad_(False)

    class Role(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Linear(1, 4, bias=False)

        def borrowed(self):
            return backbone.modules()

    of = SimpleNamespace(module=nn.ModuleDict({"policy": Role(), "value": Role()}))
    assert parameters(of) == (9 + 8, 8)


@pytest.mark.parametrize(
    ("optimizer", "count", "severity"), [("adamw", 1, "warning"), ("adamw", 2, "error"), ("muon", 1, "error"), (None, 1, "warning")]
)
def test_memory_for_each_rank_and_by_the_optimiser(chatml, monkeypatch, optimizer, count, severity):
    monkeypatch.setattr("temper.train.machine.free_memory", lambda device: 100)  # a layer of 6 parameters takes 96 or 168
    settings = {"optimizer": optimizer} if optimizer else {}
    assert [one[0] for one in found("memory", CHATS, chatml, ranks=count, settings=settings)] == [severity]


# ---------------------------------------------------------------- as a command, and before training


def test_the_command_and_training_refuse(toy, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(toy.chats).read_text().splitlines()]
    rows[4]["messages"][0]["content"] = "What do you know of Sea Star, Old Tom, Blue Gull, Red Hen, Grey Cat and Long Eel?"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": rows[4]["messages"][0]["content"]}) + "\n")
    own = ["sft", "--model", toy.base, "--data", str(tmp_path / "rows.jsonl"), "--held-out", "0", "--epochs", "0.1", "--threads", "1"]
    own += ["--tokens-per-microbatch", "512"]
    sets = ["--evaluation-sets", str(tmp_path / "test.jsonl")]
    assert main(["doctor", *own, "--checks", "overlap"]) == 0
    capsys.readouterr()
    assert main(["doctor", *own, *sets, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    (leak,) = [f for f in found if f["severity"] == "error"]
    assert leak["check"] == "overlap"
    assert leak["rows"][0].startswith(f"{tmp_path / 'rows.jsonl'}:5 ")
    assert {"batch", "memory", "longest-batch", "length"} <= {f["check"] for f in found}
    out = ["--out", str(tmp_path / "out")]
    assert main([*own, *sets, *out]) == 1
    err = capsys.readouterr().err
    assert "1 row with something of test" in err
    assert "1 optimiser step in all (" in err
    assert not (tmp_path / "out").exists()
    assert main([*own, *sets, *out, "--doctor", "warn"]) == 0
    assert "1 error" in json.loads((tmp_path / "out" / "stage.json").read_text())["card"]["doctor"][0]


def test_what_the_command_cannot_use(capsys):
    assert main(["doctor", "sff"]) == 2
    assert "neither a recipe nor a method" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_not_loaded(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("temper.train.machine.free_memory", lambda device: 1000)
    monkeypatch.setattr("temper.methods.sft.load_policy", lambda *a, **k: pytest.fail("loaded"))
    own = ["sft", "--model", toy.base, "--data", toy.chats]
    assert main(["doctor", *own]) == 1
    assert "are free: not loaded" in capsys.readouterr().out
    assert main([*own, "--out", str(tmp_path / "out")]) == 1
    assert "are free: not loaded" in capsys.readouterr().err


def test_a_policy_that_is_not_its_reference(toy, tmp_path):
    settings = build(load("dpo").settings("dpo"), {"model": toy.sft, "data": toy.pairs, "batch": 4, "held_out": 0.0})
    (found,) = examine_stage("dpo", settings, tmp_path / "run", (), ["reference"])
    assert found.severity == "note"
    job = load("dpo").prepare(settings, Run(tmp_path / "other"))
    trees = job.prepared.corpus.trees
    label(trees, "ref_logp", [[segment.labels["ref_logp"] + 1 for segment in tree] for tree in trees])
    case = Case("dpo", VALUES, "f", job.prepared.corpus.records, (), job.prepared)
    (found,) = run_checks(case, ["reference"])
    assert found.severity == "error"
    assert "must be the same model" in found.what


def test_a_policy_of_ppo_that_is_not_its_reference(toy, tmp_path):
    values = {"model": toy.sft, "reward": toy.reward, "prompts": toy.prompts, "max_new": 8, "tokens_per_microbatch": 256}
    job = load("ppo").prepare(build(load("ppo").settings("ppo"), values), Run(tmp_path / "run"))
    case = Case("ppo", values, "f", job.prepared.corpus.records, (), job.prepared)
    assert [f.severity for f in run_checks(case, ["reference"])] == ["note"]
    with torch.no_grad():
        next(job.prepared.module["policy"].parameters()).mul_(1.5)
    (found,) = run_checks(case, ["reference"])
    assert found.severity == "error"
    assert "the policy is not the reference" in found.what


def test_a_recipe_is_looked_at_as_far_as_it_is_made(toy, tmp_path, capsys):
    stages = {"base": {"method": "pretrain", "data": toy.text, "width": 16, "layers": 1, "heads": 2, "context": 160, "vocab": 330}}
    stages["sft"] = {"method": "sft", "model": "@base", "data": toy.chats}
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", "stages": stages}))
    assert main(["doctor", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    assert "longest-batch: " in out.split("sft:")[0]
    assert "waits for base, not made yet" in out.split("sft:")[1]
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_the_evaluation_sets_of_a_recipe(toy, tmp_path, capsys):
    (tmp_path / "test.jsonl").write_text(Path(toy.text).read_text().splitlines()[0] + "\n")
    stages = {"base": {"method": "pretrain", "data": toy.text, "width": 16, "layers": 1, "heads": 2, "context": 160, "vocab": 330}}
    stages["base"] |= {"ranks": 2, "batch": 4}
    whole = {"name": "r", "evaluation_sets": [str(tmp_path / "test.jsonl")], "stages": stages}
    (tmp_path / "r.yaml").write_text(json.dumps(whole))
    assert main(["doctor", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "r")]) == 1
    out = capsys.readouterr().out
    assert "with something of test" in out
    assert "of them on 2 ranks" in out
    _, (stage,) = read_recipe(str(tmp_path / "r.yaml"), None)
    with pytest.raises(UserError, match="with something of test"):
        make(stage, tmp_path / "r", "", None, None)


def test_an_adapter_needs_no_room_for_the_gradients_of_all_weights(toy, monkeypatch):
    room = 4 * 3 * parameters_in(toy.base)  # the weights, thrice
    monkeypatch.setattr("temper.train.machine.free_memory", lambda device: room)
    own = {"model": toy.base, "adapter": "full"}
    assert [finding.severity for finding in foresee("sft", own, 1)] == ["error"]
    assert foresee("dpo", own | {"adapter": "lora"}, 1) == []
    assert foresee("dpo", own | {"adapter": "auto"}, 1) != []  # of a whole model that is all weights
