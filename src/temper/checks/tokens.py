"""Checks of what rows became: the mask, the ends, the beginning, the template, the lengths. Floor 6."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from temper.checks.registry import Case, Found, answers, check, lengths, many, reward_models
from temper.config import UserError
from temper.data.template import DEFAULT_TEMPLATE, bos_id, render_prompt, stop_ids
from temper.forest import Tree
from temper.records import Chat, Message, Prompt, Record, Text

DECODED = 300  # rows whose learned tokens are compared with their answers
RENDERED = 20  # rows that are rendered by the tokenizer's own means too
ASK = [Message(role="user", content="a")]
SHORT = 8  # characters; so short a question may well stand in its answer
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
        yield Found("error", f"{many(len(nothing), 'row')} in which no token of an answer is learned", nothing)
    if everything:
        yield Found("error", f"{many(len(everything), 'row')} in which every token is learned", everything)
    if total and case.method != "reward":  # there a score is learned
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
        yield Found("error", f"{many(len(wrong), 'row')} of {len(trees):,} whose last learned token is not the end of turn", wrong)


@check(
    "beginning",
    why="a model that was trained with one beginning token is off by a few points without it or with two",
    do="write the beginning token once: in the template, or by the tokenizer, not in both",
)
def beginning(case: Case) -> Iterator[Found]:
    if case.prepared is None or (bos := bos_id(case.prepared.tokenizer)) is None:
        return
    tokenizer = case.prepared.tokenizer
    if tokenizer.chat_template and (count := _own(tokenizer, ASK).count(bos)) != 1:
        name = tokenizer.convert_ids_to_tokens(bos)
        severity, what = ("error", "doubled") if count > 1 else ("note", "left out (Temper adds it; other programs may not)")
        yield Found(severity, f"{name!r} is {what}: the template and tokenizer write it {count} times")  # type: ignore[arg-type]
    if tokenizer.chat_template and tokenizer("a", verbose=False)["input_ids"][:1] == [bos] == _own(tokenizer, ASK)[:1]:
        name = tokenizer.convert_ids_to_tokens(bos)
        what = f"template and tokenizer both write {name!r}: a program that tokenises rendered text gets two"
        yield Found("note", what)
    missing, double = [], []
    for k, tree in enumerate(case.prepared.corpus.trees):
        tokens = tree[0].tokens
        if list(tokens[:2]) == [bos, bos]:
            double.append(case.tree_at(k))
        elif tokens[0] != bos and not _text(case):  # a later window of a document begins as it comes
            missing.append(case.tree_at(k))
    for name, at in (("two beginning tokens", double), ("no beginning token", missing)):
        if at:
            yield Found("error", f"{many(len(at), 'row')} with {name}", at)


def _bare(text: str) -> str:
    """Without blanks, which templates strip, and as a tokenizer may have normalised it."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _own(tokenizer: Any, messages: Sequence[Message], tools: Any = None) -> list[int]:
    """The ids by the tokenizer's own `apply_chat_template`, then tokenised as a server would: what others will give the model."""
    turns = [m.model_dump(mode="json") for m in messages]
    try:
        found = tokenizer.apply_chat_template(
            turns, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
    except Exception as error:  # whatever a template raises
        raise UserError(f"the chat template fails: {' '.join(str(error).split())[:200]}") from None
    return list(found)


@check(
    "mask-place",
    why="a target in the wrong place learns the template or the question instead of the answer",
    do="look at the template's generation blocks: they should hold the assistant's words and their end, and nothing else",
)
def mask_place(case: Case) -> Iterator[Found]:
    if _text(case) or not case.rows or case.prepared is None:
        return
    tokenizer = case.prepared.tokenizer
    stops, wrong, asked = set(stop_ids(tokenizer)), [], []
    for k, tree in list(enumerate(_learned(case)))[:DECODED]:
        record = case.records[case.rows[k]]
        turns = [(m.role, _bare(m.content)) for m in getattr(record, "messages", ())]
        question = next((text for role, text in reversed(turns) if role == "user"), "")
        for s, answer in zip(_segments(tree), answers(record), strict=False):
            said = _bare(tokenizer.decode([t for t, weight in zip(s.tokens, s.target or (), strict=False) if weight and t not in stops]))
            if _bare(answer) not in said:
                wrong.append(case.tree_at(k))
                break
            if len(question) > SHORT and question in said and not any(question in text for role, text in turns if role == "assistant"):
                asked.append(case.tree_at(k))
                break
    if asked:
        yield Found("error", f"{many(len(asked), 'row')} in which the question is learned too", asked)
    if wrong:
        yield Found("error", f"{many(len(wrong), 'row')} whose learned tokens are not their answer", wrong)


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
    kept = case.prepared.corpus.kept
    for i, record in enumerate(case.records[:RENDERED]):
        if i in kept.dropped:
            continue
        messages = _ask(record)
        if messages and tokenizer.chat_template:
            tools = getattr(record, "tools", None)
            ours, theirs = render_prompt(tokenizer, messages, tools), _own(tokenizer, messages, tools)
            bos = bos_id(tokenizer)
            if ours != theirs and ours[1:] != theirs and [t for t in theirs if t != bos] != [t for t in ours if t != bos]:
                differing.append(case.at(i))
    if differing:
        looked = many(min(RENDERED, len(case.records)), "prompt")
        what = f"{len(differing)} of {looked} with other tokens by the tokenizer's own apply_chat_template"
        yield Found("warning", what, differing, SPELLED)
    if other := _of_reward(case):
        yield Found("warning", f"the reward model was trained with another template than {case.settings['model']} has: {other}")
    folder = Path(tokenizer.name_or_path)
    if _second(folder) not in ("", tokenizer.chat_template):
        what = f"{folder} holds two chat templates that differ: chat_template.jinja (used here) and the one in tokenizer_config.json"
        yield Found("warning", what, (), "remove the one that the model was not trained with: which is read depends on the program")
    if refused := [i for i in kept.dropped if i not in kept.long]:
        what = f"{many(len(refused), 'row')} that cannot be rendered: {kept.dropped[refused[0]].removeprefix(case.at(refused[0]) + ': ')}"
        yield Found("note" if case.settings.get("skip_bad") else "error", what, [case.at(i) for i in refused], "correct or remove the rows")


def _second(folder: Path) -> str:
    """The template in tokenizer_config.json, where there is one beside chat_template.jinja."""
    if not (folder / "chat_template.jinja").is_file():
        return ""
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("chat_template", "")
    except (OSError, ValueError):
        return ""
    return found if isinstance(found, str) else ""


def _ask(record: Record) -> list[Message]:
    """The messages before the last answer."""
    if isinstance(record, Chat):
        return record.messages[: max(i for i, m in enumerate(record.messages) if m.role == "assistant")]
    return getattr(record, "messages", None) or getattr(record, "prompt", [])


def _of_reward(case: Case) -> str:
    """How the reward model's template differs on a question; "" where it does not, or there is none."""
    from temper.models.load import load_tokenizer

    for folder in reward_models(case.settings):
        judge = load_tokenizer(folder)
        mine, theirs = (render_prompt(t, ASK) for t in (case.prepared.tokenizer, judge))  # type: ignore[union-attr]
        if mine != theirs:
            return f"{judge.decode(theirs)!r}"
    return ""


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
        yield Found("error", f"pad = end token ({tokenizer.pad_token!r}), and it is masked away in {many(len(rows), 'row')}", rows)
    else:
        yield Found("note", f"pad = end token ({tokenizer.pad_token!r}); it is learned all the same, for masks come from lengths here")


def quantiles(sizes: Sequence[int], limit: int | None) -> str:
    """How long rows are, in one line."""
    ordered = sorted(sizes)
    half, most, nearly = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9, 0.99))
    room = f", {limit:,} allowed" if limit else ""
    return f"tokens per row: half have up to {half:,}, 90% {most:,}, 99% {nearly:,}, the longest {ordered[-1]:,}{room}"


