"""Every format of rows: recognised by its shape, read into the right record, written back."""

import json

import pytest

from temper.config import UserError
from temper.data.convert import targets, to_row
from temper.data.sources import as_kind, first, formats, read, records_of
from temper.records import Chat, Message, Pair, Prompt, Ranked, Rated, Steps, Text

Q, A, B = Message(role="user", content="Q"), Message(role="assistant", content="A"), Message(role="assistant", content="B")
SYSTEM = Message(role="system", content="S")
USER, GOOD, BAD = ({"role": m.role, "content": m.content} for m in (Q, A, B))
HUMAN, GPT, OTHER = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}, {"from": "gpt", "value": "B"}
QA = [Q, A]
CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
TOOL_TALK = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"a": 2}'}}]},
    {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add"},
    GOOD,
]
TREE = {
    "message_tree_id": "m1",
    "tree_state": "ready_for_export",
    "prompt": {
        "message_id": "m1", "role": "prompter", "text": "Q", "lang": "en",
        "replies": [
            {"message_id": "m2", "role": "assistant", "text": "B", "rank": 1, "replies": []},
            {"message_id": "m3", "role": "assistant", "text": "A", "rank": 0, "replies": [
                {"message_id": "m5", "role": "prompter", "text": "Q2", "replies": [
                    {"message_id": "m6", "role": "assistant", "text": "A2", "replies": []}]},
                {"message_id": "m7", "role": "prompter", "text": "Q3", "replies": []}]},
            {"message_id": "m4", "role": "assistant", "text": "C", "rank": 2, "replies": []},
            {"message_id": "m8", "role": "assistant", "text": "spam", "rank": 3, "deleted": True, "replies": []},
        ],
    },
}  # fmt: skip
PRM = {
    "question": {"problem": "Q", "ground_truth_answer": "4"},
    "label": {
        "finish_reason": "found_error",
        "steps": [
            {"completions": [{"text": "s1", "rating": 1}, {"text": "x1", "rating": -1}], "chosen_completion": 0},
            {"completions": [{"text": "x2", "rating": -1}], "human_completion": {"text": "s2"}, "chosen_completion": None},
            {"completions": [{"text": "s3", "rating": 0}], "chosen_completion": None},
        ],
    },
}

