"""The trial as a whole: what is measured, in which order, and what could not be. Floor 8 with its package."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from temper.advise.rivals import (
    PROMPTED,
    RIVALS,
    TRAINED,
    Result,
    Rows,
    Trial,
    Way,
    answered,
    checkable,
    decide,
    divide,
    look,
    summary,
)
from temper.advise.training import Cost, TooMuch, best_rate, price, train
from temper.config import UserError
from temper.data.look import quantile
from temper.data.split import key
from temper.data.template import encode_plain
from temper.data.trees import limit_of
from temper.judges.rating import Answer, Rater, rater
from temper.models.adapt import Adapter
from temper.models.load import load_policy
from temper.records import Chat, Prompt
from temper.stats.intervals import paired_difference
from temper.train import machine as host

ASKED = {  # system prompts, by the form of the answers
    "free": "Answer the request helpfully, correctly and concisely.",
    "short": "Answer with the answer alone, in as few words as possible.",
    "json": "Answer with one JSON value and nothing else.",
}
MOST_NEW = 256  # tokens of an answer where --max-new does not say
SOME = 500  # answers whose lengths are looked at, and a tenth as many prompts


NONE = Rows([], [], [], [])


def machine_facts(s: Trial) -> dict[str, Any]:
    """What computes, and how much memory is free on it. Raises UserError where there is no such device."""
    device = torch.device(s.compute.placed["device"])
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {"device": s.device, "name": name, "threads": torch.get_num_threads(), "free_bytes": host.free_memory(device)}


def measure(s: Trial, model: str | None, data: str | None, schema: str | None, form: str | None, quiet: bool = False) -> dict[str, Any]:
    """What can be measured: rows of the data, the rivals' figures, costs; and, in words, what could not be and why."""
    out: dict[str, Any] = {"rows": None, "rivals": [], "decision": None, "curve": None, "costs": {}, "samples": []}
    out |= {"too_large": [], "not_measured": []}
    chats: list[Chat] = []
    if data:
        out["rows"], chats = look(data, s.window.skip_bad)
    if not model:
        out["not_measured"].append("rivals, speed and memory: give --model" + ("" if data else " (and --data)"))
    elif data:
        _Run(s, model, out, quiet).on(chats, schema, form or out["rows"]["shows"]["format"])
    else:
        out["not_measured"].append("rivals: give --data; speed and memory are of rows of random tokens")
        load_policy(model, **s.compute.placed)  # says what is wrong with it
        _Run(s, model, out, quiet).prices(None)
    return out


