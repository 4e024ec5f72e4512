"""Tokenised sets on disk: what is read is what was made, nothing is made twice, and memory does not grow with the set."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from temper.config import UserError
from temper.data import ahead
from temper.data.sources import read
from temper.data.store import Trees, kept, label, mixed, parts
from temper.data.trees import Report, chat_chunk, chat_trees, comparison_chunk, prompt_chunk, text_chunk, text_trees
from temper.forest import Segment


def write(path, n, long=()):
    rows = [{"prompt": f"What is {k}?" + " herring" * (60 if k in long else k % 7), "completion": f"It is {k}."} for k in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def make(chatml, window, tmp_path):
    """(the store of a file, how often records were tokenised)"""
    calls = []

    def counted(records):
        calls.append(len(records))
        return chat_chunk(records, tokenizer=chatml, model=512, window=of.window, learn="all")

    def of(spec, **more):
        return kept(tmp_path / "kept", spec, "chat", counted, by="test", skip_bad=False, **more)

    of.window = window()
    of.calls = calls
    return of


def test_a_store_holds_what_was_made_and_is_made_once(make, chatml, window, tmp_path):
    spec = write(tmp_path / "a.jsonl", 600)
    expected, _ = chat_trees(chatml, read(spec, "chat").records, 512, window())
    for _ in range(2):
        found = make(spec)
        assert [found[i] for i in range(len(found))] == expected
        assert found.sizes(np.arange(600)).tolist() == [len(tree[0].tokens) for tree in expected]
        assert make.calls == [256, 256, 88]
    assert found.report.rows == 600
    assert "prompt/completion" in found.read.summary()
    assert [r.messages[0].content for r in found.sample()][:1] == ["What is 0?"]


def test_another_content_is_another_store_and_a_damaged_one_is_made_again(make, tmp_path):
    spec = write(tmp_path / "a.jsonl", 300)
    make(spec)
    (place,) = (tmp_path / "kept").iterdir()
    with (place / "tokens").open("r+b") as file:
        file.truncate(100)
    assert len(make(spec)) == 300
    assert sum(make.calls) == 600
    write(tmp_path / "a.jsonl", 301)
    assert len(make(spec)) == 301
    assert sum(make.calls) == 901
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_rows_of_another_kind_are_kept_with_what_became_of_them(make, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "Who?", "chosen": "Ada.", "rejected": "Kai."}\n')
    for _ in range(2):
        assert "the chosen answers as conversations, the rejected ones in their meta: 1 rows" in make(str(path)).read.summary()
    assert make.calls == [1]


def test_long_rows_are_counted_over_all_chunks_and_nothing_is_left_behind(make, window, tmp_path):
    make.window = window(60)
    spec = write(tmp_path / "a.jsonl", 600, long=(3, 300, 599))
    with pytest.raises(UserError, match=r"a\.jsonl:4: \d+ tokens > --max-length 60 \(and 2 more rows"):
        make(spec)
    assert not (tmp_path / "kept").exists()
    make.window = window(60, "drop")
    found = make(spec)
    assert list(found.report.dropped) == [3, 300, 599]
    assert len(found) == 597
    assert found.arrays["records"][298:300].tolist() == [299, 301]


PAIRS = [{"prompt": f"What is {k}?", "chosen": f"It is {k}.", "rejected": "No." * (1 + k % 3), "soft": 0.51 + k / 1000} for k in range(300)]
ASKED = [{"prompt": f"What is {k}?", "note": [k]} for k in range(300)]


@pytest.mark.parametrize(
    ("rows", "kind", "chunk"),
    [(PAIRS, "comparisons", comparison_chunk), (PAIRS, "rated", comparison_chunk), (ASKED, "prompts", prompt_chunk)],
)
def test_pairs_thumbs_and_prompts_with_their_records(chatml, tmp_path, rows, kind, chunk):
    """Labels and records come back as they were."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"tokenizer": chatml, "model": 512, "window": Plain()}
    found = kept(tmp_path / "kept", str(path), kind, partial(chunk, **how), by=1, skip_bad=False, every=True)
    records = read(str(path), kind).records
    expected, report = chunk(records, **how)
    assert [found[i] for i in range(len(found))] == [tree for _, tree in expected]
    trees = Trees([(found, np.arange(3, len(found)))], [1.0])
    assert list(trees.records()) == records[3:]
    assert trees.sizes().tolist() == [sum(len(s.tokens) for s in tree) for _, tree in expected[3:]]
    assert (
        found.report.tokens_unshared
        == report.tokens_unshared
        == int(found.arrays["unshared"].sum() if kind != "prompts" else report.tokens)
    )
    label(trees, "ref_logp", [[float(i)] * len(trees[i]) for i in range(len(trees))])
    assert [s.labels["ref_logp"] for s in trees[7]] == [7.0] * len(trees[7])
    assert "ref_logp" not in found[10][0].labels


def test_a_label_that_some_trees_lack(chatml, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"herring {k}"}) + "\n" for k in range(600)))

    def chunk(records):
        number = [int(r.text.split()[1]) for r in records]
        trees = [[Segment([1, 2], [0.0, 1.0], labels={"late": n / 3} if n > 300 else {})] for n in number]
        return list(enumerate(trees)), Report(len(records))

    found = kept(tmp_path / "kept", str(path), "text", chunk, by=1, skip_bad=False)
    assert [found[i][0].labels for i in (0, 299, 300, 301, 599)] == [{}, {}, {}, {"late": 301 / 3}, {"late": 599 / 3}]


