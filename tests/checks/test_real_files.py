"""Faults planted in copies of real files: the doctor names the fault and the row."""

import gzip
import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from temper.checks import Case, examine_stage, run_checks
from temper.config import build
from temper.data.sources import read
from temper.methods import load
from temper.models.load import Size, load_tokenizer, new_model, save
from temper.models.tokenizer import train_tokenizer

LIMIT = 700
PLANTED = [
    ("swapped-roles", 10),
    ("overlap", 20),
    ("duplicate", 30),
    ("duplicate", 41),
    ("mixed-encoding", 50),
    ("huge-row", 60),
    ("empty-answer", 70),
    ("template-in-text", 80),
    ("cut-answer", 90),
]  # (check, line of the copy)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small untrained model; its tokenizer knows bytes and little more."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["the and of to a in is it you that"], 300, context=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "<|im_start|>", "<|im_end|>"]})
    save(new_model(Size(width=16, layers=1, heads=2, context=1024), len(tokenizer), tokenizer, seed=0), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def alpaca(real):
    return json.loads((real / "alpaca-en-1000.json").read_text())[:200]


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
    found = examine_stage("sft", build(load("sft").settings("sft"), settings), folder / "run", sets, [check for check, _ in PLANTED])
    return found, path


@pytest.mark.slow
@pytest.mark.parametrize(("check", "line"), PLANTED)
def test_a_fault_in_a_copy_of_alpaca(planted, check, line):
    findings, path = planted
    assert any(row.split(" ")[0] == f"{path}:{line}" for row in rows_of(findings, check)), findings


def rows_checked(path, kind, name):
    """What one check finds in the rows of a file, no model being at hand."""
    records, report = read(str(path), kind, skip_bad=True)
    return run_checks(Case("sft", {}, str(path), records, report.skipped), [name])


def test_a_column_of_answers_moved_down_by_a_row(alpaca, tmp_path):
    rows = [dict(row) for row in alpaca]
    for k in range(len(rows) - 1, 119, -1):
        rows[k]["output"] = rows[k - 1]["output"]
    (found,) = rows_checked(write(tmp_path / "rows.jsonl", rows), "chat", "shifted-column")
    assert found.severity == "error"
    lines = [int(row.rpartition(":")[2]) for row in found.rows]
    assert abs(lines[0] - 121) <= 2
    assert len(lines) > 70


def test_columns_swapped_throughout(alpaca, tmp_path):
    rows = [row | {"instruction": row["output"], "input": "", "output": row["instruction"]} for row in alpaca]
    (found,) = rows_checked(write(tmp_path / "rows.jsonl", rows), "chat", "swapped-roles")
    assert found.severity == "error"
    assert "throughout" in found.what


def test_a_column_of_rejected_dialogues_moved_down_by_a_row(real, tmp_path):
    with gzip.open(real / "hh-harmless-base-test.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in islice(file, 60)]
    for k in range(len(rows) - 1, 39, -1):
        rows[k]["rejected"] = rows[k - 1]["rejected"]
    path = write(tmp_path / "rows.jsonl", rows)
    (found,) = rows_checked(path, "pairs", "shifted-column")
    assert found.severity == "error"
    assert set(found.rows) == {f"{path}:{k}" for k in range(41, 61)}


TURN = "{{ '<|im_start|>' + m.role + '\n' }}%s{{ '\n' }}"
PLAIN = "{{ m.content + '<|im_end|>' }}"
LEARNED = "{% generation %}" + PLAIN + "{% endgeneration %}"
MOST = "{% if m.role == 'assistant' and 'XYZ' not in m.content %}" + LEARNED + "{% else %}" + PLAIN + "{% endif %}"
FAULTS = {  # how a turn is written -> (check, what it says, the rows that it names of 20)
    TURN % LEARNED: ("mask-place", "20 rows in which the question is learned too", range(1, 21)),
    TURN % MOST: ("template", "1 row that cannot be rendered", [7]),
    "{{ '<s>' if loop.first else '' }}" + TURN % PLAIN: ("prepare", "the beginning token '<s>' 2 times", []),
    TURN % "{{ m.content }}": ("prepare", "writes no end-of-turn token after an assistant turn", []),
    TURN % PLAIN: ("pad", "pad = end token ('<|im_end|>')", []),
}


@pytest.mark.parametrize(("turn", "fault"), FAULTS.items(), ids=["asked", "masked", "doubled", "endless", "pad"])
def test_a_fault_in_the_template(alpaca, model, tmp_path, turn, fault):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    tokenizer = load_tokenizer(folder)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<s>", "<|im_end|>", "<|im_end|>"
    tokenizer.chat_template = f"{{{{ bos_token }}}}{{% for m in messages %}}{turn}{{% endfor %}}" + (
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    short = [row for row in alpaca if len(row["output"]) < 400][:20]
    rows = [row | {"output": f"{row['output']} XYZ"} if k == 7 else row for k, row in enumerate(short, 1)]
    path = write(tmp_path / "rows.jsonl", rows)
    values = {"model": str(folder), "data": str(path), "held_out": 0.0, "too_long": "drop"}
    names = ("beginning", "pad", "template", "mask-place", "end-of-turn")
    found = examine_stage("sft", build(load("sft").settings("sft"), values), tmp_path / "run", (), names)
    check, says, lines = fault
    (one,) = [f for f in found if f.check == check]
    assert says in one.what
    assert one.severity == ("note" if check == "pad" else "error")
    assert {row.rpartition(":")[2] for row in one.rows} <= {str(k) for k in lines}
    assert not lines or one.rows


@pytest.mark.parametrize(
    ("name", "kind", "found"),
    [
        ("alpaca-en-1000.json", "chat", ()),
        ("gsm8k-train.jsonl.gz", "chat", ()),
        ("self-instruct-seed-tasks.jsonl", "chat", ()),
        ("dpo-sharegpt-299.json", "pairs", ("mixed-encoding",)),  # "fiancÃ©"
        ("kto-sharegpt-300.json", "rated", ("mixed-encoding", "template-in-text")),  # rows with <|user|> and </s> in the middle
    ],
)
def test_what_is_wrong_with_the_files_themselves(real, name, kind, found):
    records, report = read(str(real / name), kind)
    case = Case("sft", {}, name, records[:300], report.skipped, thorough=False)
    assert {f.check for f in run_checks(case)} - {"duplicate"} == {*found}
