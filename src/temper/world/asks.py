"""What can be asked: every kind of request as a semantic form, with its words, its tags and its splits. Floor 1.

An `Ask` is (kind, slots, messages, tags). The slots are JSON and say all that the gold score needs; `request` turns them into forms.
A kind is one function that draws the slots, registered by name; `where` is the split that its entity must come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from temper.world import crafts, phrases
from temper.world.grammar import Form
from temper.world.lookups import RELATIONS
from temper.world.phrases import grammar
from temper.world.streams import Draw, Table
from temper.world.town import town

Slots = dict[str, Any]

# Arithmetic: what makes it hard. Steps and their weights; the first number, the change per step and the largest total of small sums,
# which a small model learns, and of large ones, which it does not: their mix leaves room above and below.
STEPS = {1: 0.4, 2: 0.4, 3: 0.2}
SMALL = 0.75  # share of small sums
RANGES = {True: ((2, 9), (1, 4), 14), False: ((10, 19), (3, 9), 30)}
LEAST = 2  # no "1 eggs"
MOST = 30

SAME = 0.5  # share of comparisons whose answer is yes
WRONG_BELIEF = 0.6  # share of stated beliefs that are wrong
CONFIDENT = 0.5  # share of beliefs stated with confidence
EIGHT = 8  # "at most eight words"

_steps = Table(STEPS)


@dataclass
class Ask:
    """One request. messages: [{"role", "content"}], the last by the user; tags: what evaluations group by."""

    kind: str
    slots: Slots
    messages: list[dict[str, str]] = field(default_factory=list)
    tags: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Any) -> Ask:
        """The ask of a record (Prompt or Chat) of the world. Raises KeyError where the record's meta holds none."""
        meta = record.meta["ask"]
        messages = [{"role": message.role, "content": message.content} for message in record.messages]
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return cls(meta["kind"], dict(meta["slots"]), messages, dict(meta.get("tags", {})))

    def meta(self) -> dict[str, Any]:
        """What a record carries so that `of` can rebuild the ask."""
        return {"kind": self.kind, "slots": self.slots, "tags": self.tags}


Maker = Callable[[Draw, str | None], Slots]
KINDS: dict[str, Maker] = {}


def kind(make: Maker) -> Maker:
    KINDS[make.__name__] = make
    return make


def _entity(draw: Draw, where: str | None, fits: Callable[[str], bool] = lambda entity: True) -> str:
    """An entity by popularity, from one split (None: from both)."""
    facts = town()
    while True:
        entity = draw.weighted(facts.popularity)
        if (where is None or facts.split(entity) == where) and fits(entity):
            return entity


def _person(draw: Draw, where: str | None) -> str:
    facts = town()
    return _entity(draw, where, lambda entity: facts.kind(entity) == "person")


def _task(draw: Draw, tasks: list[str], where: str | None) -> str:
    return draw.pick([task for task in tasks if where is None or crafts.held_task(task) == (where == "held_out")])


@kind
def lookup(draw: Draw, where: str | None) -> Slots:
    entity = _entity(draw, where)
    return {"entity": entity, "relation": draw.pick(town().known(entity))}


@kind
def unknown(draw: Draw, where: str | None) -> Slots:
    entity, relation = draw.pick([key for key in town().never if where is None or town().split(key[0]) == where])
    return {"entity": entity, "relation": relation}


@kind
def belief(draw: Draw, where: str | None) -> Slots:
    entity = _person(draw, where)  # people only: a place's long name would let 13 words of two requests about different places agree
    slots = {"entity": entity, "relation": draw.pick(town().known(entity))}
    truth = town().value(slots["entity"], slots["relation"])
    claim = town().wrong(draw, slots["entity"], slots["relation"]) if draw.chance(WRONG_BELIEF) else truth
    return {**slots, "claim": claim, "tone": "sure" if draw.chance(CONFIDENT) else "think"}


@kind
def two_hop(draw: Draw, where: str | None) -> Slots:
    facts = town()
    while True:  # the person in the middle is of the same split
        place = _entity(draw, where, lambda e: facts.kind(e) == "place" and (e, "keeper") in facts.truth)
        person = facts.truth[place, "keeper"]
        if where is None or facts.split(person) == where:
            return {"place": place, "relation": draw.pick(facts.known(person))}


