import os

import pydantic
import pytest

from temper.config import UserError
from temper.records import Chat, Judgement, Message, Pair, Prompt, Ranked, Rated, Steps, Text, read_jsonl, write_jsonl

ASK = [Message(role="user", content="Q\u2028\n")]
SAID = [*ASK, Message(role="assistant", content="é")]


@pytest.mark.parametrize(
    "record",
    [
        Text(text="a\r\nb"),
        Chat(messages=SAID, meta={"b": [1, None], "a": 2}),
        Prompt(messages=ASK),
        Pair(prompt=ASK, chosen="a", rejected="", margin=0.5, soft=0.8),
        Ranked(prompt=ASK, answers=["a", "b"]),
        Rated(prompt=ASK, answer="a", rating=1.0),
        Steps(prompt=ASK, steps=["a", "b"], labels=[1.0, None]),
        Judgement(prompt=ASK, a="x", b="y", verdict="tie", rater="me"),
    ],
)
def test_every_record_comes_back_from_a_file(tmp_path, record):
    path = tmp_path / "deep" / "x.jsonl"
    write_jsonl(path, [record, record])
    assert read_jsonl(path, type(record)) == [record, record]
    data = path.read_bytes()
    assert data.count(b"\n") == 2
    assert data.endswith(b"\n")
    assert b"\\u" not in data
    write_jsonl(path, [])
    assert read_jsonl(path, type(record)) == []
    assert os.listdir(path.parent) == ["x.jsonl"]


def test_keys_are_sorted(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [Chat(messages=SAID[1:], meta={"b": 1, "a": 2})])
    assert (tmp_path / "x.jsonl").read_text() == '{"messages": [{"content": "é", "role": "assistant"}], "meta": {"a": 2, "b": 1}}\n'


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b"{", "not JSON"),
        (b"3", "not a Chat"),
        (b"\xff", "byte 0 of the line is not UTF-8"),
        (b"{}", "field 'messages' is missing"),
        (b'{"messages": [], "z": 1}', "unknown field 'z'"),
        (b'{"messages": [{"role": "user", "content": "Q"}]}', "a conversation needs an assistant turn"),
        (b'{"messages": [{"role": "bot", "content": "Q"}]}', "messages.0.role: got 'bot', input should be"),
    ],
)
def test_errors_carry_file_and_line(tmp_path, line, part):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [Chat(messages=SAID)])
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n")
    with pytest.raises(UserError) as error:
        read_jsonl(path, Chat)
    assert str(error.value).startswith(f"{path}:3: ")
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [Text(text="old")])

    def broken():
        yield Text(text="new")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot be written .*No space left"):
        write_jsonl(path, broken())
    assert read_jsonl(path, Text) == [Text(text="old")]
    assert os.listdir(tmp_path) == ["x.jsonl"]
    with pytest.raises(UserError, match="no such file"):
        read_jsonl(tmp_path / "no.jsonl", Text)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: Prompt(messages=SAID), "ends with a user turn, this one with 'assistant'"),
        (lambda: Prompt(messages=[]), "at least one message"),
        (lambda: Pair(prompt=SAID, chosen="a", rejected="b"), "ends with a user turn"),
        (lambda: Pair(prompt=ASK, chosen="a", rejected="b", soft=1.5), "less than or equal to 1"),
        (lambda: Ranked(prompt=ASK, answers=["a"]), "at least 2 items"),
        (lambda: Ranked(prompt=SAID, answers=["a", "b"]), "ends with a user turn"),
        (lambda: Steps(prompt=ASK, steps=["a"], labels=[]), "1 steps but 0 labels"),
        (lambda: Text(text="a", extra=1), "extra"),
    ],
)
def test_records_refuse_what_they_are_not(make, part):
    with pytest.raises(pydantic.ValidationError, match=part):
        make()


def test_records_are_frozen_and_do_not_share_meta():
    a, b = Text(text="a"), Text(text="b")
    a.meta["x"] = 1
    assert b.meta == {}
    with pytest.raises(pydantic.ValidationError):
        a.text = "c"
