"""Checks of what rows became: the mask, the ends, the beginning, the template, the lengths. Floor 6."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from temper.checks.registry import Case, Found, answers, check
from temper.config import UserError
from temper.data.template import DEFAULT_TEMPLATE, bos_id, render_prompt, stop_ids
from temper.forest import Tree
from temper.records import Chat, Message, Prompt, Record, Text

DECODED = 300  # rows whose learned tokens are compared with their answers
RENDERED = 20  # rows that are rendered by the tokenizer's own means too
SPELLED = "mostly special tokens spelled in the text: Temper reads them as letters, other programs do not"
BAR = 30  # characters of the longest bar of a histogram


def _learned(case: Case) -> Sequence[Tree]:
    """Trees that hold something to learn; none of prompts."""
    return case.prepared.corpus.trees if case.prepared and case.learns else []


def _text(case: Case) -> bool:
    return isinstance(next(iter(case.records), None), Text)


def _segments(tree: Tree) -> list[Any]:
    """Those that are learned from: all but a shared prompt."""
    return [s for s in tree if s.labels.get("rank", 0.0) >= 0]


@check(
    "mask",
    why="a row without a learned token trains nothing, one in which all are learned teaches the user's words too",
    do="look at the template's generation blocks and at these rows: each needs an answer, and a question before it",
)
def mask(case: Case) -> Iterator[Found]:
    nothing, everything, learned, total = [], [], 0, 0
    for k, tree in enumerate(_learned(case)):
        some = [sum(map(bool, s.target or ())) for s in _segments(tree)]
        learned, total = learned + sum(some), total + sum(len(s.tokens) for s in tree)
        if not all(some):
            nothing.append(case.tree_at(k))
        elif sum(some) == sum(len(s.tokens) for s in tree):
            everything.append(case.tree_at(k))
    if nothing:
        yield Found("error", f"{len(nothing)} rows in which no token of an answer is learned", nothing)
    if everything:
        yield Found("error", f"{len(everything)} rows in which every token is learned", everything)
    if total:
        yield Found("note", f"{learned / total:.0%} of {total:,} tokens are learned")


@check(
    "end-of-turn",
    why="a model that never learns the end of its turn never stops",
    do="give a template that ends the assistant's turns with a special token, and learn it; never mask by pad = end token",
)
def end_of_turn(case: Case) -> Iterator[Found]:
    if _text(case) or not (trees := _learned(case)) or case.prepared is None:
        return
    stops = set(stop_ids(case.prepared.tokenizer))
    wrong = []
    for k, tree in enumerate(trees):
        for s in _segments(tree):
            last = max((t for t, weight in enumerate(s.target or ()) if weight), default=None)
            if last is not None and s.tokens[last] not in stops:
                wrong.append(case.tree_at(k))
                break
    if wrong:
        yield Found("error", f"{len(wrong)} of {len(trees):,} rows whose last learned token is not the end of turn", wrong)


@check(
    "beginning",
    why="a model that was trained with one beginning token is off by a few points without it or with two",
    do="write the beginning token once: in the template, or by the tokenizer, not in both",
)
def beginning(case: Case) -> Iterator[Found]:
    if case.prepared is None or (bos := bos_id(case.prepared.tokenizer)) is None:
        return
    tokenizer = case.prepared.tokenizer
    if tokenizer.chat_template and (count := _own(tokenizer, [Message(role="user", content="a")]).count(bos)) != 1:
        name = tokenizer.convert_ids_to_tokens(bos)
        severity, what = ("error", "doubled") if count > 1 else ("note", "left out (Temper adds it; other programs may not)")
        yield Found(severity, f"{name!r} is {what}: the template and tokenizer write it {count} times")  # type: ignore[arg-type]
    missing, double = [], []
    for k, tree in enumerate(case.prepared.corpus.trees):
        tokens = tree[0].tokens
        if list(tokens[:2]) == [bos, bos]:
            double.append(case.tree_at(k))
        elif tokens[0] != bos and not _text(case):  # a later window of a document begins as it comes
            missing.append(case.tree_at(k))
    for name, at in (("two beginning tokens", double), ("no beginning token", missing)):
        if at:
            yield Found("error", f"{len(at)} rows with {name}", at)


def _own(tokenizer: Any, messages: Sequence[Message], ask: bool = True) -> list[int]:
    """The ids by the tokenizer's own `apply_chat_template`, then tokenised as a server would: what others will give the model."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        found = tokenizer.apply_chat_template(
            turns, add_generation_prompt=ask, tokenize=True, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
    except Exception as error:  # whatever a template raises
        raise UserError(f"the chat template fails: {' '.join(str(error).split())[:200]}") from None
    return list(found)


