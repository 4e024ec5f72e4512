"""What a stage does on the embedded world, measured exactly: gold and its parts, facts, honesty, harm, refusals, KL, wins. Floor 5.

Whether it answers and what it knows (`answers`, `correct...`, `arithmetic`, `honest`) are read from the greedy answer, everything else from
answers sampled at the temperature of the evaluation. Intervals are 95%; observations of one prompt are one cluster (of
one craft, for harm and its safe twins). A base model is given
the bare question, a model with a chat template the chat.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from temper.config import Settings, opt
from temper.data.packing import pack
from temper.data.template import render_prompt, stop_ids
from temper.data.trees import limit_of
from temper.forest import Segment, plant
from temper.judges.reward_model import RewardModel
from temper.models.heads import token_logp
from temper.models.load import load_policy
from temper.records import Prompt
from temper.rollout import Request, Sampling, sample
from temper.stats.intervals import Interval, mean_interval, paired_difference, share_interval, win_rate
from temper.world import Ask, answered, complied, correct, dataset, features, gold, refused
from temper.world.oracles import Enumerated, above_frontier, enumerate_answers, frontier_at, kl_gold_of

METRICS = {  # name -> (what it is, whether more is better: 1, less: -1, neither: 0)
    "gold": ("exact gold score of sampled answers", 1),
    "gold_helpful": ("its helpful part", 1),
    "gold_harmless": ("its harmless part", 1),
    "gold_honest": ("its honest part", 1),
    "gold_concise": ("its concise part", 1),
    "gold_format": ("its format part", 1),
    "gold_gained": ("gold above the stage it came from, paired by prompt", 1),
    "win_rate_vs_sft": ("share of sampled answers with more gold than SFT's to the same prompt, ties half", 1),
    "answers": ("share of prompts whose greedy reply is an answer, a refusal or an honest 'I do not know'", 1),
    "correct": ("facts asked in phrasings and about people and places met in SFT, greedy", 1),
    "correct_phrasing": ("facts asked in phrasings never met in SFT, greedy", 1),
    "correct_entity": ("facts about people and places never asked about in SFT, greedy", 1),
    "arithmetic": ("sums in steps, greedy", 1),
    "honest": ("'I do not know' where the fact was never stated, greedy", 1),
    "harmful": ("sampled answers to unsafe prompts that help with the harm", -1),
    "over_refusal": ("sampled refusals of safe prompts that look unsafe", -1),
    "sycophancy": ("sampled answers that take over a false belief stated by the user", -1),
    "length": ("words of a sampled answer", 0),
    "diversity": ("different answers among the samples of a prompt, as a share", 0),
    "kl": ("nats from SFT: summed log-ratio over sampled tokens (k1), mean over answers", 0),
    "proxy": ("the reward model's score of sampled answers", 0),
}


class Evaluation(Settings):
    """How a stage is evaluated."""

    prompts_each: int = opt(400, "held-out prompts", ge=24)
    samples: int = opt(2, "answers sampled to each", ge=1)
    temperature: float = opt(0.7, "of the samples, and of the log-probs that KL and frontier compare", gt=0)
    max_new: int = opt(64, "tokens an answer may have", ge=1)
    eval_seed: int = opt(0, "of the samples", ge=0)
    enumerable: int = opt(6, "prompts whose answers are enumerated for the exact frontier", ge=0)


@dataclass
class Answers:
    """The replies of one model to one list of prompts: text[i][k], token ids ids[i][k], whether they ended."""

    text: list[list[str]]
    ids: list[list[list[int]]]
    prompt_ids: list[list[int]]


def ask_all(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], n: int, max_new: int, temperature: float, seed: Sequence[int | str]
) -> Answers:
    """n answers to each prompt."""
    ids = [render_prompt(tokenizer, p.messages) for p in prompts]
    groups = sample(
        model, Request(ids, sampling=Sampling(temperature=temperature, max_new=max_new), stop=stop_ids(tokenizer), n=n, seed=seed)
    )
    text = [[tokenizer.decode(a.tokens, skip_special_tokens=True).strip() for a in g] for g in groups]
    return Answers(text, [[a.tokens for a in g] for g in groups], ids)


def summed_kl(policy: Any, reference: Any, answers: Answers, temperature: float, budget: int = 8192) -> list[float]:
    """Per answer the sum of k1 = log pi - log ref over its tokens: unbiased for the sequence KL, may be negative."""
    trees = [
        [Segment(p, [0.0] * len(p)), *(Segment(a, [1.0] * len(a), parent=0) for a in group)]
        for p, group in zip(answers.prompt_ids, answers.ids, strict=True)
    ]
    out: list[list[float]] = [[] for _ in trees]
    with torch.no_grad():
        for group in pack([sum(len(s.tokens) for s in t) for t in trees], budget):
            forest = plant([trees[i] for i in group]).to(policy.device)
            ratio = token_logp(policy, forest, temperature=temperature) - token_logp(reference, forest, temperature=temperature)
            parts = iter(ratio.split([len(s.tokens) for i in group for s in trees[i][1:]]))
            for i in group:
                out[i] = [float(next(parts).sum()) for _ in trees[i][1:]]
    return [k for group in out for k in group]


def measure(folder: Path, *, stages: dict[str, Path], how: Evaluation, log: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Evaluate the model in `folder`: the content of its evaluation.json.

    stages: what to compare with, where it exists: "sft" (reference of KL and wins), "reward" (proxy), "parent" (gold gained). A
    stage compared with must have been evaluated before with the same settings.
    """
    model, tokenizer = load_policy(str(folder))
    prompts = dataset("evaluation", n=how.prompts_each, split="evaluation")
    asks = [Ask.of(p) for p in prompts]
    log("greedy answers")
    greedy = ask_all(model, tokenizer, prompts, 1, how.max_new, 0.0, ("evaluation greedy",))
    log("sampled answers")
    sampled = ask_all(model, tokenizer, prompts, how.samples, how.max_new, how.temperature, ("evaluation", how.eval_seed))
    flat = [(i, asks[i], text) for i, group in enumerate(sampled.text) for text in group]
    scores = [gold(ask, text) for _, ask, text in flat]
    texts = ["\n".join(m.content for m in p.messages) for p in prompts]  # some prompts come twice: they are one cluster
    cluster = [texts[i] for i, _, _ in flat]
    total = [s.total for s in scores]

    found: dict[str, Interval] = {"gold": mean_interval(total, cluster)}
    for part in "helpful", "harmless", "honest", "concise", "format":
        found[f"gold_{part}"] = mean_interval([getattr(s, part) for s in scores], cluster)
    found |= _shares(asks, texts, greedy, flat)
    found["length"] = mean_interval([len(text.split()) for _, _, text in flat], cluster)
    if how.samples > 1:
        found["diversity"] = mean_interval([(len(set(g)) - 1) / (len(g) - 1) for g in sampled.text])

    log("comparisons")
    before = {name: total if stages[name] == folder else _gold_of(stages[name]) for name in ("sft", "parent") if name in stages}
    if "parent" in before:
        found["gold_gained"] = paired_difference(total, before["parent"], cluster)
    if "sft" in before:
        k = how.samples  # against another sample of SFT's: one of the same number was drawn with the same random numbers
        other = [before["sft"][i - i % k + (i + 1) % k] for i in range(len(total))]
        found["win_rate_vs_sft"] = win_rate(total, other, cluster)
        reference, _ = load_policy(str(stages["sft"]))
        found["kl"] = mean_interval(summed_kl(model, reference, sampled, how.temperature), cluster)
    if "reward" in stages and tokenizer.chat_template:
        scored = RewardModel(stages["reward"]).score_answers([prompts[i].messages for i, _, _ in flat], [t for _, _, t in flat])
        found["proxy"] = mean_interval(scored, cluster)

    out: dict[str, Any] = {"metrics": {name: interval.to_dict() for name, interval in found.items()}}
    out["sampled"] = [{"prompt": i, "answer": text, "gold": s.total} for (i, _, text), s in zip(flat, scores, strict=True)]
    out["gold_deviation"] = float(np.std(total))
    out["helpful_deviation"] = float(np.std([s.helpful for s in scores]))
    out["side_by_side"] = side_by_side(model, tokenizer, how)
    if "sft" in stages and how.enumerable:
        log("exact frontier")
        known = None if stages["sft"] == folder else json.loads((stages["sft"] / "evaluation.json").read_bytes())["enumerated"]
        out["frontier"], enumerated = frontier_check(model, tokenizer, how, known)
        if known is None:
            out["enumerated"] = enumerated
    return out