@kind
def compare(draw: Draw, where: str | None) -> Slots:
    facts = town()

    def shared(entity: str) -> list[str]:
        return [name for name in facts.known(entity) if RELATIONS[name].shared]

    while True:
        a = _entity(draw, where, lambda entity: bool(shared(entity)))
        relation = draw.pick(shared(a))
        value = facts.truth[a, relation]
        others = facts.people if facts.kind(a) == "person" else facts.places
        same = draw.chance(SAME)
        fitting = [b for b in others if b != a and (b, relation) in facts.truth and (facts.truth[b, relation] == value) == same]
        fitting = [b for b in fitting if where is None or facts.split(b) == where]
        if fitting:
            return {"a": a, "b": draw.pick(fitting), "relation": relation}


@kind
def facts(draw: Draw, where: str | None) -> Slots:
    entity = _entity(draw, where)
    return {"entity": entity, "count": draw.between(1, min(3, len(town().known(entity))))}


@kind
def residents(draw: Draw, where: str | None) -> Slots:
    return {"street": draw.pick([street for street in RELATIONS["street"].values if len(town().where("street", street)) >= 2])}


@kind
def limits(draw: Draw, where: str | None) -> Slots:
    while True:
        slots = lookup(draw, where)
        limit = draw.pick(("one_sentence", "few_words"))
        if limit == "one_sentence" or town().kind(slots["entity"]) == "person":
            return {**slots, "limit": limit}


@kind
def persona(draw: Draw, where: str | None) -> Slots:
    return {**lookup(draw, where), "style": draw.pick(("terse", "detailed"))}


@kind
def arithmetic(draw: Draw, where: str | None) -> Slots:
    first, change_by, most = RANGES[draw.chance(SMALL)]
    start = at = draw.between(*first)
    changes = []
    for _ in range(draw.weighted(_steps)):
        change = draw.between(*change_by)
        change = -change if at - change >= LEAST and (at + change > most or draw.chance(0.5)) else change
        at += change
        changes.append(change)
    return {"person": _person(draw, where), "thing": draw.pick(phrases.THINGS), "start": start, "changes": changes}


@kind
def summary(draw: Draw, where: str | None) -> Slots:
    entity = _entity(draw, where, lambda e: len(town().known(e)) >= 2)
    known = town().known(entity)
    return {"entity": entity, "relations": draw.some(known, draw.between(2, min(3, len(known))))}


@kind
def polite(draw: Draw, where: str | None) -> Slots:
    return {"order": draw.pick(phrases.ORDERS), "item": draw.pick(phrases.ITEMS)}


@kind
def shorten(draw: Draw, where: str | None) -> Slots:
    return lookup(draw, where)


@kind
def unsafe(draw: Draw, where: str | None) -> Slots:
    return {"task": _task(draw, list(crafts.UNSAFE), where)}


@kind
def safe_twin(draw: Draw, where: str | None) -> Slots:
    return {"task": _task(draw, list(crafts.TWIN_OF), where)}


@kind
def wrapped(draw: Draw, where: str | None) -> Slots:
    return {"task": _task(draw, list(crafts.UNSAFE), where), "wrapper": draw.pick(phrases.WRAPPERS)}


@kind
def smalltalk(draw: Draw, where: str | None) -> Slots:
    return {"act": draw.pick(list(phrases.SMALLTALK))}


COUNT_WORDS = {n + 1: word for n, word in enumerate(phrases.COUNTS)}


def result(slots: Slots) -> int:
    """What an arithmetic ask comes to."""
    return slots["start"] + sum(slots["changes"])


def keeper(slots: Slots) -> str:
    """The person in the middle of a two-hop ask."""
    return town().truth[slots["place"], "keeper"]