@check(
    "mask-place",
    why="a target that stands a token too early or too late learns the template instead of the answer",
    do="this is a fault of the tokens, not of the text: report the row, with the model's template",
)
def mask_place(case: Case) -> Iterator[Found]:
    if _text(case) or not case.rows or case.prepared is None:
        return
    tokenizer = case.prepared.tokenizer
    stops, wrong = set(stop_ids(tokenizer)), []
    for k, tree in list(enumerate(_learned(case)))[:DECODED]:
        for s, answer in zip(_segments(tree), answers(case.records[case.rows[k]]), strict=False):
            learned = [t for t, weight in zip(s.tokens, s.target or (), strict=False) if weight and t not in stops]
            said = "".join(tokenizer.decode(learned).split())
            if "".join(answer.split()) not in said:
                wrong.append(case.tree_at(k))
                break
    if wrong:
        yield Found("error", f"{len(wrong)} rows whose learned tokens are not their answer", wrong)


@check(
    "template",
    why="a prompt that is written otherwise in training than in use is another language to the model",
    do="keep one template: the one saved with the model",
)
def template(case: Case) -> Iterator[Found]:
    if case.prepared is None or _text(case):
        return
    tokenizer = case.prepared.tokenizer
    if tokenizer.chat_template == DEFAULT_TEMPLATE:
        yield Found("note", "Temper's default template; it is saved with the model")
    differing = []
    for i, record in enumerate(case.records[:RENDERED]):
        messages = _ask(record)
        if messages and tokenizer.chat_template:
            ours, theirs = render_prompt(tokenizer, messages), _own(tokenizer, messages)
            bos = bos_id(tokenizer)
            if ours != theirs and ours[1:] != theirs and [t for t in theirs if t != bos] != [t for t in ours if t != bos]:
                differing.append(case.at(i))
    if differing:
        what = (
            f"{len(differing)} of {min(RENDERED, len(case.records))} prompts have other tokens by the tokenizer's own apply_chat_template"
        )
        yield Found("warning", what, differing, SPELLED)
    if other := _of_reward(case):
        yield Found("warning", f"the reward model was trained with another template than {case.settings['model']} has: {other}")


def _ask(record: Record) -> list[Message]:
    """The messages before the last answer."""
    if isinstance(record, Chat):
        return record.messages[: max(i for i, m in enumerate(record.messages) if m.role == "assistant")]
    return getattr(record, "messages", None) or getattr(record, "prompt", [])


def _of_reward(case: Case) -> str:
    """How the reward model's template differs on a question; "" where it does not, or there is none."""
    if not case.settings.get("reward"):
        return ""
    from temper.models.load import load_tokenizer

    judge, ask = load_tokenizer(case.settings["reward"]), [Message(role="user", content="a")]
    mine, theirs = (render_prompt(t, ask) for t in (case.prepared.tokenizer, judge))  # type: ignore[union-attr]
    return "" if mine == theirs else f"{judge.decode(theirs)!r}"


@check(
    "pad",
    why="programs that find an answer's end by `token != pad` mask the end of turn away where the two are one token",
    do="nothing here, where masks come from lengths; give the tokenizer a pad token of its own for other programs",
)
def pad(case: Case) -> Iterator[Found]:
    if case.prepared is None:
        return
    tokenizer = case.prepared.tokenizer
    if (token := tokenizer.pad_token_id) is None or token not in stop_ids(tokenizer):
        return
    ends = [s for tree in _learned(case) for s in _segments(tree)]
    masked = [s for s in ends if s.tokens[-1] == token and not (s.target or [0])[-1]]
    if masked and not _text(case):
        rows = [case.tree_at(k) for k, tree in enumerate(_learned(case)) if any(s in masked for s in _segments(tree))]
        yield Found("error", f"pad = end token ({tokenizer.pad_token!r}), and it is masked away in {len(rows)} rows", rows)
    else:
        yield Found("note", f"pad = end token ({tokenizer.pad_token!r}); it is learned all the same, for masks come from lengths here")


