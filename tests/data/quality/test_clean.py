"""Recipes and commands: rows in = rows out + rows removed, nothing half-written, one clear line for what is wrong."""

import json
from pathlib import Path

import pytest
from data.quality.conftest import chat, text

from temper.cli import main
from temper.config import UserError
from temper.data.commands import COMMANDS
from temper.data.quality import steps
from temper.data.quality.clean import clean, plan
from temper.data.quality.rows import Rows, named

ROWS = [chat(f"Why {k}?", text(30, k % 7)) | {"kept": k, "α": [1.5, None]} for k in range(10)] + [chat("Q", "shit"), chat("Q", "I")]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def recipe(tmp_path, put):
    def write(steps, **more):
        put("x.jsonl", ROWS)
        path = tmp_path / "clean.yaml"
        path.write_text(json.dumps({"data": [str(tmp_path / "x.jsonl")], "out": str(tmp_path / "out/clean.jsonl"), "steps": steps, **more}))
        return str(path)

    return write


STEPS = [{"dedup": {"part": "answer"}}, {"filter": {"min_words": 1, "toxic": True}}, {"diversity": {"keep": 4}}]


def test_every_row_stands_in_one_file_as_it_was_and_says_why(recipe, tmp_path, capsys):
    assert main(["data", "clean", recipe(STEPS)]) == 0
    folder = tmp_path / "out"
    kept, gone, report = (
        lines(folder / "clean.jsonl"),
        lines(folder / "clean.removed.jsonl"),
        json.loads((folder / "clean.report.json").read_text()),
    )
    assert len(kept) == 4
    assert len(gone) == len(ROWS) - 4
    at = [row["kept"] for row in kept if "kept" in row]
    assert at == sorted(at)
    assert sorted(map(json.dumps, [*kept, *(g["row"] for g in gone)])) == sorted(map(json.dumps, ROWS))
    assert [ROWS[int(g["at"].rpartition(":")[2]) - 1] for g in gone] == [g["row"] for g in gone]
    first = next(g for g in gone if g["step"] == "dedup")
    assert {k: first[k] for k in ("step", "data", "why")} == {"step": "dedup", "data": "x", "why": first["why"]}
    assert first["why"] == f"exact duplicate of {tmp_path / 'x.jsonl'}:1"
    assert (report["rows_in"], report["rows_out"], report["removed"]) == (len(ROWS), 4, len(ROWS) - 4)
    for step, before in zip(report["steps"], [len(ROWS), *(s["rows_out"] for s in report["steps"])], strict=False):
        assert step["rows_in"] == before == step["rows_out"] + step["removed"]
    assert report["steps"][0]["settings"] == {"near": 0.8, "ngram": 5, "part": "answer"}
    flags = lines(folder / "clean.flagged.jsonl") if report["flagged"] else []
    assert all(kept[flag["line"] - 1]["completion"] == "shit" for flag in flags)
    out = capsys.readouterr().out
    assert "dedup: 12 rows -> 9\n  3 exact duplicate\n" in out
    assert f"{len(ROWS)} rows in, 4 out, {len(ROWS) - 4} removed" in out


def test_the_same_recipe_writes_the_same_bytes(recipe, tmp_path):
    path = recipe(STEPS)
    files = []
    for name in ("a", "b"):
        assert main(["data", "clean", path, "--out", str(tmp_path / name / "c.jsonl")]) == 0
        files.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
    assert {"c.jsonl", "c.removed.jsonl", "c.report.json"} <= files[0].keys()


def test_a_step_is_a_command_of_its_own_and_says_the_same_as_the_recipe(recipe, tmp_path, capsys):
    main(["data", "clean", recipe([{"dedup": {"part": "answer"}}])])
    capsys.readouterr()
    argv = ["data", "dedup", str(tmp_path / "x.jsonl"), "--part", "answer", "--out", str(tmp_path / "one.jsonl"), "--json"]
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["removed"] == 3
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "out/clean.jsonl").read_bytes()
    assert (tmp_path / "one.removed.jsonl").read_bytes() == (tmp_path / "out/clean.removed.jsonl").read_bytes()
    assert main(argv[:5]) == 0
    assert "nothing written (give --out" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*sorted(["dedup", "decontaminate", "filter", "mix", "pairs", "score", "judge", "diversity"]), "clean"])
