"""What a file holds, as it will be trained: rows as tokens with what is learned, and statistics over all rows. Floor 2."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import groupby
from typing import Any, Literal, NamedTuple

from temper.config import UserError
from temper.data.template import encode_plain, render_prompt
from temper.data.trees import TooLong, begins, chat_tree, comparison_tree, last_answer, text_trees, where
from temper.forest import Segment, Tree
from temper.records import Chat, Judgement, Message, Pair, Prompt, Ranked, Rated, Record, Steps, Text

LANGUAGE_SAMPLE = 300  # texts whose language is told
LIKELY = 0.5  # a language that is less probable counts as not clear
UNENDING = 1 << 40  # tokens: no window


class Piece(NamedTuple):
    """Some characters of a row: those of one token, or of more where one holds only a part of a character."""

    text: str
    learned: bool
    special: bool
    cut: bool = False


class Part(NamedTuple):
    """A segment of a row: the whole of a conversation, or a prompt and the answers under it."""

    title: str
    pieces: list[Piece]


@dataclass
class Row:
    """A row as it will be trained. trouble: why it will not."""

    at: str
    parts: list[Part] = field(default_factory=list)
    tokens: int = 0
    learned: int = 0
    cut: int = 0
    trouble: str = ""


@dataclass
class Stats:
    """Over the rows; the lists have one value for each row that was tokenised, in order.

    tokens: as computed, shared prompts once; unshared: of the sequences one by one; whole: of the longest of them; answers: {label:
    tokens of each answer}; shared: tokens of the prompts that stand once; whole_prompts: how many rows share all of their prompt.
    """

    rows: int = 0
    tokenised: int = 0
    limit: int | None = None
    kinds: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    turns: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    unshared: list[int] = field(default_factory=list)
    longest: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    whole_prompts: int = 0
    chosen_longer: float = 0.0
    answers: dict[str, list[int]] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    over: list[tuple[str, str]] = field(default_factory=list)  # rows beyond the limit, and what becomes of them
    duplicates: list[tuple[str, str]] = field(default_factory=list)  # (row, the earlier row that is the same)
    same_prompt: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    longest_at: str = ""


def messages_of(record: Record) -> list[Message]:
    """The messages that a record holds, without its answers where these stand apart."""
    return list(getattr(record, "messages", None) or getattr(record, "prompt", []))


def answers_of(record: Record) -> list[tuple[str, str]]:
    """(label, answer) of the answers that stand apart."""
    match record:
        case Pair():
            return [("chosen", record.chosen), ("rejected", record.rejected)]
        case Ranked():
            return [(f"rank {k}", text) for k, text in enumerate(record.answers, 1)]
        case Rated():
            name = {1.0: "up", 0.0: "down"}.get(record.rating, f"rated {record.rating:g}")
            return [(name, record.answer)]
        case Steps():
            said = {None: "no label", 1.0: "right", 0.0: "wrong", -1.0: "wrong"}
            return [(said.get(label, f"label {label:g}" if label else ""), s) for s, label in zip(record.steps, record.labels, strict=True)]
        case Judgement():
            won = {"a": ("a, preferred", "b"), "b": ("a", "b, preferred"), "tie": ("a, tie", "b, tie")}[record.verdict]
            return list(zip(won, (record.a, record.b), strict=True))
    return []


def trees_of(tokenizer, record: Record, limit: int | None = None, learn: Literal["all", "last"] = "all") -> list[Tree]:
    """The record as training makes trees of it; a rated answer and a solution in steps as conversations, a judgement as two answers.

    limit: the window into which documents are cut; of nothing else. Raises UserError where the record cannot be trained on.
    """
    match record:
        case Text():
            return text_trees(tokenizer, [record], limit or UNENDING)[0]
        case Chat():
            return [chat_tree(tokenizer, record, learn)]
        case Pair() | Ranked():
            return [comparison_tree(tokenizer, record)]
        case Judgement():
            return [comparison_tree(tokenizer, Ranked(prompt=record.prompt, answers=[record.a, record.b]))]
        case Prompt():
            return [[Segment(render_prompt(tokenizer, record.messages, record.tools))]]
    answer = "\n".join(text for _, text in answers_of(record))
    return [chat_tree(tokenizer, Chat(messages=[*messages_of(record), Message(role="assistant", content=answer)]), "last")]


def path_tokens(tree: Tree) -> list[int]:
    """Tokens of each sequence that a tree holds: a whole conversation, or the prompt with each answer."""
    ends: list[int] = []
    for s in tree:
        ends.append(len(s.tokens) + (ends[s.parent] if s.parent >= 0 else 0))
    return [end for s, end in zip(tree, ends, strict=True) if len(tree) == 1 or any(s.target or ())]


def _answers(tree: Tree) -> Tree:
    return [s for s in tree if any(s.target or ())] if len(tree) > 1 else tree


def excess(tokenizer, tree: Tree, limit: int | None) -> tuple[int, bool]:
    """(tokens beyond the limit, whether the prompt holds so many to cut): what `chat_trees` and `comparison_trees` decide by."""
    over = max(0, max(path_tokens(tree)) - limit) if limit else 0
    root = tree[0]
    begin = begins(tokenizer, root.tokens)
    if len(tree) > 1:
        spare = len(root.tokens) - max(1, begin) if root.labels.get("rank", -1) == -1 else 0
    else:
        target = root.target or ()
        spare = last_answer(target) - max(1, begin) if any(target) else len(root.tokens) - begin - 1
    return over, over <= spare


def pieces(tokenizer, ids: Sequence[int], target: Sequence[float] | None, cut: int = 0, begin: int = 0) -> list[Piece]:
    """The tokens as text, in order; special ones by their names. cut: so many tokens after the first `begin` will not be trained on."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    states = [(bool(target and target[t]), token in special, begin <= t < begin + cut) for t, token in enumerate(ids)]
    out: list[Piece] = []
    at = 0
    for (learned, is_special, is_cut), group in groupby(states):
        run, at = list(ids[at : at + (n := len(list(group)))]), at + n
        texts = tokenizer.convert_ids_to_tokens(run) if is_special else _texts(tokenizer, run)
        out += [Piece(text, learned, is_special, is_cut) for text in texts]
    return out


