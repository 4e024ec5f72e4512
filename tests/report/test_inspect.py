"""temper data inspect: what is shown is what is trained; hostile data stays text."""

import json
from html.parser import HTMLParser

import pytest
from rich.console import Console

from temper.cli import main
from temper.config import UserError
from temper.data import look
from temper.data.sources import read
from temper.data.template import attach_default_template
from temper.data.trees import chat_trees, comparison_trees
from temper.models.tokenizer import train_tokenizer
from temper.records import Chat, Message, Pair, Prompt, Ranked, Rated, Steps, Text
from temper.report.inspect import BYTES, Inspect, facts, inspect, show, write_page
from temper.report.page import POLICY

EVIL = '<script>alert(1)</script>"><img src=x onerror=y> \x1b[31m<|end|> \u202e é🐟'


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(["The herring is fresh today and the boats are red."] * 9, 300)
    attach_default_template(made)
    return made


def asks(text):
    return [Message(role="user", content=text)]


def chat(*said):
    roles = ["user", "assistant"] * len(said)
    return Chat(messages=[Message(role=r, content=t) for r, t in zip(roles, said, strict=False)])


CHATS = [chat("What is it? é🐟", "The herring.", "Is it red?", "No."), chat("Hi", "Yo"), chat("Hi", "Yo"), chat("Hi", "No")]
PAIRS = [Pair(prompt=asks("Red or blue? " * k), chosen="Red." * k, rejected="The blue boats.") for k in (1, 4, 8)]


def text_of(row, state=None):
    found = [p for part in row.parts for p in part.pieces]
    return "".join(p.text for p in found if state is None or getattr(p, state))


def test_a_row_is_shown_as_it_is_trained(tokenizer):
    row = look.show(tokenizer, CHATS[0], "x:1", None, "error")
    (tree,), _ = chat_trees(tokenizer, CHATS[:1], None, Window())
    assert text_of(row) == tokenizer.decode(tree[0].tokens)
    assert text_of(row, "learned") == "The herring.<|end|>No.<|end|>"
    assert text_of(row, "special") == "<|begin|><|user|><|end|><|assistant|><|end|><|user|><|end|><|assistant|><|end|>"
    assert (row.tokens, row.learned) == (len(tree[0].tokens), sum(tree[0].target))
    assert text_of(look.show(tokenizer, CHATS[0], "x:1", None, "error", "last"), "learned") == "No.<|end|>"


class Window:
    def __init__(self, max_length=None, too_long="cut-prompt", skip_bad=True):
        self.max_length, self.too_long, self.skip_bad = max_length, too_long, skip_bad


@pytest.mark.parametrize("limit", [12, 20, 24, 30, 40, 60, 80])
@pytest.mark.parametrize(("records", "plant"), [(CHATS, chat_trees), (PAIRS, comparison_trees)], ids=["chats", "pairs"])
def test_what_is_cut_and_dropped_is_what_training_cuts_and_drops(tokenizer, records, plant, limit):
    try:
        trees, report = plant(tokenizer, records, limit, Window())
    except UserError:
        trees, report = [], None
    rows = [look.show(tokenizer, r, "", limit, "cut-prompt") for r in records]
    kept = [r for r in rows if not r.trouble]
    assert len(kept) == len(trees)
    assert [r.tokens - r.cut for r in kept] == [sum(len(s.tokens) for s in t) for t in trees]
    for row, tree in zip(kept, trees, strict=True):
        left = "".join(p.text for part in row.parts for p in part.pieces if not p.cut)
        assert left == "".join(tokenizer.decode(s.tokens) for s in tree)
    if report:
        assert [bool(r.cut) for r in rows] == [i in report.cut for i in range(len(rows))]
    stats = look.statistics(tokenizer, records, limit, "cut-prompt")
    assert len(stats.over) == sum(bool(r.cut or r.trouble) for r in rows)


def test_statistics(tokenizer):
    stats = look.statistics(tokenizer, CHATS)
    assert (stats.rows, stats.tokenised, stats.kinds["chat"], stats.roles["assistant"]) == (4, 4, 4, 5)
    assert stats.turns == [4, 2, 2, 2]
    assert stats.duplicates == [("row 3", "row 2")]
    assert stats.same_prompt == 1  # the fourth asks what the second asks
    trees, report = chat_trees(tokenizer, CHATS, None, Window())
    assert sum(stats.tokens) == report.tokens
    assert stats.learned == [sum(t[0].target) for t in trees] == stats.answers["learned"]
    assert look.statistics(tokenizer, CHATS * 50, most=20).tokenised == 20


def test_statistics_of_pairs(tokenizer):
    stats = look.statistics(tokenizer, PAIRS)
    trees, report = comparison_trees(tokenizer, PAIRS, None, Window())
    assert (sum(stats.tokens), sum(stats.unshared)) == (report.tokens, report.tokens_unshared)
    assert stats.shared == [len(t[0].tokens) for t in trees]
    assert stats.whole_prompts == 3
    assert stats.answers == {name: [sum(t[k].target) for t in trees] for k, name in ((1, "chosen"), (2, "rejected"))}
    assert stats.chosen_longer == sum(a > b for a, b in zip(stats.answers["chosen"], stats.answers["rejected"], strict=True))


