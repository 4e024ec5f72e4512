"""The command line: what it answers without work, its exit codes, and that it is imported lazily."""

import json
import subprocess
import sys

import pytest
from toy import command, user, values_of, write

from temper import cli
from temper.cli import COMMANDS, main
from temper.config import leaves
from temper.hollow import HEAVY
from temper.ladder.by_hand import command_of
from temper.methods import NAMES


def test_usage(capsys):
    for argv in ([], ["--help"], ["help"]):
        assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("temper 0.")


@pytest.mark.parametrize("method", NAMES)
def test_help_of_a_method_names_every_flag_with_its_default_and_examples(method, capsys):
    with pytest.raises(SystemExit) as caught:
        main([method, "--help"])
    assert caught.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for name in leaves(command_of(method)):
        assert f"--{name.rstrip('_').replace('_', '-')}" in out
    assert f"examples: temper {method} " in out
    assert "(required)" in out
    assert "(default: " in out


FROM = {  # what a method learns from; the others: from --data
    "collect": {"prompts"},
    "process-reward": {"data", "prompts"},
    "ppo": {"reward", "prompts"},
    "grpo": {"reward", "prompts"},
    "online-dpo": {"reward", "prompts"},
    "best-of-n": {"reward", "prompts"},
    "rejection": {"reward", "prompts"},
    "constitution": set(),
}


@pytest.mark.parametrize("method", NAMES)
def test_the_contracts_flags(method):
    """--model --data --out, --reward and --prompts where they belong, --max-length, --too-long, --skip-bad, --seed."""
    known = leaves(command_of(method)).keys()
    assert {"out", "max_length", "skip_bad", "seed", "json_"} <= known
    assert ("too_long" in known) == (method != "pretrain")  # documents are cut into windows
    assert ("model" in known) == (method != "pretrain")
    assert {"data", "reward", "prompts"} & known == FROM.get(method, {"data"})


def answers(*lines: list[str]) -> tuple[str, set[str]]:
    """(what a new process says to these command lines, the modules that it then holds); each is answered at once, with 0 or 2."""
    script = f"""
import contextlib, sys, temper
from temper.cli import main
for line in {[*lines]}:
    with contextlib.suppress(SystemExit):
        assert main(line) in (0, 2), line
print(*sys.modules, *(f"temper.{{name}}" for name in vars(temper)))"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, set(done.stdout.splitlines()[-1].split())


def test_usage_imports_nothing():
    assert not {"torch", "transformers", "numpy"} & answers([], ["sfd"])[1]


def test_help_and_a_mistake_import_no_pytorch():
    said, modules = answers(["sft", "--help"], ["ppo", "--halp"], ["data", "convert", "--help"])
    assert "usage: temper sft" in said
    assert "no flag --halp; did you mean --help?" in said
    assert not HEAVY & modules


@pytest.mark.slow
def test_a_command_line_is_read_without_pytorch(tmp_path):
    """Help, wrong flags, recipes and files that are not there; and nothing of the hollow libraries is left behind."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nstages:\n  sft: {method: sft, model: m, data: d, larning_rate: 1}\n")
    mistakes = [
        ["run", str(recipe)],
        ["sft", "--model", "m", "--data", "no.txt", "--out", str(tmp_path / "out")],
        *([name, str(tmp_path)] for name in ("chat", "compare", "report")),
    ]
    said, modules = answers(*([name, word] for name in COMMANDS for word in ("--help", "--halp")), *mistakes)
    assert said.count("usage: temper ") == len(COMMANDS)
    own = {"world", "data", "adapter"}  # they have commands of their own
    assert said.count("temper: no flag --halp; did you mean --help?") == len(COMMANDS.keys() - own)
    assert "temper: no command 'data --halp'" in said
    assert "temper: no command 'adapter --halp'" in said
    assert "temper: the following arguments are required: show|sample|score|annotators; see temper world --help" in said
    assert "sft has no setting 'larning_rate'; did you mean 'lr'?" in said
    assert "temper: no.txt: no such file" in said
    assert "holds no model" in said
    assert said.count("holds no stage of a run") == 2
    light = {"temper.cli", "temper.config", "temper.hollow", "temper.data", "temper.data.commands"}
    assert {name for name in modules if name.startswith("temper.") and "__" not in name} == light
    assert not HEAVY & modules


def test_a_stage_says_what_it_did_and_what_comes_next(toy, tmp_path, capsys):
    argv = command("sft", toy, tmp_path / "sft")
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sft: 40 steps, ")
    assert any("chats.jsonl: messages" in line for line in lines)
    assert any(line.startswith("  loss ") and "negative log-likelihood per learned token" in line for line in lines)
    assert any(line.startswith("  held_out_loss ") for line in lines)
    assert lines[-1] == f"model in {tmp_path / 'sft' / 'model'}; next: temper chat {tmp_path / 'sft'}"
    assert main([*argv, "--json"]) == 0  # done: the summary again
    found = json.loads(capsys.readouterr().out)
    assert found["summary"]["steps"] == 40
    assert found["card"]["records"] == 160


def test_progress_goes_to_stderr_and_quiet_is_quiet(toy, tmp_path, capsys):
    argv = [word for word in command("reward", toy, tmp_path / "a") if word != "--quiet"]
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert "a 18/18  loss " in err
    assert main([*command("reward", toy, tmp_path / "b"), "--json"]) == 0
    assert capsys.readouterr().err == ""


def test_exit_codes(monkeypatch, capsys):
    def answer(error):
        class Module:
            read = staticmethod(list)

            @staticmethod
            def main(argv):
                raise error

        monkeypatch.setattr(cli, "import_module", lambda name: Module)
        return main(["report", "x"])

    assert answer(KeyboardInterrupt()) == 130
    assert answer(BrokenPipeError()) == 0
    assert capsys.readouterr().err == "temper: interrupted\n"


@pytest.mark.slow
def test_a_method_by_hand_from_end_to_end_on_files_alone(toy, tmp_path, capsys):
    """base -> sft -> reward -> ppo, each by its command, each finding the one before by its folder."""
    steps = {
        "pretrain": values_of("pretrain", toy) | {"epochs": 1},
        "sft": {"model": tmp_path / "pretrain", "data": toy.chats, "epochs": 3, "batch": 16, "lr": 0.02},
        "reward": {"model": tmp_path / "sft", "data": toy.pairs},
        "ppo": {
            "model": tmp_path / "sft",
            "reward": tmp_path / "reward",
            "prompts": write(tmp_path / "p.jsonl", [{"messages": user("Hi")}]),
            "rollouts": 1,
            "max_new": 6,
        },
    }
    for method, values in steps.items():
        argv = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        assert main([method, *argv, "--out", str(tmp_path / method), "--quiet", "--threads", "1"]) == 0
        assert (tmp_path / method / "model" / "model.safetensors").exists()
    assert "next: temper chat" in capsys.readouterr().out