def _texts(tokenizer, ids: list[int]) -> Iterator[str]:
    """Texts of tokens, as they read after the token before; a character of several tokens comes with the last of them."""
    before = start = 0
    for t in range(1, len(ids) + 1):
        head, text = tokenizer.decode(ids[before:start]), tokenizer.decode(ids[before:t])
        if text.endswith("\ufffd") and t < len(ids) and t - start < 8:
            continue
        yield text[len(head) :]
        before, start = start, t


def show(tokenizer, record: Record, at: str, limit: int | None, too_long: TooLong, learn: Literal["all", "last"] = "all") -> Row:
    """One row as it will be trained, what will be cut included."""
    row = Row(at)
    try:
        trees = trees_of(tokenizer, record, limit, learn)
    except UserError as error:
        row.trouble = str(error)
        return row
    labels = [label for label, _ in answers_of(record)]
    for k, tree in enumerate(trees):
        over, fits = excess(tokenizer, tree, limit)
        row.tokens += sum(len(s.tokens) for s in tree)
        if over and (too_long != "cut-prompt" or not fits):
            row.trouble = fate(over, fits, too_long)
        elif over:
            row.cut = over
        for i, s in enumerate(tree):
            row.learned += sum(map(bool, s.target or ()))
            first = i == 0 or s.parent < 0
            cut = row.cut if first else 0
            if len(tree) > 1:
                rank = s.labels.get("rank", -1)
                title = "prompt" if rank < 0 else labels[int(rank)]
                if not s.labels:  # a conversation whose answers later turns see otherwise
                    title = "shared" if i == 0 else f"branch {i}"
            else:
                title = f"window {k + 1}" if len(trees) > 1 else labels[0] if isinstance(record, Rated) else ""
            row.parts.append(Part(title, pieces(tokenizer, s.tokens, s.target, cut, begins(tokenizer, s.tokens) if first else 0)))
    return row


def fate(over: int, fits: bool, too_long: TooLong) -> str:
    """What becomes of a row that is `over` tokens too long."""
    if too_long == "cut-prompt":
        return f"{over} tokens cut from its prompt" if fits else f"{over} tokens too long and left out: the answer alone does not fit"
    return f"{over} tokens too long: " + ("left out" if too_long == "drop" else "training stops at it")