@pytest.mark.parametrize(
    ("record", "titles", "learned"),
    [
        (Text(text="The boats."), [""], "The boats.<|end|>"),
        (Prompt(messages=asks("Hi")), [""], ""),
        (Ranked(prompt=asks("Hi"), answers=["a", "b", "c"]), ["prompt", "rank 1", "rank 2", "rank 3"], "a<|end|>b<|end|>c<|end|>"),
        (Rated(prompt=asks("Hi"), answer="Yo", rating=1), ["up"], "Yo<|end|>"),
        (Steps(prompt=asks("1+1?"), steps=["a", "b"], labels=[1, None]), [""], "a\nb<|end|>"),
    ],
)
def test_every_kind_of_record(tokenizer, record, titles, learned):
    row = look.show(tokenizer, record, "x:1", None, "error")
    assert [part.title for part in row.parts] == titles
    assert text_of(row, "learned") == learned
    stats = look.statistics(tokenizer, [record, record])
    assert stats.tokens == [row.tokens] * 2
    if isinstance(record, Steps):
        assert stats.answers == {"right step": [1, 1], "no label step": [1, 1]}


def test_documents_are_shown_in_windows(tokenizer):
    row = look.show(tokenizer, Text(text="The herring is fresh today and the boats are red. " * 3), "x:1", 16, "error")
    assert [part.title for part in row.parts][:2] == ["window 1", "window 2"]
    assert all(len(part.pieces) <= 16 for part in row.parts)


def test_histograms():
    assert look.histogram([[]]) == []
    assert [tuple(b) for b in look.histogram([[1, 2, 2], [3]])] == [(1, 1, [1, 0]), (2, 2, [2, 0]), (3, 3, [0, 1])]
    bins = look.histogram([[*range(1000), 10**6]])
    assert sum(b.counts[0] for b in bins) == 1001
    assert bins[-1].high == 10**6
    assert len(bins) <= 12
    assert [look.quantile([1, 2, 3, 4], q) for q in (0, 0.5, 0.95, 1)] == [1, 2, 4, 4]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_is_self_contained_and_data_stays_text(tmp_path):
    file = write(tmp_path / "evil<b>.jsonl", row(EVIL, EVIL), row("a", "b"), {"messages": "x", "<i>": EVIL})
    write_page(inspect(Inspect(file=file)), tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert {t for t, _ in tags.found}.isdisjoint({"script", "img", "link", "iframe", "i"})
    assert not any(k.startswith("on") or k in ("src", "srcset") for _, a in tags.found for k in a)
    assert all(a["href"].startswith("#") for t, a in tags.found if t == "a")
    assert "url(" not in page
    assert "@import" not in page
    assert "<script>alert(1)</script>" in tags.text
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}) in tags.found
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_the_terminal_says_the_same_without_colours_in_80_columns(tmp_path, capsys):
    file = write(tmp_path / "x.jsonl", row(f"{EVIL} " + "long " * 900, "Yes.\nIt is."), row("a", "b"), {"no": 1})
    with (tmp_path / "out.txt").open("w+", encoding="utf-8") as out:
        show(inspect(Inspect(file=file, max_length=4800)), Console(file=out, width=80, highlight=False))
        out.seek(0)
        lines = out.read().splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert "learned Yes.\u21b5" in text
    assert "more characters ..." in text
    assert "bytes" in text
    assert "1 of 3 rows cannot be used" in text
    assert "line 3" in text


def test_facts_name_what_they_counted(tmp_path):
    file = write(tmp_path / "x.jsonl", row("a", "b"), row("a", "b"))
    found = dict(facts(inspect(Inspect(file=file))))
    assert found["counted in"] == BYTES
    assert found["duplicates"] == "1 rows: line 2: repeats line 1"
    assert "messages" in found["format"]


def test_command(tmp_path, capsys):
    file = write(tmp_path / "x.jsonl", row("a", "b"))
    assert main(["data", "inspect", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 1
    assert found["shown"][0]["parts"][0]["pieces"][0] == {"text": "<|begin|>", "learned": False, "special": True, "cut": False}
    for argv, what in (
        ([str(tmp_path / "none.jsonl")], "no such file"),
        ([file, "--model", str(tmp_path)], "holds no model"),
        ([], "FILE is missing"),
        ([file, "--max-lenght", "9"], "did you mean --max-length"),
    ):
        assert main(["data", "inspect", *argv]) == 2
        err = capsys.readouterr().err
        assert what in err
        assert err.count("\n") == 1


@pytest.mark.slow
def test_hh_shares_exactly_the_dialogue_before_the_last_answers(real, tokenizer):
    """Of all pairs: what stands once is the prompt, whole; its text is what both dialogues begin with up to their last answer."""
    records = read(str(real / "hh-harmless-base-test.jsonl.gz"), "pairs", skip_bad=True).records[:200]
    stats = look.statistics(tokenizer, records)
    assert stats.whole_prompts == len(stats.tokens) == 200
    assert sum(stats.unshared) - sum(stats.tokens) == sum(stats.shared)
