"""A process reward model: P(right) of each step of a solution, read at the step's last token. Floor 5.

L = -[y log p + (1 - y) log(1 - p)] per labelled step (arXiv:2312.08935 eq. 2), or over wrong, neutral, right (arXiv:2305.20050). Labels
are people's (`--data`), or those of the model's own answers to `--prompts`: exact on the world's sums, or by rollouts (Math-Shepherd).
After the first error nothing is learned: no rater says what a step is worth that follows a wrong one (arXiv:2305.20050). The solutions of
one prompt are chains of steps that share their beginnings, in one tree. `--outcome` gives the outcome reward model (arXiv:2110.14168): the
same network on the same solutions, with one label, at the end. Deviation: the last step is read where the turn ends, not one token before.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from temper.config import Settings, UserError, opt
from temper.data.split import split
from temper.data.steps import By, step_trees
from temper.data.store import mixed
from temper.data.template import chat_template, stop_ids
from temper.data.trees import where
from temper.forest import Forest, Tree
from temper.judges.process import CLASSES, ProcessReward, exact_labels, right_answer, solutions
from temper.losses.reward import step_loss
from temper.methods.base import Asked, Batching, Job, Split, Window, asked, forests, learn, left_out, list_left_out
from temper.models.adapt import Adapter
from temper.models.heads import scalar
from temper.models.load import export, load_policy, load_scalar
from temper.records import Steps, read_jsonl, write_jsonl
from temper.rollout import Request, Sampling
from temper.runs import Run
from temper.stats.intervals import mean_interval, share_interval
from temper.stats.process import first_error, located
from temper.train import Compute, Loss, Optim, State, Step, Term, ranks

METRICS = {
    "loss": "cross-entropy per labelled step, in nats",
    "accuracy": "share of labelled steps whose P(right) is on the label's side of a half",
    "held_out_loss": "loss on solutions of prompts kept out of training",
    "held_out_accuracy": "accuracy on these",
    "held_out_steps": "labelled steps of these",
    "held_out_first_error": "of solutions with a wrong step, the share whose first wrong step is exactly the first below a half",
    "held_out_no_error": "of solutions without one, the share in which no step is below a half",
    "held_out_f1": "harmonic mean of these two (arXiv:2412.06559)",
}  # shares and losses come with NAME_low and NAME_high, the ends of their 95% intervals, clustered by prompt
EXAMPLES = """
  temper process-reward --model runs/sft --data prm800k.jsonl --out runs/prm --too-long drop
  temper process-reward --model runs/sft --prompts sums.jsonl --labels oracle --out runs/prm
  temper process-reward --model runs/sft --prompts gsm8k-train.jsonl.gz --labels rollouts --rollouts 8 --out runs/prm
  temper process-reward --model runs/sft --data runs/prm/steps.jsonl --outcome --out runs/orm
"""


class ProcessRewardSettings(Settings):
    """Train a model that says of each step of a solution whether it is right.

    For best-of-n, search over steps and step rewards in PPO and GRPO, where a right answer by wrong steps is not enough; where only the
    result counts, a check of it or --outcome is cheaper. Sources: arXiv:2305.20050, arXiv:2312.08935.
    """

    model: str = opt(..., "the SFT model: the reward model starts from it, and it answers --prompts")
    data: str | None = opt(None, "solutions with labelled steps: PRM800K, Math-Shepherd, prompt/completions/labels, or a run's steps.jsonl")
    prompts: str | None = opt(None, "instead of --data: prompts that the model answers, its answers are labelled")
    labels: Literal["oracle", "rollouts"] = opt("rollouts", "of answers to --prompts: exact (the world's sums), or by completing each step")
    samples_per_prompt: int = opt(4, "answers to each of --prompts", ge=1)
    rollouts: int = opt(8, "completions from each step, for --labels rollouts", ge=1)
    hard: bool = opt(True, "a label above 0 is 1; --no-hard keeps shares of rollouts as they are")
    until_error: bool = opt(True, "learn nothing after a solution's first wrong step")
    neutral: Literal["skip", "right", "class"] = opt("skip", "neutral steps (PRM800K): not learned, right, or a class between")
    outcome: bool = opt(False, "one label at the end instead: an outcome reward model on the same solutions")
    aggregate: Literal["product", "minimum", "last", "mean"] = opt("product", "the score of an answer from its steps'")
    steps_by: Literal["line", "sentence"] | None = opt(None, "what a step is; default: a line, of the world's answers a sentence")
    sampling: Sampling = Sampling()
    window: Window = Window()
    split: Split = Split()
    batching: Batching = Batching(batch=32)
    optim: Optim = Optim(lr=1e-3, schedule="cosine", warmup=0.05)
    compute: Compute = Compute()
    adapters: Adapter = Adapter()


def settings(name: str) -> type[Settings]:
    return ProcessRewardSettings


def count_steps(trees: Sequence[Tree]) -> dict[str, float]:
    return {"steps": float(sum(segment.labels["counted"] for tree in trees for segment in tree))}


def read_steps(model: Any, batch: Forest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(raw scores, labels, over how many solutions each counts) of the labelled steps, read at their last tokens."""
    counted = batch.columns["counted"]
    here = (counted > 0).nonzero()[:, 0]
    return scalar(model, batch, batch.last[here]), batch.columns["label"][here], counted[here]


