"""The rules over comparisons as methods: on rankings, without a reference, and what their gradient is in the end."""

from itertools import combinations

import pytest
import torch
from toy import train, user, values_of, write
from transformers import AutoModelForCausalLM

from temper.config import UserError, build
from temper.data.sources import read
from temper.data.template import render_chat
from temper.data.trees import comparison_tree, comparison_trees
from temper.forest import plant
from temper.losses.preference import RULES, Pairs
from temper.methods import preference
from temper.methods.comparisons import count_records
from temper.models.load import load_policy
from temper.records import Message, Pair, Ranked
from temper.runs import Run

ANSWERS = ["It is red.", "Blue.", "The boat is grey, I think.", "No.", "I do not know."]
QUESTIONS = ["What colour is the Sea Star?", "Tell me the colour of the Old Tom.", "Which colour has the Red Hen?"]
OVER_PAIRS = [name for name, rule in RULES.items() if not rule.listwise]


def ranking(question, answers):
    return Ranked(prompt=[Message(role="user", content=question)], answers=answers)


RANKINGS = [ranking(q, answers) for q, answers in zip(QUESTIONS, (ANSWERS[:3], ANSWERS[1:3], ANSWERS), strict=True)]


def all_pairs(record):
    return [Pair(prompt=record.prompt, chosen=a, rejected=b) for a, b in combinations(record.answers, 2)]


@pytest.fixture(scope="module")
def moved(toy):
    """A policy that has left its reference: (policy, reference, tokenizer)."""
    reference, tokenizer = load_policy(toy.sft)
    policy, _ = load_policy(toy.sft)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.02 * torch.randn_like(p)
    return policy, reference, tokenizer


def planted(moved, records):
    _, reference, tokenizer = moved
    trees = [comparison_tree(tokenizer, record) for record in records]
    preference.with_reference(reference, trees, 8192)
    return plant(trees, count_records(trees))


def double(toy, state):
    """transformers' own model in float64."""
    model = AutoModelForCausalLM.from_pretrained(f"{toy.sft}/model").double().eval()
    model.load_state_dict({name: x.double() for name, x in state.items()})
    return model


def plain_logp(model, ids, target):
    logp = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]
    return (logp * torch.tensor(target)[1:]).sum()


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "fdpo"])
def test_the_gradient_of_a_packed_forest_is_that_of_plain_float64_forwards(toy, moved, name):
    """Policy and reference by transformers, one conversation at a time, through the same rule in float64."""
    policy, reference, tokenizer = moved
    pairs = [all_pairs(r)[0] for r in RANKINGS]
    loss = preference.make_loss(RULES[name], {})(policy, planted(moved, pairs)).terms["preference"].total
    got = torch.autograd.grad(loss, list(policy.parameters()))
    models = [double(toy, m.state_dict()) for m in (policy, reference)]
    sides = [
        [render_chat(tokenizer, [*p.prompt, Message(role="assistant", content=getattr(p, side))], "last") for p in pairs]
        for side in ("chosen", "rejected")
    ]
    logp = [[torch.stack([plain_logp(m, *row) for row in rows]) for rows in sides] for m in models]
    length = [torch.tensor([float(sum(target)) for _, target in rows]) for rows in sides]
    want = RULES[name](Pairs(*logp[0], *(x.detach() for x in logp[1]), *length)).sum()
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    wanted = torch.autograd.grad(want, list(models[0].parameters()))
    scale = max(float(g.abs().max()) for g in wanted)
    assert scale > 0.01
    for (at, _), a, b in zip(policy.named_parameters(), got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4 * scale, rtol=1e-3, msg=lambda text, at=at: f"{at}: {text}")


@pytest.mark.parametrize("name", OVER_PAIRS)
def test_the_loss_of_a_ranking_is_the_mean_over_its_pairs_one_by_one(moved, name):
    policy, loss = moved[0], preference.make_loss(RULES[name], {})
    with torch.no_grad():
        out = loss(policy, planted(moved, RANKINGS))
        one_by_one = sum(
            sum(float(loss(policy, planted(moved, [pair])).terms["preference"].total) for pair in all_pairs(r)) / len(all_pairs(r))
            for r in RANKINGS
        )
    assert out.terms["preference"].per == "records"
    assert float(out.terms["preference"].total) == pytest.approx(one_by_one, rel=1e-5)
    assert out.metrics["margin"][1] == 3 + 1 + 10