def test_mixtures_that_are_held_in_memory(tmp_path):
    a, b = write(tmp_path / "a.jsonl", 30), write(tmp_path / "b.jsonl", 10)
    found = mixed(f"{a}=1,{b}=2", "chat", False, 0)
    names = [r.meta["at"].rpartition(":")[0] for r in found.records]
    assert (names.count(a), names.count(b)) == (5, 10)
    assert len({r.meta["at"] for r in found.records}) == 15
    assert "5 of 30 records of " in found.report.summary()
    assert mixed(a, "chat", False, 0).records == read(a, "chat").records


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chat", "comparisons"])
def test_helping_processes_make_the_same(chatml, tmp_path, monkeypatch, kind):
    """Tokens, labels and records: every file of the store."""
    spec, chat = write(tmp_path / "a.jsonl", 700), kind == "chat"
    if not chat:
        Path(spec).write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    how = {"tokenizer": chatml, "model": 512, "window": Plain()}
    make = partial(chat_chunk, **how, learn="all") if chat else partial(comparison_chunk, **how)
    kept(tmp_path / "one", spec, kind, make, by=1, skip_bad=False, every=not chat)
    monkeypatch.setattr(ahead, "ALONE", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    two = kept(tmp_path / "two", spec, kind, make, by=1, skip_bad=False, every=not chat)
    (a,), (b,) = ((tmp_path / name).iterdir() for name in ("one", "two"))
    assert all((b / file.name).read_bytes() == file.read_bytes() for file in a.iterdir())
    assert len(two) == (700 if chat else 300)


class Plain:
    max_length, too_long, skip_bad = None, "error", False


def test_windows_of_documents(base, tmp_path):
    (tmp_path / "a.txt").write_text("The herring is red. " * 900)
    found = kept(tmp_path / "kept", str(tmp_path / "a.txt"), "text", partial(text_chunk, tokenizer=base, window=32), by=1, skip_bad=False)
    assert [found[i] for i in range(len(found))] == text_trees(base, read(str(tmp_path / "a.txt"), "text").records, 32)[0]


def test_trees_are_those_that_are_meant_and_mixtures_take_their_share():
    a, b = [["a", i] for i in range(10)], [["b", i] for i in range(100)]
    trees = Trees([(a, np.arange(2, 10)), (b, np.arange(100))], [1, 3])
    assert len(trees) == 108
    assert trees[0] == ["a", 2]
    assert trees[8] == ["b", 0]
    assert trees[-1] == ["b", 99]
    assert trees.take == [8, 24]
    assert trees[7:9] == [["a", 9], ["b", 0]]


def test_specs_of_mixtures(tmp_path):
    assert parts("a.jsonl=0.7, b.jsonl=0.3") == {"a.jsonl": 0.7, "b.jsonl": 0.3}
    assert parts("world:demonstrations?n=100&seed=2") == {"world:demonstrations?n=100&seed=2": 1.0}
    assert parts("world:demonstrations?n=100=2,x/y=1") == {"world:demonstrations?n=100": 2.0, "x/y": 1.0}
    odd = tmp_path / "a=1,b=2"
    odd.write_text("")
    assert parts(str(odd)) == {str(odd): 1.0}
    for wrong in ("a.jsonl=0.7,b.jsonl", "a.jsonl=1,a.jsonl=2", "a.jsonl=0,b.jsonl=1"):
        with pytest.raises(UserError, match=r"each data set of a mixture"):
            parts(wrong)


MEASURE = """
import resource, sys
from functools import partial
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from conftest import CHATML, make_tokenizer
from temper.data.store import Trees, kept
from temper.data.trees import text_chunk
from temper.methods.base import Batching, offline
import numpy as np
tokenizer = make_tokenizer(eos="<|endoftext|>")
how = partial(text_chunk, tokenizer=tokenizer, window=256)
kept(Path(sys.argv[2]) / "small", sys.argv[4], "text", how, by=1, skip_bad=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = kept(Path(sys.argv[2]) / "kept", sys.argv[1], "text", how, by=1, skip_bad=False)
trees = Trees([(store, np.arange(len(store)))], [1.0])
source = offline(trees, Batching(batch=8))
for step in range(len(store) // 8):
    source(step)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown / 1024, sum(p.stat().st_size for p in (Path(sys.argv[2]) / "kept").rglob("*")) / 2**20)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_set(tmp_path):
    """Making and reading an epoch of it takes less memory than the tokens alone would, to say nothing of Python's objects for them."""
    rows = "".join(json.dumps({"text": f"{k} The harbour master weighs the herring. " * 30}) + "\n" for k in range(10_000))
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "small.jsonl").write_text(rows[: rows.index("\n", 200_000) + 1])
    places = [tmp_path / "a.jsonl", tmp_path, Path(__file__).parent, tmp_path / "small.jsonl"]
    command = [sys.executable, "-c", MEASURE, *map(str, places)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, stored = map(float, done.stdout.split())
    assert stored > 10
    assert grown < stored
