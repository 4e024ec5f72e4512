"""The grammar engine: one table of templates both renders forms into text and parses text back into forms. Floor 1.

A form is a tuple (frame, slot, slot, ...); a slot is a word of a vocabulary, another form, or a tuple of forms (a speech). A template
is text with slots in braces, named after what fills them: "{person} keeps a {pet}". Digits tell two slots of one kind apart. A template
that begins with "~" is held out: it renders only where held-out phrasings are asked for. Parsing is by words, so case and spacing do
not matter; the templates of a symbol share one trie, and one sentence takes some ten microseconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from temper.world.streams import Draw

Form = tuple[Any, ...]

WORD = re.compile(r"\d+|[A-Za-z]+|[^\sA-Za-z\d]")
SLOT = re.compile(r"\{([a-z_]+)(\d*)\}")
ENDS = frozenset(".?!")
NESTED = 3  # speeches within speeches that parsing follows; none of the town's texts has more than two


@dataclass
class Node:
    words: dict[str, Node] = field(default_factory=dict)
    slots: dict[str, Node] = field(default_factory=dict)
    ends: list[tuple[str, tuple[int, ...], bool]] = field(default_factory=list)


class Template(NamedTuple):
    literals: tuple[str, ...]  # one more than slots
    slots: tuple[tuple[str, int], ...]  # (symbol, index in the form)
    held: bool

    @property
    def open(self) -> bool:
        """Whether it ends in a speech, so that any sentence after it could belong to it."""
        return bool(self.slots) and self.slots[-1][0] == "speech" and not words(self.literals[-1])


class Sentence(NamedTuple):
    """A stretch of tokens start:end. form is None where it is no sentence of the grammar; `cut`: it could still become one."""

    form: Form | None
    start: int
    end: int
    held: bool = False
    cut: bool = False


def words(text: str) -> list[str]:
    """Lower-case words, numbers and marks of a text."""
    return WORD.findall(text.lower())


class Grammar:
    """words: symbol -> surfaces. frames: frame -> templates (slot order of the first is the order in the form). groups: symbol -> frames.

    The group "sentence" is what parses at the top; "speech" is one or more sentences.
    """

    def __init__(self, vocabulary: dict[str, list[str]], frames: dict[str, list[str]], groups: dict[str, list[str]]) -> None:
        self.vocabulary = vocabulary
        self.frames = frames
        self.groups = {**groups, **{name: [name] for name in frames if name not in groups}}
        self.surfaces: dict[str, dict[str, list[tuple[tuple[str, ...], str]]]] = {}
        for symbol, surfaces in vocabulary.items():
            table: dict[str, list[tuple[tuple[str, ...], str]]] = {}
            for surface in surfaces:
                tokens = tuple(words(surface))
                table.setdefault(tokens[0], []).append((tokens, surface))
            for entries in table.values():
                entries.sort(key=lambda entry: -len(entry[0]))
            self.surfaces[symbol] = table
        self.templates = {name: self._compile(name, templates) for name, templates in frames.items()}
        self.seen = {name: [t for t in templates if not t.held] for name, templates in self.templates.items()}
        self.held = {name: [t for t in templates if t.held] for name, templates in self.templates.items()}
        self.tries = {symbol: self._trie(members) for symbol, members in self.groups.items()}
        self.open = {name for name, group in self.templates.items() if any(t.open for t in group)}
        self.sentences = lru_cache(maxsize=65536)(self._sentence)

    def _compile(self, name: str, templates: Sequence[str]) -> list[Template]:
        order = [match.group(0) for match in SLOT.finditer(templates[0])]
        out = []
        for text in templates:
            held, text = text.startswith("~"), text.lstrip("~")
            matches = list(SLOT.finditer(text))
            if sorted(m.group(0) for m in matches) != sorted(order):
                raise ValueError(f"frame {name}: {text!r} must have the slots {order}")
            cuts = [0] + [at for m in matches for at in m.span()] + [len(text)]
            literals = tuple(text[a:b] for a, b in zip(cuts[0::2], cuts[1::2], strict=True))
            for m in matches:
                if m.group(1) not in self.vocabulary and m.group(1) not in self.groups and m.group(1) != "speech":
                    raise ValueError(f"frame {name}: no words and no frame for slot {m.group(0)}")
            out.append(Template(literals, tuple((m.group(1), order.index(m.group(0)) + 1) for m in matches), held))
        return out

    def _trie(self, members: Sequence[str]) -> Node:
        root = Node()
        for name in members:
            for template in self.templates[name]:
                node = root
                for k, literal in enumerate(template.literals):
                    for word in words(literal):
                        node = node.words.setdefault(word, Node())
                    if k < len(template.slots):
                        node = node.slots.setdefault(template.slots[k][0], Node())
                captured = [index for _, index in template.slots]
                node.ends.append((name, tuple(captured.index(i) for i in range(1, len(captured) + 1)), template.held))
        return root

    # ---- rendering

    def phrase(self, form: Form, draw: Draw, held: bool | None = None) -> str:
        """The form as text, first letter as in the template. held: only held-out (True) or only ordinary (False) templates, where the
        frame has both; None: any."""
        name = form[0]
        templates = self.templates[name] if held is None else (self.held[name] if held else self.seen[name]) or self.templates[name]
        literals, slots, _ = templates[int(draw.u() * len(templates))]
        out = [literals[0]]
        for k, (symbol, index) in enumerate(slots):
            value = form[index]
            if symbol in self.vocabulary:
                out.append(value)
            elif symbol == "speech":
                out.append(self.text(value, draw, held))
            else:
                out.append(self.phrase(value, draw, held))
            out.append(literals[k + 1])
        return "".join(out)

    def sentence(self, form: Form, draw: Draw, held: bool | None = None) -> str:
        text = self.phrase(form, draw, held)
        return text[0].upper() + text[1:]

    def text(self, forms: Sequence[Form], draw: Draw, held: bool | None = None) -> str:
        """Sentences, one space between."""
        return " ".join([self.sentence(form, draw, held) for form in forms])

    # ---- parsing

    def _symbol(self, symbol: str, tokens: tuple[str, ...], i: int, far: list[int]) -> list[tuple[Any, int]]:
        table = self.surfaces.get(symbol)
        if table is not None:
            out: list[tuple[Any, int]] = []
            if i < len(tokens):
                for surface, value in table.get(tokens[i], ()):
                    n = len(surface)
                    if tokens[i : i + n] == surface:
                        out.append((value, i + n))
                    elif tokens[i:] == surface[: len(tokens) - i]:
                        far[0] = len(tokens)
            return out
        if symbol == "speech":
            return self._speech(tokens, i, far)
        found: list[tuple[Form, int, bool]] = []
        self._walk(self.tries[symbol], tokens, i, (), found, far)
        return [(form, end) for form, end, _ in found]

    def _speech(self, tokens: tuple[str, ...], i: int, far: list[int]) -> list[tuple[Any, int]]:
        """Every run of sentences that starts at i, the longest first."""
        if far[1] == NESTED:
            return []
        far[1] += 1
        forms: tuple[Form, ...] = ()
        out: list[tuple[Any, int]] = []
        while (best := self._longest(tokens, i, far)) is not None:
            forms, i = (*forms, best[0]), best[1]
            out.append((forms, i))
        far[1] -= 1
        return out[::-1]

    def _walk(self, node: Node, tokens: tuple[str, ...], i: int, captured: tuple, found: list, far: list[int]) -> None:
        while True:
            if i > far[0]:
                far[0] = i
            for name, order, held in node.ends:
                found.append(((name, *[captured[k] for k in order]), i, held))
            for symbol, child in node.slots.items():
                for value, end in self._symbol(symbol, tokens, i, far):
                    self._walk(child, tokens, end, (*captured, value), found, far)
            following = node.words.get(tokens[i]) if i < len(tokens) else None
            if following is None:
                return
            node, i = following, i + 1

    def _longest(self, tokens: tuple[str, ...], i: int, far: list[int]) -> tuple[Form, int, bool] | None:
        found: list[tuple[Form, int, bool]] = []
        self._walk(self.tries["sentence"], tokens, i, (), found, far)
        return max(found, key=lambda entry: entry[1]) if found else None

    def _sentence(self, tokens: tuple[str, ...]) -> tuple[Form | None, int, bool, bool]:
        """(form, end, held, cut) of the longest sentence at the start of tokens."""
        far = [0, 0]  # the furthest token reached, and how deep in speeches
        best = self._longest(tokens, 0, far)
        if best is not None:
            return (*best, False)
        return None, 0, False, far[0] == len(tokens)

    def parse(self, text: str) -> tuple[list[str], list[Sentence]]:
        """Tokens of the text, and its sentences in order. Total: what is no sentence comes back with form None, up to its next end mark."""
        tokens = words(text)
        ends = [k + 1 for k, token in enumerate(tokens) if token in ENDS]
        out: list[Sentence] = []
        i, n, at = 0, len(tokens), 0
        while i < n:
            while at < len(ends) and ends[at] <= i:
                at += 1
            stop = ends[at] if at < len(ends) else n
            form, length, held, cut = self.sentences(tuple(tokens[i:stop]))
            if stop < n and (cut if form is None else form[0] in self.open):  # a sentence that holds other sentences
                form, length, held, cut = self.sentences(tuple(tokens[i:]))
            if form is not None:
                out.append(Sentence(form, i, i + length, held))
                i += length
                continue
            while stop < n and tokens[stop] in '"!?.)':
                stop += 1
            out.append(Sentence(None, i, stop, False, cut and stop == n))
            i = stop
        return tokens, out

    def forms(self, text: str) -> list[Form | None]:
        return [sentence.form for sentence in self.parse(text)[1]]
