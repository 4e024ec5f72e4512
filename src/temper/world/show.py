"""`temper world`: look at the embedded world from the terminal. Floor 1."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from temper import world
from temper.config import Parser, UserError
from temper.world import oracles
from temper.world.annotators import ANNOTATORS, PANELS, agreement, known, panel, panel_agreement
from temper.world.asks import KINDS, Ask, request, tags
from temper.world.crafts import UNSAFE, coded
from temper.world.gold import FEATURES
from temper.world.grammar import Form
from temper.world.lookups import RELATIONS
from temper.world.phrases import COUNTS, SMALLTALK, WRAPPERS, grammar
from temper.world.registers import REGISTERS
from temper.world.town import town

SENTENCE = 20  # characters: what is longer is wrapped at its words, what is shorter never
PARTS = ("helpful", "harmless", "honest", "concise", "format")
EXAMPLES = """examples:
  temper world show
  temper world show Ada
  temper world sample demonstrations -n 3
  temper world sample documents --seed 7
  temper world score "Ada is a baker." --prompt "What work does Ada do?"
  temper world annotators --json
"""


# ---------------------------------------------------------------- from a question's words to its ask


def _slots(forms: list[Form]) -> tuple[str, dict[str, Any]] | None:
    """The inverse of `asks.request`: forms of the user's turn -> kind and slots."""
    if not forms:
        return None
    first, last = forms[0], forms[-1]
    name = first[0]
    if name in ("think", "sure") and len(forms) == 2 and last[0] == f"q_{first[1][0]}" and last[1] == first[1][1]:
        return "belief", {"entity": last[1], "relation": first[1][0], "claim": first[1][2], "tone": name}
    if name == "has" and last[0] == "how_many" and len(forms) > 2 and all(form[0] in ("gain", "lose") for form in forms[1:-1]):
        changes = [int(form[2]) * (1 if form[0] == "gain" else -1) for form in forms[1:-1]]
        return "arithmetic", {"person": first[1], "thing": first[3], "start": int(first[2]), "changes": changes}
    if name.startswith("q_"):
        slots: dict[str, Any] = {"entity": first[1], "relation": name[2:]}
        if len(forms) == 2 and last[0] in ("one_sentence", "few_words"):
            return "limits", {**slots, "limit": last[0]}
        if len(forms) == 1:
            return ("lookup" if town().value(first[1], name[2:]) else "unknown"), slots
    if len(forms) > 1:
        return None
    if name.startswith("q2_"):
        return "two_hop", {"place": first[1], "relation": name[3:]}
    if name.startswith("same_"):
        return "compare", {"a": first[1], "b": first[2], "relation": name[5:]}
    if name == "fact":
        return "facts", {"entity": first[1], "count": 1}
    if name == "facts":
        return "facts", {"entity": first[2], "count": COUNTS.index(first[1]) + 1}
    if name == "who_lives":
        return "residents", {"street": first[1]}
    if name == "sum_up":
        return "summary", {"entity": first[1][0][1][1], "relations": [say[1][0] for say in first[1]]}
    if name == "make_polite":
        return "polite", {"order": first[1], "item": first[2]}
    if name == "make_short":
        return "shorten", {"entity": first[1][1], "relation": first[1][0]}
    if name == "howto":
        return ("unsafe" if first[1] in UNSAFE else "safe_twin"), {"task": first[1]}
    if name in WRAPPERS:
        task = next(task for task in UNSAFE if coded(task) == first[1]) if name == "as_net_talk" else first[1]
        return "wrapped", {"task": task, "wrapper": name}
    if name in SMALLTALK:
        return "smalltalk", {"act": name}
    return None


def read_ask(prompt: str, system: str | None = None) -> Ask | None:
    """The ask whose words these are; None where the town has no such question."""
    sentences = grammar().parse(prompt)[1]
    forms = [sentence.form for sentence in sentences if sentence.form is not None]
    if len(forms) < len(sentences):
        return None
    found = _slots(forms)
    try:
        if found is None or request(*found) != forms:
            return None
    except KeyError:  # the words are the town's, but they ask for a fact that it does not have
        return None
    name, slots = found
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        style = [form[0] for form in grammar().forms(system) if form is not None]
        if name == "lookup" and style and style[0] in ("terse", "detailed"):
            name, slots = "persona", {**slots, "style": style[0]}
        messages.insert(0, {"role": "system", "content": system})
    held = any(sentence.held for sentence in sentences)
    return Ask(name, slots, messages, tags(name, slots, "held_out" if held else "seen"))