def _digest(value: Any) -> bytes:
    return blake2b(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def statistics(
    tokenizer,
    records: Sequence[Record],
    limit: int | None = None,
    too_long: TooLong = "error",
    learn: Literal["all", "last"] = "all",
    most: int | None = None,
) -> Stats:
    """Counts over all records; tokens of at most `most` of them, evenly spaced."""
    out = Stats(rows=len(records), limit=limit)
    seen: dict[bytes, str] = {}
    prompts: set[bytes] = set()
    every = max(1.0, len(records) / most) if most else 1.0
    chosen_ones = {int(k * every) for k in range(int(len(records) / every))} if every > 1 else None
    for i, record in enumerate(records):
        at = where(record, i)
        out.kinds[type(record).__name__.lower()] += 1
        messages, answers = messages_of(record), answers_of(record)
        said = [*((m.role, m.content) for m in messages), *(("assistant", text) for _, text in answers)]
        if messages:
            out.roles.update(role for role, _ in said)
            out.turns.append(len(messages) + bool(answers))
        key = _digest(record.model_dump(mode="json", exclude={"meta"}))
        if (first := seen.setdefault(key, at)) != at:
            out.duplicates.append((at, first))
        elif messages:
            asked = _digest([m.content for m in messages if m.role != "assistant" or answers])
            out.same_prompt += asked in prompts
            prompts.add(asked)
        if chosen_ones is None or i in chosen_ones:
            _count(out, tokenizer, record, at, too_long, learn)
    _tell_languages(out, records)
    return out


def _count(out: Stats, tokenizer, record: Record, at: str, too_long: TooLong, learn: Literal["all", "last"]) -> None:
    out.tokenised += 1
    try:
        trees = trees_of(tokenizer, record, None, learn)
    except UserError as error:
        out.refused.append((at, str(error)))
        return
    tree = trees[0]
    paths = path_tokens(tree)
    if not out.longest or max(paths) > max(out.longest):
        out.longest_at = at
    out.tokens.append(sum(len(s.tokens) for s in tree))
    out.unshared.append(sum(paths))
    out.longest.append(max(paths))
    out.learned.append(sum(map(bool, (w for s in tree for w in s.target or ()))))
    over, fits = excess(tokenizer, tree, out.limit)
    if over and not isinstance(record, Text):
        out.over.append((at, fate(over, fits, too_long)))
    if len(tree) > 1 and "rank" in tree[0].labels:
        shared = len(tree[0].tokens) if tree[0].labels.get("rank") == -1 else 0
        out.shared.append(shared)
        out.whole_prompts += shared == len(render_prompt(tokenizer, messages_of(record)))
        lengths = [sum(map(bool, s.target or ())) for s in _answers(tree)]
        for (label, _), n in zip(answers_of(record), lengths, strict=True):
            out.answers.setdefault(label, []).append(n)
        if isinstance(record, Pair):
            out.chosen_longer += 0.5 if lengths[0] == lengths[1] else lengths[0] > lengths[1]
    elif isinstance(record, Steps):
        steps = encode_plain(tokenizer, [text for _, text in answers_of(record)], [at] * len(record.steps))
        for (label, _), ids in zip(answers_of(record), steps, strict=True):
            out.answers.setdefault(f"{label} step", []).append(len(ids))
    elif not isinstance(record, Prompt | Text):
        label = answers_of(record)[0][0] if isinstance(record, Rated) else "learned"
        out.answers.setdefault(label, []).append(out.learned[-1])


def _tell_languages(out: Stats, records: Sequence[Record]) -> None:
    from temper.data.quality.filter import language

    for k in range(min(LANGUAGE_SAMPLE, len(records))):
        record = records[k * len(records) // min(LANGUAGE_SAMPLE, len(records))]
        text = "\n".join([*(m.content for m in messages_of(record)), *(a for _, a in answers_of(record)), getattr(record, "text", "")])
        name, sure = language(text)
        out.languages[name if sure >= LIKELY else "not clear"] += 1


class Bin(NamedTuple):
    """low <= x <= high; of the last bin of a histogram high is the largest value."""

    low: int
    high: int
    counts: list[int]  # of each group


def histogram(groups: Sequence[Sequence[int]], most: int = 12) -> list[Bin]:
    """Bins of equal round width up to the 99th percentile, of whole numbers; what is larger is in the last bin."""
    values = sorted(x for group in groups for x in group)
    if not values:
        return []
    low, high = values[0], max(values[0], values[min(len(values) - 1, int(0.99 * len(values)))])
    step = next(m * 10**k for k in range(16) for m in (1, 2, 5) if (high - low + 1) <= most * m * 10**k)
    start = low // step * step if step > 1 else low
    count = (high - start) // step + 1
    table = [[0] * len(groups) for _ in range(count)]
    for g, group in enumerate(groups):
        for x in group:
            table[min((x - start) // step, count - 1)][g] += 1
    edges = [(start + k * step, start + (k + 1) * step - 1) for k in range(count)]
    edges[-1] = (edges[-1][0], max(edges[-1][1], values[-1]))
    return [Bin(a, b, row) for (a, b), row in zip(edges, table, strict=True)]


def quantile(values: Sequence[int], q: float) -> int:
    """The value at or below which a share q of the values lies."""
    return sorted(values)[min(len(values) - 1, max(0, -int(-q * len(values) // 1) - 1))]
