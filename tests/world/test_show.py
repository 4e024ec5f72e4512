"""`temper world`: what it says is what the world holds; what it does not know is one line."""

import io
import json

import pytest
from rich.console import Console

from temper import world
from temper.config import UserError
from temper.world import show
from temper.world.annotators import ANNOTATORS, PANELS
from temper.world.asks import KINDS, make
from temper.world.oracles import renderings
from temper.world.streams import Draw, stream
from temper.world.town import town


def run(capsys, *argv):
    assert show.main(argv) == 0
    return capsys.readouterr().out


def run_json(capsys, *argv):
    return json.loads(run(capsys, *argv, "--json"))


@pytest.mark.parametrize("phrasing", ["seen", "held_out"])
@pytest.mark.parametrize("name", KINDS)
def test_every_question_is_read_back_from_its_words(name, phrasing):
    draw = Draw(stream("test/read_ask"))
    for _ in range(20):
        asked = make(name, draw, None, phrasing)
        system = next((m["content"] for m in asked.messages if m["role"] == "system"), None)
        found = show.read_ask(asked.messages[-1]["content"], system)
        assert found is not None, asked
        assert (found.kind, found.slots, found.messages) == (asked.kind, asked.slots, asked.messages)


@pytest.mark.parametrize("text", ["", "What is the capital of France?", "Fair winds to you.", "What work does Ada do? And why?", "12 + 3"])
def test_other_words_are_no_question_of_the_town(text):
    assert show.read_ask(text) is None


def test_show_says_what_the_town_holds(capsys):
    found = run_json(capsys, "show")
    assert found["version"] == world.VERSION
    assert found["facts"]["stated"] == len(town().truth)
    assert found["facts"]["never_stated"] == len(town().never)
    name = next(p for p in town().people if len(town().known(p)) == 5)
    facts = run_json(capsys, "show", name.lower())["entity_facts"]
    assert {f["relation"]: f["value"] for f in facts} == {r: town().value(name, r) for r in town().relations(name)}
    text = run(capsys, "show", name)
    assert world.VERSION in text
    assert all(town().value(name, r) in text for r in town().relations(name))
    assert run_json(capsys, "show", "the Star Inn")["entity"] == "the Star Inn"


@pytest.mark.parametrize("name", world.DATASETS)
def test_sample_prints_the_records_of_a_data_set(capsys, name):
    found = run_json(capsys, "sample", name, "-n", "2", "--seed", "3")
    assert found == [record.model_dump() for record in world.dataset(name, n=2, seed=3)]
    text = run(capsys, "sample", name, "-n", "2", "--seed", "3")
    first = found[0].get("text") or found[0]["messages"][-1]["content"]
    assert first.split()[0] in text


def test_score_is_the_gold_score_with_its_parts(capsys):
    asked = make("lookup", Draw(stream("test/score")))
    prompt = asked.messages[-1]["content"]
    answer = renderings(("say", town().fact(asked.slots["entity"], asked.slots["relation"])))[0]
    found = run_json(capsys, "score", answer, "--prompt", prompt)
    assert found["gold"]["total"] == world.gold(asked, answer).total == pytest.approx(2.0)
    assert found["kind"] == "lookup"
    assert set(found["annotators"]) == set(ANNOTATORS)
    assert found == run_json(capsys, "score", f"{prompt}\n{answer}")
    text = run(capsys, "score", answer, "--prompt", prompt)
    assert "helpful" in text
    assert "█" in text


def test_markup_in_an_answer_is_shown_as_it_is(capsys):
    text = run(capsys, "score", "[bold red]no[/] [link=x]y[/link] [/]", "--prompt", renderings(("q_trade", town().people[0]))[0])
    assert "[bold red]no[/] [link=x]y[/link] [/]" in text


@pytest.mark.slow
def test_annotators_are_listed_with_agreement_and_ceiling(capsys):
    found = run_json(capsys, "annotators")
    assert set(found["annotators"]) == set(ANNOTATORS)
    assert set(found["panels"]) == set(PANELS)
    assert 0.66 <= found["panels"]["town"]["agreement"] <= 0.73
    assert found["panels"]["town"]["ceiling"] > 0.73
    text = run(capsys, "annotators")
    assert all(name in text for name in [*ANNOTATORS, *PANELS])
    for width in (80, 60, 40):  # no word is broken, whatever the terminal's width
        out = io.StringIO()
        show._show_raters(Console(file=out, width=width), found)
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        used = {name for rater in found["annotators"].values() for name in rater["utility"]}
        assert {*ANNOTATORS, *PANELS, *used} <= {line.split(" ")[0] for line in lines}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["shwo"], "'show'"),
        (["show", "Apple"], "'Apple Market'"),
        (["sample", "demonstration"], "'demonstrations'"),
        (["sample"], "name"),
        (["sample", "prompts", "-n", "0"], "-n 0"),
        (["sample", "prompts", "-n", "three"], "three"),
        (["sample", "prompts", "--sed", "1"], "--sed"),
        (["score", "Ada is a baker."], "--prompt"),
        (["score", "Ada.", "--prompt", "What is the capital of France?"], "no such question"),
    ],
)
def test_mistakes_are_one_line(argv, said):
    with pytest.raises(UserError) as error:
        show.main(argv)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argv", [[], ["--help"], ["show", "--help"], ["score", "--help"]])
def test_help_has_examples(capsys, argv):
    try:
        code = show.main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 0
    out = capsys.readouterr().out
    assert "temper world score" in out
    assert "examples:" in out
