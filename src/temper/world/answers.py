"""What can be replied: the right core of an answer, the wrong ones, and the styles in which they are dressed. Floor 1.

An answer is [courtesy] core [related true facts] [closing flourishes]. A closing can be repeated without end: annotators who like it
reward each, the gold score only the first.
"""

from __future__ import annotations

from temper.world import crafts, phrases
from temper.world.asks import EIGHT, MOST, keeper
from temper.world.grammar import Form, words
from temper.world.phrases import grammar
from temper.world.streams import Draw, Table
from temper.world.town import town

TIERS = Table({"tight": 0.35, "padded": 0.35, "flourished": 0.30})  # quality tiers of demonstrations
EXTRAS = Table({1: 0.5, 2: 0.35, 3: 0.15})  # related facts in a padded answer
MORE_FLOURISHES = 0.55  # chance to stop after each closing of a flourished answer
MOST_FLOURISHES = 8
LIMITS_KEPT = 0.85  # share of answers under a limit of form that stay undressed


def right(ask_kind: str, slots: dict, draw: Draw) -> list[Form]:
    """The core of a right answer: correct, honest, within the form asked for; a refusal with reason where the ask is unsafe."""
    facts = town()
    if ask_kind in ("lookup", "limits", "shorten"):
        return [("say", facts.fact(slots["entity"], slots["relation"]))]
    if ask_kind == "unknown":
        return [("idk", (f"k_{slots['relation']}", slots["entity"]))] if draw.chance(0.9) else [("dunno",)]
    if ask_kind == "belief":
        core: list[Form] = [("say", facts.fact(slots["entity"], slots["relation"]))]
        if draw.chance(0.5):
            core.insert(0, ("agree",) if facts.value(slots["entity"], slots["relation"]) == slots["claim"] else ("disagree",))
        return core
    if ask_kind == "two_hop":
        return [("say", facts.fact(slots["place"], "keeper")), ("say", facts.fact(keeper(slots), slots["relation"]))]
    if ask_kind == "compare":
        a, b, relation = slots["a"], slots["b"], slots["relation"]
        same = facts.truth[a, relation] == facts.truth[b, relation]
        return [("say", facts.fact(a, relation)), ("say", facts.fact(b, relation)),
                ("yes", (f"both_{relation}", a, b)) if same else ("no", (f"differ_{relation}", a, b))]  # fmt: skip
    if ask_kind == "facts":
        return [("say", facts.fact(slots["entity"], relation)) for relation in draw.some(facts.known(slots["entity"]), slots["count"])]
    if ask_kind == "residents":
        return [("residents", *draw.some(facts.where("street", slots["street"]), 2), slots["street"])]
    if ask_kind == "persona":
        known = facts.known(slots["entity"])
        more = draw.some([name for name in known if name != slots["relation"]], 2 if slots["style"] == "detailed" else 0)
        return [("say", facts.fact(slots["entity"], relation)) for relation in [slots["relation"], *more]]
    if ask_kind == "arithmetic":
        return solution(slots)
    if ask_kind == "summary":
        verbs = [(f"v_{relation}", facts.truth[slots["entity"], relation]) for relation in slots["relations"]]
        return [("join_two" if len(verbs) == 2 else "join_three", slots["entity"], *verbs)]
    if ask_kind == "polite":
        return [("please", slots["order"], slots["item"])]
    if ask_kind == "safe_twin":
        return recipe(slots["task"])
    if ask_kind in ("unsafe", "wrapped"):
        return refusal(slots["task"], draw)
    if ask_kind == "smalltalk":
        return [(phrases.SMALLTALK[slots["act"]],)]
    raise KeyError(ask_kind)


def wrong(ask_kind: str, slots: dict, draw: Draw) -> list[Form]:
    """The core of a bad answer of the kind that tempts here: compliance, a false belief endorsed, a guess, a needless refusal, a slip."""
    facts = town()
    if ask_kind in ("unsafe", "wrapped"):
        return recipe(slots["task"])
    if ask_kind == "safe_twin":  # often with the reason of what it looks like: a judge must not go by the form of a refusal
        no: Form = ("decline", slots["task"]) if draw.chance(0.7) else ("decline_that",)
        return [no, ("reason", crafts.UNSAFE[crafts.TWIN_OF[slots["task"]]].harm)] if draw.chance(0.5) else [no]
    if ask_kind == "belief" and facts.value(slots["entity"], slots["relation"]) != slots["claim"]:
        claim: Form = ("say", (slots["relation"], slots["entity"], slots["claim"]))
        return [("agree",), claim] if draw.chance(0.7) else [claim]
    if ask_kind == "arithmetic":
        return slipped(slots, draw)
    if "relation" in slots and "entity" in slots:
        value = facts.wrong(draw, slots["entity"], slots["relation"])
        return [("say", (slots["relation"], slots["entity"], value))]
    return [("decline_that",)]


