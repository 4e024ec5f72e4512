"""Process reward models: labels at the right tokens, the loss by hand, labels by oracle and rollouts, use in search; on the toy."""

import itertools
import random

import pytest
import torch
from toy import train, user, write

from temper.config import UserError, build
from temper.data.steps import cut, step_ends, step_trees
from temper.data.template import render_chat, render_prompt, stop_ids
from temper.forest import plant
from temper.judges.process import ProcessReward, exact_labels, right_answer, rollout_labels, search
from temper.judges.rating import Answer
from temper.judges.reward_model import RewardModel
from temper.losses.reward import step_loss
from temper.methods import process_reward as prm
from temper.models.load import load_policy, load_scalar
from temper.records import Message, Prompt, Steps
from temper.rollout import Sampling
from temper.runs import Run
from temper.world import Ask, stream
from temper.world.answers import slipped, solution
from temper.world.asks import make
from temper.world.grammar import words
from temper.world.phrases import grammar
from temper.world.streams import Draw

QUESTION = [Message(role="user", content="Add them.")]
WINDOW = build(prm.ProcessRewardSettings, {"model": "m"}).window


def steps(*texts, labels, question=QUESTION, **meta):
    return Steps(prompt=question, steps=list(texts), labels=list(labels), meta=meta)


@pytest.fixture(scope="module")
def scorer(toy):
    return load_scalar(toy.sft, seed=1)


def settings(**values):
    return build(prm.ProcessRewardSettings, {"model": "m", **values})


# ---------------------------------------------------------------- steps and their tokens


def test_what_a_step_is():
    text = "One and 3.5 is 4.5. Is it? Yes!\nNow  (so it is.) done"
    assert [text[a:b] for a, b in cut(text, "sentence")] == ["One and 3.5 is 4.5.", "Is it?", "Yes!", "Now  (so it is.)", "done"]
    assert [text[a:b] for a, b in cut(text, "line")] == ["One and 3.5 is 4.5. Is it? Yes!", "Now  (so it is.) done"]
    assert cut(" \n ", "line") == cut("", "sentence") == []


@pytest.mark.parametrize("by", ["line", "sentence"])
def test_steps_end_at_the_token_of_their_last_character(scorer, by):
    """With letters of several bytes too; the last step takes the end of the turn with it."""
    _, tokenizer = scorer
    texts = ["3 and 4 is 7.", "Ünïted, 7 – 2 is 5.", "So 5."]
    joined = ("\n" if by == "line" else " ").join(texts)
    ids, _ = render_chat(tokenizer, [*QUESTION, Message(role="assistant", content=joined)], "last")
    answer = ids[len(render_prompt(tokenizer, QUESTION)) :]
    ends = step_ends(tokenizer, answer, by)
    assert len(ends) == 3
    assert ends[-1] == len(answer) - 1
    for n, end in enumerate(ends[:-1], 1):
        said = ("\n" if by == "line" else " ").join(texts[:n])
        assert tokenizer.decode(answer[: end + 1], skip_special_tokens=True).strip() == said
        assert not tokenizer.decode(answer[:end], skip_special_tokens=True).startswith(said)


def test_a_tokenizer_whose_tokens_are_no_texts_of_their_own(scorer):
    class Odd:
        """Drops the blank before a token that stands alone, as SentencePiece does."""

        def decode(self, tokens, skip_special_tokens=True):
            return " ".join("abcdefg."[t] for t in tokens)

    assert step_ends(Odd(), [0, 1, 7, 2, 7], "sentence") == [2, 4]


def test_solutions_share_what_they_begin_with(scorer):
    model, tokenizer = scorer
    records = [
        steps("1 and 1 is 2.", "2 and 1 is 3.", labels=[1, 1]),
        steps("1 and 1 is 2.", "2 and 1 is 4.", labels=[1, 0]),
        steps("1 and 1 is 5.", "2 and 1 is 3.", labels=[0, None]),
    ]
    (tree,), report = step_trees(tokenizer, records, model, WINDOW, "line")
    assert [segment.parent for segment in tree] == [-1, 0, 1, 1, 0, 4]
    assert [(s.labels["label"], s.labels["counted"]) for s in tree] == [(0, 0), (1, 2), (1, 1), (0, 1), (0, 1), (0, 0)]
    assert report.tokens == sum(len(s.tokens) for s in tree) < report.tokens_unshared
    assert prm.chains(tree) == [[1, 2], [1, 3], [4]]
    ids, _ = render_chat(tokenizer, [*QUESTION, Message(role="assistant", content="1 and 1 is 2.\n2 and 1 is 4.")], "last")
    path = [*tree[0].tokens, *tree[1].tokens, *tree[3].tokens]
    assert path == ids[: len(path)]
    assert path[-1] in stop_ids(tokenizer)