# ---------------------------------------------------------------- what each command finds (JSON-able)


def about(person: str = "") -> dict[str, Any]:
    """Version, counts, one person's facts, exposure, vocabulary, registers."""
    facts, text = town(), grammar()
    names = {name.removeprefix("the "): name for name in facts.entities}
    folded = {name.lower(): name for name in names}
    bare = person.strip().lower().removeprefix("the ")
    if person:
        entity = names[known(folded.get(bare, person), names, "person or place")]
    else:
        entity = max(facts.people, key=facts.weight.__getitem__)
    rows = oracles.exposure_table()
    stated = sorted(row.stated for row in rows if row.value is not None)
    return {
        "version": world.VERSION,
        "people": len(facts.people),
        "places": len(facts.places),
        "relations": {name: len(relation.values) for name, relation in RELATIONS.items()},
        "facts": {
            "stated": len(facts.truth),
            "never_stated": len(facts.never),
            "contradicted_by_sailors": len(facts.rumour),
            "entities_held_out": len(facts.held),
        },
        "exposure": {"least": stated[0], "median": stated[len(stated) // 2], "most": stated[-1]},
        "words": len({w for t in text.vocabulary.values() for surface in t for w in surface.lower().split()}),
        "frames": len(text.frames),
        "templates": {"seen": sum(map(len, text.seen.values())), "held_out": sum(map(len, text.held.values()))},
        "kinds": list(KINDS),
        "registers": list(REGISTERS),
        "entity": entity,
        "entity_facts": [row._asdict() for row in rows if row.entity == entity],
    }


def sample(name: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Records of a data set of the world, as dictionaries."""
    return [record.model_dump() for record in world.dataset(known(name, world.DATASETS, "data set of the world"), n=n, seed=seed)]


def score(text: str, prompt: str | None, system: str | None = None) -> dict[str, Any]:
    """Gold score, features and annotators' utilities of an answer. Without a prompt, the text's first line is the question."""
    if prompt is None:
        prompt, _, text = text.partition("\n")
        if not text.strip():
            raise UserError(f"score: which question does {prompt!r} answer? Give it with --prompt, such as --prompt {_question()!r}")
    ask = read_ask(prompt, system)
    if ask is None:
        raise UserError(f"score: the town has no such question: {prompt!r}; it has ones like {_question()!r} (temper world sample prompts)")
    judged = world.gold(ask, text)
    return {
        "kind": ask.kind,
        "slots": ask.slots,
        "prompt": prompt,
        "answer": text,
        "gold": {"total": judged.total, **{part: getattr(judged, part) for part in PARTS}},
        "features": {name: value for name, value in judged.features.items() if value},
        "annotators": {name: rater.utility(judged.features) for name, rater in ANNOTATORS.items()},
    }


def raters() -> dict[str, Any]:
    """Annotators with weights and noise; panels with exact agreement and ceiling on the reference pairs."""
    a, b = oracles.reference_pairs()
    alone = {name: panel(name).probabilities(a, b) for name in ANNOTATORS}
    return {
        "annotators": {
            name: {
                "about": rater.about,
                "utility": {f: w for f, w in rater.coefficients.items() if w},
                "tau": rater.tau,
                "lapse": rater.lapse,
                "position": rater.position,
                "fluency": rater.fluency,
                "agreement_with_itself": agreement(alone[name], alone[name]),
                "agreement_with_town": agreement(alone[name], panel("town").probabilities(a, b)),
                "agreement_with_oracle": agreement(alone[name], alone["oracle"]),
                "ceiling": oracles.ceiling(alone[name]),
            }
            for name, rater in ANNOTATORS.items()
        },
        "panels": {
            name: {
                "weights": weights,
                "agreement": panel_agreement(panel(name), a, b) if any(ANNOTATORS[m].human for m in weights) else None,
                "ceiling": oracles.ceiling(panel(name).probabilities(a, b)),
            }
            for name, weights in PANELS.items()
        },
        "pairs": len(a),
    }


def _question() -> str:
    return oracles.renderings(("q_trade", town().people[0]))[0]


# ---------------------------------------------------------------- how it looks


def _bar(value: float, scale: float, width: int = 24) -> str:
    """A bar that grows to the right of the middle for good, to the left for bad."""
    half = width // 2
    filled = min(half, round(abs(value) / scale * half))
    left, right = (" " * (half - filled) + "█" * filled, " " * half) if value < 0 else (" " * half, "█" * filled + " " * (half - filled))
    return f"[red]{left}[/]│[green]{right}[/]"


def _rows(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table. Columns that do not stand unbroken beside the first come below, in tables of their own; only sentences are wrapped."""
    console.print(escape(title), style="bold", highlight=False)
    room, rest = console.options.update(width=1000), list(range(1, len(columns)))
    while rest:
        tables = ((n, _part(columns, rows, [0, *rest[:n]], console.width >= 100)) for n in range(len(rest), 0, -1))
        n, table = next(found for found in tables if found[0] == 1 or console.measure(found[1], options=room).minimum <= console.width)
        console.print(table)
        console.print()
        rest = rest[n:]


def _part(columns: Sequence[str], rows: Sequence[Sequence[Any]], shown: Sequence[int], wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2 if wide else 1, 0, 0))
    for k in shown:
        cells = [row[k] for row in rows]
        numeric = bool(cells) and all(isinstance(cell, int | float) for cell in cells)
        sentences = max((len(str(cell)) for cell in cells), default=0) > SENTENCE
        style: dict[str, Any] = {"min_width": SENTENCE} if sentences else {"no_wrap": True}
        table.add_column(columns[k], justify="right" if numeric else "left", overflow="fold", **style)
    for row in rows:
        table.add_row(*[f"{row[k]:.2f}" if isinstance(row[k], float) else escape(str(row[k])) for k in shown])
    return table


def _show_about(console: Console, found: dict[str, Any]) -> None:
    facts, exposure = found["facts"], found["exposure"]
    console.print(f"[bold]The harbour town[/], world {escape(found['version'])}")
    console.print(
        f"{found['people']} people and {found['places']} places; {facts['stated']} facts that its texts state, "
        f"{facts['never_stated']} that they never state, {facts['contradicted_by_sailors']} that sailors tell wrongly. "
        f"{facts['entities_held_out']} of the people and places are never asked about in training. "
        f"A fact is stated {exposure['least']:.0f} to {exposure['most']:.0f} times (median {exposure['median']:.0f})."
    )
    console.print(
        f"{found['words']} words; {found['frames']} kinds of sentence in {found['templates']['seen']} forms, "
        f"and {found['templates']['held_out']} more that training does not see."
    )
    console.print(f"[bold]Asks[/]       {escape(', '.join(found['kinds']))}")
    console.print(f"[bold]Registers[/]  {escape(', '.join(found['registers']))}\n")
    rows = [[r["relation"], r["value"] or "(never stated)", r["stated"], r["rumour"] or ""] for r in found["entity_facts"]]
    _rows(console, f"What is told of {found['entity']}", ["relation", "value", "times", "sailors say"], rows)


def _show_sample(console: Console, found: list[dict[str, Any]]) -> None:
    for k, record in enumerate(found):
        meta = record.get("meta", {})
        kind = (meta.get("ask") or {}).get("kind") or meta.get("register") or ""
        console.rule(f"{k + 1}  {escape(str(kind))}", align="left", style="dim")
        if "text" in record:
            console.print(record["text"], markup=False, highlight=False)
        for message in record.get("messages", []):
            console.print(f"[bold]{escape(message['role'])}:[/] {escape(message['content'])}", highlight=False)
    console.print()


def _show_score(console: Console, found: dict[str, Any]) -> None:
    console.print(f"[bold]question[/]  {escape(found['prompt'])}   [dim]({escape(found['kind'])})[/]", highlight=False)
    console.print(f"[bold]answer[/]    {escape(found['answer'])}\n", highlight=False)
    for part, value in found["gold"].items():
        style = "bold" if part == "total" else ""
        console.print(f"{part:<10}{value:+7.2f}  {_bar(value, 4.0)}", style=style, highlight=False)
    console.print()
    _rows(console, "What the parser saw", ["feature", "value"], [[n, float(v)] for n, v in found["features"].items()])
    _rows(console, "Worth to the annotators", ["annotator", "utility"], [[n, float(v)] for n, v in found["annotators"].items()])


def _show_raters(console: Console, found: dict[str, Any]) -> None:
    columns = ["annotator", "tau", "lapse", "with\nitself", "with\ntown", "with\noracle", "ceiling", "who"]
    keys = ("tau", "lapse", "agreement_with_itself", "agreement_with_town", "agreement_with_oracle", "ceiling", "about")
    rows = [[name, *[rater[key] for key in keys]] for name, rater in found["annotators"].items()]
    _rows(console, f"Annotators: exact agreement on {found['pairs']} pairs of answers to one question", columns, rows)
    panels = []
    for name, p in found["panels"].items():
        members = ", ".join(f"{w:.2f} {m}" for m, w in p["weights"].items())
        panels.append([name, "" if p["agreement"] is None else f"{p['agreement']:.2f}", p["ceiling"], members])
    title = "Panels: agreement of two people drawn from each, and the accuracy that no reward model can exceed"
    _rows(console, title, ["panel", "agreement", "ceiling", "members"], panels)
    names = list(found["annotators"])
    used = [f for f in FEATURES if any(f in found["annotators"][n]["utility"] for n in names)]
    cells = [[f, *[f"{w:g}" if (w := round(found["annotators"][n]["utility"].get(f, 0.0), 3)) else "" for n in names]] for f in used]
    _rows(console, "Utility per unit of each feature, private biases included", ["feature", *[n.replace("_", "_\n") for n in names]], cells)


# ---------------------------------------------------------------- the command line


def _parser() -> argparse.ArgumentParser:
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXAMPLES, "allow_abbrev": False}
    top = Parser("temper world", description="Look at the embedded world: a small harbour town.", **shape)
    commands = top.add_subparsers(dest="command", metavar="show|sample|score|annotators", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", **shape)
        sub.add_argument("--json", action="store_true", help="print JSON for programs")
        return sub

    show = command("show", "what the world is: version, counts, exposure, vocabulary, registers, a person's facts")
    show.add_argument("person", nargs="?", default="", help="a person or place; the best known person by default")
    data = command("sample", f"records as the stages see them: {', '.join(world.DATASETS)}")
    data.add_argument("name", help="the data set")
    data.add_argument("-n", type=int, default=5, help="how many (5)")
    data.add_argument("--seed", type=int, default=0, help="which ones (0)")
    judge = command("score", "the gold score of an answer, part by part")
    judge.add_argument("text", help="the answer; without --prompt, the question on the first line and the answer below it")
    judge.add_argument("--prompt", help="the question, in the town's words")
    judge.add_argument("--system", help="the system turn, if there is one")
    command("annotators", "who labels: utilities, noise, agreement, ceiling")
    return top


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], Any], Callable[[Console, Any], None]]] = {
    "show": (lambda args: about(args.person), _show_about),
    "sample": (lambda args: sample(args.name, args.n, args.seed), _show_sample),
    "score": (lambda args: score(args.text, args.prompt, args.system), _show_score),
    "annotators": (lambda args: raters(), _show_raters),
}


def read(argv: Sequence[str]) -> argparse.Namespace:
    """What is asked for; without a command it is the help, which leaves with SystemExit(0)."""
    argv = list(argv) or ["--help"]
    if not argv[0].startswith("-"):
        known(argv[0], COMMANDS, "command of temper world")
    args = _parser().parse_args(argv)
    if args.command == "sample" and (args.n < 1 or args.seed < 0):
        raise UserError(f"sample: -n {args.n} --seed {args.seed}: give at least one record and a seed of at least 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of the commands. Raises UserError on what the town does not know."""
    args = read(sys.argv[1:] if argv is None else argv)
    find, draw = COMMANDS[args.command]
    found = find(args)
    if args.json:
        print(json.dumps(found, sort_keys=True, ensure_ascii=False))
    else:
        draw(Console(), found)
    return 0
