"""What is measured of a trial: the content of its evaluation.json, {"metrics": {name: {mean, low, high, n}}, ...}. Floor 8.

A measure is one function of a `Subject`, registered by name; the file of an experiment names it. Intervals are 95%, over prompts. `items`
are a metric's values by prompt, the same prompts for every trial: what differences between arms are paired by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from temper.config import UserError
from temper.data.template import render_prompt, stop_ids
from temper.data.trees import text_trees
from temper.evals.harbour import Answers, Evaluation, ask_all
from temper.evals.harbour import measure as evaluate
from temper.judges.process import ProcessReward, exact_labels
from temper.judges.rating import Answer
from temper.methods.sft import held_out_loss
from temper.models.load import load_policy
from temper.records import Chat, Prompt, read_jsonl
from temper.rollout import Request, Sampling, sample
from temper.stats.best_of_n import expected
from temper.stats.intervals import mean_interval, share_interval, win_rate
from temper.world import Ask, correct, dataset, gold
from temper.world.lookups import RELATIONS

SUMS = 400  # held-out sums that are asked
POOL, CHOICES = 200, 16  # held-out sums, and the answers to each that a process reward model chooses from
DOCUMENTS = 400  # held-out documents whose likelihood says what was forgotten
MAX_NEW = 64


class Subject(NamedTuple):
    """What is measured: a trial's folder, the run that it started from and how that is evaluated, the trial's seed."""

    folder: Path
    run: Path
    how: Evaluation
    seed: int = 0


Found = dict[str, Any]
MEASURES: dict[str, Callable[[Subject], Found]] = {}


def measure(make: Callable[[Subject], Found]) -> Callable[[Subject], Found]:
    MEASURES[make.__name__] = make
    return make


@measure
def policy(s: Subject) -> Found:
    """Gold and its parts, wins over SFT, KL and proxy: what the run's own stages are measured by."""
    others = {"sft": s.run / "sft", "reward": s.run / "reward"}
    found = evaluate(s.folder, stages={role: path for role, path in others.items() if path.exists()}, how=s.how)
    by: dict[int, list[float]] = {}
    for row in found["sampled"]:
        by.setdefault(row["prompt"], []).append(row["gold"])
    return {**found, "items": {"gold": [float(np.mean(scores)) for scores in by.values()]}}


@measure
def chosen(s: Subject) -> Found:
    """The answers that best of n chose for the evaluation's prompts, as `policy` measures a model's."""
    prompts = dataset("evaluation", n=s.how.prompts_each, split="evaluation")
    texts = [_text(p.messages) for p in prompts]
    picked = {_text(c.messages[:-1]): c.messages[-1].content for c in read_jsonl(s.folder / "chosen.jsonl", Chat)}
    other: dict[int, list[float]] = {}
    for row in json.loads((s.run / "sft" / "evaluation.json").read_bytes())["sampled"]:
        other.setdefault(row["prompt"], []).append(row["gold"])
    rows = [(i, gold(Ask.of(p), picked[t]).total, t) for i, (p, t) in enumerate(zip(prompts, texts, strict=True)) if t in picked]
    if not rows:
        raise UserError(f"{s.folder}: no answer to a prompt of the evaluation; best-of-n must be asked world:evaluation?split=evaluation")
    pairs = [(score, theirs, text) for i, score, text in rows for theirs in other[i]]
    last = json.loads((s.folder / "curve.json").read_bytes())["rows"][-1]
    found = {
        "gold": mean_interval([score for _, score, _ in rows], [text for *_, text in rows]),
        "win_rate_vs_sft": win_rate([a for a, *_ in pairs], [b for _, b, _ in pairs], [text for *_, text in pairs]),
        "length": mean_interval([len(picked[text].split()) for *_, text in rows]),
    }
    return {"metrics": {**{name: x.to_dict() for name, x in found.items()}, "kl": last["kl"], "proxy": last["reward"]}}


def _text(messages: Sequence[Any]) -> str:
    return "\n".join(m.content for m in messages)


