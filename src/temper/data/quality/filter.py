"""Rules on single rows: length, language, refusals, boilerplate, repetition; a word list that flags and removes nothing.

Nothing is on unless it is asked for. Languages are told by py3langid (97 languages, its model is part of the package, so offline). The
phrases are English. Repetition is measured as in arXiv:2112.11446, table A1, which removed web text with more than 0.3 of its lines or
0.15 of its 5-grams repeated.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pydantic

from temper.config import UserError, opt
from temper.data.quality.clean import command
from temper.data.quality.rows import Report, Rows, Step, Verdict, Verdicts, best, prompt, whole
from temper.data.quality.words import ngrams, words

NAME = "filter"
EXAMPLES = """
  temper data filter chats.jsonl --min-words 3 --max-words 2000 --languages en --out clean.jsonl
  temper data filter chats.jsonl --refusals --boilerplate --max-repetition 0.3 --toxic --out clean.jsonl
"""
BEGINNING = 200  # characters of an answer in which a refusal shows
SURE = 0.5  # confidence below which a language is flagged as unsure instead of removed
LOOKED_AT = 2000  # characters by which a language is told
REFUSALS = re.compile(
    r"\bI(?:'m| am) (?:very |so |really )?sorry,? (?:but|I)\b|\bI (?:apologi[sz]e|regret),? but\b"
    r"|\bI(?: can ?not| can't|(?: a|')m (?:unable|not able) to| won't| will not| must decline to)"
    r" (?:assist|help|provide|fulfil|complete|comply|answer|support|engage|create|generate|do that)"
    r"|\bas an? (?:AI|artificial intelligence|language model)\b.{0,60}\b(?:cannot|can't|unable|not able|do not have|don't have)\b",
    re.IGNORECASE | re.DOTALL,
)
BOILERPLATE = re.compile(
    r"\bas an? (?:AI|artificial intelligence|large language|language)(?: language)? (?:model|assistant)\b"
    r"|\bas of my (?:last|knowledge|latest)\b|\bmy (?:knowledge cut-?off|training data)\b"
    r"|\btrained by OpenAI\b|\bOpenAI'?s? (?:use case )?polic|\bregenerate response\b"
    r"|\b(?:accept|use) (?:all )?cookies\b|\ball rights reserved\b|\blorem ipsum\b|\benable javascript\b|\bsubscribe to our newsletter\b",
    re.IGNORECASE,
)
# Words that are toxic in nearly every use, few and English: a flag to look by, no measure of toxicity. Bring a list of your own.
TOXIC = "arsehole asshole bastard bitch bitches bullshit cunt dickhead fuck fucked fucker fucking motherfucker shit slut twat wanker whore"


class Options(Step):
    """Remove rows by rules on their text; the answer is the one that would be learned (of a pair the chosen one)."""

    min_words: int | None = opt(None, "words that an answer (or a plain text) has at least", ge=0)
    max_words: int | None = opt(None, "words that an answer (or a plain text) has at most", ge=1)
    min_prompt_words: int | None = opt(None, "words that a prompt has at least", ge=0)
    max_prompt_words: int | None = opt(None, "words that a prompt has at most", ge=1)
    languages: list[str] = opt([], "languages to keep, as two letters: en de zh")
    refusals: bool = opt(False, "remove rows whose answer begins with a refusal")
    boilerplate: bool = opt(False, "remove rows whose answer holds a phrase of chat services or web pages")
    max_repetition: float | None = opt(None, "share of an answer's lines or 5-grams that repeat earlier ones, at most", ge=0, le=1)
    toxic: bool = opt(False, "flag rows that hold a word of the built-in list; removes nothing")
    toxic_words: str | None = opt(None, "flag rows that hold a word of this file, one a line; removes nothing")

    @pydantic.model_validator(mode="after")
    def _something(self) -> Options:
        if self == self.model_construct():
            raise ValueError("no rule is given; give one, such as --min-words 3 or --languages en (in a recipe: min_words: 3)")
        for low, high in ((self.min_words, self.max_words), (self.min_prompt_words, self.max_prompt_words)):
            if low is not None and high is not None and low > high:
                raise ValueError(f"at least {low} and at most {high} words: no row has both")
        return self


Rule = Callable[[str, str], tuple[str, str] | None]  # (prompt, answer) -> (reason, detail), None where nothing is wrong


def repetition(text: str) -> float:
    """The larger of the shares of lines and of word 5-grams that stood in the text before; 0 for a text of less than ten words."""
    said = words(text)
    if len(said) < 10:
        return 0.0
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    grams = ngrams(said, 5)
    return max(1 - len(set(lines)) / len(lines), 1 - len(np.unique(grams)) / len(grams))


@functools.cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language(text: str) -> tuple[str, float]:
    """(two letters, confidence in [0, 1])."""
    return _identifier().classify(text[:LOOKED_AT])


def _length(what: str, low: int | None, high: int | None) -> Rule:
    def rule(asked: str, said: str) -> tuple[str, str] | None:
        n = len(words(asked if what == "prompt" else said))
        if low is not None and n < low:
            return f"{what} too short", f"{n} words, at least {low}"
        if high is not None and n > high:
            return f"{what} too long", f"{n} words, at most {high}"
        return None

    return rule


def _phrase(reason: str, pattern: re.Pattern[str], within: int | None = None) -> Rule:
    def rule(asked: str, said: str) -> tuple[str, str] | None:
        found = pattern.search(said[:within])
        return (reason, repr(found[0])) if found else None

    return rule


def _repetition(most: float) -> Rule:
    def rule(asked: str, said: str) -> tuple[str, str] | None:
        share = repetition(said)
        return ("repetition", f"{share:.0%} of its lines or 5-grams repeat, at most {most:.0%}") if share > most else None

    return rule


def rules(options: Options) -> Iterator[Rule]:
    """The rules that are on."""
    if options.min_words is not None or options.max_words is not None:
        yield _length("answer", options.min_words, options.max_words)
    if options.min_prompt_words is not None or options.max_prompt_words is not None:
        yield _length("prompt", options.min_prompt_words, options.max_prompt_words)
    if options.refusals:
        yield _phrase("refusal", REFUSALS, BEGINNING)
    if options.boilerplate:
        yield _phrase("boilerplate", BOILERPLATE)
    if options.max_repetition is not None:
        yield _repetition(options.max_repetition)


def toxic_list(options: Options) -> frozenset[str]:
    """The words that flag a row. Raises UserError for a file that cannot be read, or an entry of several words."""
    listed = set(TOXIC.split()) if options.toxic else set()
    if options.toxic_words is not None:
        try:
            lines = Path(options.toxic_words).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--toxic-words {options.toxic_words}: cannot be read as UTF-8 text ({error})") from None
        for number, line in enumerate(lines, 1):
            if len(said := words(line)) > 1:
                raise UserError(f"{options.toxic_words}:{number}: got {line!r}, one word a line is what can be looked for")
            listed.update(said)
    return frozenset(listed)


def run(options: Options, rows: Rows, report: Report) -> Verdicts:
    """One pass; a row that breaks several rules is counted by the first and lists all."""
    if strange := set(options.languages) - set(_identifier().labels if options.languages else ()):
        raise UserError(f"languages: no language {sorted(strange)[0]!r}; there are {', '.join(sorted(_identifier().labels))}")
    active, listed = list(rules(options)), toxic_list(options)
    found: Verdicts = {}
    for item in rows:
        asked, said = "\n\n".join(prompt(item.record)), best(item.record)
        broken = [wrong for rule in active if (wrong := rule(asked, said))]
        flags: list[tuple[str, str]] = []
        if options.languages:
            name, sure = language(whole(item))
            if name not in options.languages:
                (broken if sure >= SURE else flags).append(("language", f"{name} ({sure:.2f})"))
        if listed and (used := sorted(listed.intersection(words(whole(item))))):
            flags.append(("toxic word", ", ".join(used)))
        if broken or flags:
            first, *more = broken or flags
            detail = "; ".join([first[1], *(f"{reason}: {what}" for reason, what in more)])
            found[item.id] = Verdict(first[0], detail, flag=not broken)
    return found


main = partial(command, NAME)
