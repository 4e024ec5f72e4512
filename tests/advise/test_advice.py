"""What is recommended follows from answers and figures: each rule on figures made by hand."""

import pytest

from temper.advise.advice import recommend
from temper.advise.command import QUESTIONS, Answers, ask, settled
from temper.advise.literature import LITERATURE
from temper.advise.rivals import decide
from temper.advise.show import page, tell

APPROACH, PREFERENCE, AMOUNT, COST = range(4)


def found(**answers):
    """What is known where nothing was measured."""
    said = {name: {"value": q.assumed if name != "feedback" else [q.assumed], "from": "assumed"} for name, q in QUESTIONS.items()}
    said |= {name: {"value": value, "from": "a flag"} for name, value in answers.items()}
    empty = {"rows": None, "rivals": [], "decision": None, "curve": None, "costs": {}, "samples": [], "too_large": [], "not_measured": []}
    machine = {"device": "cpu", "name": "2 CPU cores", "threads": 1, "free_bytes": 1e9}
    return {"model": None, "data": None, "schema": None, "machine": machine, "answers": said, **empty}


def m(mean, half=0.05):
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 64}


def cost(trained=1e6):
    sizes = {"weights": 4e6, "states": 16 * trained, "activations": 2e9}
    rest = {"parameters": 1e6, "trained": trained, "tokens_at_once": 2048, "microbatch": 2048}
    return {**rest, "bytes": sizes, "tokens_per_row": 100.0, "tokens_per_second": m(1000.0, 10.0)}


def measured(right=0.3, epochs=2.0, gain=-0.2, half=0.05, by=("correct",), **answers):
    """A trial that LoRA won."""
    trained = {"rate": 3e-4, "epochs": epochs, "of": 4.0, "asked": 8, "rows": 512, "tried": {"3e-05": 2.0, "0.0003": 1.0, "0.003": None}}
    rest = {"forward_tokens_per_second": 2000.0, "sampled_tokens_per_second": 50.0, "shots": 0.0, "answer_tokens": 20.0}
    rivals = [
        {"name": "few-shot", "measures": {"correct": m(0.1), "nll": m(2.0)}, "trained": None, **rest},
        {"name": "lora", "measures": {"correct": m(right), "nll": m(1.0)}, "trained": trained, **rest},
    ]
    against = {"correct": {"best": "lora", "gaps": {"few-shot": m(right - 0.1)}}}
    more = {
        "model": "M",
        "data": "D",
        "rows": {"records": 1000, "held_out": 64, "chosen_on": 32, "learned_from": 512, "max_new": 9, "source": "D: 1000 rows"},
        "rivals": rivals,
        "decision": {"chosen": "lora", "equal": ["full"], "by": list(by), "against": against},
        "curve": {"rival": "lora", "rows": [128, 512], "gains": {"nll": m(gain, half)}, "quarter": {"nll": m(1.2)}},
        "costs": {"lora": cost()},
        "samples": [{"asked": "<b>?", "wanted": "w", "answers": {"lora": "<script>"}}],
    }
    return found(examples=1000, **answers) | more


def said(item):
    return " ".join(f"{r['text']} {r['source']} {r['limit']}" for r in item["reasons"])


@pytest.mark.parametrize(
    ("answers", "choice"),
    [
        ({}, "A system prompt, while examples are collected (not measured)"),
        ({"examples": 8}, "Examples in the prompt (not measured)"),
        ({"examples": 500}, "LoRA (not measured)"),
        ({"examples": 500, "task": "style"}, "LoRA (not measured)"),
        ({"examples": 500, "task": "facts"}, "Full fine-tuning (not measured)"),
    ],
)
def test_without_figures_the_task_and_the_literature_speak(answers, choice):
    item = recommend(found(**answers))[APPROACH]
    assert item["choice"] == choice
    assert not any(r["kind"] == "measured" for r in item["reasons"])
    assert ("folklore" in said(item)) == bool(answers)


