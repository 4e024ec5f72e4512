"""Rewards that a program can verify: the world's gold score, maths, formats, unit tests of code, a function of the user's. Floor 4."""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from temper.config import UserError
from temper.judges.rating import Answer, Checked, Context, Missing
from temper.judges.sandbox import Limits, run
from temper.judges.verifiable_maths import simple
from temper.judges.worker import Failed, Worker

PATIENCE = 5.0  # seconds for a pattern or a schema
HANGS = 3  # answers on which a check may hang before it leaves out the others of the same call


class OneByOne(Checked):
    """A check of one answer after the other. look: an answer's score, why it has none, or the arguments with which to ask the worker."""

    def __init__(self, look: Callable[[Answer], float | Missing | tuple], worker: Worker | None = None) -> None:
        self.look, self.worker = look, worker

    def score(self, answers: Sequence[Answer]) -> list[float | Missing]:
        out: list[float | Missing] = []
        hung = 0
        for answer in answers:
            found = self.look(answer)
            if isinstance(found, tuple):
                assert self.worker is not None
                try:
                    found = float(self.worker(*found)) if hung < HANGS else Missing(f"not tried after {HANGS} that took too long")
                except Failed as error:
                    found = Missing(error)
                    hung += "was stopped" in found
            out.append(found)
        return out


# ---------------------------------------------------------------- the embedded world


class Gold(Checked):
    """The exact score of an answer to a question of the embedded world, or a part or feature of it."""

    def __init__(self, part: str) -> None:
        from temper.world.gold import FEATURES, Gold

        parts = [name for name in Gold._fields if name != "features"]
        if part not in (*parts, *FEATURES):
            raise UserError(f"gold has no part {part!r}; there are {', '.join(parts)}, and the features {', '.join(FEATURES)}")
        self.part, self.feature = part, part not in parts

    def score(self, answers: Sequence[Answer]) -> list[float | Missing]:
        from temper.world import Ask, gold

        out: list[float | Missing] = []
        for answer in answers:
            if "ask" not in answer.prompt.meta:
                out.append(Missing("not a question of the embedded world"))
                continue
            found = gold(Ask.of(answer.prompt), answer.text)
            out.append(found.features[self.part] if self.feature else getattr(found, self.part))
        return out


def gold(argument: str, context: Context) -> Checked:
    return Gold(argument or "total")


# ---------------------------------------------------------------- maths

REFERENCES = ("answer", "final_answer", "reference", "solution")  # fields of a row that may hold what is right


def reference(answer: Answer) -> str | Missing:
    """What is right: a field of the row, or the sum that the embedded world asks for."""
    meta = answer.prompt.meta
    if isinstance(meta.get("ask"), dict):
        from temper.world import Ask
        from temper.world.gold import revised

        asked = revised(Ask.of(answer.prompt))
        return str(asked.slots["start"] + sum(asked.slots["changes"])) if asked.kind == "arithmetic" else Missing("asks for no number")
    found = next((meta[name] for name in REFERENCES if isinstance(meta.get(name), str | int | float) and str(meta[name]).strip()), None)
    return str(found) if found is not None else Missing(f"has no reference answer in {', '.join(REFERENCES)}")


def maths(argument: str, context: Context, *, seconds: float = 5.0) -> Checked:
    """1 where the final answer equals the row's, else 0; compared by `verifiable_maths.equal`."""
    if argument:
        raise UserError(f"maths takes no argument, got {argument!r}")

    def look(answer: Answer) -> tuple | float | Missing:
        right = reference(answer)
        if isinstance(right, Missing):
            return right
        known = simple(right, answer.text)
        return (right, answer.text) if known is None else float(known)

    return OneByOne(look, Worker("temper.judges.verifiable_maths:equal", seconds, memory=2048, imports=["sympy"]))


# ---------------------------------------------------------------- formats

THINK = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
FORMATS = "json, schema=FILE, think, boxed, words=LOW..HIGH, characters=LOW..HIGH, tokens=LOW..HIGH, or a regular expression"


