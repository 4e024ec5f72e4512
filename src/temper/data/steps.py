"""Solutions in steps: where each step ends, in characters and in tokens, and the trees they are learned from. Floor 2.

A step is read at its last token, found by its index: the token that holds the step's last character. The last step takes what ends the
turn with it, so that it is read where the solution is known to be over.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

from temper.config import UserError
from temper.data.template import chat_template, render_chat
from temper.data.trees import Report, Window, _cut, _Fit, begins, last_answer
from temper.forest import Segment, Tree
from temper.records import Message, Steps

By = Literal["line", "sentence"]
BETWEEN: dict[By, str] = {"line": "\n", "sentence": " "}  # what stands between the steps of a solution
STOPS: dict[By, tuple[str, ...]] = {"line": ("\n",), "sentence": (".", "!", "?")}  # strings that end a step while it is sampled
_STEP = {"line": re.compile(r"\S[^\n]*"), "sentence": re.compile(r"\S(?:[^\n]*?[.!?][\"')]*(?=\s|\Z)|[^\n]*)")}


def cut(text: str, by: By) -> list[tuple[int, int]]:
    """The steps of a text as spans of characters, without the blanks around them. A sentence ends with a mark before a blank."""
    return [(m.start(), m.start() + len(m[0].rstrip())) for m in _STEP[by].finditer(text)]


@lru_cache(maxsize=1 << 16)
def _piece(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=True)


def reach(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, list[int]]:
    """(the text of the tokens without special ones, after each token how many of its characters are out)."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    pieces = [_piece(tokenizer, token) for token in tokens]
    if "".join(pieces) != text:  # a tokenizer whose tokens are no texts of their own
        return text, [len(tokenizer.decode(list(tokens[: i + 1]), skip_special_tokens=True)) for i in range(len(tokens))]
    out, n = [], 0
    for piece in pieces:
        n += len(piece)
        out.append(n)
    return text, out


def token_ends(reached: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Index of each step's last token: the first with all of its characters out. The last step's is the last token of all."""
    out = []
    at = 0
    for _, end in spans[:-1]:
        while reached[at] < end:
            at += 1
        out.append(at)
    return [*out, len(reached) - 1] if spans else []


def step_ends(tokenizer: Any, tokens: Sequence[int], by: By) -> list[int]:
    """Index of each step's last token, of an answer as it was sampled; none where it says nothing."""
    text, reached = reach(tokenizer, tokens)
    return token_ends(reached, cut(text, by))


def spans_of(text: str, steps: Sequence[str]) -> list[tuple[int, int]]:
    """Where the steps stand in the text, one after the other. Raises UserError for a step that does not."""
    out, at = [], 0
    for k, step in enumerate(steps, 1):
        bare = step.strip()
        start = text.find(bare, at)
        if not bare or start < 0:
            raise UserError(f"step {k} {'is empty' if not bare else 'is not what its tokens say'}; leave it out")
        at = start + len(bare)
        out.append((start, at))
    return out


def _render(tokenizer: Any, record: Steps, by: By) -> tuple[list[int], int, list[int]]:
    """(ids, where the answer begins, indices of the steps' last tokens within it)."""
    if not record.steps:
        raise UserError("no steps")
    text = BETWEEN[by].join(step.strip() for step in record.steps)
    ids, target = render_chat(tokenizer, [*record.prompt, Message(role="assistant", content=text)], "last")
    begin = last_answer(target)
    stop = len(target) - target[::-1].index(1.0)
    said, reached = reach(tokenizer, ids[begin:stop])
    return ids[:stop], begin, token_ends(reached, spans_of(said, record.steps))


def step_trees(tokenizer: Any, records: Sequence[Steps], model: Any, window: Window, by: By) -> tuple[list[Tree], Report]:
    """One tree per prompt: the prompt, and its solutions as chains of steps, which share what they begin with.

    Labels of a segment: `label`, the mean over the solutions that it is a step of, and `counted`, over how many of them (0: no label).
    Raises UserError for a tokenizer without a chat template, and `file:row: ...`.
    """
    chat_template(tokenizer)
    fit = _Fit(records, model, window)
    trees: dict[tuple[int, ...], Tree] = {}
    children: dict[tuple[int, ...], dict[tuple[int, tuple[int, ...]], int]] = {}
    for i, record in enumerate(records):
        rendered = fit.attempt(i, _render, tokenizer, record, by)
        if rendered is None:
            continue
        ids, begin, ends = rendered
        first = begins(tokenizer, ids)
        over = fit.excess(i, len(ids), cuttable=begin - max(1, first))
        if over is None:
            continue
        ids, _ = _cut(ids, [0.0] * len(ids), over, first)
        prompt, answer = tuple(ids[: begin - over]), ids[begin - over :]
        tree = trees.setdefault(prompt, [Segment(list(prompt), [0.0] * len(prompt), labels={"label": 0.0, "counted": 0.0})])
        known, at = children.setdefault(prompt, {}), 0
        for (a, b), label in zip(pairwise([-1, *ends]), _merged(ends, record.labels), strict=True):
            if a == b:
                continue
            key = at, tuple(answer[a + 1 : b + 1])
            if key not in known:
                known[key] = len(tree)
                tree.append(Segment(list(key[1]), [0.0] * (b - a), at, labels={"label": 0.0, "counted": 0.0}))
                fit.report.tokens += b - a
            at = known[key]
            if label is not None:
                old, n = tree[at].labels["label"], tree[at].labels["counted"]
                tree[at].labels = {"label": (old * n + label) / (n + 1), "counted": n + 1}
        fit.report.tokens_unshared += len(ids)
    fit.report.tokens += sum(len(tree[0].tokens) for tree in trees.values())
    return list(trees.values()), fit.done()


def _merged(ends: Sequence[int], labels: Sequence[float | None]) -> list[float | None]:
    """Labels of the steps; of those that end with one token the lowest stands with the first of them, which is the one that is read."""
    lowest: dict[int, float] = {}
    for end, label in zip(ends, labels, strict=True):
        if label is not None:
            lowest[end] = min(label, lowest.get(end, label))
    return [lowest.get(end) for end in ends]
