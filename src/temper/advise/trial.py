"""The rivals on held-out rows of the user's data, and what training and sampling take on this machine.

Every rival answers the same held-out rows, greedily. The negative log-likelihood (NLL) of the true answer is in nats per token of its text,
the end-of-turn token left out, so that a base model without a chat template can be compared; a figure is the mean over rows with a 95%
interval, rows of one opening being one cluster. Learning rate and epoch of a trained rival are chosen on other rows than those.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from temper.checks import Case
from temper.checks.machine import BESIDE, Need, needed
from temper.config import Settings, UserError, opt
from temper.data import sources
from temper.data.look import quantile
from temper.data.sharing import size
from temper.data.split import key, split
from temper.data.template import attach_default_template, encode_plain, render_chat, render_prompt, stop_ids
from temper.data.trees import Report, chat_trees, limit_of
from temper.driver import progress
from temper.forest import Segment, Tree, per_segment
from temper.judges.rating import Answer, Rater, rater
from temper.judges.verifiable import REFERENCES, is_json
from temper.methods.base import Batching, Corpus, Prepared, Window, forests
from temper.methods.sft import lm_loss, train_on
from temper.models.adapt import Adapter
from temper.models.heads import token_logp
from temper.models.load import load_policy, parameters_in, resize
from temper.records import Chat, Message, Pair, Prompt, Ranked, Rated, Record
from temper.rollout import Request, Sampling, generator, sample
from temper.stats.intervals import Interval, mean_interval, paired_difference, share_interval
from temper.train import Compute, Optim, TrainingError
from temper.train import machine as host

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
ASKED = {
    "free": "Answer the request helpfully, correctly and concisely.",
    "short": "Answer with the answer alone, in as few words as possible.",
    "json": "Answer with one JSON value and nothing else.",
}
SHORT = 10  # words of an answer that can be compared as a whole
LEAST = 12  # rows that a trial needs
PROBE = 3.0  # seconds for which training is timed
MOST_NEW = 256  # tokens of an answer where --max-new does not say
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


def machine_facts(s: Trial) -> dict[str, Any]:
    """What computes, and how much memory is free on it."""
    free = host.free_memory(torch.device(s.device)) if _there(s.device) else None
    name = torch.cuda.get_device_name() if s.device == "cuda" and _there("cuda") else f"{os.cpu_count()} CPU cores"
    return {"device": s.device, "name": name, "threads": torch.get_num_threads(), "free_bytes": free}


def _there(device: str) -> bool:
    return device == "cpu" or getattr(torch, device).is_available()


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
    structured = sum(a.strip()[:1] in ("{", "[") and is_json(a) for a in answers[:1000]) >= 0.9 * min(1000, len(answers))
    short = sum(len(a.split()) <= SHORT for a in answers) >= 0.9 * len(answers)
    feedback = [k for k, kind in (("pairs", "pairs"), ("thumbs", "rated answers")) if kinds[kind]]
    if sum(_checkable(r) for r in chats) >= 0.9 * len(chats):
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
    return (
        "pairs"
        if isinstance(record, Pair | Ranked)
        else "rated answers"
        if isinstance(record, Rated)
        else "conversations"
        if isinstance(record, Chat)
        else f"{type(record).__name__.lower()}s"
    )


def _checkable(chat: Chat) -> bool:
    return any(isinstance(chat.meta.get(name), str | int | float) for name in REFERENCES)


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
    sampled = sum(len(r.tokens) for r in rollouts) / (time.perf_counter() - began)
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
    return Result(values, [a.text for a in answers], sum(a.shots for a in asked) / len(asked), forward, sampled)


# ---------------------------------------------------------------- training


@dataclass
class Trained:
    """A trained rival: its model with the weights of its best epoch."""

    model: Any
    tokenizer: Any
    rate: float
    epochs: float
    rows: int
    dev_nll: float
    tried: dict[str, float | None] = field(default_factory=dict)  # rate -> NLL on the rows that choose; None: it diverged


class Cost(NamedTuple):
    """What training takes here: memory by the doctor's estimate, tokens per second by the clock."""

    need: Need
    speed: Interval
    tokens: float  # of a row, on average
    microbatch: int


class _TooMuch(UserError):
    """A rival that cannot be trained here."""


def load(s: Trial, name: str, kind: str) -> tuple[Any, Any]:
    """The model with what is to be trained of it, and a tokenizer with a chat template."""
    full = TRAINED[kind] == "full"
    free = host.free_memory(torch.device(s.device)) if _there(s.device) else None
    if full and free is not None and (least := parameters_in(name) * (4.0 + BESIDE["adamw"])) > free:
        raise _TooMuch(f"weights, gradients and optimiser take {least / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free")
    model, tokenizer = load_policy(name, **s.compute.placed, adapters=Adapter(adapter=TRAINED[kind]), seed=s.seed)  # type: ignore[arg-type]
    if attach_default_template(tokenizer):
        resize(model, tokenizer)
    return model, tokenizer