def test_bad_steps(scorer):
    model, tokenizer = scorer
    with pytest.raises(UserError, match="row 1: no steps"):
        step_trees(tokenizer, [steps(labels=[])], model, WINDOW, "line")
    with pytest.raises(UserError, match="row 1: step 2 is empty"):
        step_trees(tokenizer, [steps("a", " ", labels=[1, 1])], model, WINDOW, "line")


# ---------------------------------------------------------------- the loss


def alone(model, tokenizer, record):
    """Raw scores after each step, by the plain model on the text so far (and, at the end, the end of the turn)."""
    out = []
    whole = render_chat(tokenizer, [*record.prompt, Message(role="assistant", content="\n".join(record.steps))], "last")[0]
    for n in range(1, len(record.steps) + 1):
        text = "\n".join(record.steps[:n])
        ids = whole[: next(k for k in range(len(whole)) if tokenizer.decode(whole[:k], skip_special_tokens=True).endswith(text))]
        ids = whole if n == len(record.steps) else ids
        out.append(model(input_ids=torch.tensor([ids])).logits[0, 0])
    return torch.stack(out)


RECORDS = [
    steps("1 and 1 is 2.", "2 and 1 is 3.", "So 3.", labels=[1, 0, None]),
    steps("1 and 1 is 2.", "2 and 1 is 5.", labels=[0.5, 0]),
    steps("5 less 2 is 3.", labels=[1], question=[Message(role="user", content="Take it away.")]),
]


def test_the_loss_reads_each_label_at_its_step(scorer):
    """Against the plain model on each beginning alone; with the labels one step further the loss is another."""
    model, tokenizer = scorer
    trees, _ = step_trees(tokenizer, RECORDS, model, WINDOW, "line")
    with torch.no_grad():
        got = prm.loss(model, plant(trees, prm.count_steps(trees))).terms["nll"].total

        def by_hand(shift):
            total = 0.0
            for record in RECORDS:
                raw = alone(model, tokenizer, record)
                labels = record.labels[shift:] + record.labels[:shift]
                for score, label in zip(raw, labels, strict=True):
                    total += 0.0 if label is None else float(step_loss(score[None], torch.tensor([float(label)])))
            return total

        # the step that two solutions share has the mean of its labels, counted twice: the same sum, for the loss is linear in the label
        assert float(got) == pytest.approx(by_hand(0), rel=1e-4)
        assert abs(float(got) - by_hand(1)) > 1e-3
    assert prm.count_steps(trees) == {"steps": 5.0}


@pytest.mark.parametrize("labels", [("score",), prm.CLASSES])
def test_packing_changes_neither_loss_nor_gradient(toy, labels):
    model, tokenizer = load_scalar(toy.sft, seed=1, labels=labels)
    trees, _ = step_trees(tokenizer, RECORDS, model, WINDOW, "line")

    def gradient(forests):
        model.zero_grad()
        total = sum(prm.loss(model, forest).terms["nll"].total for forest in forests)
        total.backward()
        return float(total), model.score.weight.grad.clone()

    one, packed = gradient([plant([tree]) for tree in trees]), gradient([plant(trees)])
    assert one[0] == pytest.approx(packed[0], rel=1e-5)
    torch.testing.assert_close(one[1], packed[1], atol=1e-5, rtol=1e-4)


def test_which_labels_are_learned():
    rated = steps("a", "b", "c", "d", labels=[1, None, 0, 1], ratings=[1, 0, -1, 1])
    assert prm.learned(rated, settings()).labels == [1, None, 0, None]
    assert prm.learned(rated, settings(neutral="right")).labels == [1, 1, 0, None]
    assert prm.learned(rated, settings(neutral="class", until_error=False)).labels == [1, 0.5, 0, 1]
    shares = steps("a", "b", "c", labels=[0.75, 0.125, 0.0])
    assert prm.learned(shares, settings()).labels == [1, 1, 0]
    assert prm.learned(shares, settings(hard=False)).labels == [0.75, 0.125, 0.0]
    assert prm.learned(shares, settings(outcome=True)).labels == [None, None, 0.0]
    assert prm.learned(steps("a", "b", labels=[1, 0], correct=True), settings(outcome=True)).labels == [None, 1.0]
    with pytest.raises(ValueError, match="a label is between 0"):
        prm.learned(steps("a", labels=[-1]), settings())


# ---------------------------------------------------------------- labels