def is_json(text: str) -> bool:
    """One JSON value and nothing else. NaN and Infinity are none."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(name: str) -> None:
    raise ValueError(name)


def fits(text: str, schema: dict[str, Any]) -> bool:
    """JSON that a JSON Schema describes; nothing is fetched for it."""
    if not is_json(text):
        return False
    import jsonschema.validators
    from referencing.jsonschema import EMPTY_REGISTRY

    return bool(jsonschema.validators.validator_for(schema)(schema, registry=EMPTY_REGISTRY).is_valid(json.loads(text)))


def thinks(text: str) -> bool:
    """<think>...</think><answer>...</answer>, each once and not empty (arXiv:2501.12948, sec. 2.2.2)."""
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    found = THINK.fullmatch(text) if once else None
    return bool(found and found[1].strip() and found[2].strip())


def matches(text: str, pattern: str) -> bool:
    """Whether the pattern is found; ^ and $ are the text's ends, and a dot is any character."""
    return bool(re.search(pattern, text.strip(), re.DOTALL))


def band(written: str, name: str) -> tuple[float, float]:
    """LOW..HIGH; either may be missing."""
    low, dots, high = written.partition("..")
    try:
        found = float(low or 0), float(high or "inf")
    except ValueError:
        found = 1.0, 0.0
    if not dots or found[0] > found[1]:
        raise UserError(f"format:{name}={written}: give the least and the most, as in format:{name}=20..80; either may be left out")
    return found


LENGTHS: dict[str, Callable[[Answer], int]] = {
    "words": lambda answer: len(answer.text.split()),
    "characters": lambda answer: len(answer.text.strip()),
    "tokens": lambda answer: len(answer.tokens),
}


def form(argument: str, context: Context) -> Checked:
    """1 where the answer has the form, else 0. Raises UserError for a form, pattern or schema that cannot be read."""
    here = "temper.judges.verifiable:"
    name, equals, value = argument.partition("=")
    if equals and name in LENGTHS:
        low, high = band(value, name)
        return OneByOne(lambda answer: float(low <= LENGTHS[name](answer) <= high))
    if equals and name == "schema":
        schema = _schema(value)
        return OneByOne(lambda answer: (answer.text, schema), Worker(here + "fits", PATIENCE, imports=["jsonschema.validators"]))
    named: dict[str, Callable[[str], bool]] = {"json": is_json, "think": thinks, "boxed": lambda text: "\\boxed{" in text}
    if argument in named:
        return OneByOne(lambda answer: float(named[argument](answer.text)))
    if not argument:
        raise UserError(f"format: which? give {FORMATS}")
    try:
        re.compile(argument)
    except re.error as error:
        raise UserError(f"format:{argument}: no regular expression ({error}); give {FORMATS}") from None
    return OneByOne(lambda answer: (answer.text, argument), Worker(here + "matches", PATIENCE))


def _schema(path: str) -> dict[str, Any]:
    import jsonschema.validators

    try:
        schema = json.loads(Path(path).read_text("utf-8"))
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: no JSON Schema: {' '.join(str(error).split())[:200]}") from None
    except jsonschema.SchemaError as error:
        raise UserError(f"{path}: no JSON Schema: {error.message[:200]}") from None
    return dict(schema)


# ---------------------------------------------------------------- code

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


def block(text: str) -> str:
    """The last fenced block of Python (or of no named language); the whole text where there is no fence."""
    text = text.rpartition("</think>")[2]
    found = [body for language, body in _FENCE.findall(text) if language.lower() in ("", "python", "python3", "py")]
    return found[-1] if found else "" if "```" in text else text


class Tests(NamedTuple):
    """Of a row: Python to run after the code; or inputs and the outputs that they should give."""

    code: str = ""
    cases: Sequence[tuple[str, str]] = ()


def tests_of(meta: dict[str, Any]) -> Tests | Missing:
    """`tests` (text or a list of it), MBPP's `test_list` (arXiv:2108.07732), HumanEval's `test` with `entry_point` (arXiv:2107.03374),
    APPS' `input_output` (arXiv:2105.09938)."""
    inputs = meta.get("input_output")
    if isinstance(inputs, str):
        try:
            inputs = json.loads(inputs)
        except (ValueError, RecursionError):
            return Missing("its input_output is no JSON")
    if isinstance(inputs, dict) and inputs.get("inputs") and not inputs.get("fn_name"):
        return Tests(cases=[(_lines(i), _lines(o)) for i, o in zip(inputs["inputs"], inputs.get("outputs", ()), strict=False)])
    lines = [meta.get("test_setup_code") or "", *_list(meta.get("test_imports")), *_list(meta.get("tests")), *_list(meta.get("test_list"))]
    if isinstance(meta.get("test"), str):
        lines.append(meta["test"] + (f"\ncheck({meta['entry_point']})" if meta.get("entry_point") else ""))
    code = "\n".join(line for line in lines if line)
    return Tests(code) if code.strip() else Missing("has no tests in tests, test_list, test or input_output")


