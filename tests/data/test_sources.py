import gzip
import json
from pathlib import Path

import pytest

from temper.config import UserError
from temper.data.files import kind_of, parts_of
from temper.data.sources import formats, read
from temper.data.template import attach_default_template
from temper.data.trees import chat_trees, comparison_trees, text_trees
from temper.records import Chat, Message, Pair, Prompt, Ranked, write_jsonl

HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: Me.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: You.",
}
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "A"), ("assistant", "B")))


@pytest.fixture
def put(tmp_path):
    def write(name, *values):
        path = tmp_path / name
        text = "".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values)
        if name.endswith(".json"):
            text = json.dumps(list(values), indent=1)
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("row", "kind", "source"),
    [
        ({"text": "once"}, "text", "plain text"),
        ({"messages": [USER, GOOD]}, "chat", "messages"),
        ({"messages": [USER]}, "prompts", "messages"),
        ({"prompt": "Q", "completion": "A"}, "chat", "prompt/completion"),
        ({"prompt": [USER], "completion": [GOOD]}, "chat", "prompt/completion"),
        ({"prompt": "Q", "response": "A"}, "chat", "prompt/completion"),
        ({"prompt": "Q"}, "prompts", "prompt/completion"),
        ({"instruction": "Q", "input": "", "output": "A"}, "chat", "Alpaca"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "pairs", "chosen/rejected"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "pairs", "chosen/rejected"),
        ({"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "pairs", "chosen/rejected"),
        ({"prompt": "Q", "chosen": GOOD, "rejected": BAD, "margin": 2}, "pairs", "chosen/rejected"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "pairs", "chosen/rejected"),
        (HH, "pairs", "HH dialogues"),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz"])
def test_every_format_is_recognised_and_gives_the_same_records(put, row, kind, source, name):
    path = put(name, row, row)
    records, report = read(path, kind)
    assert report.source == source
    assert report.used == report.rows == 2
    assert not report.skipped
    assert "rows with" in report.why or "'chosen'" in report.why
    record = records[1]
    assert record.meta["at"] == f"{path}:{2 if name != 'x.json' else report_line(path)}"
    said = getattr(record, "messages", None) or getattr(record, "prompt", None)
    if source != "HH dialogues" and kind != "text":
        assert said[0] == Message(role="user", content="Q")
    if kind == "pairs" and source != "HH dialogues":
        assert (record.chosen, record.rejected, record.margin) == ("A", "B", row.get("margin"))
    if kind == "chat":
        assert record.messages[-1] == Message(role="assistant", content="A")


def report_line(path):
    lines = Path(path).read_text().split("\n")
    return [i for i, line in enumerate(lines, 1) if line.startswith(" {")][1]


def test_natural_conversions_are_done_and_said(put):
    path = put("x.jsonl", HH)
    assert [m.content for m in read(path, "pairs").records[0].prompt] == ["Hi", "Hello.", "Who?"]
    chat, report = read(path, "chat")
    assert chat[0].messages[-1].content == "Me."
    assert "chosen answers" in report.summary()
    prompts, report = read(path, "prompts")
    assert prompts[0].messages[-1].content == "Who?"
    assert report.conversions == {"the prompts of the pairs": 1}
    prompts, report = read(put("y.jsonl", {"messages": [USER, GOOD, USER, BAD]}), "prompts")
    assert len(prompts[0].messages) == 3
    assert "without their last answer" in report.summary()
    chat, report = read(put("z.jsonl", {"messages": [USER, GOOD, USER]}), "chat")
    assert len(chat[0].messages) == 2
    assert "left out" in report.summary()
    assert read(put("a.json", {"instruction": "Q", "input": "more", "output": "A", "system": "S"}), "chat").records[0].messages == [
        Message(role="system", content="S"),
        Message(role="user", content="Q\n\nmore"),
        Message(role="assistant", content="A"),
    ]


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_other_conversions_are_refused(put, kind):
    with pytest.raises(UserError, match=r"x\.jsonl: messages: holds conversations, needed are"):
        read(put("x.jsonl", {"messages": [USER, GOOD]}), kind, skip_bad=True)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("{not json", "not JSON"),
        ('"text"', "a row is an object with named fields, got 'text'"),
        ({"prompt": "Q", "completion": " \n"}, "message 2 (assistant) is empty"),
        ({"prompt": "", "completion": "A"}, "the prompt is empty"),
        ({"prompt": "Q", "completion": 3}, "field 'completion' should be text or messages, got '3'"),
        ({"prompt": "Q"}, "holds prompts, needed are conversations"),
        ({"question": "Q"}, "not a row of prompt/completion"),
        ({"prompt": [{"role": "robot", "content": "x"}], "completion": "A"}, "message 1 has role 'robot'"),
        ({"prompt": [{"content": "x"}], "completion": "A"}, "message 1 has no 'role'"),
        ({"prompt": [{"role": "user"}], "completion": "A"}, "message 1 has no text in 'content'"),
        ('{"prompt": "Q", "completion": "\\ud800"}', "surrogate"),
    ],
)
def test_bad_rows_are_errors_or_skipped_and_listed(put, row, match):
    good = {"prompt": "Q", "completion": "A"}
    path = put("x.jsonl", good, row, good)
    with pytest.raises(UserError) as error:
        read(path, "chat")
    assert str(error.value).startswith(f"{path}:2: ")
    assert match in str(error.value)
    assert "--skip-bad" in str(error.value)
    assert "\n" not in str(error.value)
    records, report = read(path, "chat", skip_bad=True)
    assert len(records) == 2
    assert report.rows == 3
    assert report.skipped[0][0] == f"{path}:2"
    assert match in report.skipped[0][1]
    assert "2: " in report.summary()


@pytest.mark.parametrize(
    ("pair", "match"),
    [
        ({**HH, "chosen": HH["chosen"].replace("Hi", "Ho")}, "differ from turn 1 on"),
        ({**HH, "chosen": HH["chosen"].replace(" Me.", " ")}, "the chosen answer is empty"),
        ({**HH, "chosen": HH["chosen"] + "\n\nHuman: Oh"}, "ends with a Human turn"),
        ({**HH, "chosen": HH["chosen"] + "\n\nAssistant: Oh"}, "differ from turn 4 on"),
    ],
)
def test_bad_hh_rows(put, pair, match):
    with pytest.raises(UserError, match=match):
        read(put("x.jsonl", HH, pair), "pairs")


def test_bad_pairs_of_messages(put):
    with pytest.raises(UserError, match="differ from message 1 on"):
        read(put("x.jsonl", {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "other"}, BAD]}), "pairs")
    with pytest.raises(UserError, match="field 'margin' should be a number"):
        read(put("x.jsonl", {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": "big"}), "pairs")


def test_files_that_cannot_be_read(put, tmp_path):
    def error(path, kind="chat"):
        with pytest.raises(UserError) as caught:
            read(str(path), kind, skip_bad=True)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert error("nowhere.jsonl") == "nowhere.jsonl: no such file"
    assert "is empty" in error(put("e.jsonl"))
    (tmp_path / "e.txt").write_text("  \n")
    assert "is empty" in error(tmp_path / "e.txt", "text")
    assert "is empty" in error(put("e.json"))
    assert "unknown kind of file '.xml'; give .jsonl, .json, .csv" in error("x.xml")
    assert "the folder holds no" in error((tmp_path / "d").mkdir() or tmp_path / "d")
    unknown = error(put("u.jsonl", {"a": 1, "b": 2}))
    assert "u.jsonl:1: a row with 'a', 'b' is of no known format" in unknown
    assert all(name in unknown for name in formats())
    assert "x.jsonl:1: not JSON" in error(put("x.jsonl", "hello", "you"))
    (tmp_path / "b.txt").write_bytes(b"one\ntwo \xff\n")
    assert "b.txt:2: byte 5 of the line is not UTF-8" in error(tmp_path / "b.txt", "text")
    whole = gzip.compress(b'{"prompt": "Q", "completion": "A"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz:\d+: broken gzip .*nothing after it can be read"):
        read(str(tmp_path / "cut.jsonl.gz"), "chat")
    records, report = read(str(tmp_path / "cut.jsonl.gz"), "chat", skip_bad=True)
    assert 0 < len(records) < 1000
    assert report.skipped == [(f"{tmp_path / 'cut.jsonl.gz'}:{len(records) + 1}", report.skipped[0][1])]
    (tmp_path / "no.jsonl.gz").write_bytes(b"not gzip")
    assert "no.jsonl.gz:1: broken gzip" in error(tmp_path / "no.jsonl.gz")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('[{"prompt": "Q"},\n {"prompt": "Q"}', "bad.json:2: not JSON (the list is not closed"),
        ('[{"prompt": "Q"}\n {"prompt": "Q"}]', "bad.json:2: not JSON (expected ','"),
        ('[{"prompt": "Q"},\n\n {"prompt" "Q"}]', "bad.json:3: not JSON"),
        ('[{"prompt": "Q"}]\nmore', "bad.json:2: not JSON (text after the end"),
    ],
)
def test_broken_json_lists_name_the_line(tmp_path, text, match):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError) as error:
        read(str(tmp_path / "bad.json"), "prompts")
    assert match in str(error.value)


def test_json_of_lines_bom_and_folders(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"prompt": "1"}\r\n{"prompt": "2"}\r\n')
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "3\xe2\x80\xa8"}\r\n\n{"prompt": "4"}')
    records, report = read(str(tmp_path), "prompts")
    assert [r.messages[0].content for r in records] == ["1", "2", "3\u2028", "4"]
    assert records[3].meta["at"].endswith("b.jsonl:3")
    assert report.rows == 4