def test_plackett_luce_takes_rankings_as_they_are_and_pairs_as_dpo_does(moved):
    policy = moved[0]
    listwise, dpo = (preference.make_loss(RULES[name], {"beta": 0.7}) for name in ("pldpo", "dpo"))
    pairs = [pair.model_copy(update={"soft": soft}) for pair, soft in zip(all_pairs(RANKINGS[0]), (1.0, 0.5, 0.8), strict=True)]
    with torch.no_grad():
        forest = planted(moved, pairs)
        assert float(listwise(policy, forest).terms["preference"].total) == pytest.approx(
            float(dpo(policy, forest).terms["preference"].total)
        )
        forest = planted(moved, RANKINGS)
        gain = preference.answer_logp(policy, forest) - forest.columns["ref_logp"]
        s = [0.7 * gain[part] for part in ([1, 2, 3], [5, 6], [8, 9, 10, 11, 12])]
        want = sum(float(x[k:].logsumexp(0) - x[k]) for x in s for k in range(len(x)))
        assert float(listwise(policy, forest).terms["preference"].total) == pytest.approx(want, rel=1e-5)


def test_a_margin_of_the_data_is_the_offset(moved):
    policy, pair = moved[0], all_pairs(RANKINGS[0])[0]
    forest = planted(moved, [pair.model_copy(update={"margin": 2.0})])
    with torch.no_grad():
        out = preference.make_loss(RULES["dpo"], {"beta": 0.5, "offset": 0.3})(policy, forest)
    z = 0.5 * out.metrics["margin"][0] - 0.6
    assert float(out.terms["preference"].total) == pytest.approx(float(torch.nn.functional.softplus(-z)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.reference])
def test_a_rule_without_a_reference_computes_none(toy, tmp_path, monkeypatch, name):
    monkeypatch.setattr(preference, "with_reference", lambda *given: pytest.fail("computed a reference"))
    summary = train(name, tmp_path / "out", **values_of(name, toy) | {"epochs": 1})
    assert not (tmp_path / ".references").exists()
    assert 0 <= summary["held_out_accuracy_low"] <= summary["held_out_accuracy"] <= summary["held_out_accuracy_high"] <= 1


@pytest.mark.parametrize("name", RULES)
def test_every_rule_learns_to_prefer_what_it_was_shown(toy, name):
    model, tokenizer = load_policy(toy.sft)
    trees, _ = comparison_trees(tokenizer, read(toy.pairs, "comparisons").records, model, preference.Window())
    if RULES[name].reference:
        preference.with_reference(model, trees, 8192)
    s = build(preference.settings(name), values_of(name, toy) | {"batch": 18, "epochs": 12, "lr": 5e-3})
    rows = [step.metrics for step in preference.train(s, model, trees)]
    assert rows[-1]["margin"] > rows[0]["margin"] + 1
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_held_out_comparisons_of_rankings(toy, tmp_path):
    """All of them are counted; those of one ranking share its answers, and the interval says so."""
    rows = [{"prompt": user(f"{r.prompt[0].content} {i}"), "answers": r.answers, "meta": {}} for i in range(4) for r in RANKINGS]
    summary = train("ipo", tmp_path / "ipo", model=toy.sft, data=str(write(tmp_path / "rows.jsonl", rows)), held_out=0.5, lr=1e-3)
    card = Run(tmp_path / "ipo").stage["card"]
    assert card["records"] + card["held_out"] == 12
    assert card["comparisons"] + summary["held_out_pairs"] == 4 * 14


def test_nothing_but_ties(toy, tmp_path):
    rows = [{"prompt": user(q), "chosen": "Blue.", "rejected": "Red.", "margin": None, "soft": 0.5, "meta": {}} for q in QUESTIONS]
    with pytest.raises(UserError, match="no record prefers one answer to another, all are ties"):
        train("dpo", tmp_path / "dpo", model=toy.sft, data=str(write(tmp_path / "ties.jsonl", rows)), held_out=0)
    assert not (tmp_path / "dpo").exists()


@pytest.mark.parametrize(("name", "flag"), [("dpo", "beta"), ("ipo", "tau"), ("kto", "beta"), ("orpo", "lam")])
def test_no_pull_at_all_is_refused(toy, tmp_path, name, flag):
    with pytest.raises(UserError, match=f"'?{flag}'?: got 0, input should be greater than 0"):
        train(name, tmp_path / "out", **values_of(name, toy) | {flag: 0})


def test_a_file_without_a_preference(toy, tmp_path):
    with pytest.raises(UserError, match=r"chats\.jsonl: .*holds conversations, needed are pairs of answers or rankings of answers"):
        train("simpo", tmp_path / "out", **values_of("simpo", toy) | {"data": toy.chats})