def test_what_does_not_fit_is_not_recommended():
    case = found(examples=500, task="facts", hardware=1.0) | {"costs": {"full": cost(), "lora": cost(1e4)}}
    approach, _, _, bill = recommend(case)
    assert approach["choice"].startswith("LoRA")
    assert "full: does not fit into the 1 GB" in said(bill)
    assert "arXiv:2305.14314" in said(bill)
    case["answers"]["hardware"]["value"] = 24.0
    assert recommend(case)[APPROACH]["choice"].startswith("Full")


@pytest.mark.parametrize(
    ("feedback", "task", "choice", "paper"),
    [
        (["none"], "style", "None: fine-tune only", ""),
        (["none"], "harmless", "Constitutional AI", "2212.08073"),
        (["thumbs"], "style", "KTO", "2402.01306"),
        (["people"], "style", "A reward model", "2203.02155"),
        (["people", "pairs", "thumbs"], "style", "DPO", "2404.10719"),
        (["pairs", "verifiable"], "reasoning", "GRPO", "2402.03300"),
    ],
)
def test_the_preference_method_is_what_the_feedback_allows(feedback, task, choice, paper):
    item = recommend(found(feedback=feedback, task=task))[PREFERENCE]
    assert item["choice"].startswith(choice)
    assert paper in said(item)


def test_a_verdict_that_is_never_good_teaches_nothing():
    """At one right answer in a hundred a group of eight rarely holds one."""
    assert recommend(measured(right=0.3, feedback=["verifiable"]))[PREFERENCE]["choice"].startswith("GRPO")
    poor = measured(right=0.0, feedback=["verifiable", "pairs"])
    poor["rivals"][1]["measures"]["correct"] |= {"low": 0.0, "high": 0.01}
    item = recommend(poor)[PREFERENCE]
    assert item["choice"].startswith("DPO")
    assert "too rare" in said(item)


def test_a_trial_speaks_for_itself():
    approach, _, amount, bill = recommend(measured())
    assert approach["choice"] == "LoRA"
    assert approach["command"] == (
        "temper sft --model M --data D --adapter lora --lr 0.0003 --epochs 2 --tokens-per-microbatch 2048 --out runs/sft"
    )
    text = said(approach)
    assert "correct: few-shot 10% (5% to 15%); lora 30% (25% to 35%). Clearly worse than lora: few-shot" in text
    assert "full could not be told apart from lora" in text
    assert "the largest rate that worked" in text
    assert "512 of 1,000 rows" in text
    assert amount["choice"] == "More rows of this kind still pay"
    assert "0.100 for each doubling" in said(amount)
    assert bill["choice"] == "If it is trained, lora: 2.0 GB, 3 min 20 s"  # 1000 rows x 2 passes x 100 tokens at 1000/s


def test_the_price_of_a_preference_method_is_arithmetic():
    """1,000 pairs of 2 x 100 tokens: 200 s of learning at 1000/s and 100 s of the reference's reading at 2000/s."""
    assert "1,000 pairs: about 5 min 00 s" in said(recommend(measured(feedback=["pairs"]))[PREFERENCE])
    grpo = said(recommend(measured(feedback=["verifiable"]))[PREFERENCE])  # 20 tokens at 50/s, then 100 at 1000/s and at 2000/s
    assert "1,000 sampled answers: about 9 min 10 s" in grpo
    assert "no second model" in grpo


def test_the_limits_are_said():
    assert "likelihood is not quality" in said(recommend(measured(by=("nll",)))[APPROACH])
    assert "no pass" in said(recommend(measured(epochs=0.0))[APPROACH])
    assert "the time allowed 4 of 8 passes" in said(recommend(measured())[APPROACH])
    assert "the last pass was the best" in said(recommend(measured(epochs=4.0))[APPROACH])
    assert "nothing told the rivals apart" in said(recommend(measured(by=()))[APPROACH])
    assert recommend(measured(half=0.3))[AMOUNT]["choice"].startswith("Four times the rows gained nothing")
    assert "takes more than the 0.01 hours" in said(recommend(measured(budget=0.01))[COST])