def price(s: Trial, name: str, kind: str, rows: Sequence[Chat] | None, quiet: bool) -> Cost:
    """Estimate the memory, then time training for some seconds. rows: None: as many random tokens as a row may have.

    Raises _TooMuch where it does not fit.
    """
    _say(f"{kind}: measuring memory and speed", quiet)
    model, tokenizer = load(s, name, kind)
    if rows is None:
        length, many = min(limit_of(model, s.window.max_length)[0] or 256, 256), 2 * s.batch
        ids = generator("advise", s.seed).integers(model.config.get_text_config().vocab_size, size=(many, length)).tolist()
        trees: Sequence[Tree] = [[Segment(row, [0.0] + [1.0] * (length - 1))] for row in ids]
        report = Report(rows=many)
    else:
        trees, report = chat_trees(tokenizer, rows, model, s.window)
    values = {"batch": s.batch, "tokens_per_microbatch": s.tokens_per_microbatch, "optimizer": "adamw"}
    corpus = Corpus([*(rows or [])], trees, sources.Report("data"), report)
    need = needed(Case("sft", values, "data", corpus.records, (), Prepared(corpus, tokenizer, model, lm_loss)))
    free = host.free_memory(next(model.parameters()).device)
    if free is not None and need.states + need.activations > 0.9 * free:
        raise _TooMuch(f"training takes {(need.states + need.activations) / 1e6:,.0f} MB beside the weights, {free / 1e6:,.0f} MB are free")
    speeds, began = [], time.perf_counter()
    for step in _steps(s, model, trees, 1e-6, 1000 * len(trees)):
        speeds += [step.metrics["tokens_per_second"]] if step.n > 1 else []  # the first one makes the optimiser's memory
        if len(speeds) >= 3 and time.perf_counter() - began > PROBE:
            break
    return Cost(need, mean_interval(speeds), sum(map(size, trees)) / len(trees), s.tokens_per_microbatch)


def _steps(s: Trial, model: Any, trees: Sequence[Tree], rate: float, epochs: float) -> Iterator[Any]:
    batching = Batching(batch=s.batch, epochs=epochs, tokens_per_microbatch=s.tokens_per_microbatch, seed=s.seed)
    return train_on(model, trees, batching, Optim(lr=rate, schedule="cosine", warmup=0.1), None, s.compute)