def test_own_records_come_back_whole(tmp_path):
    prompt = [Message(role="user", content="Q")]
    for kind, record in (
        ("pairs", Pair(prompt=prompt, chosen="A", rejected="B", soft=0.7, meta={"ask": {"kind": "lookup"}})),
        ("chat", Chat(messages=[*prompt, Message(role="assistant", content="A")], meta={"k": 1})),
        ("prompts", Prompt(messages=prompt, meta={"k": 1})),
        ("comparisons", Ranked(prompt=prompt, answers=["A", "B", "C"], meta={"probabilities": [0.7, 0.8, 0.6]})),
        ("comparisons", Pair(prompt=prompt, chosen="A", rejected="B", margin=2.0)),
    ):
        path = tmp_path / f"{kind}.jsonl"
        write_jsonl(path, [record])
        ((got,), report) = read(str(path), kind)
        at = {"at": f"{path}:1"}
        assert got == record.model_copy(update={"meta": record.meta | at})
        assert report.source == "temper records"


def test_comparisons_are_pairs_or_rankings(put):
    ranked = {"prompt": [USER], "answers": ["A", "B", "C"], "meta": {}}
    (got,), report = read(put("r.jsonl", ranked), "comparisons")
    assert (got.answers, report.source) == (["A", "B", "C"], "temper records")
    for row in HH, {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 2}:  # every format of pairs
        assert read(put("p.jsonl", row), "comparisons").records == read(put("p.jsonl", row), "pairs").records
    pairs, report = read(put("r.jsonl", ranked), "pairs")
    assert [(p.chosen, p.rejected) for p in pairs] == [("A", "B"), ("A", "C"), ("B", "C")]
    assert "3 records of 1 rows" in report.summary()
    with pytest.raises(UserError, match="holds conversations, needed are pairs of answers or rankings of answers"):
        read(put("c.jsonl", {"messages": [USER, GOOD]}), "comparisons")
    with pytest.raises(UserError, match=r"answers: got .*at least 2 items"):
        read(put("one.jsonl", {**ranked, "answers": ["A"]}), "comparisons")


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_an_empty_answer_of_a_ranking_is_named(put, empty):
    row = {"prompt": [USER], "answers": ["A", "B", "C"], "meta": {}}
    bad = {**row, "answers": [" \n" if i == empty else a for i, a in enumerate(row["answers"])]}
    path = put("r.jsonl", row, bad)
    with pytest.raises(UserError, match=rf"r\.jsonl:2: answer {empty + 1} is empty"):
        read(path, "comparisons")
    records, report = read(path, "comparisons", skip_bad=True)
    assert len(records) == 1
    assert report.skipped[0][0] == f"{path}:2"