def test_help_and_examples(name, capsys):
    assert name in COMMANDS
    assert name == "clean" or name in steps()
    with pytest.raises(SystemExit) as caught:
        main(["data", name, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "examples:\n" in out
    assert f"temper data {name} " in out


def test_removed_partners_of_a_later_step_do_not_confuse_the_counts(put):
    """A step sees only what the steps before it left."""
    rows = Rows({"x": put("x.jsonl", ROWS)})
    chosen = [{"filter": {"min_words": 2}}, {"dedup": {"near": None}}, {"dedup": {"part": "answer"}}]
    _, planned = plan({"data": ["x"], "steps": chosen}, "r")
    result = clean(rows, planned)
    assert [(r.rows_in, r.removed) for r in result.reports] == [(12, 2), (10, 0), (10, 3)]
    assert len(rows) == 7


def test_unusable_rows_stop_the_work_or_are_removed_with_their_reason(put, tmp_path, capsys):
    path = Path(put("x.jsonl", ROWS))
    path.write_text(path.read_text() + '{"prompt": \n{"strange": 1}\n')
    assert main(["data", "dedup", str(path), "--out", str(tmp_path / "o.jsonl")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"temper: {path}:13: not JSON")
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("o*"))
    assert main(["data", "dedup", str(path), "--near", "none", "--skip-bad", "--out", str(tmp_path / "o.jsonl")]) == 0
    gone = lines(tmp_path / "o.removed.jsonl")
    assert [(g["at"].rpartition(":")[2], g["step"], g["row"]) for g in gone] == [("13", "read", None), ("14", "read", {"strange": 1})]
    assert "read: 2 unusable rows of 14 removed" in capsys.readouterr().out


def test_nothing_is_written_where_the_disk_refuses(put, tmp_path, monkeypatch):
    path, out = put("x.jsonl", ROWS), tmp_path / "deep" / "o.jsonl"
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert main(["data", "dedup", path, "--out", str(out)]) == 2
    assert not list(out.parent.iterdir())


def test_a_file_that_changes_under_the_work_is_noticed(put):
    path = put("x.jsonl", ROWS)
    rows = Rows({"x": path})
    put("x.jsonl", ROWS[:5])
    with pytest.raises(UserError, match="changed while it was read"):
        list(rows)


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ([], "name at least one step"),
        (["dedupe"], r"step 1: got 'dedupe', should be one of .*dedup"),
        ([{"dedup": {}, "mix": {}}], "step 1: got"),
        (["dedup", {"dedup": {"nera": 0.5}}], r"step 2, dedup has no setting 'nera'; did you mean 'near'"),
        (["filter"], "step 1, filter: no rule is given"),
        ([{"dedup": {"near": 2}}], "'near': got 2, input should be less than or equal to 1"),
        ([{"decontaminate": {}}], "'against' is missing"),
    ],
)
def test_a_wrong_recipe_is_one_line_before_a_row_is_read(recipe, capsys, steps, match):
    import re

    assert main(["data", "clean", recipe(steps, data=["missing.jsonl"])]) == 2
    err = capsys.readouterr().err
    assert re.search(match, err), err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("out", "match"), [("x.jsonl", "would stand among the data"), ("o.txt", "ends in .jsonl")])
def test_outputs_that_would_harm_are_refused(put, tmp_path, capsys, out, match):
    path = put("x.jsonl", ROWS)
    before = Path(path).read_bytes()
    assert main(["data", "dedup", path, "--out", str(tmp_path / out)]) == 2
    assert match in capsys.readouterr().err
    assert main(["data", "dedup", str(tmp_path), "--out", str(tmp_path / "o.jsonl")]) == 2
    assert Path(path).read_bytes() == before


def test_data_have_names():
    assert named(["a/b.jsonl.gz", "c=d.json", "world:prompts?n=3"]) == {
        "b": "a/b.jsonl.gz",
        "c": "d.json",
        "world:prompts": "world:prompts?n=3",
    }


def test_standard_input_is_refused_with_a_reason():
    with pytest.raises(UserError, match="can be read only once"):
        Rows({"-": "-"})


def test_trees_are_rows(put):
    """Messages of a tree, a line each, make one row, which is kept or removed as a whole."""
    node = {"message_tree_id": "t", "text": "Why?", "role": "prompter", "lang": "en"}
    reply = {**node, "role": "assistant", "parent_id": "m0", "rank": 0}
    tree = [{**node, "message_id": "m0", "parent_id": None}, *({**reply, "message_id": f"m{k}", "text": f"So {k}."} for k in (1, 2))]
    (item,) = Rows({"x": put("x.jsonl", tree)})
    assert item.at.endswith(":1")
    assert {t for _, t in steps()["dedup"].texts(item)} >= {"Why?", "So 1."}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alpaca-en-1000.json", "hh-harmless-base-test.jsonl.gz", "kto-sharegpt-300.json"])
def test_real_duplicates(real, name):
    _, planned = plan({"data": ["x"], "steps": ["dedup"]}, "r")
    result = clean(Rows({"x": str(real / name)}, skip_bad=True), planned)
    assert result.to_dict()["rows_in"] == result.to_dict()["rows_out"] + result.to_dict()["removed"]
    expected = {"alpaca-en-1000.json": 14, "hh-harmless-base-test.jsonl.gz": 0}
    assert result.reports[0].removed == expected.get(name, result.reports[0].removed)
