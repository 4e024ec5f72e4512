"""The rivals: which rows do what, how each rival asks, what is measured of its answers, and which one is chosen.

Every rival answers the same held-out rows, greedily. The negative log-likelihood (NLL) of the true answer is in nats per token of its text,
the end-of-turn token left out, so that a base model without a chat template can be compared; a figure is the mean over rows with a 95%
interval, rows of one opening being one cluster.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from temper.config import Settings, UserError, opt
from temper.data import sources
from temper.data.sharing import size
from temper.data.split import split
from temper.data.template import encode_plain, render_chat, render_prompt, stop_ids
from temper.driver import progress
from temper.forest import Segment, Tree, per_segment
from temper.judges.rating import Answer, Rater
from temper.judges.verifiable import REFERENCES, is_json
from temper.methods.base import Window, forests
from temper.models.heads import token_logp
from temper.records import Chat, Message, Pair, Prompt, Ranked, Rated, Record
from temper.rollout import Request, Sampling, generator, sample
from temper.stats.intervals import mean_interval, paired_difference, share_interval
from temper.train import Compute

PROMPTED = ("zero-shot", "system", "few-shot")
TRAINED = {"prompt-tuning": "prompt", "lora": "lora", "full": "full"}  # rival -> --adapter
RIVALS = (*PROMPTED, *TRAINED)  # from the cheapest to the dearest
MEASURES = {  # in the order in which they decide -> what it is
    "correct": "share of final answers that equal the row's",
    "reward": "mean of --reward",
    "exact": "share of answers that equal the row's, case and blanks aside; JSON by its value",
    "schema": "share of answers that are JSON and fit the schema",
    "json": "share of answers that are JSON",
    "nll": "negative log-likelihood of the row's answer, nats per token",
    "ended": "share of answers that end by themselves",
}
LESS = ("nll",)  # the smaller the better
MOST = 0.9  # of the rows must be of a form for the data to be of it
SHORT = 10  # words of an answer that can be compared as a whole
LEAST = 12  # rows that a trial needs
DEV_SHARE = 5  # one row of so many chooses the rate and the epoch


class Trial(Settings):
    """The trial: which rivals run, on how much, for how long."""

    rivals: list[Literal["zero-shot", "system", "few-shot", "prompt-tuning", "lora", "full"]] = opt(
        ["zero-shot", "system", "few-shot", "lora", "full"], "what is compared", min_length=1
    )
    held_out: int = opt(64, "rows kept out and measured on; at most a third of them", ge=4)
    learn_from: int = opt(512, "rows that the trained rivals learn from, at most", ge=4)
    epochs: int = opt(4, "passes over them, at most; the best is kept", ge=1)
    rates: list[float] = opt([3e-5, 3e-4, 3e-3], "learning rates that are tried; an adapter's are larger by its usual factor", min_length=1)
    batch: int = opt(16, "rows per optimiser step", ge=1)
    tokens_per_microbatch: int = opt(2048, "tokens computed at a time", ge=64)
    minutes: float = opt(10.0, "for all trainings together, about; rows and passes become fewer where they take longer", gt=0)
    shots: int = opt(4, "examples shown by few-shot, as many as fit", ge=1)
    system: str | None = opt(None, "the system prompt that is tried; default: one that asks for the form of the answers")
    max_new: int | None = opt(None, "tokens an answer may have; default: as the data's, at most 256", ge=1)
    reward: str | None = opt(None, "a rater of answers, as --reward of `temper grpo`: the measure that decides")
    device: Literal["cpu", "cuda", "mps"] = opt("cpu", "what computes")
    seed: int = opt(0, "of the split, the order and new adapters", ge=0)
    window: Window = Window(too_long="drop")

    @property
    def compute(self) -> Compute:
        return Compute(device=self.device)


# ---------------------------------------------------------------- the rows


def look(data: str, skip_bad: bool) -> tuple[dict[str, Any], list[Chat]]:
    """(what the file holds and shows, its conversations). Raises UserError where it has none."""
    found = sources.Report(data)
    kinds = Counter(map(_kind, sources.stream(data, "any", found, skip_bad=skip_bad)))
    records, report = sources.read(data, "chat", skip_bad=skip_bad)
    chats = [r for r in records if len(r.messages) > 1 and r.messages[-1].content.strip() and not r.messages[-1].tool_calls]
    if not chats:
        raise UserError(f"{data}: no conversation that ends with an answer in words; nothing can be compared")
    answers = [r.messages[-1].content for r in chats]
    structured = sum(a.strip()[:1] in ("{", "[") and is_json(a) for a in answers[:1000]) >= MOST * min(1000, len(answers))
    short = sum(len(a.split()) <= SHORT for a in answers) >= MOST * len(answers)
    feedback = [k for k, kind in (("pairs", "pairs"), ("thumbs", "rated answers")) if kinds[kind]]
    if checkable(chats):
        feedback.append("verifiable")
    shows: dict[str, Any] = {"examples": len(chats), "format": "json" if structured else "short" if short else "free"}
    return {
        "source": report.summary(),
        "kinds": dict(kinds),
        "records": len(chats),
        "skipped": len(report.skipped),
        "shows": {**shows, **({"feedback": feedback} if feedback else {})},
    }, chats


def _kind(record: Record) -> str:
    named = {Pair: "pairs", Ranked: "pairs", Rated: "rated answers", Chat: "conversations"}
    return named.get(type(record), f"{type(record).__name__.lower()}s")


def checkable(chats: Sequence[Chat]) -> bool:
    """Whether most rows carry an answer that a program can check."""
    return sum(any(isinstance(c.meta.get(name), str | int | float) for name in REFERENCES) for c in chats) >= MOST * len(chats)


class Rows(NamedTuple):
    """Which rows do what. No opening stands in two of them."""

    learn: list[Chat]
    dev: list[Chat]  # choose rate and epoch
    test: list[Chat]
    shots: list[Chat]


def divide(chats: Sequence[Chat], s: Trial, fits: Callable[[Chat], bool]) -> tuple[Rows, int]:
    """(the rows by their use, how many of those looked at are too long). Raises UserError where too few are left."""
    kept, test = split(chats, min(s.held_out, len(chats) // 3), s.seed)
    order = generator("advise", s.seed).permutation(len(kept))
    most = min(len(kept), (s.learn_from + s.shots) * (DEV_SHARE + 1) // DEV_SHARE + s.shots)
    some = [kept[i] for i in order[:most]]
    test, some, looked = list(filter(fits, test)), list(filter(fits, some)), len(test) + len(some)
    learn, dev = split(some, max(1, min(s.held_out, len(some) // DEV_SHARE)), s.seed + 1)
    shots, learn = learn[: s.shots], learn[: s.learn_from]
    if len(test) < 2 or not dev or len(learn) < s.shots or len(chats) < LEAST:
        short = f"{len(chats)} rows, of which {len(learn)} to learn from, {len(dev)} to choose by and {len(test)} to measure on fit"
        raise UserError(f"too few for a trial: {short}; give at least {LEAST} that differ in what they ask, or leave --data out")
    return Rows(learn, dev, test, shots), looked - len(test) - len(some)


# ---------------------------------------------------------------- how a rival asks


def with_system(messages: Sequence[Message], text: str) -> list[Message]:
    """The messages with a system prompt, before one that is there."""
    if messages[0].role == "system":
        return [Message(role="system", content=f"{text}\n{messages[0].content}"), *messages[1:]]
    return [Message(role="system", content=text), *messages]


def with_shots(messages: Sequence[Message], shots: Sequence[Chat]) -> list[Message]:
    """The messages after examples, each a conversation of its own; a system prompt stays in front."""
    own = [m for m in messages if m.role == "system"]
    shown = [m for chat in shots for m in chat.messages if m.role != "system"]
    return [*own, *shown, *(m for m in messages if m.role != "system")]


class Asked(NamedTuple):
    """A row as a rival puts it: the prompt's ids; prompt and true answer, whose text is learned and not its end."""

    ids: list[int]
    tree: Tree
    shots: int = 0


