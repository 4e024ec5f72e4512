import copy

import pytest

from temper.config import UserError
from temper.data.template import render_chat, render_prompt
from temper.data.trees import chat_trees, comparison_tree, comparison_trees, prompt_ids, text_trees
from temper.forest import plant
from temper.records import Chat, Message, Pair, Prompt, Ranked, Text


def user(text):
    return Message(role="user", content=text)


def chat(question, answer, **meta):
    return Chat(messages=[user(question), Message(role="assistant", content=answer)], meta=meta)


LONG = "herring " * 60


def test_chat_trees_are_what_the_template_renders(chatml, window):
    trees, report = chat_trees(chatml, [chat("Hello?", "Fine.")], 512, window())
    assert (trees[0][0].tokens, trees[0][0].target) == render_chat(chatml, chat("Hello?", "Fine.").messages)
    assert plant(trees).weights["tokens"] == sum(trees[0][0].target)
    assert report.limit == 512
    assert "the model's window" in report.summary()


def test_too_long_is_an_error_that_names_row_and_remedy(chatml, window):
    records = [chat("Hi", "Fine.", at="x.jsonl:1"), chat(LONG, "Fine.", at="x.jsonl:2"), chat(LONG * 2, "Fine.", at="x.jsonl:3")]
    n = [len(render_chat(chatml, r.messages)[0]) for r in records]
    with pytest.raises(UserError) as error:
        chat_trees(chatml, records, 4096, window(50))
    assert str(error.value) == (
        f"x.jsonl:2: {n[1]} tokens > --max-length 50 (and 1 more rows, the longest {n[2]}); "
        "use --too-long drop|cut-prompt or a larger --max-length"
    )
    with pytest.raises(UserError, match="> 50, the model's window"):
        chat_trees(chatml, records, 50, window())
    with pytest.raises(UserError, match="the model's window is 32 tokens"):
        chat_trees(chatml, records, 32, window(50))
    trees, report = chat_trees(chatml, records, 4096, window(50, "drop"))
    assert len(trees) == 1
    assert list(report.dropped) == [1, 2]
    assert f"x.jsonl:2: {n[1]} tokens" in report.summary()
    assert len(report.lines()) == 2


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_cut_prompt_keeps_the_beginning_token_and_the_whole_answer(name, request, window):
    tokenizer = request.getfixturevalue(name)
    record = chat(LONG, "Three crowns.")
    ids, target = render_chat(tokenizer, record.messages)
    ([[segment]], report) = chat_trees(tokenizer, [record], None, window(30, "cut-prompt"))
    begin = int(name == "llama3")
    assert len(segment.tokens) == 30
    assert list(report.cut) == [0]
    assert segment.tokens == ids[:begin] + ids[len(ids) - 30 + begin :]
    assert sum(segment.target) == sum(target)
    plant([[segment]])


def test_cut_prompt_drops_where_the_answer_alone_is_too_long(chatml, window):
    trees, report = chat_trees(chatml, [chat("Hi", LONG), chat("Hi", "Fine.")], None, window(20, "cut-prompt"))
    assert len(trees) == 1
    assert "answer alone does not fit" in report.dropped[0]


def test_an_earlier_answer_that_is_cut_is_no_longer_learned(chatml, window):
    messages = [user("Hi"), Message(role="assistant", content=LONG), user("And?"), Message(role="assistant", content="Fine.")]
    whole = len(render_chat(chatml, messages)[0])
    target = render_chat(chatml, messages)[1]
    last = sum(render_chat(chatml, messages, "last")[1])
    for limit in range(20, whole):
        ([[segment]], _) = chat_trees(chatml, [Chat(messages=messages)], None, window(limit, "cut-prompt"))
        assert len(segment.tokens) == limit
        assert sum(segment.target) == (last if whole - limit > target.index(1.0) else sum(target) - (whole - limit == target.index(1.0)))
        plant([[segment]])


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_pairs_share_the_prompt_and_unroll_to_the_two_conversations(name, request):
    tokenizer = request.getfixturevalue(name)
    record = Pair(prompt=[user("What is the price?")], chosen="Three crowns.", rejected="Three", margin=0.5, soft=0.9)
    prompt, chosen, rejected = comparison_tree(tokenizer, record)
    assert prompt.tokens == render_prompt(tokenizer, record.prompt)
    for segment, text in ((chosen, record.chosen), (rejected, record.rejected)):
        ids, target = render_chat(tokenizer, [*record.prompt, Message(role="assistant", content=text)])
        assert [*prompt.tokens, *segment.tokens] == ids
        assert [*prompt.target, *segment.target] == target
    assert [segment.labels["rank"] for segment in (prompt, chosen, rejected)] == [-1, 0, 1]
    assert chosen.labels["margin"] == 0.5
    assert rejected.labels["soft"] == 0.9
    plant([[prompt, chosen, rejected]])