@measure
def sums(s: Subject) -> Found:
    """Held-out sums in steps: right results, greedy and sampled; right traces among the right results."""
    model, tokenizer = load_policy(str(s.folder))
    prompts = dataset("sums", n=SUMS, split="evaluation")
    greedy = ask_all(model, tokenizer, prompts, 1, MAX_NEW, 0.0, ("sums greedy",))
    sampled = ask_all(model, tokenizer, prompts, s.how.samples, MAX_NEW, s.how.temperature, ("sums", s.how.eval_seed))
    found: Found = {"metrics": {}, "items": {}}
    for name, answers in ("accuracy", greedy), ("sampled_accuracy", sampled):
        rows = [(i, p, text) for i, (p, group) in enumerate(zip(prompts, answers.text, strict=True)) for text in group]
        right = [correct(Ask.of(p), text) for _, p, text in rows]
        found["metrics"][name] = share_interval(right, [i for i, *_ in rows]).to_dict()
        found["items"][name] = np.reshape(right, (len(prompts), -1)).mean(1).tolist()
        traces = [(i, trace(p, text)) for (i, p, text), ok in zip(rows, right, strict=True) if ok]
        if traces:
            found["metrics"][name.replace("accuracy", "traces")] = share_interval([t for _, t in traces], [i for i, _ in traces]).to_dict()
    return found


def trace(prompt: Prompt, text: str) -> bool:
    """Whether every step of an answer to a sum is right."""
    labels = exact_labels(prompt, text, "sentence")
    return bool(labels) and min(labels) == 1.0


@measure
def selection(s: Subject) -> Found:
    """A process or outcome reward model as what chooses among the SFT model's answers to held-out sums: for n = 1, 4, 16 the share of right
    results of the best of n, and among these the share of right traces, by the estimator over all subsets of n."""
    policy, tokenizer = load_policy(str(s.run / "sft"))
    prompts = dataset("sums", n=POOL, split="evaluation")
    ids = [render_prompt(tokenizer, p.messages) for p in prompts]
    how = Sampling(temperature=1.0, max_new=MAX_NEW)
    groups = sample(policy, Request(ids, sampling=how, stop=stop_ids(tokenizer), n=CHOICES, seed=("selection", s.seed)))
    judge = ProcessReward(s.folder)
    table = []
    for prompt, own, group in zip(prompts, ids, groups, strict=True):
        texts = [str(tokenizer.decode(a.tokens, skip_special_tokens=True)).strip() for a in group]
        rated = judge.rate([Answer(prompt, own, a.tokens, text, a.finish == "stop") for a, text in zip(group, texts, strict=True)])
        score = [-1.0 if x is None or a.finish != "stop" else x for x, a in zip(rated, group, strict=True)]
        right = np.array([correct(Ask.of(prompt), text) for text in texts], float)
        table.append((score, right, right * [trace(prompt, text) for text in texts]))
    found = {}
    for n in (1, 4, CHOICES):
        right, whole = (np.array([expected(row[0], row[k], n) for row in table]) for k in (1, 2))
        found[f"right@{n}"] = mean_interval(right)
        found[f"traces@{n}"] = _share_of(whole, right)
    found[f"wrong_traces@{CHOICES}"] = mean_interval(right - whole)
    return {"metrics": {name: x.to_dict() for name, x in found.items()}}


def _share_of(part: np.ndarray, whole: np.ndarray) -> Any:
    """The ratio of two means over prompts, with the interval of its linearisation."""
    ratio = float(part.mean() / whole.mean())
    return mean_interval(ratio + (part - ratio * whole) / whole.mean())


@measure
def memory(s: Subject) -> Found:
    """New facts learned and what was forgotten: `told` in held-out phrasings, beside all of `policy`; nats per token of a document."""
    model, tokenizer = load_policy(str(s.folder))
    found = policy(s) if tokenizer.chat_template else {"metrics": {}}
    chats = dataset("news", n=SUMS, split="evaluation")
    if tokenizer.chat_template:
        prompts = [Prompt(messages=c.messages[:-1], meta=c.meta) for c in chats]
        answers: Answers = ask_all(model, tokenizer, prompts, 1, MAX_NEW, 0.0, ("news",))
        right = [told(c, text) for c, (text,) in zip(chats, answers.text, strict=True)]
        facts = ["|".join(c.meta["ask"]["slots"].values()) for c in chats]
        found["metrics"]["told"] = share_interval(right, facts).to_dict()
    documents = dataset("documents", n=DOCUMENTS, seed=0, split="validation")
    trees, _ = text_trees(tokenizer, documents, model.config.max_position_embeddings)
    found["metrics"]["document_nats"] = mean_interval([held_out_loss(model, [tree], 8192) for tree in trees]).to_dict()
    return found


def told(chat: Chat, answer: str) -> bool:
    """Whether an answer tells the new fact that it was asked for, and no other value of that relation."""
    said = {x for x in RELATIONS[chat.meta["ask"]["slots"]["relation"]].values if re.search(rf"\b{re.escape(x)}\b", answer, re.IGNORECASE)}
    return said == {chat.meta["told"]}
