"""`temper data COMMAND`: command -> module, imported when it is asked for. No logic. Floor 2."""

from __future__ import annotations

import difflib
from importlib import import_module

from temper.config import UserError

COMMANDS = {  # command -> (module with main(argv) -> int, what it does)
    "inspect": ("temper.report.inspect", "see rows as they will be trained, and what a file holds"),
    "convert": ("temper.data.convert", "write any readable data in another format"),
    "synthesize": ("temper.data.synthesize", "have a teacher model write instructions and answers, from seed tasks"),
    "catalogue": ("temper.data.catalogue", "what is known of the instruction sets that the literature compares"),
    "clean": ("temper.data.quality.clean", "clean data by a recipe of the steps below"),
    "dedup": ("temper.data.quality.dedup", "remove exact and near duplicates"),
    "decontaminate": ("temper.data.quality.decontaminate", "remove rows that hold something of an evaluation set"),
    "filter": ("temper.data.quality.filter", "remove rows by length, language, refusals, boilerplate and repetition"),
    "pairs": ("temper.data.quality.pairs", "check the labels of pairs; remove equal and contradictory ones"),
    "score": ("temper.data.quality.score", "remove rows that a scorer trained on a labelled file holds for poor"),
    "judge": ("temper.data.quality.judge", "remove rows that a judge model holds for unclear or badly answered"),
    "diversity": ("temper.data.quality.diversity", "keep the rows that cover the data best"),
    "mix": ("temper.data.quality.mix", "take rows of several data sets in given proportions"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: temper data COMMAND [OPTIONS]\n\n{lines}\n\ntemper data COMMAND --help shows a command's options and examples."


def read(argv: list[str]) -> str:
    """The module of the command that is asked for, or "". Raises UserError for a command that there is not."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        return ""
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        raise UserError(f"no command 'data {argv[0]}'; {f'did you mean {near[0]!r}?' if near else 'temper data --help lists them'}")
    return COMMANDS[argv[0]][0]


def main(argv: list[str]) -> int:
    if not (module := read(argv)):
        print(usage())
        return 0
    return import_module(module).main(argv[1:])