def _shares(asks: Sequence[Ask], texts: Sequence[str], greedy: Answers, flat) -> dict[str, Interval]:
    """The shares that only some of the prompts speak of; one without prompts is left out.

    Clusters are prompts; for harm and its safe twins the crafts, of which there are few.
    """
    one = [g[0] for g in greedy.text]

    def over(test, pick) -> list[tuple[str, bool]]:
        return [(name, test(ask, text)) for name, ask, text in zip(texts, asks, one, strict=True) if pick(ask)]

    def lookup(ask: Ask, phrasing: str, entity: str) -> bool:
        return ask.kind == "lookup" and ask.tags["answerable"] and ask.tags["phrasing"] == phrasing and ask.tags["entity"] == entity

    picked = {
        "answers": over(answered, lambda a: True),
        "correct": over(correct, lambda a: lookup(a, "seen", "seen")),
        "correct_phrasing": over(correct, lambda a: lookup(a, "held_out", "seen")),
        "correct_entity": over(correct, lambda a: lookup(a, "seen", "held_out")),
        "arithmetic": over(correct, lambda a: a.kind == "arithmetic"),
        "honest": over(lambda a, t: features(a, t)["right_idk"] > 0, lambda a: a.kind == "unknown"),
    }
    sampled = {
        "harmful": [(a.slots["task"], complied(a, t)) for _, a, t in flat if a.tags.get("unsafe")],
        "over_refusal": [(a.slots["task"], refused(a, t)) for _, a, t in flat if a.tags.get("twin")],
        "sycophancy": [(texts[i], features(a, t)["endorses_false"] > 0) for i, a, t in flat if a.tags.get("belief") == "wrong"],
    }
    found = {**picked, **sampled}
    return {name: share_interval([v for _, v in x], [c for c, _ in x]) for name, x in found.items() if x}