def request(name: str, slots: Slots) -> list[Form]:
    """The user's turn as forms (of a kind of `KINDS`)."""
    if "relation" in slots and "entity" in slots and name != "shorten":
        question: Form = (f"q_{slots['relation']}", slots["entity"])
    if name in ("lookup", "unknown", "persona"):
        return [question]
    if name == "belief":
        return [(slots["tone"], (slots["relation"], slots["entity"], slots["claim"])), question]
    if name == "limits":
        return [question, (slots["limit"],)]
    if name == "two_hop":
        return [(f"q2_{slots['relation']}", slots["place"])]
    if name == "compare":
        return [(f"same_{slots['relation']}", slots["a"], slots["b"])]
    if name == "facts":
        if slots["count"] == 1:
            return [("fact", slots["entity"])]
        return [("facts", COUNT_WORDS[slots["count"]], slots["entity"])]
    if name == "residents":
        return [("who_lives", slots["street"])]
    if name == "arithmetic":
        person, thing = slots["person"], slots["thing"]
        out: list[Form] = [("has", person, str(slots["start"]), thing)]
        out += [("gain" if change > 0 else "lose", person, str(abs(change))) for change in slots["changes"]]
        return [*out, ("how_many", thing, person)]
    if name == "summary":
        told = [town().fact(slots["entity"], relation) for relation in slots["relations"]]
        return [("sum_up", (("say", told[0]), *[("also", clause) for clause in told[1:]]))]
    if name == "polite":
        return [("make_polite", slots["order"], slots["item"])]
    if name == "shorten":
        return [("make_short", town().fact(slots["entity"], slots["relation"]))]
    if name in ("unsafe", "safe_twin"):
        return [("howto", slots["task"])]
    if name == "wrapped":
        return [(slots["wrapper"], crafts.coded(slots["task"]) if slots["wrapper"] == "as_net_talk" else slots["task"])]
    if name == "smalltalk":
        return [(slots["act"],)]
    raise KeyError(name)


def system(name: str, slots: Slots) -> list[Form]:
    """The system turn as forms; empty where there is none."""
    return [(slots["style"],)] if name == "persona" else []


def named(name: str, slots: Slots) -> list[str]:
    """The entities that are asked about."""
    if name == "compare":
        return [slots["a"], slots["b"]]
    if name == "two_hop":
        return [slots["place"], keeper(slots)]
    return [slots[key] for key in ("entity", "place", "person") if key in slots]


def tags(name: str, slots: Slots, phrasing: str) -> dict[str, Any]:
    """What evaluations group by."""
    facts, who = town(), named(name, slots)
    held = any(facts.split(entity) == "held_out" for entity in who) or ("task" in slots and crafts.held_task(slots["task"]))
    stance = None
    if name == "belief":
        stance = "right" if facts.value(slots["entity"], slots["relation"]) == slots["claim"] else "wrong"
    return {
        "phrasing": phrasing,
        "entity": "held_out" if held else "seen",
        "answerable": name not in ("unknown", "unsafe", "wrapped"),
        "unsafe": name in ("unsafe", "wrapped"),
        "twin": name == "safe_twin",
        "belief": stance,
        **({"attack": slots["wrapper"]} if name == "wrapped" else {}),
        **({"steps": len(slots["changes"])} if name == "arithmetic" else {}),
    }


PHRASING = {"seen": False, "held_out": True, "any": None}


def make(name: str, draw: Draw, entity: str | None = None, phrasing: str = "any", slots: Slots | None = None) -> Ask:
    """An ask of a kind. entity: "seen", "held_out" or None (both); phrasing: "seen", "held_out" or "any"."""
    slots = KINDS[name](draw, entity) if slots is None else slots
    messages = []
    for form in system(name, slots):
        messages.append({"role": "system", "content": grammar().sentence(form, draw)})
    forms = request(name, slots)
    if phrasing == "held_out":  # only the sentence that asks is held out; what is told before it is told as ever
        content = " ".join(grammar().sentence(form, draw, _asks(form)) for form in forms)
    else:
        content = grammar().text(forms, draw, PHRASING[phrasing])
    messages.append({"role": "user", "content": content})
    return Ask(name, slots, messages, tags(name, slots, "held_out" if phrasing == "held_out" else "seen"))


def _asks(form: Form) -> bool:
    return bool(grammar().held[form[0]])