@pytest.mark.parametrize("text", ["", "a", "a\n\nb", "x" * 50 + "\n\n\n" + "y\n" * 40 + "\u2028z", "a\r\n\r\nb\r\n" * 10])
@pytest.mark.parametrize("size", [1, 5, 30])
def test_parts_join_to_the_text(text, size):
    assert "".join(parts_of(text, size)) == text


def test_text_files_keep_their_bytes(tmp_path):
    text = "Été\r\n\r\n" + "line\n" * 5000
    (tmp_path / "t.txt").write_bytes(text.encode())
    records, _ = read(str(tmp_path / "t.txt"), "text")
    assert "".join(r.text for r in records) == text
    assert [r.meta["part"] for r in records] == list(range(1, len(records) + 1))
    assert len(records) > 2
    assert kind_of(tmp_path / "t.txt.gz") == ".txt"


def test_world_options_are_checked():
    with pytest.raises(UserError, match="no option 'm'"):
        read("world:documents?m=3", "text")
    with pytest.raises(UserError, match="n is 'many'"):
        read("world:documents?n=many", "text")


def test_rankings_name_each_answer_once(tmp_path):
    row = {"prompt": [{"role": "user", "content": "Q"}], "answers": ["b", "a", "b "], "meta": {}}
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "answers": ["b", "a"]}) + "\n")
    with pytest.raises(UserError, match=r"r\.jsonl:1: answer 3 is the same as answer 1"):
        read(str(path), "comparisons")
    records, report = read(str(path), "comparisons", skip_bad=True)
    assert (len(records), report.skipped[0][0]) == (1, f"{path}:1")