def _gold_of(folder: Path) -> list[float]:
    return [row["gold"] for row in json.loads((folder / "evaluation.json").read_bytes())["sampled"]]


def side_by_side(model: Any, tokenizer: Any, how: Evaluation) -> list[dict[str, Any]]:
    """The 24 fixed prompts: all of them, with one sampled answer each and its gold parts."""
    prompts = dataset("side_by_side", n=24)
    answers = ask_all(model, tokenizer, prompts, 1, how.max_new, how.temperature, ("side by side", how.eval_seed))
    out = []
    for prompt, (text,) in zip(prompts, answers.text, strict=True):
        score = gold(Ask.of(prompt), text)
        parts = {part: getattr(score, part) for part in ("total", "helpful", "harmless", "honest", "concise", "format")}
        out.append({"messages": [m.model_dump() for m in prompt.messages], "kind": Ask.of(prompt).kind, "answer": text, "gold": parts})
    return out


def enumerated_logp(
    model: Any, tokenizer: Any, prompt: Prompt, answers: Sequence[str], temperature: float, children: int = 256
) -> np.ndarray:
    """log p of each answer with its end of turn, [K]: the prompt computed once for every `children` of them."""
    head, ids = _tokens(tokenizer, prompt, answers)
    out = []
    with torch.no_grad():
        for i in range(0, len(ids), children):
            some = ids[i : i + children]
            forest = plant([[Segment(head, [0.0] * len(head)), *(Segment(a, [1.0] * len(a), parent=0) for a in some)]]).to(model.device)
            out += [float(part.double().sum()) for part in token_logp(model, forest, temperature=temperature).split([len(a) for a in some])]
    return np.array(out)


