"""What rates sampled answers, and the grammar of `--reward`: raters, functions of raters, weighted sums of them. Floor 4.

    0.7*runs/reward + 0.3*maths            a reward model's folder, a check by program, weights
    gold - 0.1*format:words=40..           " + " and " - " stand between spaces; a weight of 0 is reported and not counted
    worst(runs/a, runs/b; lam=0.5)         a function of raters, its options after a semicolon
    python:my.py:score?seconds=30          options of a rater after a question mark
    format:"a, b + c"                      quotes around what holds the grammar's own signs

A rater gives one number per answer, or none with the reason why: such an answer is left out of learning and counted, never scored 0.
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from temper.config import UserError
from temper.records import Prompt

REWARDS = "a reward model's folder, gold, maths, format:..., code, python:FILE:FUNCTION, or a sum of them"  # what --reward may be


class Answer(NamedTuple):
    """One sampled answer, with the prompt it answers."""

    prompt: Prompt
    prompt_ids: Sequence[int]  # as the policy saw it
    tokens: Sequence[int]  # as they were sampled, what ended them included
    text: str  # decoded, without special tokens
    ended: bool  # it came to its end, rather than to --max-new


class Rater(Protocol):
    """A reward model, a check by program, the embedded world's gold score, ..."""

    name: str

    def rate(self, answers: Sequence[Answer]) -> list[float | None]:
        """One number per answer, in order, the larger the better; None where there is none to be had: such an answer is left out
        of learning and counted, never scored 0. Answers to one prompt stand together."""
        ...


class Missing(str):
    """In a score's place: why there is none."""


class Failure(NamedTuple):
    """How many answers a rater could not rate, and why not the first of them."""

    n: int
    first: str


class Ratings(NamedTuple):
    """scores: of the whole, None where a weighted part has none; parts: {rater: its scores, unweighted}; failures: {rater: Failure}."""

    scores: list[float | None]
    parts: dict[str, list[float | None]]
    failures: dict[str, Failure]

    @property
    def missing(self) -> int:
        return self.scores.count(None)

    def means(self) -> dict[str, float]:
        """{rater: mean over the answers that it rated}; left out where it rated none."""
        found = {name: [s for s in scores if s is not None] for name, scores in self.parts.items()}
        return {name: math.fsum(scores) / len(scores) for name, scores in found.items() if scores}