@check(
    "length",
    why="rows beyond the limit are refused, dropped or lose the start of their prompt",
    do="choose --too-long drop or cut-prompt knowingly, or a larger --max-length where the model has room",
)
def length(case: Case) -> Iterator[Found]:
    if case.prepared is None:
        return
    kept, policy = case.prepared.corpus.kept, case.settings.get("too_long", "error")
    gone = [(i, text) for i, text in kept.dropped.items() if "tokens" in text]
    refused = [(i, text) for i, text in kept.dropped.items() if "tokens" not in text]
    if refused:
        first = refused[0][1].partition(": ")[2]
        yield Found(_lost(case), f"{len(refused)} rows that the template refuses: {first}", [case.at(i) for i, _ in refused])
    if gone:
        severity, will = ("error", "are too long and will be refused") if policy == "error" else ("warning", "are too long and left out")
        yield Found(severity, f"{len(gone)} rows {will} ({gone[0][1].partition(': ')[2]})", [case.at(i) for i, _ in gone])  # type: ignore[arg-type]
    if kept.cut:
        share = len(kept.cut) / max(1, kept.rows)
        what = f"{len(kept.cut)} prompts ({share:.0%}) lose their start"
        yield Found("warning" if share > 0.05 else "note", what, [case.at(i) for i in kept.cut])
    sizes = [max(_lengths(tree)) for tree in case.prepared.corpus.trees]
    if sizes and not _text(case):
        longest = max(range(len(sizes)), key=sizes.__getitem__)
        yield Found("note", f"{quantiles(sizes, kept.limit)}; the longest is", [case.tree_at(longest)], detail=histogram(sizes))


def _lost(case: Case) -> Any:
    return "note" if case.settings.get("skip_bad") else "error"


def _lengths(tree: Tree) -> list[int]:
    """Tokens along the path to the end of each segment."""
    out: list[int] = []
    for s in tree:
        out.append(len(s.tokens) + (out[s.parent] if s.parent >= 0 else 0))
    return out


def quantiles(sizes: Sequence[int], limit: int | None) -> str:
    """How long rows are, in one line."""
    ordered = sorted(sizes)
    half, most, nearly = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9, 0.99))
    room = f" of {limit} allowed" if limit else ""
    return f"tokens per row: half have up to {half}, 90% {most}, 99% {nearly}, the longest {ordered[-1]}{room}"


def histogram(sizes: Sequence[int]) -> list[str]:
    """Rows by tokens, in powers of two: a line with a bar each."""
    bins = Counter(n.bit_length() for n in sizes)
    longest = max(bins.values())
    return [
        f"{1 << (b - 1):>6}-{(1 << b) - 1:<6} {'#' * (bins[b] and max(1, round(BAR * bins[b] / longest))):<{BAR}} {bins[b]:,}"
        for b in range(min(bins), max(bins) + 1)
    ]


@check(
    "unanswered",
    why="conversations that end with the user's turn teach nothing by it, and those without a question have nothing to answer",
    do="end each conversation with the assistant's turn",
)
def ends(case: Case) -> Iterator[Found]:
    at = [case.at(i) for i, r in enumerate(case.records) if isinstance(r, Chat) and r.messages[-1].role != "assistant"]
    if at:
        yield Found("warning", f"{len(at)} conversations that end with a turn nobody answers", at)
    bare = [
        case.at(i) for i, r in enumerate(case.records) if isinstance(r, Chat | Prompt) and not any(m.role == "user" for m in r.messages)
    ]
    if bare:
        yield Found("warning", f"{len(bare)} conversations without a user's turn", bare)