def _tokens(tokenizer: Any, prompt: Prompt, answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    stop = stop_ids(tokenizer)[0]
    return render_prompt(tokenizer, prompt.messages), [
        [*tokenizer.encode(a, add_special_tokens=False, verbose=False), stop] for a in answers
    ]


def _fitting(model: Any, tokenizer: Any, prompt: Prompt, answers: Sequence[str]) -> list[str]:
    """The answers that the model's window has room for."""
    window, _ = limit_of(model, None)
    head, ids = _tokens(tokenizer, prompt, answers)
    return [a for a, own in zip(answers, ids, strict=True) if window is None or len(head) + len(own) <= window]


def frontier_check(
    policy: Any, tokenizer: Any, how: Evaluation, reference: list[list[float]] | None
) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """On prompts whose grammatical answers can be listed: the policy's exact KL and gold, and the most gold that KL could buy.

    reference: what this returned second for the reference, the log-probabilities of every answer; None: the policy is the reference.
    """
    out: list[dict[str, Any]] = []
    listed: list[list[float]] = []
    for k, prompt in enumerate(dataset("enumerable", n=how.enumerable)):
        ask = Ask.of(prompt)
        answers = _fitting(policy, tokenizer, prompt, enumerate_answers(ask))
        if not answers:
            listed.append([])
            continue
        score = np.array([gold(ask, a).total for a in answers])
        p = enumerated_logp(policy, tokenizer, prompt, answers, how.temperature)
        listed.append(p.tolist())
        q = p if reference is None else np.array(reference[k])
        point = kl_gold_of(p, q, score)
        out.append(
            {
                "prompt": prompt.messages[-1].content,
                "answers": len(answers),
                "mass": float(np.exp(p).sum()),
                "reference_mass": float(np.exp(q).sum()),
                "kl": point.kl,
                "gold": point.gold,
                "reference_gold": kl_gold_of(q, q, score).gold,
                "frontier_gold": frontier_at([Enumerated(q, score)], point.kl).gold,
                "above": above_frontier(p, q, score),
            }
        )
    return out, listed


class Probe:
    """A quick look during training: gold, proxy and KL of sampled answers to a few held-out prompts."""

    def __init__(
        self, policy: Any, tokenizer: Any, how: Evaluation, *, reference: str | None, reward: str | None, prompts: int = 96
    ) -> None:
        self.policy, self.tokenizer, self.how = policy, tokenizer, how
        self.prompts = dataset("evaluation", n=prompts, seed=1, split="evaluation")
        self.reference = load_policy(reference, device=policy.device)[0] if reference else None
        self.reward = RewardModel(reward, device=policy.device) if reward else None

    def __call__(self) -> dict[str, float]:
        answers = ask_all(
            self.policy, self.tokenizer, self.prompts, 1, self.how.max_new, self.how.temperature, ("probe", self.how.eval_seed)
        )
        texts = [t for (t,) in answers.text]
        out = {"gold": float(np.mean([gold(Ask.of(p), t).total for p, t in zip(self.prompts, texts, strict=True)]))}
        if self.reward:
            out["proxy"] = float(np.mean(self.reward.score_answers([p.messages for p in self.prompts], texts)))
        if self.reference is not None:
            out["kl"] = float(np.mean(summed_kl(self.policy, self.reference, answers, self.how.temperature)))
        return out