def agrees(raw: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """[n] 1 where P(right) is on the label's side of a half."""
    p = torch.tensor(ProcessReward.chance(raw), device=label.device)
    return ((p >= 0.5) == (label >= 0.5)).float()


def loss(model: Any, batch: Forest) -> Loss:
    raw, label, counted = read_steps(model, batch)
    total, n = (step_loss(raw, label) * counted).sum(), counted.sum()
    return Loss({"nll": Term(total, per="steps")}, {"accuracy": ((agrees(raw.detach(), label) * counted).sum(), n)})


def learned(record: Steps, s: ProcessRewardSettings) -> Steps:
    """The record with the labels that are learned. Raises ValueError for a label outside [0, 1]."""
    if any(x is not None and not 0 <= x <= 1 for x in record.labels):
        raise ValueError(f"labels {record.labels}; a label is between 0 (wrong) and 1 (right), or none")
    ratings = record.meta.get("ratings") or [None] * len(record.labels)
    neutral = {"skip": None, "right": 1.0, "class": 0.5}[s.neutral]
    known = [neutral if x is None and rating == 0 else x for x, rating in zip(record.labels, ratings, strict=True)]
    hard = [x if x is None or (s.neutral == "class" and x == 0.5) or not s.hard else float(x > 0) for x in known]
    error = first_error(hard, 0.5 if s.hard else 1e-9)
    if s.outcome:
        right = record.meta.get("correct", float(error < 0) if any(x is not None for x in hard) else None)
        return record.model_copy(update={"labels": [*[None] * (len(hard) - 1), None if right is None else float(right)]})
    if s.until_error and error >= 0:
        hard[error + 1 :] = [None] * (len(hard) - error - 1)
    return record.model_copy(update={"labels": hard})


def steps_of(records: Sequence[Any]) -> By:
    """What a step is where it is not said: a sentence of the world's answers, else a line."""
    return "sentence" if all("ask" in record.meta for record in records) else "line"


def make_steps(s: ProcessRewardSettings, prompts: Asked) -> list[Steps]:
    """The model's answers to the prompts, cut into steps and labelled."""
    policy, tokenizer = load_policy(s.model, **s.compute.placed)
    kept, ids = prompts.every()
    by = s.steps_by or steps_of(kept)
    for prompt in kept:  # a prompt that cannot be checked is found before anything is sampled
        right_answer(prompt, "") if s.labels == "rollouts" else exact_labels(prompt, "", by)
    request = Request(ids, sampling=s.sampling, stop=stop_ids(tokenizer), n=s.samples_per_prompt, seed=("process-reward", s.batching.seed))
    found = solutions(policy, tokenizer, kept, request, by, s.rollouts if s.labels == "rollouts" else 0)
    if not found:
        raise UserError(f"{s.model}: no answer to {s.prompts} ended within --max-new {s.sampling.max_new}; raise it")
    return found


def chains(tree: Tree) -> list[list[int]]:
    """The labelled steps of each solution of a tree, from the first to the last."""
    inner = {segment.parent for segment in tree}
    out = []
    for leaf in range(1, len(tree)):
        if leaf in inner:
            continue
        path, at = [], leaf
        while at > 0:
            path.append(at)
            at = tree[at].parent
        out.append([k for k in reversed(path) if tree[k].labels["counted"]])
    return out


def held_out(model: Any, trees: Sequence[Tree], microbatch: int) -> dict[str, float]:
    """Figures on the solutions of prompts kept out of training; intervals are clustered by prompt."""
    right, cost, prompt, found, true = [], [], [], [], []
    with torch.no_grad():
        for index, forest in forests(trees, microbatch, count_steps, model.device):
            raw, label, _ = read_steps(model, forest)
            steps = iter(zip(ProcessReward.chance(raw), agrees(raw, label).tolist(), step_loss(raw, label).tolist(), strict=True))
            for i in index:
                here = {k: next(steps) for k, segment in enumerate(trees[i]) if segment.labels["counted"]}
                right += [ok for _, ok, _ in here.values()]
                cost += [x for *_, x in here.values()]
                prompt += [i] * len(here)
                for chain in filter(None, chains(trees[i])):
                    found.append(first_error([here[k][0] for k in chain]))
                    true.append(first_error([trees[i][k].labels["label"] for k in chain]))
    if not right:
        return {"held_out_steps": 0}
    errors = located(found, true)
    named = {
        "held_out_loss": mean_interval(cost, prompt),
        "held_out_accuracy": share_interval(right, prompt),
        "held_out_first_error": errors.wrong,
        "held_out_no_error": errors.right,
    }
    out: dict[str, float] = {"held_out_steps": len(right)}
    for name, interval in named.items():
        if interval:
            out |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return out | ({"held_out_f1": errors.f1} if errors.f1 is not None else {})


def gather(s: ProcessRewardSettings, run: Run, tokenizer: Any, model: Any) -> tuple[list[Steps], str, list[dict[str, str]]]:
    """The solutions, from the file or from the model itself (then kept in steps.jsonl), where they come from, and what was left out."""
    if s.data is not None and s.prompts is None:
        found = mixed(s.data, "steps", s.window.skip_bad, s.batching.seed)
        return found.records, found.report.summary(), left_out([found.report], [])
    if s.data is not None or s.prompts is None:
        raise UserError("give either --data, solutions with labelled steps, or --prompts, which the model answers")
    path, twice = run.file("steps.jsonl"), s.labels == "rollouts"  # what completes an answer has as much room as the answer
    prompts = asked(s.prompts, run, tokenizer, model, s.window, room=s.sampling.max_new * (1 + twice), seed=s.batching.seed)
    with ranks.leader_first():
        if not path.exists():
            write_jsonl(path, make_steps(s, prompts))
    made = read_jsonl(path, Steps)
    said = f"{prompts.card['source']}; {prompts.card['kept']}; {len(made)} different answers that ended, labels: {s.labels}"
    return made, said, prompts.left


def train(settings: ProcessRewardSettings, model: Any, trees: Sequence[Tree], resume: State | None = None) -> Iterator[Step]:
    s = settings
    return learn(model, trees, loss, s.batching, s.optim, resume, s.compute, count_steps)


def prepare(settings: ProcessRewardSettings, run: Run) -> Job:
    s, b = settings, settings.batching
    labels = CLASSES if s.neutral == "class" and not s.outcome else ("score",)
    model, tokenizer = load_scalar(s.model, seed=b.seed, labels=labels, **s.compute.placed, adapters=s.adapters)
    chat_template(tokenizer)
    records, source, left = gather(s, run, tokenizer, model)
    by = s.steps_by or steps_of(records)
    for i, record in enumerate(records):
        try:
            records[i] = learned(record, s)
        except ValueError as error:
            raise UserError(f"{where(record, i)}: {error}") from None
    kept, out = split(records, s.split.held_out, b.seed)
    (trees, cut), (tests, test_cut) = (step_trees(tokenizer, part, model, s.window, by) for part in (kept, out))
    steps = count_steps(trees)["steps"]
    if not steps:
        raise UserError(f"{s.data or s.prompts}: no step has a label to learn from")
    model.config.temper_process = {"by": by, "outcome": s.outcome, "aggregate": "last" if s.outcome else s.aggregate}
    return Job(
        total=b.steps(len(trees)),
        steps=lambda resume: train(s, model, trees, resume),
        save=lambda path: export(model, tokenizer, path),
        card={
            "source": source,
            "prompts": len(trees),
            "solutions": sum(len(chains(tree)) for tree in trees),
            "steps": int(steps),
            "right": sum(x.labels["label"] * x.labels["counted"] for tree in trees for x in tree) / steps,
            "held_out": len(tests),
            "tokens": cut.tokens,
            "kept": cut.summary(),
            "kept_held_out": test_cut.summary() if out else "",
            "left_out": list_left_out(run, [*left, *left_out([], [cut, test_cut])]),
        },
        evaluate=(lambda: held_out(model, tests, b.tokens_per_microbatch)) if tests else None,
    )