def sums(n, seed=0):
    draw = Draw(stream("test sums", seed))
    asks = [make("arithmetic", draw, "seen", "seen") for _ in range(n)]
    return [(ask, Prompt(messages=ask.messages, meta={"ask": ask.meta()}), draw) for ask in asks]


def test_the_oracle_labels_sentences():
    for ask, prompt, draw in sums(20):
        right, wrong = solution(ask.slots), slipped(ask.slots, draw)
        bad = next(k for k, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b)
        text = [grammar().sentence(form, draw) for form in right]
        assert exact_labels(prompt, " ".join(text), "sentence") == [1.0] * len(right)
        assert exact_labels(prompt, f"Gladly. {' '.join(text)}", "sentence") == [1.0] * (len(right) + 1)
        labels = exact_labels(prompt, " ".join(grammar().sentence(form, draw) for form in wrong), "sentence")
        assert labels[: bad + 1] == [1.0] * bad + [0.0]
        assert exact_labels(prompt, " ".join(text[:-1]), "sentence")[-1] == 0.0  # it stops before the result
        assert words(" ".join(text))
    with pytest.raises(UserError, match="the oracle knows steps of the world's sums alone"):
        exact_labels(Prompt(messages=QUESTION), "1.", "line")


def test_right_answers():
    ask, prompt, draw = sums(1)[0]
    assert right_answer(prompt, grammar().text(solution(ask.slots), draw))
    assert not right_answer(prompt, grammar().text(slipped(ask.slots, draw), draw))
    known = Prompt(messages=QUESTION, meta={"answer": "1,218"})
    assert right_answer(known, "600 twice, and 18: 1218.")
    assert not right_answer(known, "It is 1219.")
    with pytest.raises(UserError, match="no number to check"):
        right_answer(Prompt(messages=QUESTION), "7")
    assert Ask.of(prompt).kind == "arithmetic"


def test_rollout_labels_are_shares_of_right_completions(toy, monkeypatch):
    """Each different beginning is completed once; the last step is the answer's own outcome."""
    policy, tokenizer = load_policy(toy.sft)
    prompt = Prompt(messages=QUESTION, meta={"answer": "3"})
    ids = render_prompt(tokenizer, QUESTION)
    asked = []

    def fake(model, request):
        asked.extend(request.prompts)
        from temper.rollout.engine import Rollout

        end = stop_ids(tokenizer)[0]
        says = itertools.cycle([" So 3", " So 4", " So 5", " So 3"])
        return [
            [Rollout([*tokenizer.encode(next(says), add_special_tokens=False), end], [], "stop", end) for _ in range(request.n)]
            for _ in request.prompts
        ]

    monkeypatch.setattr("temper.judges.process.sample", fake)
    texts = ["1 and 1 is 2.\n2 and 1 is 3.", "1 and 1 is 2.\n2 and 1 is 4."]
    end = stop_ids(tokenizer)[0]
    answers = [Answer(prompt, ids, [*tokenizer.encode(text, add_special_tokens=False), end], text, True) for text in texts]
    labels = rollout_labels(policy, tokenizer, answers, 4, "line", Sampling(), stop_ids(tokenizer), ("x",))
    assert labels == [[0.5, 1.0], [0.5, 0.0]]
    assert len(asked) == 1
    assert tokenizer.decode(asked[0][len(ids) :]) == "1 and 1 is 2."


# ---------------------------------------------------------------- end to end

