"""compare and chat on two tiny models of random weights."""

import io
import json
import shutil

import pytest
from rich.console import Console

from temper.config import UserError
from temper.data.template import attach_default_template
from temper.models.load import Size, new_model, save
from temper.models.tokenizer import train_tokenizer
from temper.report import chat, compare
from temper.world import dataset
from tests.report.synthetic import make

TINY = ["--max-new", "6"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A run of base (no template), sft and ppo with models, and a reward stage that has none to ask."""
    folder = make(tmp_path_factory.mktemp("runs") / "harbour", ("base", "sft", "reward", "ppo"))
    texts = [p.messages[0].content for p in dataset("prompts", n=60)]
    for seed, name in enumerate(("base", "sft", "ppo")):
        tokenizer = train_tokenizer(iter(texts), 700)
        if name == "base":
            tokenizer.chat_template = None
        else:
            attach_default_template(tokenizer)
        model = new_model(Size(width=16, layers=1, heads=2, context=128), len(tokenizer), tokenizer, seed=seed)
        save(model, tokenizer, folder / name / "model")
    (folder / "reward" / "model").mkdir()
    (folder / "reward" / "model" / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    return folder


def answers(models, capsys, *argv) -> dict:
    assert compare.main([str(models), *argv, *TINY, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_same_prompts_through_every_stage(models, capsys):
    question = next(p for p in dataset("side_by_side", n=24)).messages[0].content
    found = answers(models, capsys, question, "Hello there")
    assert list(found["prompts"][0]["answers"]) == ["base", "sft", "ppo"]
    assert found["without_template"] == ["base"]
    first, second = found["prompts"]
    assert all("gold" in a for a in first["answers"].values())
    assert all("gold" not in a for a in second["answers"].values())
    assert found == answers(models, capsys, question, "Hello there")
    other = answers(models, capsys, question, "Hello there", "--seed", "1")
    assert other["prompts"] != found["prompts"]


def test_mixtures_of_stages_stand_beside_them(models, capsys):
    spec = "0.5*sft + 0.5*ppo"
    row = answers(models, capsys, "Hello there", "--mix", spec, "1*sft", "--temperature", "0")["prompts"][0]["answers"]
    assert list(row) == ["base", "sft", "ppo", spec, "1*sft"]
    assert row["1*sft"] == row["sft"]
    with pytest.raises(UserError, match=r"0.5\*sft \+ 0.5\*dpo: .* has no stage 'dpo'; it has base, sft, ppo"):
        compare.read([str(models), "--mix", "0.5*sft + 0.5*dpo"])
    both = f"0.25*{models / 'sft'} + 0.75*{models / 'ppo'}"
    assert chat.main([both, "--once", "Hello there", "--json", "--temperature", "0", "--max-new", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0
    with pytest.raises(UserError, match="the weights sum to"):
        chat.read([both.replace("0.25*", "0.5*"), "--once", "x"])


def test_without_prompts_the_fixed_ones(models, capsys):
    found = answers(models, capsys, "--temperature", "0", "--system", "Be brief.")
    assert len(found["prompts"]) == 24
    for row in found["prompts"]:  # one system turn, instead of the prompt's own
        assert [m for m in row["messages"] if m["role"] == "system"] == [{"role": "system", "content": "Be brief."}]
        assert row["messages"][0]["role"] == "system"


def test_the_temperature_is_the_evaluations(models, tmp_path, capsys):
    assert answers(models, capsys, "Hello there")["temperature"] == 0.7
    assert answers(models, capsys, "Hello there", "--temperature", "0")["temperature"] == 0
    folder = tmp_path / "warm"
    shutil.copytree(models, folder)
    for stage in "base", "sft", "ppo":
        path = folder / stage / "evaluation.json"
        path.write_text(path.read_text().replace('"temperature": 0.7', '"temperature": 0.4'))
    assert answers(folder, capsys, "Hello there")["temperature"] == 0.4
    assert talk(folder).temperature == talk(folder, "sft/model").temperature == 0.4
    assert talk(folder, temperature=0.0).temperature == 0
    for path in folder.glob("*/evaluation.json"):
        path.unlink()
    assert answers(folder, capsys, "Hello there")["temperature"] == talk(folder).temperature == 0.7


def test_that_gold_is_not_shown_is_said(models, capsys):
    question = dataset("side_by_side", n=24)[0].messages[0].content
    assert compare.main([str(models), question, *TINY]) == 0
    assert "no gold" not in capsys.readouterr().out
    assert compare.main([str(models), question, "Hello there", "--system", "Speak as a gull.", *TINY]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no gold for 1 of 2: not prompts that the embedded world understands" in said


def test_every_fixed_prompt_is_understood():
    for prompt in dataset("side_by_side", n=24):
        assert compare._ask(prompt.messages) is not None, prompt.messages


def test_hostile_answers_are_shown_as_text():
    row = {"text": "[bold]x[/nope] \x1b[31mred :smile:", "finish": "length", "tokens": 3, "gold": dict.fromkeys(compare.PARTS, -1.0)}
    asked = [compare.Question([compare.Message(role="user", content="[link=http://x]\x07")], None)]
    for width, terminal in ((60, True), (200, True), (80, False)):
        out = io.StringIO()
        console = Console(file=out, width=width, highlight=False, force_terminal=terminal, color_system=None)
        compare.show(console, asked, {"[red]": [row], "sft": [row], "ppo": [row]})
        said = out.getvalue()
        assert "[bold]x[/nope]" in said.replace("\n", " ")
        assert "[link=http://x]" in said
        assert ":smile:" in said
        assert "\x1b" not in said
        assert "\x07" not in said


def test_in_a_pipe_a_block_for_each_answer_and_no_line_broken():
    long = "Sila has a goose. " * 20
    row = {"text": long.strip(), "finish": "stop", "tokens": 3}
    asked = [compare.Question([compare.Message(role="user", content=long.strip())], None)]
    out = io.StringIO()
    compare.show(Console(file=out, width=80, highlight=False), asked, {"sft": [row], "ppo": [row]})
    assert out.getvalue().splitlines() == ["== 1 of 1", long.strip(), "", "-- sft", long.strip(), "", "-- ppo", long.strip(), ""]


def test_shown_in_the_terminal(models, capsys):
    assert compare.main([str(models), "Which pet does Sila have?", *TINY]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "base: no chat template" in said
    assert "gold" in said


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["nowhere"], "no such folder"),
        ([], "DIR is missing"),
        (["{models}/reward", "x"], "no stage holds a language model"),
        (["{models}", " "], "prompt 1: is empty"),
        (["{models}", "a x " * 200], "window"),
        (["{models}", "--temprature", "1"], "--temperature"),
    ],
)
def test_compare_refuses_in_one_line(models, argv, error):
    with pytest.raises(UserError, match=error) as caught:
        compare.main([a.format(models=models) for a in argv])
    assert "\n" not in str(caught.value)


def test_chat_once(models, capsys):
    assert chat.main([str(models / "sft"), "--once", "Who is Kai?", *TINY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == "Who is Kai?"
    assert 1 <= found["tokens"] <= 6
    assert chat.main([str(models / "sft" / "model"), "--once", "Who is Kai?", *TINY, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def talk(models, stage="sft", **settings):
    s = chat.Chat(stage=str(models / stage), max_new=6, **settings)
    return chat.Conversation(*chat.load_askable(chat.model_folder(s.stage)), s)


def test_turns_are_kept_and_forgotten(models):
    one = talk(models)
    one.say("Who is Kai?")
    one.say("And Sila?")
    assert [m.role for m in one.turns] == ["user", "assistant", "user", "assistant"]
    assert "forgotten" in str(one.command("/reset"))
    assert one.turns == []
    assert one.command("/system Be brief.") == "system: Be brief."
    assert one.system == "Be brief."
    assert one.command("/system") == "no system turn"
    assert "no command /help" in str(one.command("/help"))
    assert one.command("/quit") is None


def test_the_window_drops_the_oldest_turns_and_says_so(models):
    one = talk(models, system="Be brief.")
    dropped = [one.say("Which pet does Sila have? Which street does Kai live in?").dropped for _ in range(6)]
    assert dropped[0] == 0
    assert max(dropped) > 0
    assert all(d % 2 == 0 for d in dropped)
    assert one.turns[0].role == "user"
    before = list(one.turns)
    with pytest.raises(UserError, match="do not fit"):
        one.say("word " * 200)
    assert one.turns == before


def test_a_base_model_continues(models, monkeypatch, capsys):
    lines = iter(["Kai lives in", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert chat.main([str(models / "base"), *TINY]) == 0
    assert "no chat template" in " ".join(capsys.readouterr().out.split())  # wherever the line was broken


def test_a_conversation_ends_with_its_input(models, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who is Kai?\n\n/system Be brief.\n" + "word " * 200 + "\nAnd Sila?\n"))
    assert chat.main([str(models / "ppo"), "--json", *TINY]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [("answer" in r, "error" in r) for r in rows] == [(True, False), (False, True), (True, False)]


@pytest.mark.parametrize(
    ("place", "error"),
    [("", "a run with the stages base, ppo, reward, sft"), ("reward", "reward"), ("ppo/nothing", "no such folder")],
)
def test_chat_refuses_in_one_line(models, place, error):
    with pytest.raises(UserError, match=error) as caught:
        chat.main([str(models / place), "--once", "x"])
    assert "\n" not in str(caught.value)
