"""Files of every kind, packed or not, whole or broken; standard input; the hub."""

import gzip
import io
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from temper.config import UserError
from temper.data import files, hub
from temper.data.files import rows, write_rows
from temper.data.sources import read

ROWS = [{"prompt": "Q, with a comma", "completion": 'said "A"\nand é'}, {"prompt": "2", "completion": "B"}]
KINDS = [".jsonl", ".json", ".csv", ".tsv", ".parquet"]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(tmp_path, kind, packed):
    pytest.importorskip("pyarrow")
    paths = [tmp_path / f"{name}{kind}{packed}" for name in "ab"]
    for path in paths:
        write_rows(path, iter(ROWS))
    assert [row.value for row in rows(paths[0])] == ROWS
    assert not [row for row in rows(paths[0]) if row.broken]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_packed_file_that_breaks_off_gives_what_is_before(tmp_path, kind, packed):
    pytest.importorskip("pyarrow")
    path = tmp_path / f"x{kind}{packed}"
    words = random.Random(0)
    write_rows(path, ({"prompt": str(i), "completion": words.randbytes(60).hex()} for i in range(2000)))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=rf"x{kind}{packed}:\d+: broken (gzip|zstd) \(.*nothing after it can be read"):
        read(str(path), "chat")
    if packed == ".gz":  # .zst comes in larger blocks
        records, report = read(str(path), "chat", skip_bad=True)
        assert 500 < len(records) < 2000
        assert len(report.skipped) == 1


def test_a_table_that_is_broken(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'prompt,completion\nQ,A\nQ\n"Q\n2",B\nQ,\xff\nQ,"C"x\nQ,D\n')
    assert [(r.line, r.broken.partition(" ")[0]) for r in rows(path)] == [(2, ""), (3, "1"), (4, ""), (6, "byte"), (7, "not"), (8, "")]
    assert [r.broken for r in rows(path)][1] == "1 cells, but the header names 2 columns"
    path.write_text("a,b,a\n1,2,3\n")
    with pytest.raises(UserError, match=r"t\.csv:1: the header names 'a' twice"):
        list(rows(path))
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(UserError, match=r"x\.parquet:1: broken Parquet"):
        read(str(tmp_path / "x.parquet"), "chat")


def test_a_byte_that_is_not_utf8_in_a_list(tmp_path):
    good = json.dumps(ROWS[0]).encode()
    (tmp_path / "x.json").write_bytes(b"[" + good + b',\n{"prompt": "\xff", "completion": "A"},\n' + good + b"]")
    with pytest.raises(UserError, match=r"x\.json:2: byte 0xff in the row is not UTF-8"):
        read(str(tmp_path / "x.json"), "chat")
    assert len(read(str(tmp_path / "x.json"), "chat", skip_bad=True).records) == 2


def test_rows_of_a_list_on_one_line_are_told_by_their_columns(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1}, {"a": 2},\n {\n"a": 3}, {"a": 4}, {"a": 5}]')
    assert [row.line for row in rows(path)] == [1, "1:12", 2, 3, "3:20"]


def test_a_line_that_is_too_long_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE", 1 << 20)
    path = tmp_path / "x.jsonl"
    long = json.dumps({**ROWS[0], "prompt": "x" * (3 << 20)})
    path.write_text("\n".join([json.dumps(ROWS[0]), long, json.dumps(ROWS[1])]))
    found = list(rows(path))
    assert [(r.line, bool(r.broken)) for r in found] == [(1, False), (2, True), (3, False)]
    assert found[1].broken == "longer than 1 MiB; a line should hold one row"


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_standard_input_is_told_by_how_it_begins(tmp_path, monkeypatch, kind, packed):
    pytest.importorskip("pyarrow")
    path = tmp_path / f"x{kind}{packed}"
    write_rows(path, ROWS)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
    records, report = read("-", "chat")
    assert (len(records), report.source) == (2, "prompt/completion")
    assert records[0].meta["at"] == f"standard input:{1 if kind == '.jsonl' else next(rows(path)).line}"


def test_standard_input_of_text_and_of_nothing(monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"Once, upon\na time")))
    assert read("-", "text").records[0].text == "Once, upon\na time"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    with pytest.raises(UserError, match="standard input: is empty"):
        read("-", "text")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(gzip.compress(b'{"prompt": "Q"}\n' * 9999)[:-20])))
    with pytest.raises(UserError, match=r"standard input:.*broken gzip"):
        read("-", "prompts")


def test_what_a_file_cannot_hold(tmp_path):
    nested = [{"messages": [{"role": "user", "content": "Q"}]}]
    for name, why in (("x.csv", "a table of text cannot hold 'messages'"), ("x.txt", "holds plain text only"), ("x.doc", "unknown kind")):
        with pytest.raises(UserError, match=why):
            write_rows(tmp_path / name, nested)
    assert not list(tmp_path.iterdir())


def test_a_name_of_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own/there").mkdir()
    assert hub.is_name("openai/gsm8k?config=main&split=test")
    assert hub.is_name("hub:gsm8k")
    for path in ("own/there", "a/b.jsonl", "/a/b", "./a/b", "x.json", "a/b.jsonl.gz", "-", "world:documents"):
        assert not hub.is_name(path)
    monkeypatch.setattr(hub, "_reachable", lambda endpoint: True)
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"question": "Q", "answer": "#### 4", "note": None}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    ((chat,), report) = read("openai/gsm8k?config=main&split=test", "chat")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test", "revision": None})]
    assert chat.meta == {"answer": "4", "at": "openai/gsm8k?config=main&split=test:1"}
    assert report.source == "worked solutions"
    with pytest.raises(UserError, match="no option 'name'; there are config, split and revision"):
        read("openai/gsm8k?name=main", "chat")

    def refuse(*args, **kwargs):
        raise ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(Config name is missing. Please pick one.*name it as openai/gsm8k\?config="):
        read("openai/gsm8k", "chat")


def test_without_a_network_one_line_says_so(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(hub, "_reachable", lambda endpoint: False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^nobody/nothing: no such file, and the hub cannot be reached") as error:
        read("nobody/nothing", "chat")
    assert "\n" not in str(error.value)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"reading Parquet needs pyarrow: pip install 'temper-lm\[data\]'"):
        list(rows(Path(tmp_path / "x.parquet")))