def histogram(sizes: Sequence[int], long: Sequence[int] = ()) -> list[str]:
    """Rows by tokens, in powers of two: a line with a bar each, those beyond the limit (also in `sizes`) as x."""
    bins, beyond = Counter(n.bit_length() for n in sizes), Counter(n.bit_length() for n in long)
    largest, lines = max(bins.values()), []
    for b in range(min(bins), max(bins) + 1):
        counts = (("#", bins[b] - beyond[b]), ("x", beyond[b]))
        bar = "".join(mark * (n and max(1, round(BAR * n / largest))) for mark, n in counts)
        cut = f", {beyond[b]:,} beyond the limit" if beyond[b] else ""
        lines.append(f"{1 << (b - 1):>6}-{(1 << b) - 1:<6} {bar:<{BAR}} {bins[b]:,}{cut}")
    return lines


@check(
    "length",
    why="rows beyond the limit are refused, dropped or lose the start of their prompt",
    do="choose --too-long drop or cut-prompt knowingly, or a larger --max-length where the model has room",
)
def length(case: Case) -> Iterator[Found]:
    if case.prepared is None or _text(case):
        return
    kept, policy = case.prepared.corpus.kept, case.settings.get("too_long", "error")
    gone = [i for i in kept.long if i not in kept.cut]
    if gone:
        will = {"error": "refused", "cut-prompt": "left out, for their answers alone are longer,"}.get(policy, "left out")
        room = f" beside {case.settings['max_new']} of answer" if case.prepared.answered else ""
        most = max(kept.long[i] for i in gone)
        what = f"{many(len(gone), 'row')} of more than {kept.limit:,} tokens{room}, the longest {most:,}: {will} by --too-long {policy}"
        yield Found("error" if policy == "error" else "warning", what, [case.at(i) for i in gone])
    if kept.cut:
        share = len(kept.cut) / max(1, kept.rows)
        what = f"{many(len(kept.cut), 'prompt')} ({share:.0%}) without their start, by --too-long {policy}"
        yield Found("warning" if share > 0.05 else "note", what, [case.at(i) for i in kept.cut])
    sizes = {i: max(lengths(tree)) for i, tree in zip(case.rows, case.prepared.corpus.trees, strict=False)} | kept.long
    if sizes:
        longest = max(sizes, key=sizes.__getitem__)
        what = f"{quantiles([*sizes.values()], kept.limit)}; the longest is"
        yield Found("note", what, [case.at(longest)], detail=histogram([*sizes.values()], [*kept.long.values()]))


@check(
    "unanswered",
    why="conversations that end with the user's turn teach nothing by it, and those without a question have nothing to answer",
    do="end each conversation with the assistant's turn",
)
def ends(case: Case) -> Iterator[Found]:
    at = [case.at(i) for i, r in enumerate(case.records) if isinstance(r, Chat) and r.messages[-1].role != "assistant"]
    if at:
        yield Found("warning", f"{many(len(at), 'conversation')} ending with a turn nobody answers", at)
    bare = [
        case.at(i) for i, r in enumerate(case.records) if isinstance(r, Chat | Prompt) and not any(m.role == "user" for m in r.messages)
    ]
    if bare:
        yield Found("warning", f"{many(len(bare), 'conversation')} without a user's turn", bare)