def _list(value: Any) -> Iterator[str]:
    yield from (str(one) for one in (value if isinstance(value, list | tuple) else [value] if value else []))


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _words(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().splitlines()]


class Code(Checked):
    """1 where the answer's code passes all tests of its row, else 0: also where it does not end in time, which is its own fault."""

    def __init__(self, limits: Limits, weak: bool, most: int) -> None:
        self.limits, self.weak, self.most = limits, weak, most
        tried = run("answer = 42", "assert answer == 42", limits=limits, weak=weak)
        if not tried.passed:
            raise UserError(
                f"code: this machine gives no walls around what a model writes ({tried.why}); on a machine that is only for this, "
                "code?weak=yes runs it behind an audit hook instead"
            )

    def score(self, answers: Sequence[Answer]) -> list[float | Missing]:
        with ThreadPoolExecutor(self.most) as pool:  # each thread waits for a process
            return list(pool.map(self.one, answers))

    def one(self, answer: Answer) -> float | Missing:
        tests = tests_of(answer.prompt.meta)
        if isinstance(tests, Missing):
            return tests
        code = block(answer.text)
        for given, wanted in tests.cases or [("", "")]:
            outcome = run(code, None if tests.cases else tests.code, given, self.limits, self.weak)
            if outcome.passed is None:
                return Missing(outcome.why)
            if not outcome.passed or (tests.cases and _words(outcome.output) != _words(wanted)):
                return 0.0
        return 1.0


def code(argument: str, context: Context, *, seconds: float = 5.0, memory: int = 512, at_once: int = 0, weak: bool = False) -> Checked:
    """seconds of CPU and megabytes of memory for each run; at_once: how many run side by side, 0 is one for each core."""
    if argument:
        raise UserError(f"code takes no argument, got {argument!r}; the tests stand in the data, in a field `tests`")
    if seconds < 1 or memory < 64 or at_once < 0:
        raise UserError("code: give seconds of 1 or more, memory of 64 or more and at_once of 0 or more")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return Code(Limits(seconds, memory), weak, at_once or cores)


# ---------------------------------------------------------------- a function of the user's


class Python(Checked):
    """`score(prompts, answers, metas) -> list of numbers`, in a process of its own: what it raises, or that it hangs, costs its scores."""

    def __init__(self, target: str, seconds: float) -> None:
        path, _, name = target.rpartition(":")
        if not path.endswith(".py") or not name.isidentifier():
            raise UserError(f"python:{target}: give a file and a function, as in python:my.py:score")
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        self.worker = Worker(target, seconds)
        try:
            self.worker.start()
        except Failed as error:
            raise UserError(f"{path}: cannot be used: {error}") from None

    def score(self, answers: Sequence[Answer]) -> list[float | Missing]:
        if not answers:
            return []
        prompts = [[{"role": m.role, "content": m.content} for m in a.prompt.messages] for a in answers]
        try:
            found = self.worker(prompts, [a.text for a in answers], [a.prompt.meta for a in answers])
        except Failed as error:
            return [Missing(error)] * len(answers)
        if not isinstance(found, list | tuple):
            return [Missing(f"returned {type(found).__name__} where a list of {len(answers)} numbers is needed")] * len(answers)
        if len(found) != len(answers):
            return [Missing(f"returned {len(found)} numbers for {len(answers)} answers")] * len(answers)
        wrong = next((x for x in found if x is not None and not isinstance(x, int | float)), None)
        if wrong is not None:
            return [Missing(f"returned {str(wrong)[:40]!r} among the numbers")] * len(answers)
        return [Missing("returned None") if x is None else Missing(f"returned {x}") if not math.isfinite(x) else float(x) for x in found]


def python(argument: str, context: Context, *, seconds: float = 60.0) -> Checked:
    if seconds <= 0:
        raise UserError("python: give seconds above 0")
    return Python(argument, seconds)
