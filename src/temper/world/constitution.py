"""The constitution file: principles with the words of their critique, revision and comparison requests. Floor 1."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import yaml

from temper.config import UserError

DEFAULT = Path(__file__).with_name("constitution.yaml")
ABOUT = ("harm", "honesty", "help")
PLACEHOLDERS = ("{prompt}", "{a}", "{b}", "{principle}")


class Principle(NamedTuple):
    name: str
    about: str
    critique: str
    revision: str
    comparison: str


class Constitution(NamedTuple):
    principles: tuple[Principle, ...]
    comparison_template: str

    def comparison(self, prompt: str, a: str, b: str, principle: Principle) -> str:
        """The request to choose between answers a and b."""
        parts = {"{prompt}": prompt, "{a}": a, "{b}": b, "{principle}": principle.comparison}
        text = self.comparison_template
        at = sorted((text.index(key), key) for key in parts)
        out, end = [], 0
        for start, key in at:
            out += [text[end:start], parts[key]]
            end = start + len(key)
        return "".join([*out, text[end:]])

    def named(self, name: str) -> Principle:
        """The principle called `name`. Raises KeyError."""
        return {principle.name: principle for principle in self.principles}[name]


def load(path: str | Path = DEFAULT) -> Constitution:
    """Reads a constitution file. Raises UserError (file, entry, what is missing) where it is not one."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such constitution file")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("principles"), list) or not raw["principles"]:
        raise UserError(f"{path}: needs a list 'principles'")
    principles = []
    for k, entry in enumerate(raw["principles"]):
        missing = [key for key in Principle._fields if not isinstance(entry, dict) or not isinstance(entry.get(key), str)]
        if missing:
            raise UserError(f"{path}: principle {k + 1}: missing {', '.join(missing)}")
        if entry["about"] not in ABOUT:
            raise UserError(f"{path}: principle {k + 1}: about is {entry['about']!r}; use one of {', '.join(ABOUT)}")
        principles.append(Principle(*[entry[key] for key in Principle._fields]))
    if len({principle.name for principle in principles}) < len(principles):
        raise UserError(f"{path}: two principles have one name")
    template = raw.get("comparison_template")
    if not isinstance(template, str) or any(template.count(key) != 1 for key in PLACEHOLDERS):
        raise UserError(f"{path}: comparison_template needs each of {' '.join(PLACEHOLDERS)} once")
    return Constitution(tuple(principles), template)


@lru_cache(maxsize=8)
def constitution(path: str | Path = DEFAULT) -> Constitution:
    """A constitution file, read once; the town's own by default."""
    return load(path)
