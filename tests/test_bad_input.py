"""What the user did wrong: one clear line, exit code 2, nothing half-written; the corrected command then works in the same folder."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import TINY, says, train, user, write
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from temper.cli import main
from temper.models.load import save
from temper.models.tokenizer import train_tokenizer
from temper.runs import Run

GOOD = [{"messages": [*user(f"What is {n}?"), says("It is blue.")]} for n in range(12)]


def run(argv, capsys):
    """(exit code, stdout, lines of stderr)"""
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def refused(argv, capsys, expected=2):
    """The one line that the command says; it must end with 2 and print nothing else."""
    code, out, err = run(argv, capsys)
    assert code == expected, err
    assert out == ""
    assert len(err) == 1, err
    assert re.match("temper: (?!temper)", err[0])
    return err[0]


def sft(toy, data, out, *more):
    return ["sft", "--model", toy.base, "--data", data, "--out", out, "--epochs", "0.1", "--threads", "1", "--quiet", *more]


def lines(path, *rows):
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")


def broken_json(path):
    lines(path, *(json.dumps(row) for row in GOOD[:3]), '{"messages": [', *(json.dumps(row) for row in GOOD[3:]))


def rows(**third):
    return lambda path: write(path, [*GOOD[:2], {**GOOD[2], **third}, *GOOD[3:]])


FILES = {  # case: (writes the file, what the line must say after the file's name)
    "missing file": (lambda path: None, r": no such file"),
    "empty file": (lambda path: path.write_bytes(b""), r": is empty; give a file with data"),
    "blank file": (lambda path: path.write_text("\n\n"), r": is empty; give a file with data"),
    "a row that is not JSON": (broken_json, r":4: not JSON \(expecting value, column \d+\); correct the row \(--skip-bad"),
    "no row is JSON": (lambda path: lines(path, "hello", "world"), r":1: not JSON"),
    "a row that is no object": (
        lambda path: lines(path, *map(json.dumps, [GOOD[0], 5])),
        r":2: a row is an object with named fields, got 5",
    ),
    "unknown format": (lambda path: write(path, [{"q": "a", "a": "b"}]), r":1: a row with 'q', 'a' is of no known format"),
    "missing field": (rows(messages=[{"role": "user"}, says("x")]), r":3: messages: message 1 has no text in 'content'"),
    "unknown role": (
        rows(messages=[{"role": "bot", "content": "x"}, says("y")]),
        r":3: messages: message 1 has role 'bot'; known are system, user, assistant, tool",
    ),
    "no answer": (rows(messages=user("x")), r":3: .*(assistant turn|holds prompts)"),
    "empty answer": (rows(messages=[*user("x"), says(" ")]), r":3: message 2 \(assistant\) is empty"),
    "longer than the window": (rows(messages=[*user("x" * 400), says("y")]), r":3: \d+ tokens > 160, the model's window; use --too-long"),
    "not UTF-8": (
        lambda path: path.write_bytes(json.dumps(GOOD[0]).encode() + b'\n{"messages": "\xff"}\n'),
        r":2: byte 15 of the line is not UTF-8",
    ),
    "messages that are a number": (
        lambda path: lines(path, *(json.dumps({**row, "meta": {}}) for row in GOOD[:2]), '{"meta": {}, "messages": 5}'),
        r":3: messages: got 5, input should be a valid list",
    ),
    "half a surrogate pair": (rows(messages=[*user("x\ud800"), says("y")]), r":3: half a surrogate pair"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_used(toy, tmp_path, capsys, case):
    make, says_what = FILES[case]
    data, out = tmp_path / "rows.jsonl", tmp_path / "deep" / "out"
    make(data)
    line = refused(sft(toy, data, out), capsys)
    assert re.match(rf"temper: {re.escape(str(data))}{says_what}", line), line
    assert not out.parent.exists()
    write(data, GOOD)
    assert run(sft(toy, data, out), capsys)[0] == 0  # no --fresh needed
    assert Run(out).done


def test_other_files(toy, tmp_path, capsys):
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in GOOD).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "table.xml").write_text("a,b\n")
    (tmp_path / "list.json").write_text(json.dumps(GOOD)[:-40])
    (tmp_path / "nothing").mkdir()
    for name, what in (
        ("cut.jsonl.gz", "broken gzip"),
        ("table.xml", "unknown kind of file '.xml'; give .jsonl, .json, .csv"),
        ("list.json", "not JSON"),
        ("nothing", "the folder holds no .jsonl, .json, .csv, .tsv, .parquet, .txt file"),
    ):
        assert what in refused(sft(toy, tmp_path / name, tmp_path / "out"), capsys)
    for spec, what in (
        ("world:demonstrators", "no data set 'demonstrators'; it has documents, demonstrations"),
        ("world:demonstrations?n=0", "n is 0"),
        ("world:demonstrations?size=3", "no option 'size'"),
        ("world:documents?n=3", "plain text, needed are conversations"),
    ):
        assert what in refused(sft(toy, spec, tmp_path / "out"), capsys)
    assert not (tmp_path / "out").exists()


PAIR = {"prompt": user("What?"), "chosen": "Blue.", "rejected": "Red."}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ('{"prompt": "What?", "chosen": "Blue.", "rejected": "Red.", "margin": 1e400}', "margin: got inf, input should be a finite number"),
        ('{"prompt": "What?", "chosen": "Blue.", "rejected": "Red.", "margin": NaN}', "margin: got nan, input should be a finite number"),
        ('{"prompt": "What?", "chosen": "Blue.", "rejected": " Blue. "}', "the rejected answer is the same as the chosen answer"),
    ],
)
@pytest.mark.parametrize("method", ["reward", "dpo"])
def test_a_pair_that_cannot_be_used(toy, tmp_path, capsys, method, row, what):
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    lines(data, *[json.dumps(PAIR)] * 3, row)
    command = [method, "--model", toy.sft, "--data", data, "--out", out, "--epochs", "0.5", "--batch", "2", "--threads", "1", "--quiet"]
    assert f"{data}:4: {what}" in refused(command, capsys)
    assert not out.exists()
    assert run([*command, "--skip-bad"], capsys)[0] == 0
    assert f"1 skipped (line: why): 4: {what}" in Run(out).stage["card"]["source"]


def test_places_that_cannot_be_written(toy, tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", GOOD)
    for out, why in (
        (data / "x", "not a directory"),
        (Path("/proc/x"), "no such file or directory"),
        (tmp_path / ("x" * 300), "file name too"),
    ):
        assert f"{out}: cannot be written ({why}" in refused(sft(toy, data, out), capsys)
    (tmp_path / "mine").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert "no such file" in refused(sft(toy, tmp_path / "typo.jsonl", tmp_path / "mine"), capsys)
    assert "no such file" in refused(sft(toy, tmp_path / "typo.jsonl", tmp_path / "mine" / "a" / "b"), capsys)
    assert sorted(tmp_path.rglob("*")) == before  # what was there stays, what was made for the run goes


def test_a_mistake_costs_no_sampling(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("temper.methods.collect.sample", lambda *args, **kwargs: pytest.fail("sampled"))
    command = ["collect", "--model", toy.sft, "--prompts", "world:prompts?n=3", "--panel", "twon", "--out", tmp_path / "out", "--quiet"]
    assert "twon" in refused(command, capsys)


def test_rows_of_the_world_have_a_name(toy, tmp_path, capsys):
    line = refused(sft(toy, "world:demonstrations?n=5", tmp_path / "out", "--max-length", "8"), capsys)
    assert re.match(r"temper: world:demonstrations\?n=5:\d: \d+ tokens > --max-length 8", line), line


def test_flags(toy, tmp_path, capsys):
    data, out = write(tmp_path / "rows.jsonl", GOOD), tmp_path / "out"
    for more, what in (
        (["--larning-rate", "0.1"], "no flag --larning-rate; did you mean --lr?"),
        (["--max-lenght", "8"], "no flag --max-lenght; did you mean --max-length?"),
        (["--lr", "-1"], "--lr: got '-1', input should be greater than 0"),
        (["--lr", "nan"], "--lr: got 'nan', input should be a finite number"),
        (["--batch", "many", "--threads", "0"], "--batch: got 'many'"),
        (["--too-long", "cut"], "--too-long: got 'cut', input should be 'error', 'drop' or 'cut-prompt'"),
        (["more.jsonl"], "unexpected 'more.jsonl'"),
        (["--max-length", "161"], "--max-length 161: the model's window is 160 tokens"),
        (["--epochs"], "--epochs: expected one argument"),
    ):
        line = refused([*sft(toy, data, out)[:7], "--quiet", *more], capsys)
        assert what in line
        assert not out.exists()
    assert "--model is missing" in refused(["sft", "--out", out, "--data", data], capsys)


def test_commands(capsys):
    assert refused(["stf"], capsys) == "temper: no command 'stf'; did you mean 'sft'?"
    assert refused(["xyzzy"], capsys) == "temper: no command 'xyzzy'; temper --help lists them"
    assert refused(["report", "--jsn", "a"], capsys) == "temper: no flag --jsn; did you mean --json?; see temper report --help"
    assert "the following arguments are required: name; see temper world sample --help" in refused(["world", "sample"], capsys)


def folder_of(folder: Path, *, eos=None, template=None):
    """A small model whose tokenizer is what the test wants."""
    words = train_tokenizer(["What is it? It is blue."] * 3, 300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, eos_token=eos)
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=310, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=99
    )
    save(AutoModelForCausalLM.from_config(config), tokenizer, folder)
    return str(folder)


def test_models(toy, tmp_path, capsys):
    data, out = write(tmp_path / "rows.jsonl", GOOD), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for model, what in (
        (tmp_path / "none", "none: no such folder"),
        (data, "rows.jsonl: a file; give the model's folder"),
        (tmp_path / "empty", "empty: no config.json, so not a model folder"),
        (tmp_path / "pickled", "weights only as pickle (pytorch_model.bin), which can run code; convert them to safetensors"),
        (toy.reward, "a scoring model, not a language model"),
        (folder_of(tmp_path / "endless", template=bare), "has no end token, so a model could never learn to stop"),
    ):
        command = sft(toy, data, out)
        command[2] = str(model)
        assert what in refused(command, capsys)
        assert not out.exists()
    assert run(sft(toy, data, out), capsys)[0] == 0
    endless = folder_of(tmp_path / "endless base")
    for command in (
        ["collect", "--model", endless, "--prompts", "world:prompts?n=3"],
        ["ppo", "--model", endless, "--reward", toy.reward, "--prompts", toy.prompts],
        ["grpo", "--model", endless, "--reward", toy.reward, "--prompts", toy.prompts],
    ):
        assert "temper" in refused([*command, "--out", tmp_path / "other", "--quiet"], capsys)
        assert not (tmp_path / "other").exists()


def test_a_damaged_model(toy, tmp_path, capsys):
    data, out = write(tmp_path / "rows.jsonl", GOOD), tmp_path / "out"
    train("sft", tmp_path / "m", model=toy.base, data=str(data), epochs=0.1)
    weights = tmp_path / "m" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    command = sft(toy, data, out)
    command[2] = str(tmp_path / "m")
    assert "model.safetensors is damaged" in refused(command, capsys)
    assert not out.exists()


def test_the_folder_of_another_run(toy, tmp_path, capsys):
    """Refused, named, and not touched; --fresh removes what temper wrote and nothing else."""
    data, out = write(tmp_path / "rows.jsonl", GOOD), tmp_path / "out"
    assert run(sft(toy, data, out), capsys)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    line = refused([*sft(toy, data, out), "--lr", "0.01"], capsys)
    assert line.endswith("out belongs to another run: lr 0.0003 there, 0.01 here; choose another --out or --fresh")
    assert "belongs to another run" in refused(["reward", "--model", toy.sft, "--data", toy.pairs, "--out", out], capsys)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (out / "notes.txt").write_text("mine")
    assert run([*sft(toy, data, out), "--lr", "0.01", "--fresh"], capsys)[0] == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert Run(out).stage["identity"]["settings"]["lr"] == 0.01


def test_folders_that_are_not_ours(toy, tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", GOOD)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "holds thesis.tex but no stage.json: not written by temper; choose another --out" in refused(
        sft(toy, data, tmp_path / "mine"), capsys
    )
    assert "is a file, not a folder" in refused(sft(toy, data, data), capsys)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_fresh_with_a_wrong_input_loses_nothing(toy, tmp_path, capsys):
    """The old model goes only when the new inputs are there."""
    data, out = write(tmp_path / "rows.jsonl", GOOD), tmp_path / "out"
    assert run(sft(toy, data, out), capsys)[0] == 0
    model = (out / "model" / "model.safetensors").read_bytes()
    assert "typo.jsonl: no such file" in refused(sft(toy, tmp_path / "typo.jsonl", out, "--fresh"), capsys)
    command = sft(toy, data, out, "--fresh")
    command[2] = str(tmp_path / "no model")
    assert "no model: no such folder" in refused(command, capsys)
    assert (out / "model" / "model.safetensors").read_bytes() == model
    assert Run(out).done


def test_a_run_that_can_go_on_is_not_given_up(toy, tmp_path, capsys, monkeypatch):
    """A full disk while the model is written: the checkpoint stays, and the same command finishes."""
    data, out = write(tmp_path / "rows.jsonl", GOOD), tmp_path / "out"
    assert run(sft(toy, data, tmp_path / "whole"), capsys)[0] == 0

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("temper.methods.sft.export", full)
        line = refused(sft(toy, data, out), capsys)
    assert "no space left on the disk; the last checkpoint is whole; free some space, then give the same command again" in line
    assert list((out / "checkpoints").iterdir())
    assert run(sft(toy, data, out), capsys)[0] == 0
    assert Run(out).stage["summary"]["resumed"] == 1
    assert (out / "model" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()


def test_no_number(toy, tmp_path, capsys):
    """Training that fails at its first step (exit code 1: not the input's shape) leaves the folder free for the corrected command."""
    data, out = write(tmp_path / "rows.jsonl", GOOD), tmp_path / "out"
    train("sft", tmp_path / "m", model=toy.base, data=str(data), epochs=0.1)
    weights = tmp_path / "m" / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] *= 1e30
    save_file(tensors, weights, metadata={"format": "pt"})
    command = sft(toy, data, out)
    command[2] = str(tmp_path / "m")
    assert "step 1: " in refused(command, capsys, expected=1)
    assert not out.exists()


@pytest.mark.slow
def test_as_a_process(toy, tmp_path):
    """Nothing of the libraries gets between: the same one line from the real command."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "temper",
            "pretrain",
            "--data",
            str(tmp_path / "no.txt"),
            "--out",
            str(tmp_path / "out"),
            "--width",
            str(TINY["width"]),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"temper: {tmp_path / 'no.txt'}: no such file\n"
    assert not (tmp_path / "out").exists()