def least_and_most(scores: Sequence[float | None], n: int) -> tuple[list[int], list[int]]:
    """Indices of the n worst and the n best answers, the extreme first; no answer stands in both."""
    order = sorted((i for i, s in enumerate(scores) if s is not None), key=lambda i: scores[i] or 0.0)
    n = min(n, len(order) // 2) or len(order[:n])
    return order[:n], order[::-1][:n] if len(order) > 1 else []


class Checked:
    """Base of a rater that says why it has no score: `score` gives a number or a Missing for each answer."""

    name = ""

    def score(self, answers: Sequence[Answer]) -> Sequence[float | Missing]:
        raise NotImplementedError

    def ratings(self, answers: Sequence[Answer]) -> Ratings:
        return checked(self.name, self.score(answers), len(answers))

    def rate(self, answers: Sequence[Answer]) -> list[float | None]:
        return self.ratings(answers).scores


def checked(name: str, scores: Sequence[Any], n: int) -> Ratings:
    """What a rater gave for n answers as Ratings: what is no finite number is masked, everything where their count is wrong."""
    if len(scores) != n:
        scores = [Missing(f"gave {len(scores)} scores for {n} answers")] * n
    found: list[float | Missing] = []
    for score in scores:
        if score is None:
            score = Missing("gave no score")
        elif not isinstance(score, Missing) and not math.isfinite(score):
            score = Missing(f"gave {score}")
        found.append(score)
    why = [score for score in found if isinstance(score, Missing)]
    return Ratings(
        [None if isinstance(score, Missing) else float(score) for score in found], {}, {name: Failure(len(why), why[0])} if why else {}
    )


def ask(rater: Rater, answers: Sequence[Answer]) -> Ratings:
    """What any rater gives, checked; its reasons and its own parts where it tells them."""
    if hasattr(rater, "ratings"):
        found: Ratings = rater.ratings(answers)
        return found
    return checked(rater.name, rater.rate(answers), len(answers))


class Heard:
    """A member of a function of raters: what it said last is kept, so that the whole can tell of its parts."""

    def __init__(self, name: str, rater: Rater) -> None:
        self.name, self.rater, self.said = name, rater, Ratings([], {}, {})

    def rate(self, answers: Sequence[Answer]) -> list[float | None]:
        self.said = ask(self.rater, answers)
        return self.said.scores


class Function:
    """A function of raters and its members."""

    def __init__(self, name: str, rater: Rater, members: Sequence[Heard]) -> None:
        self.name, self.rater, self.members = name, rater, members

    def rate(self, answers: Sequence[Answer]) -> list[float | None]:
        return self.ratings(answers).scores

    def ratings(self, answers: Sequence[Answer]) -> Ratings:
        own = checked(self.name, self.rater.rate(answers), len(answers))
        for member in self.members:
            own.parts.update({member.name: member.said.scores, **member.said.parts})
            own.failures.update(member.said.failures)
        if own.failures.keys() - {self.name}:  # the members' own reasons say more
            own.failures.pop(self.name, None)
        return own


class Mixture:
    """A weighted sum of raters: what `rater` makes of a spec."""

    def __init__(self, name: str, terms: Sequence[tuple[float, Rater]]) -> None:
        self.name, self.terms = name, list(terms)

    def rate(self, answers: Sequence[Answer]) -> list[float | None]:
        return self.ratings(answers).scores

    def ratings(self, answers: Sequence[Answer]) -> Ratings:
        """Every part over the same answers. An answer that a part with a weight cannot rate has no score."""
        total: list[float | None] = [0.0] * len(answers)
        parts: dict[str, list[float | None]] = {}
        failures: dict[str, Failure] = {}
        for weight, part in self.terms:
            found = ask(part, answers)
            parts |= {part.name: found.scores, **found.parts}
            failures |= found.failures
            if weight:
                total = [None if t is None or s is None else t + weight * s for t, s in zip(total, found.scores, strict=True)]
        return Ratings(total, parts, failures)


# ---------------------------------------------------------------- what a spec may name


class Context(NamedTuple):
    """What a rater may need beside its argument. tokenizer: the policy's, None where answers are text only; how: device, precision."""

    tokenizer: Any = None
    seed: int = 0
    how: Mapping[str, Any] = {}


Maker = Callable[..., Any]
RATERS: dict[str, str | Maker] = {  # name -> function(argument, context, *, options) -> Rater, or where it is
    "gold": "temper.judges.verifiable:gold",
    "maths": "temper.judges.verifiable:maths",
    "format": "temper.judges.verifiable:form",
    "code": "temper.judges.verifiable:code",
    "python": "temper.judges.verifiable:python",
    "text": "temper.judges.rating:by_text",
}
FUNCTIONS: dict[str, str | Maker] = {  # name -> function(members, *, options) -> Rater, or where it is
    "mean": "temper.judges.ensemble:mean",
    "worst": "temper.judges.ensemble:worst",
    "uwo": "temper.judges.ensemble:uwo",
    "switch": "temper.judges.switch:switch",
}


def function(make: Maker) -> Maker:
    """Decorator: `make(members, *, options) -> Rater` can be called in a spec by its name."""
    FUNCTIONS[make.__name__] = make
    return make


def _found(entry: str | Maker) -> Maker:
    from temper.judges import ensemble, verifiable  # noqa: F401  a change of them makes what was trained on them stale

    if callable(entry):
        return entry
    module, _, name = entry.partition(":")
    made: Maker = getattr(import_module(module), name)
    return made


def folder(path: str, context: Context) -> Rater:
    """A reward model, or a process reward model: by the policy's own tokens, or, of a reward model, by text where there is no policy.

    Raises UserError for another tokenizer.
    """
    from temper.judges.process import ProcessReward, is_process
    from temper.judges.reward_model import RewardModel

    model = ProcessReward(path, **context.how) if is_process(path) else RewardModel(path, **context.how)
    if context.tokenizer is None and isinstance(model, RewardModel):
        return ByText(model)
    if context.tokenizer is not None and model.tokenizer.get_vocab() != context.tokenizer.get_vocab():
        raise UserError(
            f"{path}: its tokenizer is not that of the policy; train a reward model on the policy's, or have the answers "
            f"rendered anew with its own by text:{path}"
        )
    return model


def by_text(argument: str, context: Context) -> Rater:
    """A reward model that reads the answers' text with its own tokenizer and template."""
    return folder(argument, context._replace(tokenizer=None))


class ByText(Checked):
    """A reward model of any tokenizer: conversations are rendered as in its own training, every answer as if it had ended."""

    def __init__(self, model: Any) -> None:
        self.name, self.model = model.name, model

    def score(self, answers: Sequence[Answer]) -> list[float | Missing]:
        from temper.data.template import render_chat
        from temper.records import Message

        window = getattr(self.model.model.config, "max_position_embeddings", None) or math.inf
        out: list[float | Missing] = []
        for answer in answers:
            chat = [*answer.prompt.messages, Message(role="assistant", content=answer.text)]
            try:
                n = len(render_chat(self.model.tokenizer, chat, "last")[0])
                out.append(Missing(f"{n} tokens, its window is {window}") if n > window else 0.0)
            except UserError as error:
                out.append(Missing(str(error)))
        fits = [i for i, score in enumerate(out) if not isinstance(score, Missing)]
        scores = self.model.score_answers([answers[i].prompt.messages for i in fits], [answers[i].text for i in fits]) if fits else []
        for i, score in zip(fits, scores, strict=True):
            out[i] = score
        return out


# ---------------------------------------------------------------- the grammar


class Term(NamedTuple):
    """name: of RATERS or FUNCTIONS, "" for a folder; members: of a function."""

    weight: float
    text: str
    name: str
    argument: str
    members: list[list["Term"]]
    options: dict[str, Any]


_WEIGHT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*\*\s*(.*)", re.IGNORECASE | re.DOTALL)
_CALL = re.compile(r"([A-Za-z_]\w*)\s*\((.*)\)", re.DOTALL)
_CLOSES = {"(": ")", "[": "]", "{": "}"}


def _split(text: str, parts: str) -> Iterator[tuple[str, str]]:
    """(what stood before it, a piece) of a text cut at the pattern `parts`, outside quotes and brackets."""
    cut, start, at, before = re.compile(parts), 0, 0, ""
    open_: list[str] = []
    while at < len(text):
        sign = text[at]
        if open_ and open_[-1] == sign:
            open_.pop()
        elif open_ and open_[-1] in "'\"":
            pass
        elif sign == "\\":
            at += 1
        elif sign in _CLOSES:
            open_.append(_CLOSES[sign])
        elif sign in "'\"" and (at == start or text[at - 1] in ":(=*, "):
            open_.append(sign)
        elif not open_ and (found := cut.match(text, at)):
            yield before, text[start:at]
            before, start, at = found.group().strip(), found.end(), found.end() - 1
        at += 1
    if open_:
        raise UserError(f"{open_[-1]} is missing; put quotes around what holds brackets or quotes of its own")
    yield before, text[start:]


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _options(make: Maker, given: Sequence[str]) -> dict[str, Any]:
    """`name=value` as the keywords of a maker, of their defaults' types."""
    known = {p.name: p.default for p in inspect.signature(make).parameters.values() if p.default is not p.empty}
    out: dict[str, Any] = {}
    for one in given:
        name, equals, value = (part.strip() for part in one.partition("="))
        if name not in known:
            raise UserError(f"no option {name!r}; there are {', '.join(known) or 'none'}")
        try:
            if isinstance(known[name], bool):
                out[name] = {"yes": True, "no": False}[value.lower()]
            else:
                out[name] = type(known[name])(value) if equals else None
            if out[name] is None or (isinstance(out[name], float) and not math.isfinite(out[name])):
                raise ValueError
        except (ValueError, KeyError):
            what = "yes or no" if isinstance(known[name], bool) else "a number" if isinstance(known[name], int | float) else "a value"
            raise UserError(f"{name} is {value!r}; give {what}, as in {name}={known[name]}") from None
    return out


def known() -> str:
    """What a spec may name, in words."""
    calls = ", ".join(f"{name}(...)" for name in FUNCTIONS)
    return f"there are {', '.join(RATERS)}, the functions {calls}, and folders of reward models"


def place(path: str) -> str:
    """The folder of DIR, or of DIR:HEAD."""
    return path if ":" not in path or Path(path).expanduser().exists() else path.rpartition(":")[0]


def _term(text: str, sign: str) -> Term:
    text = text.strip()
    weight = -1.0 if sign == "-" else 1.0
    if found := _WEIGHT.fullmatch(text):
        weight, text = weight * float(found[1]), found[2].strip()
    if not text:
        raise UserError("a rater is missing; write for example 0.7*runs/reward + 0.3*maths")
    if (call := _CALL.fullmatch(text)) and not Path(text).exists():
        if call[1] not in FUNCTIONS:
            near = difflib.get_close_matches(call[1], FUNCTIONS, n=1)
            raise UserError(f"no function {call[1]!r}; {f'did you mean {near[0]!r}?' if near else known()}")
        inside, *options = [piece for _, piece in _split(call[2], ";")]
        members = [_sum(piece) for _, piece in _split(inside, ",")]
        return Term(weight, text, call[1], "", members, _options(_found(FUNCTIONS[call[1]]), options))
    name, _, argument = text.partition(":")
    name, question, rest = name.partition("?")
    if name not in RATERS:
        path = _unquoted(text)
        if not Path(place(path)).expanduser().exists() and "/" not in path:
            near = difflib.get_close_matches(name, [*RATERS, *FUNCTIONS], n=1)
            raise UserError(f"no rater {name!r} and no such folder; {f'did you mean {near[0]!r}?' if near else known()}")
        return Term(weight, path, "", path, [], {})
    make = _found(RATERS[name])
    takes = any(p.default is not p.empty for p in inspect.signature(make).parameters.values())
    if takes and not question:
        argument, question, rest = argument.partition("?")
    return Term(weight, text, name, _unquoted(argument), [], _options(make, rest.split("&") if question else []))


def _sum(text: str) -> list[Term]:
    terms = [_term(piece, sign) for sign, piece in _split(text.strip(), r"\s+[+-](?:\s+|$)")]
    names = [term.text for term in terms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{twice} stands there twice; write it once, with the sum of its weights")
    return terms


def parse(spec: str) -> list[Term]:
    """The terms of a spec; nothing is loaded. Raises UserError naming the spec, what is wrong and what is known."""
    try:
        return _sum(spec)
    except UserError as error:
        raise UserError(f"--reward {spec!r}: {error}") from None


def reads(spec: str) -> list[str]:
    """The files and folders that a spec names, in order: what a run's result depends on beside the spec itself."""

    def of(terms: Sequence[Term]) -> Iterator[str]:
        for term in terms:
            for member in term.members:
                yield from of(member)
            if term.name in ("", "text"):
                yield place(term.argument)
            elif term.name == "python":
                yield term.argument.rpartition(":")[0]
            elif term.name == "format" and term.argument.startswith("schema="):
                yield term.argument.removeprefix("schema=")

    return list(dict.fromkeys(of(parse(spec))))


def _made(term: Term, context: Context) -> Rater:
    rater: Rater
    if term.members:
        members = [Heard(", ".join(t.text for t in member), _whole(member, context)) for member in term.members]
        return Function(term.text, _found(FUNCTIONS[term.name])(members, **term.options), members)
    if not term.name:
        return folder(term.argument, context)
    rater = _found(RATERS[term.name])(term.argument, context, **term.options)
    rater.name = term.text
    return rater


def _whole(terms: Sequence[Term], context: Context) -> Rater:
    """One rater of weight 1 as itself, else the mixture."""
    if len(terms) == 1 and terms[0].weight == 1:
        return _made(terms[0], context)
    return Mixture(" + ".join(f"{t.weight:g}*{t.text}" for t in terms), [(t.weight, _made(t, context)) for t in terms])


def rater(spec: str, *, tokenizer: Any = None, seed: int = 0, **how: Any) -> Mixture:
    """The rater that a spec describes (see the top of this file), loaded and ready; `ratings` tells of its parts.

    tokenizer: the policy's, which a reward model must share; None: reward models read the answers' text. how: device and precision of
    reward models, see `load_scalar`. Raises UserError for a spec that cannot be read or a rater that cannot be had.
    """
    context = Context(tokenizer, seed, how)
    terms = parse(spec)
    try:
        return Mixture(spec, [(term.weight, _made(term, context)) for term in terms])
    except UserError as error:
        raise UserError(f"--reward {spec!r}: {error}") from None
