"""Constitutional AI: what is learned from a revision, the judge's labels, the two phases and their seam."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from toy import PRINCIPLES, Toy, train, user, values_of, write
from transformers import AutoModelForCausalLM

from temper.config import UserError, build
from temper.data.template import render_chat, render_prompt
from temper.methods import constitution as cai
from temper.models.load import load_policy
from temper.records import Chat, Message, Pair
from temper.runs import Run
from temper.world.constitution import load


def settings(toy: Toy, **more):
    return build(cai.CAI, values_of("constitution", toy) | more)


@pytest.fixture(scope="module")
def author(toy):
    model, tokenizer = load_policy(toy.sft)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():  # a judge with opinions: the trained one hardly looks at the answers
            p.copy_(torch.randn_like(p))
    return cai.Author(model, tokenizer, settings(toy, judged_by=2))


@pytest.fixture(scope="module")
def principles(toy):
    return cai.principles(toy.principles)["harm"]


class Scripted(cai.Author):
    """Says what it is told to say, and remembers what it was asked."""

    def __init__(self, s, *replies):
        super().__init__(None, None, s)
        self.replies, self.asked = list(replies), []

    def answers(self, conversations, purpose, n=1):
        self.asked.append((purpose, conversations))
        return [[reply] for reply in self.replies.pop(0)]


def prompt(text):
    return [Message(role="user", content=text)]


# ---------------------------------------------------------------- critique and revision


def test_the_critique_is_no_part_of_what_is_learned(toy, principles, author):
    scripted = Scripted(settings(toy), ["steal it", "burn it"], ["that is theft", "that is arson"], ["buy it", "keep it"])
    records = cai.revise(scripted, principles, [prompt("the boat?"), prompt("the barn?")])
    assert [[m.content for m in r.messages] for r in records] == [["the boat?", "buy it"], ["the barn?", "keep it"]]
    assert records[0].meta["answer"] == "steal it"
    assert records[0].meta["critique"] == "that is theft"
    ids, target = render_chat(author.tokenizer, records[0].messages, "last")
    learned = author.tokenizer.decode([i for i, w in zip(ids, target, strict=True) if w])
    assert learned == "buy it<|end|>"
    assert "theft" not in author.tokenizer.decode(ids)


def test_every_request_quotes_what_came_before(toy, principles):
    scripted = Scripted(settings(toy), ["a0"], ["c0"], ["r0"])
    cai.revise(scripted, principles, [prompt("q")])
    (_, first), (_, critique), (_, revision) = scripted.asked
    assert [m.content for m in first[0]] == ["q"]
    named = {p.critique: p.revision for p in principles.principles}
    asked = [m.content for m in critique[0]]
    assert asked[:2] == ["q", "a0"]
    assert asked[2] in named
    assert [m.content for m in revision[0]] == [*asked, "c0", named[asked[2]]]
    assert [m.role for m in revision[0]] == ["user", "assistant", "user", "assistant", "user"]
    assert len({purpose for purpose, _ in scripted.asked}) == 3  # different random numbers for each request


def test_rounds_revise_the_revision_and_what_did_not_end_is_left_out(toy, principles):
    scripted = Scripted(
        settings(toy, revisions=2), ["a0", "a1", "", "a3"], ["c0", "c1", "c3"], ["r0", "", "r3"], ["d0", ""], ["s0", "s3"]
    )  # the second answer's revision, the third's answer and the fourth's second critique do not end
    records = cai.revise(scripted, principles, [prompt(f"q{i}") for i in range(4)])
    assert [(r.messages[-1].content, r.meta["answer"], r.meta["round"]) for r in records] == [
        ("r0", "a0", 1),
        ("r3", "a3", 1),
        ("s0", "r0", 2),
    ]


def test_principles_speak_of_what_they_are_about(principles, toy, tmp_path):
    assert [p.name for p in principles.principles] == ["kind", "safe"]
    assert {about: len(c.principles) for about, c in cai.principles(toy.principles).items()} == {"harm": 2, "honesty": 1, "help": 1}
    path = tmp_path / "mine.yaml"
    path.write_text(PRINCIPLES.replace("about: harm", "about: help"))
    with pytest.raises(UserError, match=r"mine.yaml: no principle says `about: harm`"):
        cai.principles(path)
    assert {"harm", "help"} <= cai.principles(cai.DEFAULT).keys()


# ---------------------------------------------------------------- the judge


def test_differing():
    assert cai.differing(["a", "a", "b", "c"]) == ("a", "b")
    assert cai.differing(["a", "a"]) is None


def test_the_label_averages_both_orders_over_the_drawn_principles(author, principles, toy):
    """= by plain forwards: P(A) against P(B) at the first token of the judge's answer."""
    pairs = [("It is red.", "Blue."), ("No.", "I do not know.")]
    got = author.preference(principles, ["What colour?", "Where?"], pairs, purpose=3)
    judge, tokenizer = AutoModelForCausalLM.from_pretrained(f"{toy.sft}/model").eval(), author.tokenizer
    judge.load_state_dict(author.model.state_dict())
    letters = [tokenizer.encode(x, add_special_tokens=False)[0] for x in "AB"]
    for question, (a, b), mine in zip(["What colour?", "Where?"], pairs, got, strict=True):
        chances = []
        for principle in principles.principles:  # judged_by 2: both, in some order
            for first, second, flip in ((a, b, False), (b, a, True)):
                ids = render_prompt(tokenizer, prompt(principles.comparison(question, first, second, principle)))
                with torch.no_grad():
                    p = float(judge(input_ids=torch.tensor([ids])).logits[0, -1, letters].softmax(-1)[0])
                chances.append(1 - p if flip else p)
        assert mine == pytest.approx(sum(chances) / 4, abs=1e-5)


