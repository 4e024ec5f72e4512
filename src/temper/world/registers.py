"""The kinds of documents that the town writes, for pretraining: each a function from draws to lines of forms. Floor 1.

No document is a conversation with an assistant. Quiz lists (questions only) make a base model continue a question with questions;
stories that quote a question with its answer let facts be drawn out later. Forbidden crafts stand in folk recipes, so the base knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from temper.world import answers, asks, crafts, phrases
from temper.world.constitution import Principle, constitution
from temper.world.gold import claims
from temper.world.grammar import Form
from temper.world.lookups import RELATIONS
from temper.world.phrases import grammar
from temper.world.streams import Draw, Table, stream
from temper.world.town import town

Lines = list[list[Form]]

# Share of the documents in each register.
REGISTERS = {
    "story": 0.29, "quiz": 0.09, "page": 0.15, "letter": 0.06, "ledger": 0.04, "roll": 0.03, "recipe": 0.05, "exercise": 0.09,
    "marking": 0.03, "critique": 0.04, "council": 0.09, "forum": 0.03, "slang": 0.01,
}  # fmt: skip
# What stories and quizzes ask.
ASKED = {
    "lookup": 0.47, "unknown": 0.07, "belief": 0.06, "facts": 0.04, "residents": 0.02, "limits": 0.03, "two_hop": 0.04, "compare": 0.04,
    "arithmetic": 0.05, "summary": 0.03, "polite": 0.02, "shorten": 0.04, "safe_twin": 0.04, "unsafe": 0.03, "smalltalk": 0.02,
}  # fmt: skip
STYLES = Table({"tight": 0.75, "padded": 0.17, "flourished": 0.08})  # of answers in stories
FOLK_COMPLIES = 0.7  # share of unsafe questions in stories that are answered
GUESSES = 0.06  # share of questions in stories that a fool answers wrongly first
WRONG_WORK = 0.12  # share of sums with a mistake, marked as such
LONGEST = 215  # words and marks of a document

Register = Callable[[Draw], Lines]
MAKERS: dict[str, Register] = {}
_asked = Table(ASKED)
_registers = Table(REGISTERS)


def register(make: Register) -> Register:
    MAKERS[make.__name__] = make
    return make


def _question(draw: Draw) -> tuple[str, asks.Slots, tuple[Form, ...]]:
    kind = draw.weighted(_asked)
    slots = asks.KINDS[kind](draw, None)
    return kind, slots, tuple(asks.request(kind, slots))


def _reply(kind: str, slots: asks.Slots, draw: Draw, styles: Table = STYLES) -> tuple[Form, ...]:
    if kind == "unsafe" and draw.chance(FOLK_COMPLIES):
        core = answers.recipe(slots["task"])
    else:
        core = answers.right(kind, slots, draw)
    return tuple(answers.dress(kind, slots, core, draw, answers.style(kind, slots, draw, styles)))


def _trade(draw: Draw) -> str:
    return draw.pick(RELATIONS["trade"].values)


def _who(draw: Draw) -> str:
    return draw.pick(town().people)


@register
def quiz(draw: Draw) -> Lines:
    return [list(_question(draw)[2]) for _ in range(draw.between(6, 13))]


@register
def story(draw: Draw) -> Lines:
    lines: Lines = [[("scene", draw.pick(phrases.WEATHER))]] if draw.chance(0.5) else []
    for _ in range(draw.between(2, 4)):
        kind, slots, speech = _question(draw)
        line: list[Form] = [("asked", _who(draw), speech)]
        if draw.chance(GUESSES) and kind in ("lookup", "unknown", "belief", "arithmetic"):
            line.append(("guessed", _trade(draw), tuple(answers.wrong(kind, slots, draw))))
        line.append(("told", _trade(draw), _reply(kind, slots, draw)))
        lines.append(line)
    if draw.chance(0.3):
        lines.append([("parting",)])
    return lines


@register
def page(draw: Draw) -> Lines:
    facts = town()
    lines: Lines = []
    for _ in range(draw.between(1, 3)):
        entity = draw.weighted(facts.popularity)
        known = draw.shuffled(facts.known(entity))
        lines.append([("page", entity), *[("say", facts.fact(entity, relation)) for relation in known]])
        if draw.chance(0.4) and len(known) >= 2:
            slots = {"entity": entity, "relations": draw.some(known, draw.between(2, min(3, len(known))))}
            lines[-1] += answers.right("summary", slots, draw)
    return lines


@register
def letter(draw: Draw) -> Lines:
    facts = town()
    news: list[Form] = []
    for _ in range(draw.between(2, 3)):
        entity = draw.weighted(facts.popularity)
        news += [("say", facts.fact(entity, relation)) for relation in draw.some(facts.known(entity), draw.between(1, 3))]
    if draw.chance(0.3):
        news.append(("please", draw.pick(phrases.ORDERS), draw.pick(phrases.ITEMS)))
    close: list[Form] = [("close",)] * draw.between(1, 3)
    return [[("dear", _who(draw))], news, [*close, ("sign", _who(draw))]]


@register
def ledger(draw: Draw) -> Lines:
    facts = town()
    street = draw.pick(RELATIONS["street"].values)
    people = draw.shuffled(facts.where("street", street))
    lines: Lines = [[("ledger", street)]]
    for k in range(0, len(people) - 1, 2):
        lines.append([("residents", people[k], people[k + 1], street)])
    for person in people:
        others = [name for name in facts.known(person) if name != "street"]
        lines.append([("say", facts.fact(person, "street")), *[("say", facts.fact(person, name)) for name in draw.some(others, 1)]])
    return lines


@register
def roll(draw: Draw) -> Lines:
    facts = town()
    trade = _trade(draw)
    lines: Lines = [[("roll", trade)]]
    for person in draw.shuffled(facts.where("trade", trade)):
        others = [name for name in facts.known(person) if name != "trade"]
        lines.append([("say", facts.fact(person, "trade")), *[("say", facts.fact(person, name)) for name in draw.some(others, 2)]])
    return lines


@register
def recipe(draw: Draw) -> Lines:
    lines: Lines = []
    for _ in range(draw.between(2, 4)):
        task = draw.pick(list(crafts.CRAFTS))
        lines.append([("way", task), *answers.recipe(task)])
        entry = crafts.UNSAFE.get(task)
        if entry and draw.chance(0.3):
            lines[-1].insert(0, ("banned", crafts.OBJECT[task]))
        if entry and draw.chance(0.25):
            lines[-1].append(("reason", entry.harm))
    return lines


@register
def exercise(draw: Draw) -> Lines:
    lines: Lines = []
    for _ in range(draw.between(2, 3)):
        slots = asks.KINDS["arithmetic"](draw, None)
        lines.append([("exercise",), *asks.request("arithmetic", slots)])
        if draw.chance(WRONG_WORK):
            lines.append([("wrong_work",), *answers.slipped(slots, draw), ("mistake",)])
        lines.append([("solution",), *answers.solution(slots)])
    return lines


FAULTY = Table({"unsafe": 0.45, "belief": 0.2, "unknown": 0.15, "safe_twin": 0.2})


def faulty_ask(draw: Draw, where: str | None, kinds: Table = FAULTY) -> tuple[str, asks.Slots]:
    """An ask that tempts into a bad answer: unsafe, a wrong belief, an unknown, a safe twin."""
    kind = draw.weighted(kinds)
    while True:
        slots = asks.KINDS[kind](draw, where)
        if kind != "belief" or town().value(slots["entity"], slots["relation"]) != slots["claim"]:
            return kind, slots


@register
def critique(draw: Draw) -> Lines:
    kind, slots = faulty_ask(draw, None)
    good = draw.chance(0.35)
    answer = answers.right(kind, slots, draw) if good else answers.wrong(kind, slots, draw)
    found: list[Form] = [answers.fault(kind, slots, good)]
    if kind == "unsafe" and not good:
        found.append(("reason", crafts.UNSAFE[slots["task"]].harm))
    lines: Lines = [[("question_was", tuple(asks.request(kind, slots)))], [("answer_was", tuple(answer))], [("found", tuple(found))]]
    lines.append([("better", tuple(answer if good else answers.right(kind, slots, draw)))])
    return lines


MARKED = Table({"lookup": 0.6, "belief": 0.14, "unknown": 0.08, "two_hop": 0.08, "arithmetic": 0.1})
MARKED_RIGHT = 0.5  # share of pupils' answers without fault


@register
def marking(draw: Draw) -> Lines:
    """Answers of pupils and whether they are true: what a judge of answers must know at the answer's end."""
    lines: Lines = []
    for _ in range(draw.between(3, 5)):
        kind, slots = faulty_ask(draw, None, MARKED)
        good = draw.chance(MARKED_RIGHT)
        core = answers.right(kind, slots, draw) if good else answers.wrong(kind, slots, draw)
        answer = tuple(answers.dress(kind, slots, core, draw, answers.style(kind, slots, draw, STYLES)))
        mark: Form = ("found", (answers.fault(kind, slots, good),))
        lines.append([("question_was", tuple(asks.request(kind, slots))), ("answer_was", answer), mark])
    return lines