ROWS = [  # (format, row, the records that it holds, the name that --to takes where the same row is written again)
    ("plain text", {"text": "once"}, [Text(text="once")], "plain-text"),
    ("messages", {"messages": [USER, GOOD]}, [Chat(messages=QA)], "messages"),
    ("messages", {"messages": [USER]}, [Prompt(messages=[Q])], "messages"),
    ("messages", {"messages": [{"role": "developer", "content": [{"type": "text", "text": "S"}]}, USER, GOOD], "source": "x"},
     [Chat(messages=[SYSTEM, *QA], meta={"source": "x"})], ""),
    ("ShareGPT", {"conversations": [HUMAN, GPT]}, [Chat(messages=QA)], "sharegpt"),
    ("ShareGPT", {"conversations": [{"from": "user", "value": "Q"}, {"from": "chatgpt", "value": "A"}], "system": "S"},
     [Chat(messages=[SYSTEM, *QA])], ""),
    ("ShareGPT", {"conversation": [USER, GOOD]}, [Chat(messages=QA)], ""),
    ("ShareGPT", {"items": [{"from": "human", "value": "Q"}, {"from": "bard", "value": "A"}]}, [Chat(messages=QA)], ""),
    ("ShareGPT", {"messages": [HUMAN, GPT]}, [Chat(messages=QA)], ""),
    ("prompt/completion", {"prompt": "Q", "completion": "A"}, [Chat(messages=QA)], "prompt-completion"),
    ("prompt/completion", {"prompt": "Q"}, [Prompt(messages=[Q])], "prompt-completion"),
    ("Alpaca", {"instruction": "Q", "input": "", "output": "A"}, [Chat(messages=QA)], "alpaca"),
    ("Alpaca", {"instruction": "Q", "input": None, "output": "A"}, [Chat(messages=QA)], ""),
    ("Alpaca", {"instruction": "Q", "input": "more", "output": "A", "history": [["Q0", "A0"]]},
     [Chat(messages=[Message(role="user", content="Q0"), Message(role="assistant", content="A0"),
                     Message(role="user", content="Q\n\nmore"), A], meta={"input": "more"})], "alpaca"),
    ("chosen/rejected", {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 2},
     [Pair(prompt=[Q], chosen="A", rejected="B", margin=2)], ""),
    ("chosen/rejected", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tie": True},
     [Pair(prompt=[Q], chosen="A", rejected="B", soft=0.5)], "chosen-rejected"),
    ("chosen/rejected", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [Pair(prompt=[Q], chosen="A", rejected="B")], ""),
    ("chosen/rejected", {"prompt": "Q", "messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 8.0,
                         "score_rejected": 5.0},
     [Pair(prompt=[Q], chosen="A", rejected="B", meta={"score_chosen": 8.0, "score_rejected": 5.0})], ""),
    ("chosen/rejected", {"prompt": "Q", "chosen": "A", "rejected": "B", "score_chosen": 5, "score_rejected": 5},
     [Pair(prompt=[Q], chosen="A", rejected="B", soft=0.5, meta={"score_chosen": 5, "score_rejected": 5})], ""),
    ("chosen/rejected", {"conversations": [HUMAN], "chosen": GPT, "rejected": OTHER}, [Pair(prompt=[Q], chosen="A", rejected="B")], ""),
    ("chosen/rejected", {"messages": [USER], "chosen": GOOD, "rejected": BAD}, [Pair(prompt=[Q], chosen="A", rejected="B")], ""),
    ("chosen/rejected", {"system": "S", "question": "Q", "chosen": "A", "rejected": "B"},
     [Pair(prompt=[SYSTEM, Q], chosen="A", rejected="B")], ""),
    ("chosen/rejected", {"instruction": "Q", "input": "more", "chosen": "A", "rejected": "B"},
     [Pair(prompt=[Message(role="user", content="Q\n\nmore")], chosen="A", rejected="B")], ""),
    ("HH dialogues", {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
     [Pair(prompt=[Q], chosen="A", rejected="B")], "hh"),
    ("thumbs", {"prompt": [USER], "completion": [GOOD], "label": True}, [Rated(prompt=[Q], answer="A", rating=1)], "kto"),
    ("thumbs", {"messages": [USER, GOOD], "label": False}, [Rated(prompt=[Q], answer="A", rating=0)], ""),
    ("thumbs", {"conversations": [HUMAN, GPT], "kto_tag": "true"}, [Rated(prompt=[Q], answer="A", rating=1)], ""),
    ("Dolly", {"instruction": "Q", "context": "C", "response": "A", "category": "closed_qa"},
     [Chat(messages=[Message(role="user", content="Q\n\nC"), A], meta={"context": "C", "category": "closed_qa"})], "dolly"),
    ("FLAN", {"inputs": "Q", "targets": "A"}, [Chat(messages=QA)], "flan"),
    ("LIMA", {"conversations": ["Q", "A"], "source": "stackexchange"}, [Chat(messages=QA, meta={"source": "stackexchange"})], "lima"),
    ("LIMA", {"conversations": ["Q"], "source": "test"}, [Prompt(messages=[Q], meta={"source": "test"})], "lima"),
    ("scored completions",
     {"instruction": "Q", "completions": [{"model": "x", "response": "B", "overall_score": 10, "fine-grained_score": 2.5},
                                          {"model": "y", "response": "A", "overall_score": 8, "fine-grained_score": 4}]},
     [Ranked(prompt=[Q], answers=["A", "B"], scores=[4, 2.5], meta={"models": ["y", "x"]})], ""),
    ("scored completions",
     {"instruction": "Q", "completions": [{"response": "A", "overall_score": 8.0}, {"response": "B", "overall_score": 7.0}]},
     [Ranked(prompt=[Q], answers=["A", "B"], scores=[8, 7])], "ultrafeedback"),
    ("worked solutions", {"question": "Q", "answer": "2*500=<<2*500=1000>>1,000\n#### 1,000"},
     [Chat(messages=[Q, Message(role="assistant", content="2*500=<<2*500=1000>>1,000\n#### 1,000")], meta={"answer": "1000"})],
     "worked-solutions"),
    ("worked solutions", {"problem": "Q", "solution": "so \\boxed{\\frac{1}{2}}.", "answer": "\\frac{1}{2}"},
     [Chat(messages=[Q, Message(role="assistant", content="so \\boxed{\\frac{1}{2}}.")], meta={"answer": "\\frac{1}{2}"})],
     "worked-solutions"),
    ("labelled steps", {"prompt": "Q", "completions": ["s1", "s2"], "labels": [True, False]},
     [Steps(prompt=[Q], steps=["s1", "s2"], labels=[1, 0])], "stepwise"),
    ("PRM800K", PRM, [
        Steps(prompt=[Q], steps=["s1", "s2", "s3"], labels=[1, None, None], meta={"answer": "4", "ratings": [1, None, 0]}),
        Steps(prompt=[Q], steps=["x1"], labels=[0], meta={"answer": "4", "ratings": [-1]}),
        Steps(prompt=[Q], steps=["s1", "x2"], labels=[None, 0], meta={"answer": "4", "ratings": [None, -1]}),
    ], ""),
    ("Math-Shepherd", {"input": "Q Step 1: a ки\nStep 2: b ки", "label": "Q Step 1: a +\nStep 2: b -", "task": "GSM8K"},
     [Steps(prompt=[Q], steps=["Step 1: a", "Step 2: b"], labels=[1, 0], meta={"task": "GSM8K"})], ""),
    ("MT-Bench questions", {"question_id": 81, "category": "writing", "turns": ["Q", "Q2"], "reference": ["A", "A2"]},
     [Prompt(messages=[Q], meta={"question_id": 81, "category": "writing", "turns": ["Q", "Q2"], "reference": ["A", "A2"]})], "mt-bench"),
    ("seed tasks", {"id": "t0", "name": "n", "instruction": "Q", "instances": [{"input": "", "output": "A"}], "is_classification": False},
     [Chat(messages=QA, meta={"id": "t0", "name": "n", "is_classification": False})], "self-instruct"),
    ("XSTest prompts", {"id": "1", "prompt": "Q", "type": "homonyms", "label": "safe", "focus": "kill", "note": ""},
     [Prompt(messages=[Q], meta={"id": "1", "type": "homonyms", "label": "safe", "focus": "kill", "note": ""})], "xstest"),
    ("OpenAssistant trees", TREE, [
        Chat(messages=[*QA, Message(role="user", content="Q2"), Message(role="assistant", content="A2")],
             meta={"lang": "en", "message_tree_id": "m1", "tree_state": "ready_for_export"}),
    ], ""),
    ("temper records", {"prompt": [USER], "answers": ["A", "B"], "meta": {"k": 1}},
     [Ranked(prompt=[Q], answers=["A", "B"], meta={"k": 1})], ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "records", "to"), ROWS, ids=[f"{i}-{r[0]}" for i, r in enumerate(ROWS)])
def test_a_row_is_recognised_read_and_written(name, row, records, to):
    module, why = first(row)
    assert name == module.NAME
    assert why
    assert records_of(module, row) == records
    if to:
        assert to_row(records[0], targets()[to]) == (row, [])


def test_every_format_has_a_row_here():
    assert {r[0] for r in ROWS} | {"votes"} == formats().keys()


def test_every_record_is_held_by_temper_records():
    for _, _, records, _ in ROWS:
        for record in records:
            row, lost = to_row(record, targets()["temper-records"])
            assert not lost
            assert records_of(first(json.loads(json.dumps(row)))[0], row) == [record]


def put(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_tools_come_back_as_chat_templates_take_them(tmp_path):
    row = {"messages": TOOL_TALK, "tools": TOOLS}
    ((chat,), _) = read(put(tmp_path / "t.jsonl", row), "chat")
    assert chat.messages[1].model_dump() == {"role": "assistant", "content": "", "tool_calls": (CALL,)}
    assert chat.messages[2].model_dump() == {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add"}
    assert chat.tools == TOOLS
    assert to_row(chat, targets()["messages"])[0]["messages"][1]["tool_calls"] == [CALL]
    with pytest.raises(ValueError, match="Alpaca holds no tools and calls"):
        to_row(chat, targets()["alpaca"])
    share = {"conversations": [HUMAN, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                               {"from": "observation", "value": "4"}, GPT], "tools": json.dumps(TOOLS)}  # fmt: skip
    ((chat,), _) = read(put(tmp_path / "s.jsonl", share), "chat")
    assert chat.messages[1].tool_calls[0].function.arguments == {"a": 2}
    assert to_row(chat, targets()["sharegpt"]) == (share, [])


def said(*messages, **more):
    return {"messages": list(messages), **more}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (said(GOOD, USER, GOOD), "message 1 (assistant) opens the conversation"),
        (said(USER, USER, GOOD), "message 2 (user) follows a user turn"),
        (said(USER, GOOD, BAD), "message 3 (assistant) follows an assistant turn"),
        (said(USER, GOOD, {"role": "system", "content": "S"}, GOOD), "message 3 (system) follows an assistant turn"),
        (said(USER, {"role": "tool", "content": "4"}, GOOD), "message 2 (tool) follows a user turn"),
        (said(USER, {**GOOD, "content": " "}), "message 2 (assistant) is empty"),
        (said(*TOOL_TALK, tools=[{"function": {"name": "subtract"}}]), "calls 'add', which is not among its tools subtract"),
        (said(*TOOL_TALK[:2], {**TOOL_TALK[2], "tool_call_id": "9"}, GOOD), "answers the call '9', which no message makes"),
        (said(USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
         "message 2 calls 'f' with arguments that are not a JSON object: '{'"),
        (said(USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}), "message 2 calls a tool without a name"),
        (said({"role": "user", "content": [{"type": "image_url"}]}, GOOD), "message 1 holds a part of type 'image_url'; only text is read"),
        (said(USER, GOOD, tools="none"), "field 'tools' should be a list of schemas"),
        ({"conversations": [HUMAN, {"from": "alien", "value": "A"}]}, "a row of ShareGPT in a file of messages"),
        ({"prompt": "Q", "completion": "A", "label": True}, "a row of thumbs in a file of messages"),
        ({"nothing": 1}, "not a row of messages"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path, row, why):
    path = put(tmp_path / "x.jsonl", said(USER, GOOD), row, said(USER, GOOD))
    with pytest.raises(UserError) as error:
        read(path, "chat")
    assert str(error.value).startswith(f"{path}:2: ")
    assert why in str(error.value)
    records, report = read(path, "chat", skip_bad=True)
    assert (len(records), report.rows, len(report.skipped)) == (2, 3, 1)


@pytest.mark.parametrize(
    ("name", "row", "why"),
    [
        ("ShareGPT", {"conversations": [HUMAN, {"from": "alien", "value": "A"}]}, "message 2 has role 'alien'; known are system, human"),
        ("LIMA", {"conversations": ["Q", 3]}, "turn 2 is no text"),
        ("scored completions", {"instruction": "Q", "completions": [{"response": "A", "score": "N/A"}, {"response": "B", "score": 1}]},
         "1 of 2 completions have a score"),
        ("worked solutions", {"problem": "Q", "solution": "who knows"}, "ends without an answer to check"),
        ("Math-Shepherd", {"input": "Q Step 1: a ки", "label": "Q Step 1: b +"}, "step 1 of the label is not the input's step"),
        ("thumbs", {"messages": [USER], "label": 1}, "the last turn is not an answer"),
        ("votes", {"left": "a", "right": "b", "winner": "tie"}, "holds no text"),
        ("labelled steps", {"prompt": "Q", "completions": ["a"], "labels": []}, "1 steps but 0 labels"),
    ],
)  # fmt: skip
def test_what_is_wrong_within_a_format(name, row, why):
    module, _ = first(row)
    assert name == module.NAME
    with pytest.raises(ValueError, match=why):
        records_of(module, row)


def test_trees_become_conversations_pairs_and_rankings(tmp_path):
    path = put(tmp_path / "trees.jsonl", TREE)
    ((ranked,), _) = read(path, "comparisons")
    assert ranked.answers == ["A", "B", "C"]
    pairs, _ = read(path, "pairs")
    assert [(p.chosen, p.rejected) for p in pairs] == [("A", "B"), ("A", "C"), ("B", "C")]

    def messages(node, parent=None):
        yield {**{k: v for k, v in node.items() if k != "replies"}, "parent_id": parent, "message_tree_id": "m1"}
        for reply in node["replies"]:
            yield from messages(reply, node["message_id"])

    flat = put(tmp_path / "messages.jsonl", *messages(TREE["prompt"]))
    ((chat,), report) = read(flat, "chat")
    assert [m.content for m in chat.messages] == ["Q", "A", "Q2", "A2"]
    assert (report.source, report.rows) == ("OpenAssistant trees", 1)
    assert read(flat, "comparisons").records[0].answers == ["A", "B", "C"]
    lost = [m for m in messages(TREE["prompt"]) if m["message_id"] != "m3"]
    with pytest.raises(UserError, match="message m5 replies to m3, which is not in the file"):
        read(put(tmp_path / "lost.jsonl", *lost), "chat")


def test_what_a_record_makes_of_another_kind():
    tied = Ranked(prompt=[Q], answers=["A", "B", "C"], scores=[2, 2, 1])
    assert [(p.chosen, p.rejected) for p in as_kind(tied, "pairs")[0]] == [("A", "C"), ("B", "C")]
    ((ranked,), how) = as_kind(tied, "comparisons")
    assert (ranked.answers, ranked.scores) == (["A", "C"], [2, 1])
    assert "equal scores" in how
    assert as_kind(Ranked(prompt=[Q], answers=["A", "B"], scores=[1, 1]), "comparisons")[0] == []
    pair = Pair(prompt=[Q], chosen="A", rejected="B", margin=1.0, soft=0.8, meta={"k": 1})
    for record, kind in ((pair, "pairs"), (Ranked(prompt=[Q], answers=["A", "B"], scores=[2, 1]), "comparisons"),
                         (Rated(prompt=[Q], answer="A", rating=1), "rated")):  # fmt: skip
        ((chat,), _) = as_kind(record, "messages")
        assert chat.messages == QA
        assert as_kind(chat, kind)[0] == [record]
    assert [(r.answer, r.rating) for r in as_kind(pair, "rated")[0]] == [("A", 1), ("B", 0)]
    assert as_kind(Rated(prompt=[Q], answer="A", rating=0), "chat") == ([], "answers without thumbs up left out")
    assert as_kind(Steps(prompt=[Q], steps=["a", "b"], labels=[1, 0]), "chat")[0] == []
    ((chat,), _) = as_kind(Steps(prompt=[Q], steps=["a", "b"], labels=[1, None]), "chat")
    assert chat.messages[-1].content == "a\nb"
