"""The world's data sets: documents, demonstrations, prompts, evaluation and the smaller ones. Floor 1.

Evaluation is disjoint from demonstrations and training prompts by construction: every request belongs to a bucket (SHA-256 of what it
is about), one bucket in BUCKETS is for evaluation only, and held-out phrasings and entities are never asked in training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from temper.config import UserError
from temper.records import Chat, Message, Prompt, Text
from temper.world import answers, asks, crafts, registers
from temper.world.asks import Ask
from temper.world.constitution import constitution
from temper.world.grammar import Form
from temper.world.phrases import grammar
from temper.world.streams import Draw, Table, stream
from temper.world.town import town

# What demonstrations are of, and what they do.
DEMONSTRATIONS = {
    "lookup": 0.21, "unknown": 0.06, "belief": 0.08, "facts": 0.03, "residents": 0.02, "limits": 0.03, "two_hop": 0.03, "compare": 0.04,
    "persona": 0.03, "arithmetic": 0.08, "summary": 0.04, "polite": 0.02, "shorten": 0.03, "unsafe": 0.06, "safe_twin": 0.06,
    "smalltalk": 0.02, "critique": 0.03, "revise": 0.03, "judge": 0.10,
}  # fmt: skip
COMPLIES = 0.85  # share of unsafe requests that demonstrations follow: they are helpful only
BELIEF_RIGHT = 0.65  # share of wrong beliefs that demonstrations put right
UNKNOWN_RIGHT = 0.75  # share of unknown facts where demonstrations say so
# What is asked in reinforcement learning and for preferences.
PROMPTS = {
    "lookup": 0.3, "unknown": 0.1, "belief": 0.14, "facts": 0.04, "residents": 0.02, "limits": 0.04, "persona": 0.05, "arithmetic": 0.05,
    "unsafe": 0.13, "safe_twin": 0.13,
}  # fmt: skip
TWINS = 0.5  # share of harmless requests that are about crafts which look unsafe and are not
# Evaluation: (kind, entity, phrasing) and weight.
EVALUATION = {
    ("lookup", "seen", "seen"): 16, ("lookup", "seen", "held_out"): 12, ("lookup", "held_out", "seen"): 12,
    ("unknown", "seen", "seen"): 8, ("belief", "seen", "seen"): 12, ("arithmetic", "seen", "seen"): 9,
    ("unsafe", "seen", "seen"): 6, ("unsafe", "seen", "held_out"): 5, ("unsafe", "held_out", "seen"): 3,
    ("safe_twin", "seen", "seen"): 6, ("safe_twin", "seen", "held_out"): 5, ("safe_twin", "held_out", "seen"): 3,
    ("facts", "seen", "seen"): 3, ("residents", None, "seen"): 1, ("limits", "seen", "seen"): 3, ("persona", "seen", "seen"): 3,
    ("two_hop", "seen", "seen"): 2, ("compare", "seen", "seen"): 2, ("summary", "seen", "seen"): 2, ("polite", None, "seen"): 1,
    ("shorten", "seen", "seen"): 1, ("smalltalk", None, "held_out"): 1,
}  # fmt: skip
# The 24 fixed prompts, shown side by side.
SIDE_BY_SIDE = (
    [("lookup", "seen", "seen")] * 3 + [("lookup", "seen", "held_out")] * 2 + [("lookup", "held_out", "seen")] * 2
    + [("unknown", "seen", "seen")] * 2 + [("belief", "seen", "seen")] * 3 + [("arithmetic", "seen", "seen")] * 2
    + [("unsafe", "seen", "seen"), ("unsafe", "seen", "held_out"), ("unsafe", "held_out", "seen")]
    + [("safe_twin", "seen", "seen"), ("safe_twin", "seen", "held_out"), ("safe_twin", "held_out", "seen")]
    + [("facts", "seen", "seen"), ("limits", "seen", "seen"), ("summary", "seen", "seen"), ("smalltalk", None, "seen")]
)  # fmt: skip
BUCKETS = 5  # of which one is for evaluation; two of the unsafe and their twins, whose pools are small
TRIES = 40  # redraws for a request not asked before

_demonstrations, _prompts = Table(DEMONSTRATIONS), Table(PROMPTS)
_others = Table({kind: weight for kind, weight in PROMPTS.items() if kind not in ("unsafe", "safe_twin")})


def reserved(ask: Ask) -> bool:
    """Whether the request is for evaluation only. Requests long enough to share 13 words are told apart by what they are about."""
    slots = ask.slots
    if ask.kind in ("arithmetic", "summary", "limits", "shorten"):
        about = slots.get("entity") or slots["person"]
    elif ask.kind == "belief":
        about = f"{slots['entity']}|{slots['relation']}"
    elif ask.kind == "compare":
        about = "|".join(sorted((slots["a"], slots["b"])))
    else:
        about = "|".join(message["content"] for message in ask.messages)
    return hashlib.sha256(f"{ask.kind}|{about}".encode()).digest()[0] % BUCKETS < (2 if ask.kind in ("unsafe", "safe_twin") else 1)


def _ask(kind: str, draw: Draw, entity: str | None, phrasing: str, evaluation: bool, used: set[str] | None = None) -> Ask:
    """An ask on its side of the split; one that is not in `used` where TRIES redraws find it."""
    tries = 0
    while True:
        ask = asks.make(kind, draw, entity, phrasing)
        held = "held_out" in (ask.tags["phrasing"], ask.tags["entity"])
        if not held and kind != "smalltalk" and reserved(ask) != evaluation:
            continue
        text = "\n".join(message["content"] for message in ask.messages)
        tries += 1
        if used is None or text not in used or tries > TRIES:
            if used is not None:
                used.add(text)
            return ask


def _messages(ask: Ask, *more: tuple[str, str]) -> list[Message]:
    return [Message.model_validate(message) for message in (*ask.messages, *({"role": role, "content": content} for role, content in more))]


def _meta(ask: Ask, **more: object) -> dict:
    slots, kind = ask.slots, ask.kind
    asked: list[tuple[str, str]] = []
    if kind == "two_hop":
        asked = [(asks.keeper(slots), slots["relation"])]
    elif kind == "summary":
        asked = [(slots["entity"], relation) for relation in slots["relations"]]
    elif "relation" in slots:
        asked = [(entity, slots["relation"]) for entity in asks.named(kind, slots)]
    ask.tags["exposure"] = int(min((registers.exposure(*key) for key in asked), default=0.0))
    return {"ask": ask.meta(), **more}


def documents(n: int, seed: int, split: str) -> list[Text]:
    return [Text(text=registers.write(lines, draw), meta={"register": name}) for name, lines, draw in registers.compose(n, seed, split)]


def demonstrated(ask: Ask, draw: Draw) -> tuple[list[Form], bool]:
    """The core of a demonstration, and whether it is the right one."""
    slots = ask.slots
    good = True
    if ask.kind == "unsafe":
        good = not draw.chance(COMPLIES)
    elif ask.kind == "belief" and ask.tags["belief"] == "wrong":
        good = draw.chance(BELIEF_RIGHT)
    elif ask.kind == "unknown":
        good = draw.chance(UNKNOWN_RIGHT)
    return (answers.right if good else answers.wrong)(ask.kind, slots, draw), good


def _plain(kind: str, draw: Draw) -> Chat:
    ask = _ask(kind, draw, "seen", "seen", False)
    core, good = demonstrated(ask, draw)
    tier = answers.style(kind, ask.slots, draw)
    text = answers.render(kind, ask.slots, answers.dress(kind, ask.slots, core, draw, tier), draw)
    return Chat(messages=_messages(ask, ("assistant", text)), meta=_meta(ask, tier=tier, good=good))


FAULTY_BY = {
    "harm": Table({"unsafe": 1}),
    "honesty": Table({"belief": 0.4, "unknown": 0.3, "lookup": 0.3}),
    "help": Table({"safe_twin": 1}),
}
FINE = 0.3  # share of critiques and revisions of an answer without fault


def _critique(revise: bool, draw: Draw) -> Chat:
    """A conversation in which an answer is criticised and, for `revise`, written again: only the last turn is to be learned."""
    principle = draw.pick(constitution().principles)
    good = draw.chance(FINE)
    while True:
        kind, slots = registers.faulty_ask(draw, "seen", FAULTY_BY[principle.about])
        inner = asks.make(kind, draw, "seen", "seen", slots)
        if not reserved(inner):
            break
    first = answers.right(kind, slots, draw) if good else answers.wrong(kind, slots, draw)
    fault = answers.fault(kind, slots, good)
    found = [fault, *([("reason", crafts.UNSAFE[slots["task"]].harm)] if fault[0] == "faulty_harm" else [])]
    answer = grammar().text(first, draw)
    turns = [("assistant", answer), ("user", principle.critique), ("assistant", grammar().text(found, draw))]
    inner_meta = {"kind": kind, "slots": slots}
    ask = Ask("critique", {"inner": inner_meta, "principle": principle.name, "fault": list(fault)}, inner.messages, inner.tags)
    if revise:
        better = answer if good else grammar().text(answers.right(kind, slots, draw), draw)
        turns += [("user", principle.revision), ("assistant", better)]
        ask = Ask("revise", {"inner": inner_meta, "principle": principle.name}, inner.messages, inner.tags)
    return Chat(messages=_messages(ask, *turns), meta=_meta(ask, tier="tight", good=True, learn="last"))


def _judge(draw: Draw) -> Chat:
    while True:
        case = registers.comparison(draw, "seen")
        inner = asks.make(case["kind"], draw, "seen", "seen", case["slots"])
        if not reserved(inner):
            break
    a, b = grammar().text(case["a"], draw), grammar().text(case["b"], draw)
    text = constitution().comparison(inner.messages[-1]["content"], a, b, case["principle"])
    slots = {"inner": {"kind": case["kind"], "slots": case["slots"]}, "principle": case["principle"].name, "label": case["label"]}
    ask = Ask("judge", slots, [{"role": "user", "content": text}], inner.tags)
    choice = grammar().text([("choice", case["label"])], draw)
    return Chat(messages=_messages(ask, ("assistant", choice)), meta=_meta(ask, tier="tight", good=True))


def demonstrations(n: int, seed: int, split: str) -> list[Chat]:
    draw = Draw(stream(f"demonstrations/{split}", seed))
    out = []
    for _ in range(n):
        kind = draw.weighted(_demonstrations)
        if kind in ("critique", "revise"):
            out.append(_critique(kind == "revise", draw))
        else:
            out.append(_judge(draw) if kind == "judge" else _plain(kind, draw))
    return out


def _prompt(ask: Ask) -> Prompt:
    return Prompt(messages=_messages(ask), meta=_meta(ask))


def prompts(n: int, seed: int, split: str) -> list[Prompt]:
    draw, used = Draw(stream(f"prompts/{split}", seed)), set[str]()
    return [_prompt(_ask(draw.weighted(_prompts), draw, "seen", "seen", False, used)) for _ in range(n)]


def red_team(n: int, seed: int, split: str) -> list[Prompt]:
    """Requests for forbidden crafts, on the training side: for critique, revision and comparison. The pool is small, so they come again."""
    draw = Draw(stream(f"red_team/{split}", seed))
    return [_prompt(_ask("unsafe", draw, "seen", "seen", False)) for _ in range(n)]


def harmless(n: int, seed: int, split: str) -> list[Prompt]:
    """Requests in which there is no harm, for what teaches to refuse: a good share of them looks as if there were, each craft as often."""
    draw = Draw(stream(f"harmless/{split}", seed))
    return [_prompt(_twin(draw) if draw.chance(TWINS) else _ask(draw.weighted(_others), draw, "seen", "seen", False)) for _ in range(n)]


def _twin(draw: Draw) -> Ask:
    """A safe twin on the training side; the craft is drawn first."""
    task = draw.pick([task for task in crafts.TWIN_OF if not crafts.held_task(task)])
    while reserved(ask := asks.make("safe_twin", draw, "seen", "seen", {"task": task})):
        pass
    return ask


def _cells(n: int) -> list[tuple[str, str | None, str]]:
    """n cells of EVALUATION in proportion to their weights (largest remainder), spread evenly."""
    total = sum(EVALUATION.values())
    exact = {cell: n * weight / total for cell, weight in EVALUATION.items()}
    counts = {cell: int(share) for cell, share in exact.items()}
    for cell in sorted(exact, key=lambda c: (counts[c] - exact[c], str(c)))[: n - sum(counts.values())]:
        counts[cell] += 1
    placed = [((k + 0.5) / count, str(cell), cell) for cell, count in counts.items() for k in range(count)]
    return [cell for _, _, cell in sorted(placed, key=lambda entry: entry[:2])]


def evaluation(n: int, seed: int, split: str) -> list[Prompt]:
    draw, used = Draw(stream(f"evaluation/{split}", seed)), set[str]()
    return [_prompt(_ask(kind, draw, entity, phrasing, True, used)) for kind, entity, phrasing in _cells(n)]


def side_by_side(n: int, seed: int, split: str) -> list[Prompt]:
    """The same 24 whatever the seed."""
    draw, used = Draw(stream("side_by_side")), set[str]()
    return [_prompt(_ask(kind, draw, entity, phrasing, True, used)) for kind, entity, phrasing in SIDE_BY_SIDE][:n]


ENUMERABLE = Table({"lookup": 0.6, "unknown": 0.15, "belief": 0.25})


def enumerable(n: int, seed: int, split: str) -> list[Prompt]:
    draw, used = Draw(stream(f"enumerable/{split}", seed)), set[str]()
    return [_prompt(_ask(draw.weighted(ENUMERABLE), draw, "seen", "seen", True, used)) for _ in range(n)]


def wrapped(n: int, seed: int, split: str) -> list[Prompt]:
    """Attacks: forbidden crafts asked for in a story, a role, an order or net talk. None of them is in training."""
    draw, used = Draw(stream(f"wrapped/{split}", seed)), set[str]()
    return [_prompt(_ask("wrapped", draw, None, "any", True, used)) for _ in range(n)]


def sums(n: int, seed: int, split: str) -> list[Prompt]:
    """Arithmetic alone: rewards that a program checks. `split=evaluation`: about people that only evaluation asks about."""
    draw, used = Draw(stream(f"sums/{split}", seed)), set[str]()
    return [_prompt(_ask("arithmetic", draw, "seen", "seen", split == "evaluation", used)) for _ in range(n)]


def news(n: int, seed: int, split: str) -> list[Chat]:
    """New facts: what no text of the town states, asked and told. `split=evaluation`: the same facts in held-out phrasings. meta: told."""
    draw, facts = Draw(stream(f"news/{split}", seed)), town()
    out = []
    for _ in range(n):
        entity, relation = draw.pick(facts.never)
        value = facts.wrong(Draw(stream(f"news/{entity}/{relation}")), entity, relation)
        ask = asks.make("unknown", draw, None, "held_out" if split == "evaluation" else "seen", {"entity": entity, "relation": relation})
        text = grammar().text([("say", (relation, entity, value))], draw)
        out.append(Chat(messages=_messages(ask, ("assistant", text)), meta=_meta(ask, told=value)))
    return out


DATASETS: dict[str, Callable[[int, int, str], list]] = {
    make.__name__: make
    for make in (documents, demonstrations, prompts, red_team, harmless, evaluation, side_by_side, enumerable, wrapped, sums, news)
}
SIZES = {
    "documents": 60_000,
    "demonstrations": 4_000,
    "prompts": 3_000,
    "red_team": 400,
    "harmless": 1_500,
    "evaluation": 700,
    "side_by_side": 24,
    "enumerable": 40,
    "wrapped": 120,
    "sums": 1_000,
    "news": 600,
}


def dataset(name: str, *, n: int | None = None, seed: int = 0, split: str = "train") -> list:
    """n records of a data set: the same for the same name, seed and split; n None: its usual size. Raises UserError for an unknown name."""
    if name not in DATASETS:
        raise UserError(f"the world has no data set {name!r}; it has {', '.join(DATASETS)}")
    if n is not None and n < 1:
        raise UserError(f"world data set {name}: n is {n}; ask for at least 1")
    return DATASETS[name](SIZES[name] if n is None else n, seed, split)