def test_pairs_obey_the_policy(chatml, window):
    pairs = [Pair(prompt=[user(LONG)], chosen="Fine.", rejected="Hello there."), Pair(prompt=[user("Hi")], chosen="a", rejected=LONG)]
    trees, report = comparison_trees(chatml, pairs, None, window(40, "cut-prompt"))
    assert list(report.cut) == [0]
    assert list(report.dropped) == [1]
    assert max(len(trees[0][0].tokens) + len(s.tokens) for s in trees[0][1:]) == 40
    assert report.tokens < report.tokens_unshared
    with pytest.raises(UserError, match=r"row 1: .* more rows"):
        comparison_trees(chatml, pairs, None, window(40))


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_a_ranking_shares_the_prompt_and_unrolls_to_its_conversations(name, request):
    tokenizer = request.getfixturevalue(name)
    record = Ranked(prompt=[user("What is the price?")], answers=["Three crowns.", "Three", "I do not know.", "Herring."])
    prompt, *answers = comparison_tree(tokenizer, record)
    assert prompt.tokens == render_prompt(tokenizer, record.prompt)
    assert [segment.labels for segment in answers] == [{"rank": rank, "soft": 1.0, "margin": 0.0} for rank in range(4)]
    assert prompt.labels["rank"] == -1
    for segment, text in zip(answers, record.answers, strict=True):
        ids, target = render_chat(tokenizer, [*record.prompt, Message(role="assistant", content=text)])
        assert [*prompt.tokens, *segment.tokens] == ids
        assert [*prompt.target, *segment.target] == target
        assert segment.parent == 0
    forest = plant([[prompt, *answers]])
    assert sum(len(segment.tokens) for segment in (prompt, *answers)) == forest.T


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_a_ranking_of_two_is_the_pair(name, request, window):
    tokenizer = request.getfixturevalue(name)
    asks = ["What is the price?", LONG]
    pairs = [Pair(prompt=[user(q)], chosen="Three crowns.", rejected="Three") for q in asks]
    rankings = [Ranked(prompt=[user(q)], answers=["Three crowns.", "Three"]) for q in asks]
    assert [comparison_tree(tokenizer, r) for r in rankings] == [comparison_tree(tokenizer, p) for p in pairs]
    for limit, policy in (None, "error"), (40, "cut-prompt"), (40, "drop"):
        one, other = (comparison_trees(tokenizer, records, None, window(limit, policy)) for records in (rankings, pairs))
        assert one == other
    mixed, _ = comparison_trees(tokenizer, [pairs[0], rankings[1]], None, window())
    assert mixed == comparison_trees(tokenizer, pairs, None, window())[0]


def test_rankings_obey_the_policy_by_their_longest_answer(chatml, window):
    """Whichever answer it is; the prompt is cut by the same tokens for all, and no answer is."""
    answers = ["Fine.", "Hello there, how are you?", "The boats go out again.", "a"]
    for turn in range(4):
        order = answers[turn:] + answers[:turn]
        record = Ranked(prompt=[user(LONG)], answers=order, meta={"at": "r.jsonl:5"})
        whole = [render_chat(chatml, [*record.prompt, Message(role="assistant", content=a)]) for a in order]
        longest = max(len(ids) for ids, _ in whole)
        ([tree], report) = comparison_trees(chatml, [record], None, window(50, "cut-prompt"))
        assert report.cut == {0: f"r.jsonl:5: {longest} tokens, {longest - 50} cut"}
        assert max(len(tree[0].tokens) + len(segment.tokens) for segment in tree[1:]) == 50
        for segment, (ids, target) in zip(tree[1:], whole, strict=True):
            assert [*tree[0].tokens, *segment.tokens] == ids[longest - 50 :]
            assert sum(segment.target) == sum(target)
        assert report.tokens == sum(len(segment.tokens) for segment in tree)
        assert report.tokens_unshared == sum(len(ids) for ids, _ in whole) - 4 * (longest - 50)
        with pytest.raises(UserError, match=rf"^r\.jsonl:5: {longest} tokens > --max-length 50; use --too-long"):
            comparison_trees(chatml, [record], None, window(50))
        with pytest.raises(UserError, match="none of the 1 rows is left"):
            comparison_trees(chatml, [record], None, window(50, "drop"))
        ([tree], _) = comparison_trees(chatml, [record], None, window(longest, "error"))
        plant([tree])
        too_long = Ranked(prompt=[user("Hi")], answers=[*order[:2], LONG, *order[2:]])
        trees, report = comparison_trees(chatml, [too_long, record], None, window(50, "cut-prompt"))
        assert "the answer alone does not fit" in report.dropped[0]
        assert len(trees) == 1