def test_every_reason_says_what_it_rests_on():
    cases = [found(), found(examples=9), found(task="harmless"), measured(), *(found(feedback=[f]) for f in ("pairs", "people", "thumbs"))]
    for item in (item for case in cases for item in recommend(case)):
        for r in item["reasons"]:
            assert r["kind"] in ("measured", "answered", "reckoned", "literature")
            assert (r["kind"] == "literature") == r["source"].startswith("arXiv:")
            assert r["limit"] or r["kind"] != "literature"
    assert all(len(claim.arxiv) == 10 for claim in LITERATURE.values())


def test_page_and_terminal(capsys):
    case = measured(feedback=["pairs"])
    case["advice"] = recommend(case)
    written = page(case)
    assert "<script" not in written
    assert "&lt;script&gt;" in written
    assert 'href="https://arxiv.org/abs/2404.10719"' in written
    assert "Measured here" in written
    tell(case)
    assert "Assumed, as nothing was said: task instructions" in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------- questions


def test_only_what_is_open_is_asked():
    heard = []

    def person(name, question, choices):
        heard.append(name)
        return {"examples": "12\n", "hardware": "24", "feedback": "pairs, people", "format": "json"}.get(name, "\n")

    answers = ask(Answers(task="style", budget=2), person)
    assert heard == ["examples", "feedback", "hardware", "privacy", "format"]
    assert answers == Answers(task="style", budget=2, examples=12, hardware=24.0, feedback=["pairs", "people"], format="json")


def test_what_the_data_tell_is_not_asked():
    heard = []
    ask(Answers(), lambda name, *_: heard.append(name) or "", ("examples", "format"))
    assert heard == ["task", "feedback", "hardware", "privacy", "budget"]


def test_a_wrong_answer_is_asked_again(capsys):
    replies = iter(["maths", "reasoning"])
    assert ask(Answers(), lambda name, *_: next(replies) if name == "task" else "").task == "reasoning"
    assert "'maths'" in capsys.readouterr().err


def test_where_an_answer_comes_from():
    data = {"shows": {"examples": 300, "format": "json", "feedback": ["verifiable"]}}
    out = settled(Answers(task="style"), Answers(task="style", privacy="open", feedback=["people"]), data)
    assert {name: (a["value"], a["from"]) for name, a in out.items()} == {
        "task": ("style", "a flag"),
        "examples": (300, "the data"),
        "feedback": (["people", "verifiable"], "you and the data"),
        "hardware": ("here", "assumed"),
        "privacy": ("open", "you"),
        "format": ("json", "the data"),
        "budget": (8.0, "assumed"),
    }


# ---------------------------------------------------------------- which rival


def column(*values):
    return [float(v) for v in values] * 8


def chosen(values, n=16):
    return decide(values, list(range(n)))


def test_the_cheapest_that_none_is_clearly_better_than():
    values = {
        "zero-shot": {"exact": column(0, 0), "nll": column(1, 1)},
        "lora": {"exact": column(1, 1), "nll": column(5, 5)},
        "full": {"exact": column(1, 1), "nll": column(2, 2)},
    }
    out = chosen(values)
    assert (out["chosen"], out["equal"], out["by"]) == ("lora", ["full"], ["exact"])  # the NLL is not asked once answers differ
    assert out["against"]["exact"]["gaps"]["zero-shot"]["low"] > 0


def test_the_likelihood_decides_where_answers_do_not():
    values = {
        "zero-shot": {"exact": column(0, 1), "nll": column(3, 4)},
        "lora": {"exact": column(1, 0), "nll": column(1, 2)},
    }
    assert (chosen(values)["chosen"], chosen(values)["by"]) == ("lora", ["nll"])
    values["lora"]["nll"] = column(3, 4)
    assert (chosen(values)["chosen"], chosen(values)["by"]) == ("zero-shot", [])


def test_answers_without_a_rating_are_left_out_for_all():
    values = {"zero-shot": {"reward": [None, *column(0, 0)[1:]]}, "lora": {"reward": [*column(1, 1)[:-1], None]}}
    assert chosen(values)["by"] == ["reward"]
    assert chosen({name: {"reward": [None] * 16} for name in values})["by"] == []