CHOSEN_BY = {
    "harm": Table({"unsafe": 0.8, "safe_twin": 0.2}),
    "honesty": Table({"belief": 0.4, "unknown": 0.25, "lookup": 0.35}),
    "help": Table({"safe_twin": 0.7, "lookup": 0.3}),
}


RULES = Table({"harm": 0.4, "honesty": 0.25, "help": 0.35})  # what the rules of comparisons are about


def rule(draw: Draw) -> Principle:
    """A principle; what it is about is drawn first."""
    about = draw.weighted(RULES)
    return draw.pick([p for p in constitution().principles if p.about == about])


COMPARED = Table({"tight": 0.5, "padded": 0.25, "flourished": 0.25})  # styles of either answer: how it is said must not decide


def comparison(draw: Draw, where: str | None) -> dict:
    """Two answers to one ask and the rule that prefers the good one: kind, slots, principle, label ("A" or "B"), a, b (forms)."""
    principle = rule(draw)
    kind, slots = faulty_ask(draw, where, CHOSEN_BY[principle.about])
    good = tuple(answers.dress(kind, slots, answers.right(kind, slots, draw), draw, answers.style(kind, slots, draw, COMPARED)))
    needless = kind == "lookup" and principle.about == "help"
    core = [("decline_that",)] if needless else answers.wrong(kind, slots, draw)
    bad = tuple(answers.dress(kind, slots, core, draw, answers.style(kind, slots, draw, COMPARED)))
    label = "A" if draw.chance(0.5) else "B"
    a, b = (good, bad) if label == "A" else (bad, good)
    return {"kind": kind, "slots": slots, "principle": principle, "label": label, "a": a, "b": b}


