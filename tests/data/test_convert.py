"""`temper data convert`: nothing of the words is lost, what else is lost is said, nothing is half-written."""

import json

import pytest

from temper.cli import main
from temper.data.sources import read

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "A"), ("assistant", "B")))


def put(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(capsys, *argv):
    code = main(["data", "convert", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def records_of(path, kind="any"):
    return [r.model_copy(update={"meta": {k: v for k, v in r.meta.items() if k != "at"}}) for r in read(str(path), kind).records]


def test_there_and_back(tmp_path, capsys):
    source = put(
        tmp_path / "a.jsonl", {"instruction": "Q", "input": "x", "output": "A", "id": 7}, {"instruction": "Q", "input": "", "output": "A"}
    )
    code, out, _ = run(capsys, source, "--to", "messages", "--out", tmp_path / "m.jsonl")
    assert code == 0
    assert "Alpaca (rows with 'instruction' and 'output'); 2 of 2 rows" in out
    assert "2 rows of messages, nothing of them lost" in out
    assert rows_of(tmp_path / "m.jsonl")[0] == {"messages": [{"role": "user", "content": "Q\n\nx"}, GOOD], "meta": {"id": 7, "input": "x"}}
    assert run(capsys, tmp_path / "m.jsonl", "--to", "alpaca", "--out", tmp_path / "b.jsonl")[0] == 0
    assert rows_of(tmp_path / "b.jsonl")[0] == {"instruction": "Q", "input": "x", "output": "A", "meta": {"id": 7}}
    assert records_of(tmp_path / "b.jsonl") == records_of(source)


def test_what_is_lost_is_said(tmp_path, capsys):
    source = put(tmp_path / "p.jsonl", {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 2, "id": 3})
    code, out, _ = run(capsys, source, "--to", "hh", "--out", tmp_path / "h.jsonl", "--json")
    done = json.loads(out)
    assert (code, done["lost"], done["written"]) == (0, {"margin": 1}, 1)
    code, out, _ = run(capsys, source, "--to", "hh", "--out", tmp_path / "h.jsonl", "--no-meta")
    assert "lost: HH dialogues has no place for margin: 1 rows" in out
    assert "no place for meta 'id': 1 rows" in out
    code, out, _ = run(capsys, source, "--to", "messages", "--out", tmp_path / "m.jsonl")
    assert "the chosen answers as conversations, the rejected ones in their meta: 1 rows" in out
    assert run(capsys, tmp_path / "m.jsonl", "--to", "chosen-rejected", "--out", tmp_path / "q.jsonl")[0] == 0
    assert records_of(tmp_path / "q.jsonl") == records_of(source)


@pytest.mark.parametrize(
    ("row", "to", "why"),
    [
        ({"messages": [USER, GOOD, USER, GOOD]}, "flan", "FLAN holds one question and its answer, this conversation has 4 turns"),
        ({"prompt": "Q", "chosen": "a\n\nHuman: b", "rejected": "B"}, "hh", "cannot hold"),
        ({"prompt": "Q ", "chosen": "a", "rejected": "B"}, "hh", "HH dialogues cannot hold its prompt exactly"),
        ({"messages": [{"role": "system", "content": "S"}, USER, GOOD]}, "lima", "no system turn"),
        ({"messages": [USER, GOOD]}, "worked-solutions", "end with an answer to check"),
        ({"text": "once"}, "messages", "holds plain text, needed are conversations or prompts"),
        ({"messages": [USER, GOOD]}, "stepwise", "needed are solutions with labelled steps"),
    ],
)
def test_what_cannot_be_held_is_refused_and_nothing_written(tmp_path, capsys, row, to, why):
    code, out, err = run(capsys, put(tmp_path / "x.jsonl", row), "--to", to, "--out", tmp_path / "out.jsonl")
    assert (code, out) == (2, "")
    assert why in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_the_rest_goes_on_with_skip_bad(tmp_path, capsys):
    rows = [
        {"messages": [USER, GOOD]},
        {"messages": [USER, USER, GOOD]},
        {"messages": [USER, GOOD, USER, GOOD]},
        "{",
        {"messages": [USER, GOOD]},
    ]
    source = put(tmp_path / "x.jsonl", *rows)
    code, _, err = run(capsys, source, "--to", "alpaca", "--out", tmp_path / "a.jsonl")
    assert code == 2
    assert "x.jsonl:2: message 2 (user) follows a user turn (and 1 more bad rows, lines 4)" in err
    code, out, _ = run(capsys, source, "--to", "flan", "--out", tmp_path / "a.json", "--skip-bad")
    assert code == 0
    assert "left out: " + source + ":2: message 2 (user)" in out
    assert "left out: " + source + ":3: FLAN holds one question" in out
    assert json.loads((tmp_path / "a.json").read_text()) == [{"inputs": "Q", "targets": "A"}] * 2


def test_standard_output_and_unknown_formats(tmp_path, capfdbinary):
    source = put(tmp_path / "x.jsonl", {"prompt": "Q", "completion": "A"})
    assert main(["data", "convert", source, "--to", "sharegpt", "--out", "-"]) == 0
    out, err = capfdbinary.readouterr()
    assert json.loads(out) == {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    assert b"1 rows of ShareGPT" in err
    assert main(["data", "convert", source, "--to", "sharegtp", "--out", "-"]) == 2
    assert b"there are alpaca, " in capfdbinary.readouterr().err
    assert main(["data", "convrt"]) == 2
    assert b"did you mean 'convert'?" in capfdbinary.readouterr().err


REAL = [  # file, format, rows used of all, through, back to, kind
    ("alpaca-en-1000.json", "Alpaca", (999, 999), "messages", "alpaca"),
    ("gsm8k-test.jsonl", "worked solutions", (1319, 1319), "messages", "worked-solutions"),
    ("self-instruct-seed-tasks.jsonl", "seed tasks", (175, 175), "messages", "self-instruct"),
    ("mt-bench-questions.jsonl", "MT-Bench questions", (80, 80), "messages", "mt-bench"),
    ("xstest-prompts.csv", "XSTest prompts", (450, 450), "messages", "xstest"),
    ("dpo-sharegpt-299.json", "chosen/rejected", (299, 299), "messages", "chosen-rejected"),
    ("kto-sharegpt-300.json", "thumbs", (150, 300), "messages", "kto"),
    ("tinyshakespeare.txt", "plain text", (140, 140), "plain-text", "plain-text"),
    pytest.param("hh-harmless-base-test.jsonl.gz", "HH dialogues", (2299, 2312), "messages", "hh", marks=pytest.mark.slow),
    pytest.param("gsm8k-train.jsonl.gz", "worked solutions", (7473, 7473), "messages", "worked-solutions", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "source", "counts", "through", "back"), REAL)
def test_real_files_there_and_back(real, tmp_path, capsys, name, source, counts, through, back):
    code, out, _ = run(capsys, real / name, "--to", through, "--out", tmp_path / "there.jsonl", "--skip-bad", "--json")
    done = json.loads(out)
    assert code == 0
    assert (done["format"], done["written"], done["rows"], done["lost"]) == (source, *counts, {})
    again = tmp_path / ("back" + {"csv": ".csv", "txt": ".txt"}.get(name.rpartition(".")[2], ".jsonl"))
    assert run(capsys, tmp_path / "there.jsonl", "--to", back, "--out", again)[0] == 0
    whole = read(str(real / name), "any", skip_bad=True).records
    want = [r.model_copy(update={"meta": {k: v for k, v in r.meta.items() if k != "at"}}) for r in whole]
    if source == "thumbs":  # a thumb down is no conversation to learn
        want = [r for r in want if r.rating == 1]
    assert records_of(again) == want
    if again.suffix in (".csv", ".txt"):
        assert again.read_bytes() == (real / name).read_bytes()


@pytest.mark.parametrize("name", ["votes-food.csv", "votes-simple-golden.csv", "krippendorff-codings.csv"])
def test_real_tables_without_text_are_refused(real, tmp_path, capsys, name):
    code, _, err = run(capsys, real / name, "--to", "messages", "--out", tmp_path / "x.jsonl")
    assert code == 2
    assert "names systems and holds no text" in err or "names '' twice" in err
