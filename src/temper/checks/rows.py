"""Checks of what rows say, before any token: they need no model. Floor 6."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from temper.checks.registry import Case, Found, answers, check, lengths, many, said
from temper.data.quality import decontaminate, dedup
from temper.data.quality.rows import Item, Items, prompt
from temper.data.quality.words import words
from temper.records import Chat, Pair, Prompt, Ranked, Rated, Record, Text

TESTS = re.compile(  # in the name of a file: a split that is not for training, or a benchmark
    r"(?<![a-z])(?:test|eval|evaluation|benchmark)(?![a-z])|mt[-_]bench|arena[-_]hard|alpaca[-_]?eval|xstest|truthfulqa|humaneval|mmlu"
)
HUGE = 100_000  # characters: some 25,000 tokens
SHIFT = 8  # rows by which another row's answers must fit better
ROLES = 12.0  # nats by which two turns must look like each other's role, both of them like the wrong one
CLAIMED = {  # check -> what the reader says of a row that it refuses and that check names
    "empty-answer": r"\bis empty",
    "equal-answers": "is the same as",
    "shifted-column": "the prompts of chosen and rejected differ",
    "swapped-roles": r"\(assistant\) opens the conversation",
}
MARKS = re.compile(  # of the common templates: ChatML, Llama 2 and 3, Zephyr, Gemma, Alpaca, Vicuna
    r"<\|im_(?:start|end)\|>|<\|(?:start|end)_header_id\|>|<\|eot_id\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|<\|(?:user|assistant|system|endoftext|end)\|>|</?s>|^### ?(?:Instruction|Response|Human|Assistant):|^(?:USER|ASSISTANT):",
    re.MULTILINE,
)
_MOJIBAKE = re.compile(r"[ÂÃÄÅÐÑâã-éïð][\u0080-\u00ff\u0152-\u0192\u02c6\u02dc\u2013-\u2122]+")  # lead bytes of UTF-8, then the rest
_ENDED = re.compile(r"[.!?…:;。！？।\"'”’»)\]}>*_`~|=\d%$€£]\s*$|[^\w,\-(\[{]\s*$")
_ASK = frozenset(
    re.findall(
        r"\w+",
        "what how why when where who whom whose which is are am was were do does did can could would will should may have has "
        "name list give write explain describe tell make create generate find compare classify summarize summarise rewrite "
        "identify edit provide suggest design construct compose translate convert calculate determine propose predict rank sort "
        "arrange choose select fix develop produce draft outline discuss analyze analyse evaluate imagine help please compute "
        "estimate brainstorm categorize recommend solve",
    )
)


def _some(case: Case) -> str:
    """Said where not all rows were looked at."""
    return "" if len(case.some) == len(case.records) else f" (of the first {len(case.some):,} rows)"


@check(
    "unreadable-row",
    why="a row that cannot be read trains nothing, and often means that its neighbours are broken too",
    do="correct the rows, or leave them out with --skip-bad",
)
def unreadable(case: Case) -> Iterator[Found]:
    claimed = {at for name in CLAIMED for at in _unread(case, name)}
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for at, why in case.unread:
        if at not in claimed:
            kinds[re.sub(r"\d+", "", why)].append((at, why))
    for same in kinds.values():
        yield Found(_by_policy(case), f"{many(len(same), 'row')}: {same[0][1]}", [at for at, _ in same])


def _unread(case: Case, name: str) -> list[str]:
    """Rows that could not be used for a reason that this check names. A few pairs with two prompts are no shifted column."""
    found = [at for at, why in case.unread if re.search(CLAIMED[name], why)]
    some = len(found) >= max(SHIFT, 0.1 * (len(case.records) + len(case.unread)))
    return found if some or name != "shifted-column" else []


def _by_policy(case: Case) -> Any:
    return "note" if case.settings.get("skip_bad") else "error"


@check(
    "empty-answer",
    why="an empty answer teaches the model to end its turn at once; an empty question, to answer nothing",
    do="remove the rows, or leave them out with --skip-bad",
)
def empty(case: Case) -> Iterator[Found]:
    if at := _unread(case, "empty-answer"):
        yield Found(_by_policy(case), f"{many(len(at), 'row')} with an empty turn", at)
    bare = [case.at(i) for i, r in enumerate(case.records) if not all(text.strip() for text in answers(r)) and not _calls(r)]
    if bare:
        yield Found("error", f"{many(len(bare), 'row')} whose answer is empty", bare)
    mute = [case.at(i) for i, r in enumerate(case.records) if not isinstance(r, Text) and not any(text.strip() for text in prompt(r))]
    if mute:
        yield Found("warning", f"{many(len(mute), 'row')} without a question", mute)


def _calls(record: Record) -> bool:
    """Whether an answer is a call of a tool, which needs no words."""
    return isinstance(record, Chat) and any(m.tool_calls for m in record.messages)


@check(
    "equal-answers",
    why="where both answers are the same there is nothing to prefer: the gradient is noise",
    do="remove the pairs",
)
def equal(case: Case) -> Iterator[Found]:
    if at := _unread(case, "equal-answers"):
        yield Found(_by_policy(case), f"{many(len(at), 'pair')} of equal answers", at)
    alike = []
    for i, record in enumerate(case.records):
        if isinstance(record, Pair | Ranked):
            plain = [re.sub(r"\W+", " ", a).strip().lower() or a for a in answers(record)]
            if len(set(plain)) < len(plain):
                alike.append(case.at(i))
    if alike:
        yield Found("warning", f"{many(len(alike), 'pair')} of answers that differ in case, blanks or marks only", alike)


@check(
    "contradiction",
    why="the same answers to the same prompt are labelled both ways, so one of the labels is wrong; such noise caps the accuracy",
    do="decide each, or keep them knowingly where raters differ (a soft label says so better)",
)
def contradiction(case: Case) -> Iterator[Found]:
    seen: dict[Any, tuple[bool, int]] = {}
    rows_ = []
    for i, record in enumerate(case.records):
        ask = tuple(prompt(record))
        if isinstance(record, Rated):
            claims: list[tuple[Any, bool]] = [((ask, record.answer), record.rating > 0.5)]
        elif isinstance(record, Pair | Ranked):
            claims = [((ask, *sorted(two)), two[0] < two[1]) for two in combinations(answers(record), 2)]
        else:
            return
        for key, way in claims:
            before = seen.setdefault(key, (way, i))
            if before[0] != way:
                rows_.append(f"{case.at(i)} against {case.at(before[1])}")
    if rows_:
        yield Found("warning", f"{many(len(rows_), 'label')} against an earlier one", rows_)


def _items(case: Case) -> Any:
    return Items(Item(i, case.at(i), "", None, [r]) for i, r in enumerate(case.records))


@check(
    "duplicate",
    why="a repeated row counts as often as it stands there, is memorised, and may stand in training and held-out rows alike",
    do="`temper data dedup` shows the pairs and removes the later ones; keep them where the weight is meant",
)
def duplicates(case: Case) -> Iterator[Found]:
    options = dedup.Options() if case.thorough else dedup.Options(near=None)
    kinds: dict[str, list[str]] = defaultdict(list)
    for i, verdict in sorted(dedup.run(options, _items(case), dedup.Report("dedup")).items()):
        kinds[verdict.reason].append(f"{case.at(i)} = {verdict.of}")
    asked = isinstance(next(iter(case.records), None), Prompt)  # the same question again is answered anew
    for reason, at in kinds.items():
        yield Found("note" if asked else "warning", f"{many(len(at), reason)} of earlier rows, of {many(len(case.records), 'row')}", at)


@check(
    "overlap",
    why="a model that was trained on the questions of a test is not measured by it",
    do="`temper data decontaminate` removes the rows; or report no score on that set",
)
def overlap(case: Case) -> Iterator[Found]:
    if "split=test" in case.spec:
        yield Found("error", f"{case.spec} is the split that evaluations read", do="train on split=train")
    elif hit := TESTS.search(Path(case.spec).name.lower()):
        yield Found("warning", f"{Path(case.spec).name} is a test set by its name ({hit[0]!r})", do="train on another split, or rename it")
    if case.evaluation_sets:
        options = decontaminate.Options(against=list(case.evaluation_sets))
        report = decontaminate.Report("decontaminate")
        found = decontaminate.run(options, _items(case), report)
        at = [f"{case.at(i)} = {verdict.of}" for i, verdict in sorted(found.items())]
        if at:
            sets = [name for name, counts in report.sources.items() if counts["rows that hold them"]]
            yield Found("error", f"{many(len(at), 'row')} with something of {', '.join(sets)}", at)


@check(
    "shifted-column",
    why="the answers (or labels) belong to other rows: the model learns to answer something else than it was asked",
    do="look at the first of these rows: a column was moved up or down when the file was made; join it again by an id",
)
def shifted(case: Case) -> Iterator[Found]:
    if at := _unread(case, "shifted-column"):
        yield Found(_by_policy(case), f"{many(len(at), 'pair')} whose chosen and rejected answer different prompts", at)
    some = case.some
    if len(some) < 3 * SHIFT or not isinstance(some[0], Chat | Pair | Rated | Ranked):
        return
    asks = [set(words(next(reversed(prompt(r)), ""))) for r in some]
    columns = [answers(r) for r in some]
    for which in range(min(map(len, columns)) if isinstance(some[0], Pair) else 1):
        said_ = [set(words(column[which])) for column in columns]
        for lag in (1, -1):
            first, last = _better(asks, said_, lag)
            if last - first >= SHIFT:
                name = ("chosen", "rejected")[which] if isinstance(some[0], Pair) else "answer"
                what = (
                    f"from {case.at(first)} to {case.at(last)} the {name}s fit the questions of the row {'before' if lag > 0 else 'after'}"
                )
                yield Found("error", what, [case.at(i) for i in range(first, last + 1)])
    if isinstance(some[0], Rated):
        yield from _shifted_labels(case)


def _better(asks: Sequence[set[str]], answers_: Sequence[set[str]], lag: int) -> tuple[int, int]:
    """The run of rows in which another row's answer, `lag` on, shares more rare words with the question than the row's own."""
    n = len(asks)
    count = Counter(w for side in (asks, answers_) for one in side for w in one)
    rare = {w: math.log(2 * n / c) for w, c in count.items() if c < 0.2 * n}

    def fit(i: int, j: int) -> float:
        return sum(rare.get(w, 0.0) for w in asks[i] & answers_[j])

    best, start, total, top = (0, 0), 0, 0, 0
    for i in range(n):  # the run of the largest sum of wins less losses
        if total <= 0:
            total, start = 0, i
        own, other = fit(i, i), fit(i, i + lag) if 0 <= i + lag < n else 0.0
        total += (other > own) - (own > other)
        if total > top:
            top, best = total, (start, i)
    return (best[0], best[0] + top) if top < (best[1] - best[0]) / 2 else best


def _shifted_labels(case: Case) -> Iterator[Found]:
    """Whether the texts predict the labels of the next or last row better than their own (McNemar's z above 3)."""
    texts = [set(words(answers(r)[0])) for r in case.some]
    labels = [r.rating > 0.5 for r in case.some]  # type: ignore[attr-defined]
    right = {}
    for lag in (-1, 0, 1):
        moved = [labels[(i + lag) % len(labels)] for i in range(len(labels))]
        right[lag] = [(s > 0) == y for s, y in zip(_odds(texts, moved), moved, strict=True)]
    for lag in (-1, 1):
        more = sum(a and not b for a, b in zip(right[lag], right[0], strict=True))
        less = sum(b and not a for a, b in zip(right[lag], right[0], strict=True))
        if more - less > 3 * math.sqrt(more + less):
            hits = sum(right[lag]) / len(labels), sum(right[0]) / len(labels)
            side = "after" if lag > 0 else "before"
            what = f"the answers predict the label of the row {side} ({hits[0]:.0%} right) better than their own ({hits[1]:.0%})"
            yield Found("error", what, [case.at(0), case.at(len(labels) - 1)])


def _odds(features: Sequence[set[str]], label: Sequence[bool]) -> list[float]:
    """Naive Bayes, each text left out of what it is judged by: log-odds of True."""
    n = Counter(label)
    count: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for words_, y in zip(features, label, strict=True):
        count[y].update(words_)
    out = []
    for words_, y in zip(features, label, strict=True):
        total = 0.0
        for side, sign in ((True, 1), (False, -1)):
            own = y == side
            total += sign * sum(math.log(count[side][w] - own + 0.5) for w in words_)
            total -= sign * len(words_) * math.log(n[side] - own + 1.0)
        out.append(total)
    return out


@check(
    "swapped-roles",
    why="the model learns to ask instead of to answer, and its own words are masked as if they were the user's",
    do="exchange the roles (or the columns) of these rows",
)
def roles(case: Case) -> Iterator[Found]:
    if at := _unread(case, "swapped-roles"):
        yield Found(_by_policy(case), f"{many(len(at), 'conversation')} that the assistant opens", at)
    chats = [(i, r) for i, r in enumerate(case.some) if isinstance(r, Chat)]
    early = [case.at(i) for i, r in chats if next(m.role for m in r.messages if m.role != "system") == "assistant"]
    if early:
        most = len(early) > len(chats) / 2
        yield Found("error" if most else "warning", f"{many(len(early), 'conversation')} that the assistant opens", early)
    twice = [case.at(i) for i, r in chats if any(a.role == b.role != "tool" for a, b in pairwise(r.messages))]
    if twice:
        yield Found("warning", f"{many(len(twice), 'conversation')} in which one role speaks twice in a row", twice)
    each = [(i, *two) for i, r in chats for two in _exchanges(r)]
    if len(each) < 20:
        return
    questions, replies = [u for _, u, _ in each], [a for _, _, a in each]
    asking = [sum(map(_asks, side)) / len(each) for side in (questions, replies)]
    if asking[1] > asking[0] + 0.2:
        what = f"{asking[1]:.0%} of the answers look like requests, {asking[0]:.0%} of the questions: the roles are swapped throughout"
        yield Found("error", what, [case.at(each[0][0]), case.at(each[-1][0])])
        return
    odds = _odds([_style(t) for t in [*questions, *replies]], [True] * len(each) + [False] * len(each))
    user, answer = odds[: len(each)], odds[len(each) :]
    if sum(u > 0 for u in user) + sum(a < 0 for a in answer) < 0.85 * len(odds):
        return  # in this file questions and answers cannot be told apart
    wrong: dict[bool, set[int]] = {True: set(), False: set()}  # whether an exchange of the row looks so
    for (i, _, _), u, a in zip(each, user, answer, strict=True):
        wrong[a - u > ROLES and min(a, -u) > 2].add(i)
    if at := [case.at(i) for i in sorted(wrong[True] - wrong[False])]:
        what = f"{many(len(at), 'row')} whose question looks like an answer and whose answer like a question{_some(case)}"
        yield Found("warning", what, at)


def _exchanges(record: Chat) -> list[tuple[str, str]]:
    """Questions and their answers."""
    return [(a.content, b.content) for a, b in pairwise(record.messages) if (a.role, b.role) == ("user", "assistant") and b.content]


def _asks(text: str) -> bool:
    first = words(text[:80])
    return text.strip().endswith("?") or bool(first and first[0] in _ASK)


def _style(text: str) -> set[str]:
    """What tells questions from answers: first and last words, length, marks."""
    w, text = words(text), text.strip()
    own = {f"first {w[0]}" if w else "no word", f"end {text[-1:]}", f"length {len(text).bit_length()}"}
    own |= {"lines"} if "\n" in text else set()
    own |= {"asks"} if "?" in text else set()
    return own | {f"in {x}" for x in w[:8]} | {f"out {x}" for x in w[-4:]}


@check(
    "mixed-encoding",
    why="text that was decoded wrongly once (Ã© for é, â€™ for ’) teaches tokens that no user writes",
    do="read the source again as UTF-8, or decode these rows the other way round (encode as cp1252, decode as UTF-8)",
)
def encoding(case: Case) -> Iterator[Found]:
    at = [case.at(i) for i, r in enumerate(case.records) if not (text := said(r)).isascii() and mojibake(text)]
    if at:
        i = next(i for i in range(len(case.records)) if case.at(i) == at[0])
        yield Found("warning", f"{many(len(at), 'row')} with text in a broken encoding, such as {mojibake(said(case.records[i]))!r}", at)


def mojibake(text: str) -> str:
    """The first run of characters that is UTF-8 read as Windows-1252 or Latin-1, or a replacement character; or ""."""
    if "\ufffd" in text:
        at = text.index("\ufffd")
        return text[max(0, at - 5) : at + 5]
    for found in _MOJIBAKE.finditer(text):
        for codec in ("cp1252", "latin-1"):
            try:
                found[0].encode(codec).decode("utf-8")
                return found[0]
            except UnicodeError:
                continue
    return ""


@check(
    "huge-row",
    why="one row of this size is a step of its own, takes the memory of a whole batch, and is rarely what it seems (a book, a log, base64)",
    do="look at it; split or remove it, or limit the length with --max-length and --too-long drop",
)
def huge(case: Case) -> Iterator[Found]:
    sizes = [(len(said(r)), i) for i, r in enumerate(case.records) if not isinstance(r, Text)]
    large = sorted(((n, i) for n, i in sizes if n >= HUGE), reverse=True)
    if large:
        what = f"{many(len(large), 'row')} of {HUGE:,} characters or more, the largest {large[0][0]:,}"
        yield Found("warning", what, [case.at(i) for _, i in large])


@check(
    "cut-answer",
    why="an answer that was cut at some window before it came here teaches the model to stop in the middle of a sentence",
    do="get the whole answers, or remove these rows",
)
def cut(case: Case) -> Iterator[Found]:
    if any(isinstance(r, Text) for r in case.some[:1]):
        return
    open_: dict[int, list[int]] = defaultdict(list)  # characters of the answer -> rows
    for i, record in enumerate(case.records):
        for answer in answers(record):
            if len(answer) > 100 and not _ENDED.search(answer[-20:]):
                open_[len(answer)].append(i)
    piled = {i for n, at in open_.items() if len(at) > 2 + 10 * _expected(open_, n) for i in at}
    full: set[int] = set()
    if case.prepared and case.rows and (limit := case.prepared.corpus.kept.limit):
        made, kept = case.prepared.corpus.trees, case.prepared.corpus.kept
        full = {i for i, tree in zip(case.rows, made, strict=True) if max(lengths(tree)) >= limit - 2 and i not in kept.cut}
    full &= {i for at in open_.values() for i in at}
    if piled | full:
        where_ = [case.at(i) for i in sorted(piled | full)]
        yield Found("warning", f"{many(len(where_), 'answer')} ending within a sentence, where some window ended", where_)


def _expected(open_: Mapping[int, Sequence[int]], n: int) -> float:
    """How many break off after exactly n characters where none was cut: the mean over the lengths within a tenth of n."""
    around = range(n - n // 10, n + n // 10 + 1)
    return sum(len(open_.get(m, ())) for m in around if m != n) / len(around)


@check(
    "template-in-text",
    why="rows that were rendered already get a second template around them: the model learns marks that it will never see in use",
    do="take the marks out of the text and give roles and contents; Temper writes the model's own template",
)
def marks(case: Case) -> Iterator[Found]:
    found: dict[str, list[str]] = defaultdict(list)
    for i, record in enumerate(case.records):
        if not isinstance(record, Text) and (hit := MARKS.search(said(record))):
            found[hit[0].strip()].append(case.at(i))
    for mark, at in found.items():
        most = len(at) > 0.5 * len(case.records)
        what = f"{json.dumps(mark, ensure_ascii=False)} stands in the text of {many(len(at), 'row')}"
        yield Found("error" if most else "warning", what, at)
