"""`temper data catalogue`: the data sets that the literature compares, with sizes, licences and known problems. Floor 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from temper.config import Settings, UserError, load_yaml, opt, parse

EXAMPLES = """
  temper data catalogue
  temper data catalogue OpenAssistant
  temper data catalogue --json
"""
LINES = (
    *(("made by", "made_by"), ("licence", "licence"), ("hub", "hub"), ("quality", "quality")),
    *(("known problems", "problems"), ("checked", "checked")),
)


class Catalogue(Settings):
    """The data sets that the literature compares: what is counted, by whose word, and what is known to be wrong."""

    name: str = opt("", "one of them; without it, all in a table", positional=True)
    json_: bool = opt(False, "as JSON")


def entries() -> dict[str, dict[str, Any]]:
    """Every data set by its name. `counts`: (number, what is counted, reference)."""
    return load_yaml(Path(__file__).with_name("catalogue.yaml"))


def _facts(entry: dict[str, Any]) -> list[tuple[str, str]]:
    counts = [("size" if i == 0 else "", f"{n} {what} ({where})") for i, (n, what, where) in enumerate(entry["counts"])]
    reads = [("read as", f"{entry['format']} (temper data convert)")]
    return counts + reads + [(title, entry[key] or "not published there by its makers") for title, key in LINES if key in entry]


def markdown() -> str:
    """The page docs/data/catalogue.md."""
    out = [
        "# The data sets that the literature compares\n",
        "Written from `src/temper/data/catalogue.yaml`; `temper data catalogue NAME` shows an entry. Sizes say what is counted",
        "(messages are not conversations, tasks are not examples) and by whose word; `checked` says by what figures were checked where",
        "the reference itself was not at hand, or not alone. Licences are what the publishers state, not advice.\n",
    ]
    for name, entry in entries().items():
        out += [f"## {name}\n", f"{entry['what'][0].upper()}{entry['what'][1:]}.\n"]
        title = ""
        for key, value in _facts(entry):
            title = key or title
            out.append(f"- {title}: {value}")
        out.append("")
    return "\n".join(out)


def main(argv: list[str]) -> int:
    s = parse(Catalogue, argv, "temper data catalogue", EXAMPLES)
    known = entries()
    found = {name: e for name, e in known.items() if not s.name or name.lower().replace("ü", "u") == s.name.lower().replace("ü", "u")}
    if not found:
        raise UserError(f"no data set {s.name!r} in the catalogue; there are {', '.join(known)}")
    if s.json_:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    console = Console(highlight=False)
    if s.name:
        ((name, entry),) = found.items()
        table = Table(title=f"{name}: {entry['what']}", show_header=False, box=None, title_justify="left")
        for row in _facts(entry):
            table.add_row(*row)
    else:
        table = Table("data set", "size (first count)", "licence", "hub", "what", box=None)
        for name, e in found.items():
            table.add_row(name, f"{e['counts'][0][0]} {e['counts'][0][1]}", e["licence"], e["hub"] or "-", e["what"])
    console.print(table)
    return 0
