"""Joined trees give the same sums as the trees one by one."""

import copy
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.data.sharing import branches, shared, size
from temper.data.template import render_chat
from temper.data.trees import chat_trees, comparison_trees
from temper.forest import Segment, plant
from temper.records import Chat, Message, Pair


def paths(trees):
    """How often each token is learned after each prefix."""
    out = Counter()
    for tree in trees:
        before = []
        for s in tree:
            prefix = before[s.parent] if s.parent >= 0 else ()
            for token, weight in zip(s.tokens, s.target or [0.0] * len(s.tokens), strict=True):
                out[(*prefix, token)] += weight
                prefix = (*prefix, token)
            before.append(prefix)
    return +out


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), max_size=9), st.integers(1, 5), st.integers(1, 40))
def test_sums_stay_what_they_were(sequences, least, most):
    trees = [[Segment(ids, [0.0] + [float(t % 2) for t in range(len(ids) - 1)])] for ids in sequences]
    joined = shared(trees, most, least)
    assert paths(joined) == paths(trees)
    assert sum(map(size, joined)) <= sum(map(size, trees))
    if joined:
        assert plant(joined).weights["tokens"] == sum(sum(t[0].target) for t in trees)


def test_conversations_at_several_lengths_are_one_chain():
    """The same dialogue cut after each answer, the last one learned: each token is computed once."""
    ids = list(range(100))
    trees = [[Segment(ids[:n], [0.0] * (n - 10) + [1.0] * 10)] for n in (40, 70, 100)]
    (tree,) = shared(trees, 1000, 20)
    assert [(len(s.tokens), s.parent) for s in tree] == [(40, -1), (30, 0), (30, 1)]
    assert [sum(s.target) for s in tree] == [10, 10, 10]
    assert shared(trees, 60, 20) != [tree]
    assert shared(trees, 1000, least=101) == trees


def test_comparisons_share_their_prompts_and_stay_whole(chatml, window):
    prompt = [Message(role="user", content="What is the price of herring today? " * 3)]
    more = [*prompt, Message(role="assistant", content="a"), Message(role="user", content="And of crab?")]
    pairs = [Pair(prompt=p, chosen=a, rejected=b) for p, a, b in [(prompt, "a", "b"), (more, "c", "d"), (prompt, "e", "f")]]
    trees, _ = comparison_trees(chatml, pairs, None, window())
    (joined,) = shared(trees, 10_000, 8)
    assert size(joined) < sum(map(size, trees))
    assert paths([joined]) == paths(trees)
    forest = plant([joined])
    rank = forest.columns["rank"]
    answers = [chatml.decode(forest.tokens[forest.segment == s].tolist()).split("<")[0] for s in (rank >= 0).nonzero()[:, 0].tolist()]
    assert answers == ["a", "b", "e", "f", "c", "d"]


REASONS = (  # the reasoning of an answer is taken out when a question follows
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("limit", [None, 60])
def test_every_answer_is_learned_with_the_reasoning_that_later_turns_do_not_see(chatml, window, limit):
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = REASONS
    says = [("user", "Hi"), ("assistant", "<think>one</think>Hello"), ("user", "And?"), ("assistant", "<think>two</think>Fine")]
    chat = Chat(messages=[Message(role=role, content=text) for role, text in says])
    turns = [render_chat(tokenizer, chat.messages[:n], "last") for n in (2, 4)]
    ([tree], report) = chat_trees(tokenizer, [chat], None, window(limit, "cut-prompt"))
    if limit is None:
        assert len(tree) == 3
        assert paths([tree]) == paths([[Segment(*turn)] for turn in turns])
        assert report.tokens == size(tree) < report.tokens_unshared == sum(len(ids) for ids, _ in turns)
    plant([tree])
    assert sum(sum(s.target) for s in tree) == sum(sum(target) for _, target in turns)


def test_branches_that_share_nothing():
    assert [(list(s.tokens), s.parent) for s in branches([([3, 4], [0, 1]), ([1, 2], [0, 1])])] == [([1, 2], -1), ([3, 4], -1)]