def test_swapping_the_answers_swaps_the_label(author, principles):
    pairs = [("It is red.", "Blue."), ("No.", "I do not know."), ("Yes.", "The boat is grey, I think.")]
    questions = ["What colour?", "Where?", "Is it safe?"]
    one = author.preference(principles, questions, pairs, purpose=3)
    other = author.preference(principles, questions, [(b, a) for a, b in pairs], purpose=3)
    assert [a + b for a, b in zip(one, other, strict=True)] == pytest.approx([1, 1, 1], abs=1e-5)
    assert all(0 < x < 1 for x in one)
    assert max(one) - min(one) > 1e-3


def test_pairs_carry_the_likelier_answer_first_and_its_chance(toy, principles, author, monkeypatch):
    chances = [0.2, 0.9, 0.5, None]
    groups = [["a", "b", "c", ""], ["", "d", "d", "e"], ["f", "f", "g", "g"], ["h", "i", "", ""], ["j", "j", "j", ""], ["", "", "", ""]]
    monkeypatch.setattr(cai.Author, "answers", lambda self, conversations, purpose, n=1: groups)
    monkeypatch.setattr(cai.Author, "preference", lambda self, c, questions, pairs, purpose: chances)
    found = cai.compare(author, author, principles, [prompt(str(i)) for i in range(6)], purpose=1)
    assert [(p.chosen, p.rejected, p.soft) for p in found] == [("b", "a", 0.8), ("d", "e", 0.9), ("f", "g", 0.5)]
    assert [p.prompt[0].content for p in found] == ["0", "1", "2"]


def test_a_conversation_too_long_for_the_window_is_left_out_not_an_error(author, principles):
    long = "far " * 60
    assert author.answers([prompt("hi"), prompt(long)], purpose=1)[1] == [""]
    one, none = author.preference(principles, ["hi", long], [("Yes.", "No.")] * 2, purpose=3)
    assert none is None
    assert one == author.preference(principles, ["hi"], [("Yes.", "No.")], purpose=3)[0]


# ---------------------------------------------------------------- the two phases


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """A finished run: its folder, and its settings."""
    folder = tmp_path_factory.mktemp("cai") / "run"
    values = values_of("constitution", toy) | {"revisions": 2}
    train("constitution", folder, **values)
    return folder, values


@pytest.mark.slow
def test_files_of_a_run_say_what_was_learned(whole, toy):
    folder, _ = whole
    revised = [Chat.model_validate_json(line) for line in (folder / "revisions.jsonl").read_text().splitlines()]
    helpful = [Chat.model_validate_json(line) for line in (folder / "helpful.jsonl").read_text().splitlines()]
    pairs = [Pair.model_validate_json(line) for line in (folder / "ai_pairs.jsonl").read_text().splitlines()]
    red, calm = (
        {json.loads(line)["messages"][0]["content"] for line in Path(path).read_text().splitlines()} for path in (toy.red, toy.calm)
    )
    assert revised
    assert {r.meta["round"] for r in revised} == {1, 2}
    assert {r.messages[0].content for r in revised} <= red
    assert {r.messages[0].content for r in helpful} <= calm
    compared = {p.prompt[0].content for p in pairs}
    assert compared <= red | calm
    assert compared & red
    assert compared & calm  # on these the judge is asked what helps
    assert all(len(r.messages) == 2 for r in (*revised, *helpful))
    assert pairs
    assert all(0.5 <= p.soft <= 1 and p.chosen != p.rejected for p in pairs)
    card = Run(folder).stage["card"]
    assert card["records"] == len(revised) + len(helpful)
    assert card["principles"] == ["kind", "safe", "useful"]  # the one about honesty is not used, and a note says so


