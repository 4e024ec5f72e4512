"""Instruction data from a teacher model: Self-Instruct (arXiv:2212.10560) over an OpenAI-compatible endpoint. Floor 2.

Round by round: a few tasks are shown, the teacher goes on with new ones (section 2.2, step 1); for each it says whether it is a
classification (step 2); then it writes an instance, the label first for classifications, else the input first (step 3); filters (step 4):
ROUGE-L below 0.7 to every task there is, words that a language model cannot serve, length, a broken or repeated instance; and a judge.
Deviations: the tasks are asked of a chat model; a judge's mark filters too; a round's requests carry seeds derived from (seed, round).

Every round is written down before the next begins, with what was refused and why, so the same command goes on after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from temper.client import Endpoint
from temper.config import Settings, UserError, dump, opt, parse
from temper.data.files import rows
from temper.data.quality.words import words
from temper.data.sources import read
from temper.records import Chat, Message, write_jsonl

EXAMPLES = """
  temper data synthesize --seeds seed_tasks.jsonl --endpoint http://localhost:8000 --model big --n 1000 --out made.jsonl
  temper data synthesize --seeds prompts.txt --endpoint https://api.example.com --model big --key-env MY_KEY --n 50 --out made.jsonl
"""
SHOWN, OWN = 8, 2  # tasks in the prompt, at most so many of them the teacher's own (section 2.2)
UNSERVED = re.compile(r"\b(?:images?|graphs?|pictures?|files?|maps?|draw|plot|go to|video|audio|music|flowchart|diagram)\b", re.IGNORECASE)
NEW = "Come up with new tasks for an assistant, unlike each other, one per line."
CLASSIFY = "Is this task a classification with few possible answers? Say Yes or No."
INPUT_FIRST = "Give one example of this task. Write 'Input:' and what it is about (or none), then 'Output:' and the answer."
OUTPUT_FIRST = "Give one example of this classification. Write 'Label:' and one of its labels, then 'Input:' and a text with that label."
JUDGE = "Mark this example from 1 to 5: is the task clear, and is the answer right and complete? Say the mark only."


class Synthesize(Settings):
    """Have a teacher model write instructions and answers, from seed tasks; keep those that are new and good."""

    seeds: str = opt(..., "seed tasks: Self-Instruct's JSONL, or anything that gives conversations or prompts; .txt: one task a line")
    endpoint: str = opt(..., "the teacher's server: http://host:port, OpenAI-compatible")
    model: str = opt(..., "the teacher's name there")
    n: int = opt(100, "examples to make", ge=1)
    out: str = opt(..., "file to write, JSONL; NAME.refused.jsonl beside it lists what was refused and why")
    key_env: str = opt("OPENAI_API_KEY", "environment variable with the key; it is never written down")
    judge: str | None = opt(None, "model on the same server that marks each example from 1 to 5; none: the teacher itself")
    least: int = opt(3, "mark that an example needs; 0: no judge", ge=0, le=5)
    rouge: float = opt(0.7, "a task this similar (ROUGE-L) to one that is there is refused", gt=0, le=1)
    temperature: float = opt(0.7, "of the teacher, for tasks; examples and marks are greedy", ge=0)
    max_new: int = opt(512, "tokens of an answer", ge=8)
    at_once: int = opt(8, "requests in flight", ge=1)
    barren: int = opt(20, "rounds in a row without a new example after which it gives up", ge=1)
    patience: float = opt(120.0, "seconds for which a server that does not answer is asked again", gt=0)
    seed: int = opt(0, "of what is shown and asked", ge=0)


class Task(NamedTuple):
    """An instruction with an instance. name: the seed's id, or made:N. input may be empty; answer is where it is known."""

    name: str
    instruction: str
    input: str = ""
    answer: str = ""
    classification: bool = False


