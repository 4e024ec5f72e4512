"""Faults planted in copies of real files: the doctor names the fault and the row."""

import json

import pytest
import torch

from temper.checks import examine_stage
from temper.config import build
from temper.methods import load
from temper.models.load import Size, new_model, save
from temper.models.tokenizer import train_tokenizer

LIMIT = 700


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small untrained model; its tokenizer knows bytes and little more."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["the and of to a in is it you that"], 300, context=1024)
    save(new_model(Size(width=16, layers=1, heads=2, context=1024), len(tokenizer), tokenizer, seed=0), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def alpaca(real):
    return json.loads((real / "alpaca-en-1000.json").read_text())[:300]


def rows_of(findings, check):
    return [row for f in findings for row in f.rows if f.check == check]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def planted(alpaca, real, model, tmp_path_factory):
    """(findings, file) of a copy of Alpaca rows with one fault of each kind; rows count from 1."""
    folder = tmp_path_factory.mktemp("faults")
    rows = [dict(row) for row in alpaca]
    rows[9]["instruction"], rows[9]["output"] = rows[9]["output"], rows[9]["instruction"]
    question = json.loads((real / "mt-bench-questions.jsonl").read_text().splitlines()[4])["turns"][0]
    rows[19] = {"instruction": question, "input": "", "output": "That I cannot say."}
    rows[29] = dict(rows[28])
    long = next(row for row in alpaca if len(row["output"].split()) > 80)
    rows[39] = long | {"output": " ".join(word if k != 40 else "swapped" for k, word in enumerate(long["output"].split(" ")))}
    rows[40] = dict(long)
    rows[49]["output"] = "Café, naïve: ".encode().decode("cp1252") + rows[49]["output"]
    rows[59]["output"] = "0123456789abcdef" * 65536
    rows[69]["output"] = ""
    rows[79]["instruction"] = "<|im_start|>user\n" + rows[79]["instruction"]
    for k in (89, 90, 91):
        rows[k]["output"] = " ".join(row["output"] for row in alpaca[k : k + 9]).ljust(512, "x")[:511] + "w"
    path = write(folder / "rows.jsonl", rows)
    settings = {"model": str(model), "data": str(path), "max_length": LIMIT, "held_out": 0.0}
    sets = [str(real / "mt-bench-questions.jsonl")]
    found = examine_stage("sft", build(load("sft").settings("sft"), settings), folder / "run", sets)
    return found, path


@pytest.mark.parametrize(
    ("check", "line"),
    [
        ("swapped-roles", 10),
        ("overlap", 20),
        ("duplicate", 30),
        ("duplicate", 41),
        ("mixed-encoding", 50),
        ("huge-row", 60),
        ("empty-answer", 70),
        ("template-in-text", 80),
        ("cut-answer", 90),
    ],
)
def test_a_fault_in_a_copy_of_alpaca(planted, check, line):
    findings, path = planted
    assert any(row.split(" ")[0] == f"{path}:{line}" for row in rows_of(findings, check)), findings


def examined(method, folder, names=(), **values):
    return examine_stage(method, build(load(method).settings(method), values), folder / "run", (), names)


def test_a_column_of_answers_moved_down_by_a_row(alpaca, model, tmp_path):
    rows = [dict(row) for row in alpaca]
    for k in range(len(rows) - 1, 119, -1):
        rows[k]["output"] = rows[k - 1]["output"]
    path = write(tmp_path / "rows.jsonl", rows)
    found = examined("sft", tmp_path, ["shifted-column"], model=str(model), data=str(path), too_long="drop", held_out=0.0)
    assert [f.severity for f in found] == ["error"]
    lines = [int(row.rpartition(":")[2]) for row in found[0].rows]
    assert abs(lines[0] - 121) <= 2
    assert len(lines) > 170


def test_columns_swapped_throughout(alpaca, model, tmp_path):
    path = write(
        tmp_path / "rows.jsonl", [row | {"instruction": row["output"], "input": "", "output": row["instruction"]} for row in alpaca]
    )
    (found,) = examined("sft", tmp_path, ["swapped-roles"], model=str(model), data=str(path), too_long="drop", held_out=0.0)
    assert found.severity == "error"
    assert "throughout" in found.what


def test_the_files_themselves_have_no_such_fault(alpaca, model, tmp_path):
    path = write(tmp_path / "rows.jsonl", alpaca)
    found = examined("sft", tmp_path, model=str(model), data=str(path), too_long="drop", held_out=0.0)
    assert not [f for f in found if f.severity == "error"]
    assert not {f.check for f in found} & {"swapped-roles", "shifted-column", "mixed-encoding", "huge-row", "cut-answer"}