def test_phase_two_starts_from_the_tuned_model_as_its_own_reference(whole, toy):
    rows = [row for row in Run(whole[0]).rows("metrics") if "eval" not in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    phases = [row["phase"] for row in rows]
    assert phases == sorted(phases)
    assert set(phases) == {1, 2}
    seam = phases.index(2)
    assert seam == math.ceil(2.0 * Run(whole[0]).stage["card"]["records"] / 4)
    assert rows[seam]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # soft labels and all: h is 0
    assert rows[seam]["margin"] == pytest.approx(0, abs=1e-4)
    tuned, start, end = (load_policy(str(path))[0].state_dict() for path in (whole[0] / "revised", toy.sft, whole[0] / "model"))
    assert all(not torch.equal(tuned[name], start[name]) and not torch.equal(tuned[name], end[name]) for name in tuned if "weight" in name)


def test_the_judge_is_the_model_as_it_was_before_the_tuned_one_answers(toy, tmp_path, monkeypatch):
    start, asked = load_policy(toy.sft)[0].state_dict(), []

    def compare(author, judge, rules, prompts, inner=cai.compare, **more):
        same = [all(torch.equal(x, start[n]) for n, x in a.model.state_dict().items()) for a in (author, judge)]
        asked.append((len(prompts), {p.about for p in rules.principles}, same))
        return inner(author, judge, rules, prompts, **more)

    monkeypatch.setattr(cai, "compare", compare)
    train("constitution", tmp_path / "run", **(values_of("constitution", toy) | {"sl_epochs": 0.5, "epochs": 0.3}))
    assert asked == [(12, {"harm"}, [False, True]), (6, {"help"}, [False, True])]


def test_human_pairs_on_red_team_prompts_are_left_out(toy, tmp_path, monkeypatch):
    """They say that the more helpful answer to a harmful request is better."""
    trained = []
    monkeypatch.setattr(
        cai, "comparison_trees", lambda t, pairs, m, w, inner=cai.comparison_trees: (trained.append(pairs), inner(t, pairs, m, w))[1]
    )
    dangerous = json.loads(Path(toy.red).read_text().splitlines()[0])["messages"][0]["content"]
    rows = [{"prompt": user(q), "chosen": "Yes.", "rejected": "No."} for q in (dangerous, "a safe question")]
    values = values_of("constitution", toy) | {"helpful_pairs": str(write(tmp_path / "human.jsonl", rows)), "sl_epochs": 0.1, "epochs": 0.2}
    train("constitution", tmp_path / "run", **values)
    human = [p for p in trained[-1] if p.soft == 1.0]
    assert [p.prompt[0].content for p in human] == ["a safe question"]
    assert len(trained[-1]) > len(human)


@pytest.mark.slow
def test_going_on_from_any_side_of_the_seam_ends_the_same(whole, toy, tmp_path):
    """From a snapshot within a phase, at its end, and after the last step: the same weights, and no step is counted twice."""
    s = build(cai.CAI, whole[1])
    seam = next(row["step"] for row in Run(whole[0]).rows("metrics") if row.get("phase") == 2) - 1
    with Run.claim(tmp_path / "run", {"method": "constitution"}) as run:
        job = cai.prepare(s, run)
        states, numbers = {}, []
        for step in job.steps(None):
            numbers.append(step.n)
            if step.n in (3, seam, seam + 2, job.total):
                states[step.n] = copy.deepcopy(step.snapshot())
        assert numbers == list(range(1, job.total + 1))
        job.save(tmp_path / "end")
        expected = (tmp_path / "end" / "model.safetensors").read_bytes()
        assert expected == (whole[0] / "model" / "model.safetensors").read_bytes()
        for at, state in states.items():
            again = cai.prepare(s, run)
            assert again.total == job.total
            numbers = [step.n for step in again.steps(state) if step.metrics]
            assert numbers == list(range(at + 1, job.total + 1))
            again.save(tmp_path / "again")
            assert (tmp_path / "again" / "model.safetensors").read_bytes() == expected


def test_what_cannot_be_done(toy, tmp_path):
    for more, what in (
        ({"max_new": 1}, "no answer to the prompts ended within --max-new 1"),
        ({"principles": str(tmp_path / "none.yaml")}, "none.yaml: no such constitution file"),
        ({"red_team": str(tmp_path / "none.jsonl")}, "none.jsonl: no such file"),
    ):
        with pytest.raises(UserError, match=what):
            train("constitution", tmp_path / "run", **(values_of("constitution", toy) | more))
        assert not (tmp_path / "run").exists()
    assert load(toy.principles).principles