def read_seeds(spec: str) -> list[Task]:
    """Seed tasks of a file. Raises UserError where there is none."""
    path = Path(spec)
    if path.suffix == ".txt" and path.is_file():
        lines = path.read_text("utf-8").splitlines()
        found = [Task(f"{path.name}:{i}", line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    else:
        first = next((row.value for row in rows(path) if not row.broken), None) if path.is_file() else None
        if isinstance(first, dict) and "instances" in first:
            found = [_seed(f"{path}:{row.line}", row.value, row.broken) for row in rows(path)]
        else:
            found = [
                Task(str(r.meta["at"]), "\n".join(m.content for m in r.messages if m.role == "user")) for r in read(spec, "prompts").records
            ]
    if not found:
        raise UserError(f"{spec}: holds no task; give seed tasks to start from")
    return found


def _seed(at: str, row: Any, broken: str) -> Task:
    try:
        if broken:
            raise ValueError(broken)
        instance = row["instances"][0]
        return Task(
            str(row.get("id", at)), row["instruction"], instance["input"], instance["output"], bool(row.get("is_classification", False))
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        what = str(error) if isinstance(error, ValueError) else f"no {error}"
        raise UserError(f'{at}: not a seed task ({what}); one is {{"instruction", "instances": [{{"input", "output"}}]}}') from None


# ---------------------------------------------------------------- similarity


def rouge_l(a: Sequence[str], b: Sequence[str], floor: float = 0.0) -> float:
    """F1 of the longest common subsequence of two word lists (ROUGE-L, Lin 2004); 0 where it cannot reach `floor`."""
    if not a or not b or 2 * sum((Counter(a) & Counter(b)).values()) < floor * (len(a) + len(b)):
        return 0.0
    before = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(before[j + 1], row[j]))
        before = row
    return 2 * before[-1] / (len(a) + len(b))


def nearest(text: str, pool: Sequence[tuple[str, list[str]]], floor: float) -> tuple[float, str]:
    """(ROUGE-L, name) of the most similar task of the pool, where any reaches the floor."""
    mine = words(text)
    return max(((rouge_l(mine, theirs, floor), name) for name, theirs in pool), default=(0.0, ""))


def refused(instruction: str) -> str:
    """Why an instruction is no use, or "" (section 2.2, filtering)."""
    length = len(words(instruction))
    if not 3 <= length <= 150:
        return f"{length} words"
    if found := UNSERVED.search(instruction):
        return f"asks for what is no text ({found[0]})"
    return "" if instruction[0].isalnum() or instruction[0] in "\"'“‘¿¡" else "begins with a mark"


# ---------------------------------------------------------------- asking the teacher


def instructions_of(text: str) -> list[str]:
    """The tasks in a teacher's list: its lines, without numbers and marks in front."""
    lines = [re.sub(r"^\s*(?:(?:Task )?\d+[.):]|[-*•])\s*", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line]


def instance_of(text: str, classification: bool) -> tuple[str, str] | None:
    """(input, answer) as the teacher wrote them; None where it did not keep to the form."""
    form = r"\s*Label:(?P<answer>.*?)Input:(?P<input>.*)" if classification else r"\s*(?:Input:(?P<input>.*?))?Output:(?P<answer>.*)"
    found = re.fullmatch(form, text.strip(), re.DOTALL)
    if not found or not found["answer"].strip():
        return None
    given = (found["input"] or "").strip()
    return "" if re.fullmatch(r"\W*(?:none|n/?a)?\W*", given, re.IGNORECASE) else given, found["answer"].strip()


class Teacher:
    """The endpoint, and the prompts by which it is asked."""

    def __init__(self, s: Synthesize) -> None:
        self.s = s
        self.server = Endpoint(s.endpoint, s.model, key_env=s.key_env, patience=s.patience)
        self.judge = Endpoint(s.endpoint, s.judge or s.model, key_env=s.key_env, patience=s.patience)

    def tasks(self, shown: Sequence[Task], seed: int) -> tuple[str, str]:
        """(what the teacher lists, the prompt's hash)."""
        prompt = "\n".join([NEW, "", *(f"{i}. {' '.join(t.instruction.split())}" for i, t in enumerate(shown, 1))])
        return self._ask(self.server, prompt, seed, self.s.temperature), hashlib.sha256(prompt.encode()).hexdigest()

    def classifies(self, instruction: str, seed: int) -> bool:
        return self._ask(self.server, f"{CLASSIFY}\n\nTask: {instruction}", seed).strip().lower().startswith("yes")

    def instance(self, instruction: str, classification: bool, examples: Sequence[Task], seed: int) -> tuple[str, str] | None:
        """(input, answer); `examples` of the same kind are shown before."""
        parts = [OUTPUT_FIRST if classification else INPUT_FIRST]
        for e in examples:
            given = f"Input: {e.input or 'none'}"
            parts.append(f"Task: {e.instruction}\n" + (f"Label: {e.answer}\n{given}" if classification else f"{given}\nOutput: {e.answer}"))
        return instance_of(self._ask(self.server, "\n\n".join([*parts, f"Task: {instruction}"]), seed), classification)

    def mark(self, task: Task, seed: int) -> int | None:
        """1 to 5; None where the judge gives none."""
        text = f"{JUDGE}\n\nTask: {task.instruction}\nInput: {task.input or 'none'}\nOutput: {task.answer}"
        found = re.search(r"\b[1-5]\b", self._ask(self.judge, text, seed))
        return int(found[0]) if found else None

    def _ask(self, server: Endpoint, prompt: str, seed: int, temperature: float = 0.0) -> str:
        text, _ = server.chat(
            [{"role": "user", "content": prompt}], temperature=temperature, max_tokens=self.s.max_new, seed=seed % (1 << 31)
        )
        return text


# ---------------------------------------------------------------- the loop


def _rng(*key: Any) -> Random:
    return Random("|".join(map(str, key)))


def one_round(s: Synthesize, teacher: Teacher, seeds: Sequence[Task], made: Sequence[Task], number: int) -> dict[str, Any]:
    """One round: {"round", "kept": rows, "refused": rows}; a function of (settings, seeds, what was made, round) and the teacher."""
    rng = _rng(s.seed, number)
    own = rng.sample(list(made), min(OWN, len(made)))
    shown = [*rng.sample(list(seeds), min(SHOWN - len(own), len(seeds))), *own]
    rng.shuffle(shown)
    listed, prompt = teacher.tasks(shown, rng.getrandbits(31))
    pool = [(t.name, words(t.instruction)) for t in (*seeds, *made)]
    out: dict[str, Any] = {"round": number, "kept": [], "refused": []}
    fresh: list[tuple[str, dict[str, Any]]] = []
    for instruction in instructions_of(listed):
        near, name = nearest(instruction, pool, s.rouge)
        why = refused(instruction) or (f"ROUGE-L {near:.2f} to {name}" if near >= s.rouge else "")
        if why:
            out["refused"].append({"instruction": instruction, "why": why})
            continue
        pool.append((f"the same round: {instruction}", words(instruction)))
        how = {"teacher": s.model, "seeds": [t.name for t in shown], "prompt_sha256": prompt, "round": number}
        fresh.append((instruction, how))
    numbers = [rng.getrandbits(31) for _ in fresh]

    def write(at: int) -> dict[str, Any]:
        return _example(s, teacher, [*seeds, *made], fresh[at][0], fresh[at][1], numbers[at])

    with ThreadPoolExecutor(s.at_once) as threads:
        for row in threads.map(write, range(len(fresh))):
            out["refused" if "why" in row else "kept"].append(row)
    return out


def _example(s: Synthesize, teacher: Teacher, known: Sequence[Task], instruction: str, how: dict[str, Any], seed: int) -> dict[str, Any]:
    """An instance of a new instruction, as a row; with "why" where it is refused."""
    classification = teacher.classifies(instruction, seed)
    examples = [t for t in known if t.answer and t.classification == classification]
    shown = _rng(seed).sample(examples, min(3, len(examples)))
    found = teacher.instance(instruction, classification, shown, seed)
    row: dict[str, Any] = {"instruction": instruction, "classification": classification, **how}
    if found is None:
        return {**row, "why": "the teacher gave no example in the form that was asked for"}
    given, answer = found
    row |= {"input": given, "answer": answer}
    if answer in (given, instruction):
        return {**row, "why": "the answer repeats the input"}
    if s.least:
        mark = teacher.mark(Task("", instruction, given, answer), seed)
        row |= {"judge": s.judge or s.model, "mark": mark}
        if mark is None or mark < s.least:
            return {**row, "why": f"mark {mark}, needed is {s.least}" if mark else "the judge gave no mark"}
    return row


def _key(s: Synthesize, seeds: Sequence[Task]) -> str:
    """What decides the rows, but for how many and how patiently."""
    own = {k: v for k, v in dump(s).items() if k not in ("n", "out", "at_once", "patience", "barren", "key_env", "seeds")}
    return hashlib.sha256(json.dumps([own, seeds], sort_keys=True).encode()).hexdigest()


def _rounds(journal: Path, key: str) -> list[dict[str, Any]]:
    """The whole rounds that were written down. Raises UserError where they are of another command."""
    if not journal.exists():
        return []
    lines = journal.read_bytes().split(b"\n")[:-1]  # a line without its end was cut off by a death
    found = [json.loads(line) for line in lines]
    if found and found[0].get("key") != key:
        raise UserError(f"{journal}: was begun with other seeds or settings; finish it with those, or remove it")
    return found[1:]


def synthesize(s: Synthesize, told: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Make the rows and write them; the counts. Raises UserError where the teacher goes away, what had come being kept."""
    out = Path(s.out)
    if out.exists():
        raise UserError(f"{out}: is there already; remove it or choose another --out")
    seeds, journal = read_seeds(s.seeds), out.with_name(f".{out.name}.rounds")
    key = _key(s, seeds)
    done = _rounds(journal, key)
    teacher = Teacher(s)
    kept: list[dict[str, Any]] = [row for r in done for row in r["kept"]]
    barren = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    if done:
        told(f"going on after round {len(done)}: {len(kept)} of {s.n} examples")
    journal.write_bytes(b"".join(json.dumps(x).encode() + b"\n" for x in [{"key": key}, *done]))
    with journal.open("ab") as file:
        while len(kept) < s.n:
            made = [Task(f"made:{i}", r["instruction"], r["input"], r["answer"], r["classification"]) for i, r in enumerate(kept)]
            try:
                one = one_round(s, teacher, seeds, made, len(done))
            except UserError as error:
                raise UserError(f"{error}; {len(kept)} of {s.n} examples are kept in {journal}, the same command goes on") from None
            file.write(json.dumps(one).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            done.append(one)
            kept += one["kept"]
            barren = 0 if one["kept"] else barren + 1
            told(f"round {len(done)}: {len(one['kept'])} kept, {len(one['refused'])} refused; {min(len(kept), s.n)} of {s.n}")
            if barren == s.barren:
                whys = Counter(re.sub(r"[\d.]+.*", "", x["why"]).strip() for r in done for x in r["refused"])
                most = ", ".join(f"{why} ({n})" for why, n in whys.most_common(3)) or "the teacher lists no task"
                raise UserError(f"{barren} rounds gave nothing new: {most}; {len(kept)} examples are kept in {journal}; another teacher?")
    return _write(s, out, done, kept[: s.n], journal)


def _write(s: Synthesize, out: Path, done: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]], journal: Path) -> dict[str, Any]:
    told = ("teacher", "seeds", "prompt_sha256", "round", "classification", "judge", "mark")
    chats = [
        Chat(
            messages=[
                Message(role="user", content="\n\n".join(x for x in (r["instruction"], r["input"]) if x)),
                Message(role="assistant", content=r["answer"]),
            ],
            meta={"source": "synthetic", **{k: r[k] for k in told if k in r}},
        )
        for r in kept
    ]
    away = [x for r in done for x in r["refused"]]
    lines = "".join(json.dumps(x, ensure_ascii=False, sort_keys=True) + "\n" for x in away)
    out.with_name(f"{out.stem}.refused.jsonl").write_text(lines, "utf-8")
    write_jsonl(out, chats)
    journal.unlink()
    return {"out": str(out), "examples": len(chats), "rounds": len(done), "refused": len(away)}


def main(argv: list[str]) -> int:
    """Make instruction data; exit code 0."""
    settings = parse(Synthesize, argv, "temper data synthesize", EXAMPLES)
    found = synthesize(settings, lambda line: print(line, file=sys.stderr))
    print(f"{found['out']}: {found['examples']} examples in {found['rounds']} rounds; {found['refused']} refused (see *.refused.jsonl)")
    return 0