def put(tokenizer: Any, chat: Chat, messages: Sequence[Message]) -> Asked:
    """The row with these messages for its prompt. Raises UserError where the template refuses them."""
    ids = render_prompt(tokenizer, messages, chat.tools)
    if not tokenizer.chat_template:
        answer = encode_plain(tokenizer, [chat.messages[-1].content], ["the answer"])[0]
        return Asked(ids, [Segment([*ids, *answer], [0.0] * len(ids) + [1.0] * len(answer))])
    whole, target = render_chat(tokenizer, [*messages, chat.messages[-1]], "last", chat.tools)
    return Asked(ids, [Segment(whole[:-1], target[:-1])])


@dataclass
class Way:
    """How a rival puts rows. room: tokens that prompt and answer may have together; None: any number."""

    name: str
    system: str
    shots: Sequence[Chat]
    room: int | None
    max_new: int

    def __call__(self, tokenizer: Any, chat: Chat) -> Asked:
        prompt = chat.messages[:-1]
        if self.name == "system":
            return put(tokenizer, chat, _refusable(tokenizer, with_system(prompt, self.system), self.system, prompt))
        if self.name == "few-shot":
            for n in range(len(self.shots), 0, -1):
                asked = put(tokenizer, chat, with_shots(prompt, self.shots[:n]))
                if self.fits(asked):
                    return asked._replace(shots=n)
        return put(tokenizer, chat, prompt)

    def fits(self, asked: Asked) -> bool:
        return self.room is None or max(len(asked.ids) + self.max_new, size(asked.tree) + 1) <= self.room