def test_world_data_sets():
    records, report = read("world:demonstrations?n=5&seed=1", "prompts")
    assert len(records) == 5
    assert "demonstrations, n=5, seed=1" in report.summary()
    assert records[0].meta["ask"]
    with pytest.raises(UserError, match=r"^world:documents\?n=2: holds plain text, needed are conversations"):
        read("world:documents?n=2", "chat")
    with pytest.raises(UserError, match="no data set 'nowhere'"):
        read("world:nowhere", "chat")


def test_hh_file(real, make_tokenizer, window):
    path = str(real / "hh-harmless-base-test.jsonl.gz")
    with pytest.raises(UserError, match=r"gz:87: the chosen answer is empty \(and 12 more bad rows, lines 517, 668, 764, 926"):
        read(path, "pairs")
    records, report = read(path, "pairs", skip_bad=True)
    assert (report.rows, report.used, report.source) == (2312, 2299, "HH dialogues")
    lines = {int(at.rpartition(":")[2]): why for at, why in report.skipped}
    assert [n for n, why in lines.items() if "answer is empty" in why] == [87, 517, 926, 1104]
    assert [n for n, why in lines.items() if "prompts of chosen and rejected differ" in why] == [1255, 1689, 1951, 1953, 2037]
    assert [n for n, why in lines.items() if "(assistant) follows an assistant turn" in why] == [668, 764, 1320, 1850]
    tokenizer = make_tokenizer(eos="<|endoftext|>")
    attach_default_template(tokenizer)
    trees, fit = comparison_trees(tokenizer, records[:200], 4096, window(900, "drop"))
    assert len(trees) + len(fit.dropped) == 200
    assert all(len(tree) == 3 for tree in trees)
    assert fit.tokens < fit.tokens_unshared


def test_alpaca_file(real, make_tokenizer, window):
    records, report = read(str(real / "alpaca-en-1000.json"), "chat")
    assert (report.used, report.source) == (999, "Alpaca")
    tokenizer = make_tokenizer()
    attach_default_template(tokenizer)
    trees, fit = chat_trees(tokenizer, records[:100], 4096, window(600, "cut-prompt"))
    assert len(trees) + len(fit.dropped) == 100
    for (segment,) in trees:
        learned = [t for t, w in zip(segment.tokens, segment.target, strict=True) if w]
        assert learned.count(tokenizer.eos_token_id) == 1
        assert learned[-1] == tokenizer.eos_token_id == segment.tokens[-1]


def test_shakespeare_file(real, base):
    path = real / "tinyshakespeare.txt"
    records, _ = read(str(path), "text")
    assert "".join(r.text for r in records).encode() == path.read_bytes()
    trees, _ = text_trees(base, records[:3], 128)
    assert (
        base.decode([t for tree in trees for t, w in zip(tree[0].tokens, tree[0].target, strict=True) if w])[-40:] == records[2].text[-40:]
    )