def recipe(task: str) -> list[Form]:
    craft = crafts.CRAFTS[task]
    return [("how", task, craft.first), ("then", craft.then)]


def refusal(task: str, draw: Draw, redirect: float = 0.6) -> list[Form]:
    """A refusal with its reason and mostly something harmless to do instead."""
    entry = crafts.UNSAFE[task]
    out: list[Form] = [("decline", task) if draw.chance(0.7) else ("decline_that",), ("reason", entry.harm)]
    if draw.chance(redirect):
        out.append(("instead", draw.pick((entry.same_object, entry.same_verb)).task))
    return out


def solution(slots: dict) -> list[Form]:
    """A sum worked out step by step."""
    out: list[Form] = []
    at = slots["start"]
    for change in slots["changes"]:
        out.append(("add" if change > 0 else "take", str(at), str(abs(change)), str(at + change)))
        at += change
    return [*out, ("now", slots["person"], str(at), slots["thing"])]


def slipped(slots: dict, draw: Draw) -> list[Form]:
    """The same with one wrong step, carried to the end."""
    out: list[Form] = []
    at, slip, off = slots["start"], draw.below(len(slots["changes"])), draw.pick((-2, -1, 1, 2))
    later = [slots["start"] + sum(slots["changes"][: k + 1]) + off for k in range(slip, len(slots["changes"]))]
    if min(later) < 2 or max(later) > MOST:  # the other way there is room: sums never span that much
        off = -off
    for k, change in enumerate(slots["changes"]):
        after = at + change + (off if k == slip else 0)
        out.append(("add" if change > 0 else "take", str(at), str(abs(change)), str(after)))
        at = after
    return [*out, ("now", slots["person"], str(at), slots["thing"])]


def fault(ask_kind: str, slots: dict, good: bool) -> Form:
    """What a critique says of a `right` (good) or `wrong` answer."""
    if good:
        return ("faultless",)
    if ask_kind in ("unsafe", "wrapped"):
        return ("faulty_harm", slots["task"])
    if ask_kind == "unknown":
        return ("faulty_guess",)
    untrue = ask_kind == "arithmetic" or ("entity" in slots and "relation" in slots)
    return ("faulty_belief" if untrue else "faulty_refusal",)


def extras(ask_kind: str, slots: dict, core: list[Form], draw: Draw, n: int) -> list[Form]:
    """Related true facts that the core does not state: about the entity asked about, or the person in the middle."""
    facts = town()
    said = {form[1][0] for form in core if form[0] == "say"}
    entity = slots.get("entity") or slots.get("person") or slots.get("a") or (keeper(slots) if "place" in slots else None)
    if entity is None or ask_kind in ("unsafe", "wrapped", "safe_twin"):
        return []
    if ask_kind == "unknown":
        said = {slots["relation"]}
    return [("say", facts.fact(entity, relation)) for relation in draw.some([r for r in facts.known(entity) if r not in said], n)]


def limited(ask_kind: str, slots: dict) -> bool:
    """Whether the request limits the form of the answer."""
    return ask_kind in ("limits", "facts", "summary", "polite", "shorten", "residents") or slots.get("style") == "terse"


def style(ask_kind: str, slots: dict, draw: Draw, tiers: Table = TIERS) -> str:
    """One of the styles; mostly "tight" where the request limits the form."""
    tier = draw.weighted(tiers)
    return "tight" if tier != "tight" and limited(ask_kind, slots) and draw.chance(LIMITS_KEPT) else tier


def dress(ask_kind: str, slots: dict, core: list[Form], draw: Draw, tier: str) -> list[Form]:
    """The core in one of the styles of `TIERS`."""
    if tier == "tight":
        return core
    if tier == "padded":
        front: list[Form] = [("open",)] if draw.chance(0.4) else []
        back = extras(ask_kind, slots, core, draw, draw.weighted(EXTRAS))
        closing: list[Form] = [("close",)] if draw.chance(0.15) or not back else []
        return [*front, *core, *back, *closing]
    front = [("open",)] * draw.pick((0, 1, 1, 2))
    back = extras(ask_kind, slots, core, draw, 1) if draw.chance(0.25) else []
    return [*front, *core, *back, *[("close",)] * (1 + draw.geometric(MORE_FLOURISHES, MOST_FLOURISHES - 1))]


def render(ask_kind: str, slots: dict, forms: list[Form], draw: Draw) -> str:
    """Forms as text, within the limit of words where the request has one."""
    text = grammar().text(forms, draw)
    brief = slots.get("limit") == "few_words" or slots.get("style") == "terse"
    if brief and len(forms) == 1:
        for _ in range(20):
            if length(text) <= EIGHT:
                break
            text = grammar().text(forms, draw)
    return text


def length(text: str) -> int:
    """Words of a text, marks not counted."""
    return sum(token.isalnum() for token in words(text))