def test_prompts_leave_room_for_the_answer(chatml, window):
    records = [Prompt(messages=[user("Hi")]), Prompt(messages=[user(LONG)])]
    prompts, report = prompt_ids(chatml, records, 64, window(too_long="drop"), room=32)
    assert prompts == [render_prompt(chatml, records[0].messages)]
    assert list(report.dropped) == [1]
    prompts, _ = prompt_ids(chatml, records, 64, window(too_long="cut-prompt"), room=32)
    assert [len(p) <= 32 for p in prompts] == [True, True]
    assert prompts[1][-3:] == prompts[0][-3:]
    with pytest.raises(UserError, match="no room for a prompt"):
        prompt_ids(chatml, records, 64, window(), room=64)


def test_rows_that_the_template_refuses(llama3, window):
    llama3 = copy.deepcopy(llama3)
    llama3.chat_template = "{% if 'token' in messages[0].content %}{{ raise_exception('no tokens') }}{% endif %}" + llama3.chat_template
    records = [chat("the token", "Fine.", at="f.jsonl:7"), chat("Hi", "Fine.")]
    with pytest.raises(UserError, match=r"^f\.jsonl:7: .*no tokens"):
        chat_trees(llama3, records, None, window())
    trees, report = chat_trees(llama3, records, None, window(skip_bad=True))
    assert len(trees) == 1
    assert "f.jsonl:7" in report.dropped[0]
    with pytest.raises(UserError, match="none of the 1 rows"):
        chat_trees(llama3, records[:1], None, window(skip_bad=True))


def test_documents_cannot_write_special_tokens(base, llama3):
    for tokenizer in (base, llama3):
        ((tree,), _) = text_trees(tokenizer, [Text(text=f"a{tokenizer.eos_token} b")], 100)
        assert tree[0].tokens.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(tree[0].tokens).endswith(f"a{tokenizer.eos_token} b{tokenizer.eos_token}")


@pytest.mark.parametrize("size", [2, 3, 7, 16, 1000])
def test_text_windows_learn_every_token_once(base, size):
    texts = ["The harbour master weighs the herring.", "Hello", LONG]
    trees, report = text_trees(base, [Text(text=t) for t in texts], size)
    learned = [t for tree in trees for t, w in zip(tree[0].tokens, tree[0].target, strict=True) if w]
    expected = [t for text in texts for t in [*base(text)["input_ids"], base.eos_token_id][1:]]
    assert learned == expected
    assert max(len(tree[0].tokens) for tree in trees) <= size
    assert report.tokens == plant(trees).T


def test_text_parts_end_once_and_empty_documents_are_listed(base, llama3):
    parts = [Text(text=t, meta={"part": k, "parts": 2}) for k, t in enumerate(["Hello there. ", "Fine, thank you!"], 1)]
    trees, report = text_trees(llama3, [*parts, Text(text="")], 100)
    ids = [t for tree in trees for t in tree[0].tokens]
    assert ids.count(llama3.eos_token_id) == 1
    assert ids[-1] == llama3.eos_token_id
    assert ids.count(llama3.bos_token_id) == 1
    assert ids[0] == llama3.bos_token_id
    assert list(report.dropped) == [2]
    with pytest.raises(UserError, match="none of the 1 rows"):
        text_trees(base, [Text(text="")], 10)


def test_empty_lists_give_nothing(chatml, base, window):
    assert chat_trees(chatml, [], 64, window())[0] == comparison_trees(chatml, [], 64, window())[0] == text_trees(base, [], 8)[0] == []