@dataclass
class _Run:
    """What the parts of a trial share. out: where the figures go."""

    s: Trial
    name: str
    out: dict[str, Any]
    quiet: bool
    rows: Rows = NONE
    checks: Mapping[str, Rater | None] = field(default_factory=dict)
    clusters: Sequence[int] = ()
    ways: Mapping[str, Way] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)

    def on(self, chats: Sequence[Chat], schema: str | None, form: str) -> None:
        """Prompted rivals, prices, trained rivals; the decision; the curve."""
        s, out = self.s, self.out
        self.checks = _checks(s, chats, schema, form)  # refuses a schema that is none
        system = s.system or ASKED[form] + (f" It must fit this JSON Schema: {_one_line(schema)}" if schema else "")
        model, tokenizer = load_policy(self.name, **s.compute.placed)
        prompted = self.put(chats, system, model, tokenizer)
        if schema:
            out["rows"]["unfit"] = self.unfit()
        for rival in prompted:
            with self.may_fail(rival):
                self.take(rival, model, tokenizer)
        del model
        self.prices(self.rows.learn)
        kinds = list(out["costs"])
        plans = {kind: self.plan(out["costs"][kind], s.minutes * 60 / (len(kinds) * len(s.rates) + 1)) for kind in kinds}
        for kind, (part, epochs) in plans.items():
            with self.may_fail(kind):
                found = best_rate(s, self.name, kind, part, self.ways[kind], epochs, self.quiet)
                own = {"rate": found.rate, "epochs": found.epochs, "of": epochs, "asked": s.epochs}
                self.take(kind, found.model, found.tokenizer, {**own, "rows": found.rows, "tried": found.tried})
                del found
        if not self.results:
            return
        decision = out["decision"] = decide({rival: r.values for rival, r in self.results.items()}, self.clusters)
        best = next((k for k in (decision["chosen"], *decision["equal"], "lora", "full") if k in plans and k in self.results), None)
        if best and len(plans[best][0].learn) >= 2 * s.batch:
            with self.may_fail("a quarter of the rows"):
                out["curve"] = self.curve(best, *plans[best])
        for i, chat in enumerate(self.rows.test[:3]):
            answers = {k: r.texts[i] for k, r in self.results.items()}
            out["samples"].append({"asked": chat.messages[-2].content, "wanted": chat.messages[-1].content, "answers": answers})

    def put(self, chats: Sequence[Chat], system: str, model: Any, tokenizer: Any) -> list[str]:
        """Divide the rows that fit, and make the ways of asking; the prompted rivals that can run."""
        s, out = self.s, self.out
        window = limit_of(model, s.window.max_length)[0]
        room = None if window is None else window - (Adapter().virtual_tokens if "prompt-tuning" in s.rivals else 0)
        texts = [c.messages[-1].content for c in chats[:SOME]]
        lengths = [len(ids) for ids in encode_plain(tokenizer, texts, ["an answer"] * len(texts))]
        max_new = s.max_new or int(min(MOST_NEW, quantile(lengths, 0.95) + 8, (room or 2 * MOST_NEW) // 2))
        self.ways = {rival: Way(rival, system, (), room, max_new) for rival in RIVALS}

        def fits(chat: Chat, rival: str = "zero-shot") -> bool:
            try:
                return self.ways[rival].fits(self.ways[rival](tokenizer, chat))
            except UserError as error:
                if not s.window.skip_bad:
                    raise UserError(f"{chat.meta.get('at', 'a row')}: {error}; --skip-bad leaves such rows out") from None
                return False

        prompted: list[str] = [k for k in PROMPTED if k in s.rivals]
        some = list(filter(fits, chats[: SOME // 10]))
        if "system" in prompted and 2 * sum(fits(chat, "system") for chat in some) < len(some):
            prompted.remove("system")
            why = f"system: its prompt does not fit beside most requests into {room} tokens; give a shorter one (--system)"
            out["not_measured"].append(why)
        narrow = "system" if "system" in prompted else "zero-shot"
        self.rows, long = divide(chats, s, lambda chat: fits(chat, narrow))
        self.ways["few-shot"].shots = self.rows.shots
        self.clusters = [key(chat) for chat in self.rows.test]
        many = {
            name: len(getattr(self.rows, part)) for name, part in (("learned_from", "learn"), ("chosen_on", "dev"), ("held_out", "test"))
        }
        out["rows"] |= {**many, "too_long": long, "max_new": max_new, "system": system}
        return prompted

    def unfit(self) -> int:
        """How many of the held-out answers of the data do not fit the schema themselves."""
        by = self.checks["schema"]
        assert by is not None
        own = [Answer(Prompt(messages=c.messages[:-1]), [], [], c.messages[-1].content, True) for c in self.rows.test]
        return by.rate(own).count(0.0)

    def take(self, rival: str, model: Any, tokenizer: Any, trained: dict[str, Any] | None = None) -> None:
        """Measure a rival and write its figures down."""
        found = self.results[rival] = self.ask(rival, model, tokenizer)
        speeds = {"forward_tokens_per_second": found.forward, "sampled_tokens_per_second": found.sampled}
        own = {"name": rival, "measures": summary(found.values, self.clusters), "trained": trained, "shots": found.shots}
        self.out["rivals"].append({**own, **speeds, "answer_tokens": found.length})

    def ask(self, rival: str, model: Any, tokenizer: Any) -> Result:
        return answered(model, tokenizer, self.rows.test, self.ways[rival], self.s, self.checks, self.quiet)

    def prices(self, rows: Sequence[Chat] | None) -> None:
        """What training each rival takes."""
        for kind in (k for k in TRAINED if k in self.s.rivals):
            with self.may_fail(kind):
                self.out["costs"][kind] = _written(price(self.s, self.name, kind, rows, self.quiet))

    def plan(self, cost: Mapping[str, Any], seconds: float) -> tuple[Rows, float]:
        """(the rows and passes) that take no longer at the measured speed: fewer passes first, then fewer rows."""
        learn = self.rows.learn
        passes = seconds * cost["tokens_per_second"]["mean"] / (cost["tokens_per_row"] * len(learn))
        many = len(learn) if passes >= 1 else max(4, int(len(learn) * passes))
        return self.rows._replace(learn=learn[:many]), float(max(1, min(self.s.epochs, int(passes))))

    def curve(self, kind: str, rows: Rows, epochs: float) -> dict[str, Any] | None:
        """The same rival from a quarter of the rows, in as many steps: what the other three quarters were worth."""
        rate = next(r["trained"]["rate"] for r in self.out["rivals"] if r["name"] == kind)
        few = rows._replace(learn=rows.learn[: len(rows.learn) // 4])
        found = train(self.s, self.name, kind, rate, few, self.ways[kind], 4 * epochs, self.quiet)
        if found is None:
            return None
        part = self.ask(kind, found.model, found.tokenizer)
        gains: dict[str, Any] = {}
        for measure, column in self.results[kind].values.items():
            rows_of = zip(column, part.values[measure], self.clusters, strict=True)
            both = [(a, b, c) for a, b, c in rows_of if a is not None and b is not None]
            if both and measure != "ended":
                gains[measure] = paired_difference(*zip(*both, strict=True)).to_dict()
        return {"rival": kind, "rows": [len(few.learn), len(rows.learn)], "gains": gains, "quarter": summary(part.values, self.clusters)}

    @contextmanager
    def may_fail(self, what: str) -> Iterator[None]:
        """What cannot be done here is left out, with the reason; the rest goes on."""
        try:
            yield
        except (UserError, MemoryError, RuntimeError) as error:
            short = host.out_of_memory(error)
            if not isinstance(error, UserError) and not short:
                raise
            self.out["not_measured"].append(f"{what}: {'out of memory' if short else error}")
            if short or isinstance(error, TooMuch):
                self.out["too_large"].append(what)


def _one_line(schema: str) -> str:
    return " ".join(Path(schema).read_text("utf-8").split())


def _checks(s: Trial, chats: Sequence[Chat], schema: str | None, form: str) -> dict[str, Rater | None]:
    """measure -> its rater; None: compared with the row's own answer."""
    checks: dict[str, Rater | None] = {}
    if checkable(chats):
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


def _written(found: Cost) -> dict[str, Any]:
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