def train(s: Trial, name: str, kind: str, rate: float, rows: Rows, way: Way, epochs: float, quiet: bool) -> Trained | None:
    """Train on `rows.learn`, looking at `rows.dev` before and after each pass; the weights that were best there stay. None: the loss became no number."""
    model, tokenizer = load(s, name, kind)
    trees, _ = chat_trees(tokenizer, rows.learn, model, s.window)
    dev = [way(tokenizer, chat).tree for chat in rows.dev]
    trained = [p for p in model.parameters() if p.requires_grad]
    best, kept, at = _mean_nll(s, model, dev), [p.detach().clone() for p in trained], 0.0
    total = Batching(batch=s.batch, epochs=epochs).steps(len(trees))
    each = max(1, -(-len(trees) // s.batch))
    with progress(f"{kind}, rate {rate:g}", total, 0, quiet) as show:
        try:
            for step in _steps(s, model, trees, rate, epochs):
                show(step.n, step.metrics)
                if step.n % each == 0 or step.n == total:
                    found = _mean_nll(s, model, dev)
                    if found < best:
                        best, at, kept = found, step.n / each, [p.detach().clone() for p in trained]
        except TrainingError:
            return None
    with torch.no_grad():
        for p, value in zip(trained, kept, strict=True):
            p.copy_(value)
    return Trained(model, tokenizer, rate, at, len(trees), best)


def _mean_nll(s: Trial, model: Any, trees: Sequence[Tree]) -> float:
    return sum(answer_nll(model, trees, s.tokens_per_microbatch)) / len(trees)


def best_rate(s: Trial, name: str, kind: str, rows: Rows, way: Way, epochs: float, quiet: bool) -> Trained:
    """The training whose rate is best on the rows that choose. Raises _TooMuch where every rate diverged."""
    best: Trained | None = None
    tried: dict[str, float | None] = {}
    for rate in s.rates:
        found = train(s, name, kind, rate, rows, way, epochs, quiet)
        tried[f"{rate:g}"] = found.dev_nll if found else None
        if found and (best is None or found.dev_nll < best.dev_nll):
            best = found
    if best is None:
        raise _TooMuch(f"the loss became no number at every rate of --rates {' '.join(tried)}; give smaller ones")
    best.tried = tried
    return best


# ---------------------------------------------------------------- which one


def decide(values: Mapping[str, Values], clusters: Sequence[Any]) -> dict[str, Any]:
    """The cheapest rival that none is clearly better than, and what told them apart.

    Measures are asked in their order: those remain that are not clearly worse than the best so far, i.e. whose paired 95% interval of the
    difference does not exclude zero. The NLL counts only where nothing else told any apart.
    """
    left, by, against = [name for name in RIVALS if name in values], [], {}
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


# ---------------------------------------------------------------- the whole


def measure(s: Trial, model: str | None, data: str | None, schema: str | None, form: str | None, quiet: bool = False) -> dict[str, Any]:
    """What can be measured: rows of the data, the rivals' figures, costs; and, in words, what could not be and why."""
    out: dict[str, Any] = {"rows": None, "rivals": [], "decision": None, "curve": None, "costs": {}, "samples": [], "not_measured": []}
    chats: list[Chat] = []
    if data:
        out["rows"], chats = look(data, s.window.skip_bad)
    if not model:
        out["not_measured"].append("rivals, speed and memory: give --model" + ("" if data else " (and --data)"))
        return out
    if not data:
        out["not_measured"].append("rivals: give --data; speed and memory are of rows of random tokens")
        for kind in (k for k in TRAINED if k in s.rivals):
            with _may_fail(kind, out):
                out["costs"][kind] = _cost(price(s, model, kind, None, quiet))
        return out
    _trial(s, model, chats, schema, form or out["rows"]["shows"]["format"], out, quiet)
    return out


def _trial(s: Trial, name: str, chats: Sequence[Chat], schema: str | None, form: str, out: dict[str, Any], quiet: bool) -> None:
    checks = _checks(s, chats, schema, form)  # refuses a schema that is none
    system = s.system or ASKED[form]
    if schema and not s.system:
        system += f" It must fit this JSON Schema: {' '.join(Path(schema).read_text('utf-8').split())[:4000]}"
    model, tokenizer = load_policy(name, **s.compute.placed)
    window = limit_of(model, s.window.max_length)[0]
    room = None if window is None else window - (Adapter().virtual_tokens if "prompt-tuning" in s.rivals else 0)
    lengths = [len(ids) for ids in encode_plain(tokenizer, [c.messages[-1].content for c in chats[:500]], ["an answer"] * len(chats[:500]))]
    max_new = s.max_new or int(min(MOST_NEW, quantile(lengths, 0.95) + 8, (room or 2 * MOST_NEW) // 2))
    ways = {rival: Way(rival, system, (), room, max_new) for rival in RIVALS}

    def fits(chat: Chat, rivals: Sequence[str] = ("zero-shot",)) -> bool:
        try:
            return all(ways[rival].fits(ways[rival](tokenizer, chat)) for rival in rivals)
        except UserError:
            if not s.window.skip_bad:
                raise UserError(f"{chat.meta.get('at', 'a row')}: {sys.exc_info()[1]}; --skip-bad leaves such rows out") from None
            return False

    some = list(filter(fits, chats[:50]))
    prompted = [k for k in PROMPTED if k in s.rivals]
    if "system" in prompted and 2 * sum(fits(chat, ["system"]) for chat in some) < len(some):
        prompted.remove("system")
        out["not_measured"].append(
            f"system: its prompt does not fit beside most requests into {room} tokens; give a shorter one (--system)"
        )
    rows, long = divide(chats, s, partial(fits, rivals=[k for k in prompted if k == "system"] or ["zero-shot"]))
    ways["few-shot"].shots = rows.shots
    clusters = [key(chat) for chat in rows.test]
    out["rows"] |= {"learned_from": len(rows.learn), "chosen_on": len(rows.dev), "held_out": len(rows.test), "too_long": long}
    out["rows"] |= {"max_new": max_new, "system": system}
    if schema:
        own = [Answer(Prompt(messages=c.messages[:-1]), [], [], c.messages[-1].content, True) for c in rows.test]
        unfit = sum(score == 0.0 for score in checks["schema"].rate(own))  # type: ignore[union-attr]
        out["rows"]["unfit"] = unfit
    results: dict[str, Result] = {}
    ask = partial(answered, rows=rows.test, s=s, checks=checks, quiet=quiet)
    for rival in prompted:
        with _may_fail(rival, out):
            results[rival] = ask(model, tokenizer, way=ways[rival])
            out["rivals"].append(_row(rival, results[rival], clusters))
    del model

    kinds = [k for k in TRAINED if k in s.rivals]
    for kind in kinds:
        with _may_fail(kind, out):
            out["costs"][kind] = _cost(price(s, name, kind, rows.learn, quiet))
    kinds = [k for k in kinds if k in out["costs"]]
    runs = len(kinds) * len(s.rates) + 1
    plans: dict[str, tuple[Rows, float]] = {}
    for kind in kinds:
        plans[kind] = _plan(s, rows, out["costs"][kind], s.minutes * 60 / runs)
        part, epochs = plans[kind]
        with _may_fail(kind, out):
            found = best_rate(s, name, kind, part, ways[kind], epochs, quiet)
            results[kind] = ask(found.model, found.tokenizer, way=ways[kind])
            own = {"rate": found.rate, "epochs": found.epochs, "of": epochs, "rows": found.rows, "tried": found.tried}
            out["rivals"].append(_row(kind, results[kind], clusters, own))
            del found
    if not results:
        return
    decision = decide({rival: r.values for rival, r in results.items()}, clusters)
    out["decision"] = decision
    best = next((k for k in (decision["chosen"], *decision["equal"], "lora", "full") if k in plans and k in results), None)
    if best and len(plans[best][0].learn) >= 4 * s.batch // 2:
        out["curve"] = _curve(s, name, best, *plans[best], out, results[best], ways[best], clusters, ask, quiet)
    for i, chat in enumerate(rows.test[:3]):
        asked = chat.messages[-2].content
        out["samples"].append({"asked": asked, "wanted": chat.messages[-1].content, "answers": {k: r.texts[i] for k, r in results.items()}})


def _checks(s: Trial, chats: Sequence[Chat], schema: str | None, form: str) -> dict[str, Rater | None]:
    checks: dict[str, Rater | None] = {}
    if sum(map(_checkable, chats)) >= 0.9 * len(chats):
        checks["correct"] = rater("maths")
    if s.reward:
        checks["reward"] = rater(s.reward)
    if form in ("short", "json"):
        checks["exact"] = None
    if schema:
        checks["schema"] = rater(f"format:schema={schema}")
    if form == "json":
        checks["json"] = rater("format:json")
    return checks


def _plan(s: Trial, rows: Rows, cost: Mapping[str, Any], seconds: float) -> tuple[Rows, float]:
    """(the rows and passes) that fit into the time at the measured speed: else fewer passes, then fewer rows."""
    tokens = seconds * cost["tokens_per_second"]["mean"]
    passes = tokens / (cost["tokens_per_row"] * len(rows.learn))
    many = len(rows.learn) if passes >= 1 else max(4, int(len(rows.learn) * passes))
    return rows._replace(learn=rows.learn[:many]), float(max(1, min(s.epochs, int(passes))))


def _curve(
    s: Trial,
    name: str,
    kind: str,
    rows: Rows,
    epochs: float,
    out: Any,
    whole: Result,
    way: Way,
    clusters: Sequence[Any],
    ask: Any,
    quiet: bool,
) -> dict[str, Any] | None:
    """The same rival from a quarter of the rows, in as many steps: what the other three quarters were worth."""
    rate = next(r["trained"]["rate"] for r in out["rivals"] if r["name"] == kind)
    few = rows._replace(learn=rows.learn[: len(rows.learn) // 4])
    found = train(s, name, kind, rate, few, way, 4 * epochs, quiet)
    if found is None:
        return None
    part = ask(found.model, found.tokenizer, way=way)
    gains = {}
    for measure, column in whole.values.items():
        both = [(a, b, c) for a, b, c in zip(column, part.values[measure], clusters, strict=True) if a is not None and b is not None]
        if both and measure != "ended":
            a, b, c = zip(*both, strict=True)
            gains[measure] = paired_difference(a, b, c).to_dict()
    return {"rival": kind, "rows": [len(few.learn), len(rows.learn)], "gains": gains, "quarter": summary(part.values, clusters)}


def _row(name: str, result: Result, clusters: Sequence[Any], trained: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "measures": summary(result.values, clusters),
        "trained": trained,
        "shots": result.shots,
        "forward_tokens_per_second": result.forward,
        "sampled_tokens_per_second": result.sampled,
    }


def _cost(found: Cost) -> dict[str, Any]:
    need = found.need
    return {
        "parameters": need.parameters,
        "trained": need.trained,
        "bytes": {"weights": need.weights, "states": need.states, "activations": need.activations},
        "tokens_at_once": need.tokens,
        "microbatch": found.microbatch,
        "tokens_per_row": found.tokens,
        "tokens_per_second": found.speed.to_dict(),
    }


@contextmanager
def _may_fail(rival: str, out: dict[str, Any]) -> Iterator[None]:
    """What a rival cannot do here leaves it out, with the reason; the others go on."""
    try:
        yield
    except (UserError, MemoryError, RuntimeError) as error:
        if not isinstance(error, UserError) and not host.out_of_memory(error):
            raise
        out["not_measured"].append(f"{rival}: {error if isinstance(error, UserError) else 'out of memory'}")


def _say(line: str, quiet: bool) -> None:
    if not quiet:
        print(line, file=sys.stderr)
