"""From records to forest trees, with an explicit policy for what does not fit; everything dropped or cut is listed. Floor 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from temper.config import UserError
from temper.data.sharing import branches, size
from temper.data.template import TurnsDiffer, bos_id, chat_template, common, encode_plain, end_id, render_chat, render_prompt
from temper.forest import Segment, Tree
from temper.records import Chat, Message, Pair, Prompt, Ranked, Rated, Record, Text

TooLong = Literal["error", "drop", "cut-prompt"]


class Window(Protocol):
    """The settings that say what happens to long and broken rows. skip_bad: rows that the template refuses are left out."""

    @property
    def max_length(self) -> int | None: ...
    @property
    def too_long(self) -> TooLong: ...
    @property
    def skip_bad(self) -> bool: ...


@dataclass
class Report:
    """What became of records on their way to tokens. Keys of `dropped` and `cut` are indices into the records."""

    rows: int = 0
    limit: int | None = None
    limit_from: str = ""
    tokens: int = 0  # as computed, shared prompts once
    tokens_unshared: int = 0  # what the same rows would be one by one
    dropped: dict[int, str] = field(default_factory=dict)
    cut: dict[int, str] = field(default_factory=dict)
    long: dict[int, int] = field(default_factory=dict)  # tokens of the rows that are beyond the limit
    refused: str = ""  # where the first row is that the policy `error` refuses
    room: int = 0  # tokens that an answer needs beside a prompt

    def add(self, part: Report) -> None:
        """Take in the report on further records, which are numbered from 0 there and go on with these here."""
        self.limit, self.limit_from, self.room = part.limit, part.limit_from, part.room
        self.dropped |= {i + self.rows: x for i, x in part.dropped.items()}
        self.cut |= {i + self.rows: x for i, x in part.cut.items()}
        self.long |= {i + self.rows: x for i, x in part.long.items()}
        for name in "rows", "tokens", "tokens_unshared":
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.refused = self.refused or part.refused

    def settle(self, given: bool) -> None:
        """Raises UserError for rows that are too long under the policy `error`, and when nothing is left. given: --max-length was."""
        if self.refused:
            lengths = list(self.long.values())
            limit = f"--max-length {self.limit}" if given else f"{self.limit}, the model's window"
            beside = f" + {self.room} for the answer" if self.room else ""
            more = f" (and {len(lengths) - 1} more rows, the longest {max(lengths)})" if len(lengths) > 1 else ""
            larger = " or a larger --max-length" if given else ""
            raise UserError(f"{self.refused}: {lengths[0]} tokens{beside} > {limit}{more}; use --too-long drop|cut-prompt{larger}")
        if self.rows and not self.kept:
            limit = f" (of at most {self.limit}, {self.limit_from})" if self.long else ""
            raise UserError(f"none of the {self.rows} rows is left to use; the first: {next(iter(self.dropped.values()), '')}{limit}")

    @property
    def kept(self) -> int:
        """Rows that became trees or prompts."""
        return self.rows - len(self.dropped)

    def summary(self) -> str:
        """One line: how many were kept, dropped and cut, the limit and where it comes from."""
        limit = f"limit {self.limit} tokens ({self.limit_from})" if self.limit else "no limit on length"
        parts = [f"{self.kept} of {self.rows} rows, {self.tokens} tokens, {limit}"]
        if self.tokens_unshared > self.tokens:
            parts.append(f"{self.tokens_unshared} tokens without shared prompts")
        for name, rows in (("dropped", self.dropped), ("prompt cut", self.cut)):
            if rows:
                first = list(rows.values())[:5]
                parts.append(f"{len(rows)} {name}: {'; '.join(first)}{'; ...' if len(rows) > len(first) else ''}")
        return "; ".join(parts)

    def lines(self) -> list[str]:
        """Every row that was dropped or cut, one line each."""
        return [f"dropped: {text}" for text in self.dropped.values()] + [f"prompt cut: {text}" for text in self.cut.values()]


def where(record: Record, index: int) -> str:
    """How messages name a record: file:line where it was read from a file, else its row (1-based)."""
    return str(getattr(record, "meta", {}).get("at") or f"row {index + 1}")


def limit_of(model: Any, max_length: int | None) -> tuple[int | None, str]:
    """(tokens a row may have, where that comes from). model: a model, its config, a number of tokens, or None for no window.

    Raises UserError when --max-length exceeds the model's window.
    """
    config = getattr(model, "config", model)
    window = config if isinstance(config, int) else getattr(config, "max_position_embeddings", None)
    if max_length is None:
        return window, "the model's window"
    if window is not None and max_length > window:
        raise UserError(f"--max-length {max_length}: the model's window is {window} tokens; give at most that")
    return max_length, f"--max-length {max_length}"


class _Fit:
    """The policy at work on records."""

    def __init__(self, records: Sequence[Record], model: Any, window: Window, room: int = 0) -> None:
        limit, source = limit_of(model, window.max_length)
        self.records, self.window, self.room = records, window, room
        self.report = Report(rows=len(records), limit=limit, limit_from=source, room=room)
        if limit is not None and limit - room < 2:
            raise UserError(f"{source} leaves no room for a prompt beside {room} tokens of answer; allow fewer tokens to the answer")

    def where(self, index: int) -> str:
        return where(self.records[index], index)

    def attempt(self, index: int, render, *args: Any, **kwargs: Any) -> Any:
        """What `render` returns; None when the template refuses the row and bad rows are skipped."""
        try:
            return render(*args, **kwargs)
        except UserError as error:
            if not self.window.skip_bad:
                raise UserError(f"{self.where(index)}: {error}") from None
            self.report.dropped[index] = f"{self.where(index)}: {error}"
            return None

    def excess(self, index: int, length: int, cuttable: int) -> int | None:
        """How many tokens to cut from the left of the prompt, 0 when the row fits; None when it is to be left out."""
        limit = self.report.limit
        if limit is None or length + self.room <= limit:
            return 0
        self.report.long[index] = length
        at = self.where(index)
        if self.window.too_long == "error":
            self.report.refused = self.report.refused or at
            return None
        over = length + self.room - limit
        beside = f" beside {self.room} of answer" if self.room else ""
        if self.window.too_long == "drop":
            self.report.dropped[index] = f"{at}: {length} tokens{beside}"
        elif over > cuttable:
            self.report.dropped[index] = f"{at}: {length} tokens{beside}, the answer alone does not fit"
        else:
            self.report.cut[index] = f"{at}: {length} tokens{beside}, {over} cut"
            return over
        return None

    def done(self) -> Report:
        """The report, settled."""
        self.report.settle(self.window.max_length is not None)
        return self.report


def _cut(ids: list[int], target: list[float], over: int, begin: int) -> tuple[list[int], list[float]]:
    """Without the `over` tokens after the first `begin`; an earlier answer that loses its start is no longer learned."""
    if over == 0:
        return ids, target
    first = begin + over
    rest = target[first:]
    if target[first - 1]:
        for t, value in enumerate(rest):
            if not value:
                break
            rest[t] = 0.0
    if not begin and rest:
        rest[0] = 0.0  # nothing precedes it
    return ids[:begin] + ids[first:], target[:begin] + rest


def last_answer(target: Sequence[float]) -> int:
    """Index of the first token of the last learned span."""
    end = next(t for t in reversed(range(len(target))) if target[t])
    while end and target[end - 1]:
        end -= 1
    return end


def begins(tokenizer, ids: Sequence[int]) -> int:
    """1 where the first token is the beginning token, which is never cut; else 0."""
    bos = bos_id(tokenizer)
    return int(bos is not None and list(ids[:1]) == [bos])


Path = tuple[list[int], list[float]]  # ids and target of a sequence
Learn = Literal["all", "last"]


def _paths(tokenizer, record: Chat, learn: Learn) -> list[Path]:
    """What a conversation is learned from: itself; or, where the template renders earlier turns otherwise than when they were said (it
    takes their reasoning out), for each assistant turn the conversation up to it, as the model met it, that turn learned.
    """
    try:
        return [render_chat(tokenizer, record.messages, learn, record.tools)]
    except TurnsDiffer:
        turns = [i for i, m in enumerate(record.messages, 1) if m.role == "assistant"]
        if learn == "last" or len(turns) < 2:
            raise
        return [render_chat(tokenizer, record.messages[:i], "last", record.tools) for i in turns]


def _chat_tree(paths: Sequence[Path]) -> Tree:
    return [Segment(*paths[0])] if len(paths) == 1 else branches(paths)


def chat_tree(tokenizer, record: Chat, learn: Learn = "all") -> Tree:
    """A conversation: one segment, or a branch for each answer that later turns do not see as it was. Raises what `render_chat` raises."""
    return _chat_tree(_paths(tokenizer, record, learn))


def chat_trees(tokenizer, records: Sequence[Chat], model: Any, window: Window, *, learn: Learn = "all") -> tuple[list[Tree], Report]:
    """One tree per conversation that fits, in order. model: gives the window (see `limit_of`).

    cut-prompt takes tokens from the left, the beginning token kept, never from the last answer. Raises UserError `file:row: ...`.
    """
    found, report = chat_chunk(records, tokenizer=tokenizer, model=model, window=window, learn=learn)
    report.settle(window.max_length is not None)
    return [tree for _, tree in found], report


Chunk = tuple[list[tuple[int, Tree]], Report]  # of a part of the records: (number, tree) of each, and a report that is not settled


def chat_chunk(records: Sequence[Chat], *, tokenizer: Any, model: Any, window: Window, learn: Learn) -> Chunk:
    """`chat_trees` of a part of the records."""
    fit, found = _Fit(records, model, window), []
    for i, record in enumerate(records):
        paths = fit.attempt(i, _paths, tokenizer, record, learn)
        if paths is None:
            continue
        begin = begins(tokenizer, paths[0][0])
        length = max(len(ids) for ids, _ in paths)
        # at least one token of context stays: the beginning token, or one of the prompt
        spare = [last_answer(target) - max(1, begin) + length - len(target) for _, target in paths]
        over = fit.excess(i, length, cuttable=min(spare))
        if over is None:
            continue
        paths = [_cut(ids, target, max(0, over - length + len(ids)), begin) for ids, target in paths]
        tree = _chat_tree(paths)
        fit.report.tokens += size(tree)
        fit.report.tokens_unshared += sum(len(ids) for ids, _ in paths)
        found.append((i, tree))
    return found, fit.report


Compared = Pair | Ranked | Rated


def _render_answers(tokenizer, record: Compared) -> tuple[int, list[tuple[list[int], list[float]]]]:
    """(shared tokens, ids and target of the conversation with each answer, the best first).

    Shared is the rendered prompt where it is proven to be a token prefix of all; else the longest common prefix.
    """
    match record:
        case Pair():
            answers = [record.chosen, record.rejected]
        case Ranked():
            answers = record.answers
        case Rated():
            answers = [record.answer]
    chats = [render_chat(tokenizer, [*record.prompt, Message(role="assistant", content=a)], "last") for a in answers]
    prompt = render_prompt(tokenizer, record.prompt)
    n = len(prompt)
    if any(ids[:n] != prompt for ids, _ in chats):
        n = min(common(chats[0][0], ids) for ids, _ in chats)
    return min(n, *(target.index(1.0) for _, target in chats)), chats


def _compared(record: Compared, shared: int, chats: Sequence[tuple[list[int], list[float]]]) -> Tree:
    soft, margin = (record.soft, record.margin or 0.0) if isinstance(record, Pair) else (1.0, 0.0)
    rating = {"rating": record.rating} if isinstance(record, Rated) else {}
    top = 0 if shared else -1
    answers = [
        Segment(ids[shared:], target[shared:], top, labels={"rank": float(rank), "soft": soft, "margin": margin, **rating})
        for rank, (ids, target) in enumerate(chats)
    ]
    if not shared:
        return answers
    return [Segment(chats[0][0][:shared], [0.0] * shared, labels={"rank": -1.0, "soft": 0.0, "margin": 0.0}), *answers]


def comparison_tree(tokenizer, record: Compared) -> Tree:
    """The prompt, and the answers under it: the prompt's tokens stand once.

    Labels: rank (0 the best or chosen answer, 1 the next, ...; -1 the prompt), soft, margin (of a pair; 0 where none was given),
    rating (of a rated answer, which stands alone under its prompt).
    """
    return _compared(record, *_render_answers(tokenizer, record))


def comparison_trees(tokenizer, records: Sequence[Compared], model: Any, window: Window) -> tuple[list[Tree], Report]:
    """One tree per record that fits, in order: prompt + the longest answer must be within the limit.

    Raises UserError for a tokenizer without a chat template, and `file:row: ...`.
    """
    found, report = comparison_chunk(records, tokenizer=tokenizer, model=model, window=window)
    report.settle(window.max_length is not None)
    return [tree for _, tree in found], report


def comparison_chunk(records: Sequence[Compared], *, tokenizer: Any, model: Any, window: Window) -> Chunk:
    """`comparison_trees` of a part of the records."""
    chat_template(tokenizer)  # it is the model's lack, not the first row's
    fit, found = _Fit(records, model, window), []
    for i, record in enumerate(records):
        rendered = fit.attempt(i, _render_answers, tokenizer, record)
        if rendered is None:
            continue
        shared, chats = rendered
        begin = min(begins(tokenizer, chats[0][0]), shared)
        over = fit.excess(i, max(len(ids) for ids, _ in chats), cuttable=shared - max(1, begin))
        if over is None:
            continue
        chats = [_cut(ids, target, over, begin) for ids, target in chats]
        shared -= over
        whole = sum(len(ids) for ids, _ in chats)
        fit.report.tokens += whole - (len(chats) - 1) * shared
        fit.report.tokens_unshared += whole
        found.append((i, _compared(record, shared, chats)))
    return found, fit.report


def prompt_ids(tokenizer, records: Sequence[Prompt], model: Any, window: Window, *, room: int = 0) -> tuple[list[list[int]], Report]:
    """ids of each prompt that fits with `room` tokens left for the answer, in order; those left out are in Report.dropped."""
    found, report = prompt_chunk(records, tokenizer=tokenizer, model=model, window=window, room=room)
    report.settle(window.max_length is not None)
    return [list(tree[0].tokens) for _, tree in found], report


def prompt_chunk(records: Sequence[Prompt], *, tokenizer: Any, model: Any, window: Window, room: int = 0) -> Chunk:
    """`prompt_ids` of a part of the records: a prompt is a tree of one segment."""
    fit, found = _Fit(records, model, window, room), []
    for i, record in enumerate(records):
        ids = fit.attempt(i, render_prompt, tokenizer, record.messages, record.tools)
        if ids is None:
            continue
        begin = begins(tokenizer, ids)
        over = fit.excess(i, len(ids), cuttable=len(ids) - begin - 1)
        if over is None:
            continue
        ids, _ = _cut(ids, [0.0] * len(ids), over, begin)
        fit.report.tokens += len(ids)
        found.append((i, [Segment(ids, [0.0] * len(ids))]))
    fit.report.tokens_unshared = fit.report.tokens
    return found, fit.report


def text_trees(tokenizer, records: Sequence[Text], window: int) -> tuple[list[Tree], Report]:
    """Documents as trees of at most `window` tokens, each document ended by the end token, which is learned.

    A longer document is cut into windows; each but the first begins with the last token of the one before, as context, so that
    every token but a document's first is learned exactly once. A record whose meta says that it is part k of n parts of one text
    is ended only if it is the last. Raises ValueError for a window below 2, UserError for a tokenizer without an end token.
    """
    found, report = text_chunk(records, tokenizer=tokenizer, window=window)
    report.settle(False)
    return [tree for _, tree in found], report


def text_chunk(records: Sequence[Text], *, tokenizer: Any, window: int) -> Chunk:
    """`text_trees` of a part of the records."""
    if window < 2:
        raise ValueError(f"window {window}: needs at least 2 tokens, one to read and one to learn")
    end, bos = end_id(tokenizer), bos_id(tokenizer)
    report = Report(rows=len(records), limit=window, limit_from="longer documents are cut into windows")
    found: list[tuple[int, Tree]] = []
    for start in range(0, len(records), 256):
        chunk = records[start : start + 256]
        names = [where(r, i) for i, r in enumerate(chunk, start)]
        batch = encode_plain(tokenizer, [r.text for r in chunk], names)
        for i, (record, ids) in enumerate(zip(chunk, batch, strict=True), start):
            part, parts = record.meta.get("part", 1), record.meta.get("parts", 1)
            ids = [*([bos] if bos is not None and part == 1 else []), *ids, *([end] if part == parts else [])]
            if len(ids) < 2 or not record.text:
                report.dropped[i] = f"{where(record, i)}: no text"
                continue
            for at in range(0, len(ids) - 1, window - 1):
                piece = ids[at : at + window]
                found.append((i, [Segment(piece, [0.0] + [1.0] * (len(piece) - 1))]))
                report.tokens += len(piece)
    report.tokens_unshared = report.tokens
    return found, report
