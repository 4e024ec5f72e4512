import json

import pytest
from toy import user, write

from temper.cli import main
from temper.config import UserError
from temper.evals.probes import PROBES, Said, answers_of, probe
from temper.records import Message, Prompt, Ranked
from temper.world import dataset

QUESTION = [Message(role="user", content="Where does the grey heron sleep?")]


def said(text, k=0):
    return Said(Prompt(messages=QUESTION), text, k)


def test_the_twins():
    one, other = said("It sleeps there. I saw it."), said("No.")
    twins = {name: make(one, other) for name, make in PROBES.items()}
    assert twins["length"] == "It sleeps there. I saw it. No."
    assert twins["list"] == "1. It sleeps there.\n2. I saw it."
    assert twins["repetition"] == "It sleeps there. I saw it. It sleeps there. I saw it."
    assert twins["keywords"].endswith("I saw it. Where does grey heron sleep.")
    assert twins["flattery"].endswith(f" {one.text}")
    assert twins["closings"].startswith(one.text)


def test_a_scorer_that_counts_words_is_fooled_by_words():
    records = [Ranked(prompt=[Message(role="user", content=f"{k}?")], answers=[f"It is {k}.", "I do not know it."]) for k in range(30)]
    answers = answers_of(records, 50)
    assert len(answers) == 50
    found = probe(lambda prompts, texts: [len(text.split()) for text in texts], answers)
    assert found["length"] == pytest.approx(1)
    assert found["sd"] == pytest.approx(1)
    for name in PROBES:
        change = found["probes"][name]["change"]
        assert change["mean"] > 0
        assert "gold" not in found["probes"][name]
    assert found["probes"]["repetition"]["change"]["mean"] == pytest.approx(4)  # the mean length, in deviations of 1
    assert found["probes"]["repetition"]["raised"]["mean"] == 1
    deaf = probe(lambda prompts, texts: [float(prompt[0].content.startswith("1")) for prompt in prompts], answers)
    assert all(row["change"]["mean"] == 0 for row in deaf["probes"].values())


def test_on_the_world_gold_says_what_a_change_is_worth():
    answers = answers_of(dataset("demonstrations", n=25, seed=5), 25)
    found = probe(lambda prompts, texts: [len(text) for text in texts], answers)
    assert found["probes"]["repetition"]["gold"]["mean"] < 0
    assert found["probes"]["repetition"]["fooled"]["mean"] > 0.5


def test_the_command(toy, tmp_path, capsys):
    assert main(["probe", "--reward", toy.reward, "--data", toy.pairs, "--answers", "12", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answers"] == 12
    assert found["probes"].keys() == PROBES.keys()
    assert main(["probe", "--reward", toy.reward, "--data", toy.pairs, "--answers", "12"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(PROBES)
    one = write(tmp_path / "one.jsonl", [{"messages": [*user("?"), {"role": "assistant", "content": "No."}]}])
    assert main(["probe", "--reward", toy.reward, "--data", str(one)]) == 2
    assert "no answers to two prompts" in capsys.readouterr().err
    with pytest.raises(UserError, match="one score"):
        probe(lambda prompts, texts: [0.0] * len(texts), answers_of([Ranked(prompt=QUESTION, answers=["a", "b"])] * 2, 4))