def _refusable(tokenizer: Any, messages: list[Message], text: str, prompt: Sequence[Message]) -> list[Message]:
    """The messages; where the template takes no system turn, its text in front of the user's first."""
    try:
        render_prompt(tokenizer, messages)
        return messages
    except UserError:
        at = next(i for i, m in enumerate(prompt) if m.role == "user")
        return [*prompt[:at], Message(role="user", content=f"{text}\n\n{prompt[at].content}"), *prompt[at + 1 :]]


# ---------------------------------------------------------------- what is measured of a rival


Values = dict[str, list[float | None]]  # measure -> a figure for each held-out row


class Result(NamedTuple):
    """A rival on the held-out rows."""

    values: Values
    texts: list[str]
    shots: float  # shown on average
    forward: float  # tokens/s of a forward pass
    sampled: float  # tokens/s of sampling
    length: float  # tokens of a sampled answer


def answer_nll(model: Any, trees: Sequence[Tree], microbatch: int) -> list[float]:
    """Of each tree, nats per learned token."""
    out = [0.0] * len(trees)
    with torch.no_grad():
        for chosen, forest in forests(trees, microbatch, device=model.device):
            at = forest.learned
            logp = token_logp(model, forest)
            mean = per_segment(logp, forest, at) / per_segment(torch.ones_like(logp), forest, at)
            for i, value in zip(chosen, mean.tolist(), strict=True):
                out[i] = -value
    return out


def same(answer: str, wanted: str) -> bool:
    """Whether two answers are equal: as JSON values, else as words, case and a full stop aside."""
    if is_json(wanted) and is_json(answer):
        return bool(json.loads(answer) == json.loads(wanted))
    return _words(answer) == _words(wanted)


def _words(text: str) -> list[str]:
    return text.casefold().strip().rstrip(".").split()