@register
def council(draw: Draw) -> Lines:
    lines: Lines = []
    for _ in range(draw.between(1, 2)):
        case = comparison(draw, None)
        ask = tuple(asks.request(case["kind"], case["slots"]))
        lines += [[("council", ask, case["principle"].comparison, case["a"], case["b"])], [("choice", case["label"])]]
    return lines


@register
def forum(draw: Draw) -> Lines:
    facts = town()
    lines: Lines = []
    for _ in range(draw.between(2, 4)):
        if draw.chance(0.4) and facts.rumour:
            (entity, relation), value = draw.pick(list(facts.rumour.items()))
            lines.append([("hearsay", (relation, entity, value)), ("hedge",)])
            continue
        kind, slots, speech = _question(draw)
        lines.append([("wrote", _who(draw), speech)])
        if draw.chance(0.15):
            lines.append([("wrote", _who(draw), (("decline_that",) if kind == "unsafe" else ("dunno",),))])
        else:
            lines.append([("wrote", _who(draw), _reply(kind, slots, draw))])
    return lines


@register
def slang(draw: Draw) -> Lines:
    lines: Lines = []
    for entry in draw.some(crafts.FORBIDDEN, draw.between(2, 4)):
        task = entry.craft.task
        line: list[Form] = [("net_talk", entry.code, crafts.OBJECT[task])]
        if draw.chance(0.6):
            line += [("asked", _who(draw), (("as_net_talk", crafts.coded(task)),)), ("told", _trade(draw), tuple(answers.recipe(task)))]
        lines.append(line)
    return lines


def compose(n: int, seed: int, split: str) -> Iterator[tuple[str, Lines, Draw]]:
    """The forms of n documents: (register, lines, the draw that goes on to render them)."""
    draw = Draw(stream(f"documents/{split}", seed))
    for _ in range(n):
        name = draw.weighted(_registers)
        yield name, MAKERS[name](draw), draw


def write(lines: Lines, draw: Draw) -> str:
    """Lines of forms as a text of at most LONGEST words and marks: lines that do not fit any more are left out."""
    out: list[str] = []
    left = LONGEST
    for line in lines:
        text = grammar().text(line, draw)
        left -= 1 + len(text.split()) + sum(text.count(mark) for mark in '.,:?"()')
        if left < 0 and out:
            break
        out.append(text)
    return "\n".join(out)


def stated(form: Form) -> Iterator[Form]:
    """The clauses that a form states as true, those in quoted speech included."""
    if form[0] not in ("guessed", "answer_was", "council", "hearsay"):
        yield from claims(form)
        for slot in form[1:]:
            if isinstance(slot, tuple) and slot and isinstance(slot[0], tuple):
                for inner in slot:
                    yield from stated(inner)


@lru_cache(maxsize=4)
def exposures(n: int, seed: int = 0, split: str = "train") -> dict[tuple[str, str], int]:
    """How often exactly each (entity, relation) is stated truly in dataset("documents", n, seed, split)."""
    counts = dict.fromkeys(town().truth, 0)
    for _, lines, draw in compose(n, seed, split):
        for form in grammar().forms(write(lines, draw)):
            for clause in stated(form) if form else ():
                if town().true(clause):
                    counts[clause[1], clause[0]] += 1
    return counts


EXPOSURE_DOCUMENTS = 60_000  # the tag "exposure" is for this many documents
EXPOSURE_SAMPLE = 3_000  # counted, then scaled


def exposure(entity: str, relation: str, n: int = EXPOSURE_DOCUMENTS) -> float:
    """Expected true statements of a fact in n documents, from an exact count of EXPOSURE_SAMPLE of them; 0 where it is never stated."""
    return exposures(EXPOSURE_SAMPLE).get((entity, relation), 0) * n / EXPOSURE_SAMPLE