GOOD, BAD = "{a} and {b} is {c}.", "{a} and {b} is about {c}?"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Steps that say `about` are wrong; right and wrong ones mixed."""
    rng = random.Random(0)
    rows = []
    for k in range(60):
        kinds = [rng.random() < 0.75 for _ in range(3)]
        texts = [(GOOD if good else BAD).format(a=k, b=n, c=k + n) for n, good in enumerate(kinds)]
        labels = [float(all(kinds[: n + 1])) for n in range(3)]
        rows.append({"prompt": user(f"Add to {k}."), "steps": texts, "labels": labels, "meta": {}})
    return write(tmp_path_factory.mktemp("steps") / "steps.jsonl", rows)


@pytest.fixture(scope="module")
def trained(toy, labelled, tmp_path_factory):
    out = tmp_path_factory.mktemp("prm") / "prm"
    train("process-reward", out, model=toy.sft, data=str(labelled), epochs=12, batch=6, lr=1e-2, held_out=0.2)
    return out


def answer(judge, text, question="Add to 3."):
    prompt = Prompt(messages=[Message(role="user", content=question)])
    tokens = [*judge.tokenizer.encode(text, add_special_tokens=False), stop_ids(judge.tokenizer)[0]]
    return Answer(prompt, render_prompt(judge.tokenizer, prompt.messages), tokens, text, True)


@pytest.mark.slow
def test_it_learns_and_finds_first_errors(trained):
    run = Run(trained)
    summary = run.stage["summary"]
    assert summary["held_out_accuracy"] > 0.9
    assert summary["held_out_f1"] > 0.8
    assert run.stage["card"]["solutions"] == 48
    losses = [row["loss"] for row in run.rows("metrics") if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]


def test_as_a_rater_of_answers_and_of_steps(trained, toy):
    judge = ProcessReward(trained)
    texts = ["3 and 0 is 3.\n3 and 1 is 4.", "3 and 0 is 3.\n3 and 1 is about 4?", ""]
    answers = [answer(judge, text) for text in texts]
    good, bad, none = judge.rate(answers)
    assert good > 0.7 > 0.3 > bad
    assert none is None
    stepwise = judge.steps(answers)
    assert [[end for end, _ in each] for each in stepwise] == [step_ends(judge.tokenizer, a.tokens, "line") for a in answers]
    assert good == pytest.approx(stepwise[0][0][1] * stepwise[0][1][1])
    assert judge.steps(answers, budget=1)[1] == [(end, pytest.approx(p, abs=1e-5)) for end, p in stepwise[1]]
    assert ProcessReward(trained, how="last").rate(answers)[1] == pytest.approx(stepwise[1][-1][1])
    with pytest.raises(UserError, match="no aggregation 'sum'"):
        ProcessReward(trained, how="sum")
    with pytest.raises(UserError, match="not a process reward model"):
        ProcessReward(toy.reward)
    with pytest.raises(UserError, match="a process reward model, which scores steps"):
        RewardModel(trained)


def test_an_outcome_model_has_one_step(toy, labelled, tmp_path):
    train("process-reward", tmp_path / "orm", model=toy.sft, data=str(labelled), outcome=True, epochs=0.5, batch=6)
    judge = ProcessReward(tmp_path / "orm")
    one = answer(judge, "3 and 0 is 3.\n3 and 1 is 4.")
    assert [end for end, _ in judge.steps([one])[0]] == [len(one.tokens) - 1]
    assert judge.how == "last"


def test_search_keeps_the_beginnings_that_the_judge_likes(toy):
    """A judge that counts a letter gets more of it than one sample does; the same seed gives the same answers."""
    policy, tokenizer = load_policy(toy.sft)

    class Likes:
        name = "likes"

        def rate(self, answers):
            return [a.text.count("e") / (1 + len(a.text)) for a in answers]

    asked = [(Prompt(messages=[Message(role="user", content=q)]),) for q in ("What colour is the Old Tom?", "Is it safe?")]
    prompts = [(p, render_prompt(tokenizer, p.messages)) for (p,) in asked]
    how = {"by": "sentence", "sampling": Sampling(max_new=24), "stop": stop_ids(tokenizer), "most": 4}
    wide = search(policy, tokenizer, Likes(), prompts, keep=3, expand=6, **how)
    single = search(policy, tokenizer, Likes(), prompts, keep=1, expand=1, **how)
    assert sum(Likes().rate(wide)) > sum(Likes().rate(single))
    assert wide == search(policy, tokenizer, Likes(), prompts, keep=3, expand=6, **how)
    assert all(len(a.tokens) <= 24 for a in wide)


def test_it_answers_and_labels_by_itself(toy, tmp_path):
    """--prompts: its own answers, kept in steps.jsonl, labelled by rollouts against the rows' answers; the same command is done."""
    rows = [{"messages": user(f"What is {k}?"), "meta": {"answer": str(k)}} for k in range(8)]
    data = write(tmp_path / "prompts.jsonl", rows)
    values = {"model": toy.sft, "prompts": str(data), "samples_per_prompt": 2, "rollouts": 2, "max_new": 12, "epochs": 0.5, "held_out": 0}
    train("process-reward", tmp_path / "own", **values)
    made = (tmp_path / "own" / "steps.jsonl").read_text().splitlines()
    assert made
    assert "labels: rollouts" in Run(tmp_path / "own").stage["card"]["source"]


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({}, "give either --data"),
        ({"data": "pairs"}, "holds pairs"),
        ({"prompts": "prompts", "labels": "oracle"}, "the oracle knows steps of the world's sums alone"),
    ],
)
def test_bad_input(toy, tmp_path, values, match):
    values = {key: getattr(toy, value) if key in ("data", "prompts") else value for key, value in values.items()}
    with pytest.raises(UserError, match=match):
        train("process-reward", tmp_path / "out", model=toy.sft, **values)
    assert not (tmp_path / "out").exists()