def answered(
    model: Any, tokenizer: Any, rows: Sequence[Chat], way: Way, s: Trial, checks: Mapping[str, Rater | None], quiet: bool
) -> Result:
    """The rival's figures on the rows, and its answers. checks: by rater; None: compared with the row's answer."""
    asked = [way(tokenizer, chat) for chat in rows]
    if way.name == "few-shot" and not any(a.shots for a in asked):
        raise UserError(f"no example fits beside a request and its answer into {way.room} tokens")
    began = time.perf_counter()
    values: Values = {"nll": [*answer_nll(model, [a.tree for a in asked], s.tokens_per_microbatch)]}
    forward = sum(size(a.tree) for a in asked) / (time.perf_counter() - began)
    stop: list[int | str] = [*stop_ids(tokenizer)]
    if not tokenizer.chat_template:  # a base model goes on with a next question
        stop.append("\n\n" if any("\n" in chat.messages[-1].content for chat in rows) else "\n")
    began, done = time.perf_counter(), 0
    with progress(f"{way.name}: answers", len(rows), 0, quiet) as show:

        def told(more: int) -> None:
            nonlocal done
            done += more
            show(done, {})

        sampling = Sampling(temperature=0.0, max_new=way.max_new, rows=64)
        request = Request([a.ids for a in asked], sampling=sampling, stop=stop, tokenizer=tokenizer)
        rollouts = [group[0] for group in sample(model, request, progress=told)]
    tokens, seconds = sum(len(r.tokens) for r in rollouts), time.perf_counter() - began
    answers = [
        Answer(
            Prompt(messages=chat.messages[:-1], meta=chat.meta),
            a.ids,
            r.tokens,
            tokenizer.decode(r.tokens, skip_special_tokens=True).strip(),
            r.finish == "stop",
        )
        for chat, a, r in zip(rows, asked, rollouts, strict=True)
    ]
    for name, by in checks.items():
        if by is None:
            values[name] = [float(same(a.text, chat.messages[-1].content)) for a, chat in zip(answers, rows, strict=True)]
        else:
            values[name] = [*by.rate(answers)]
    values["ended"] = [float(a.ended) for a in answers]
    return Result(
        values, [a.text for a in answers], sum(a.shots for a in asked) / len(asked), forward, tokens / seconds, tokens / len(rows)
    )


# ---------------------------------------------------------------- which one


def decide(values: Mapping[str, Values], clusters: Sequence[Any]) -> dict[str, Any]:
    """The cheapest rival that none is clearly better than, and what told them apart.

    Measures are asked in their order: those remain that are not clearly worse than the best so far, i.e. whose paired 95% interval of the
    difference does not exclude zero. The NLL counts only where nothing else told any apart.
    """
    left, by = [name for name in RIVALS if name in values], list[str]()
    against: dict[str, Any] = {}
    for measure in MEASURES:
        if measure == "ended" or (measure == "nll" and by) or not all(measure in values[name] for name in left):
            continue
        whole = [i for i in range(len(clusters)) if all(values[name][measure][i] is not None for name in left)]
        if len(whole) < 2 or len(left) < 2:
            continue
        sign = -1 if measure in LESS else 1
        column = {name: [sign * float(values[name][measure][i] or 0.0) for i in whole] for name in left}
        best = max(left, key=lambda name: sum(column[name]))  # of equal ones the cheapest
        gaps = {n: paired_difference(column[best], column[n], [clusters[i] for i in whole]) for n in left if n != best}
        against[measure] = {"best": best, "gaps": {n: gap.to_dict() for n, gap in gaps.items()}}
        worse = {n for n, gap in gaps.items() if gap.low > 0}
        by += [measure] if worse else []
        left = [n for n in left if n not in worse]
    return {"chosen": left[0], "equal": left[1:], "by": by, "against": against}


def summary(values: Values, clusters: Sequence[Any]) -> dict[str, Any]:
    """The means of a rival's measures, with their intervals."""
    out = {}
    for name, column in values.items():
        known = [(v, c) for v, c in zip(column, clusters, strict=True) if v is not None]
        if known:
            found, where = zip(*known, strict=True)
            out[name] = (mean_interval if name in ("nll", "reward") else share_interval)(found, where).to_dict()
    return out
