"""Supervised fine-tuning: raise the likelihood of the assistant's words, its end-of-turn token included. Floor 5.

L = -sum_i sum_t m_it log p(x_it | x_i,<t) / sum m_it, both sums over the whole optimiser step (arXiv:2306.04751, sec. 3.2);
m is 1 on the assistant's tokens, 0 on everything else.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from temper.config import Settings, opt
from temper.data.sources import read
from temper.data.split import split
from temper.data.template import attach_default_template, stop_ids
from temper.data.trees import chat_trees
from temper.forest import Forest, Tree
from temper.methods.base import Batching, Job, Prepared, Split, Window, forests, offline
from temper.models.heads import weighted_nll
from temper.models.load import load_policy, resize, save
from temper.runs import Run
from temper.train import Compute, Loss, Optim, State, Step, Term, fit

METRICS = {
    "loss": "negative log-likelihood per learned token, in nats",
    "held_out_loss": "the same on records kept out of training",
}
EXAMPLES = """
  temper sft --model runs/base --data alpaca.json --out runs/sft
  temper sft --model Qwen/Qwen2.5-0.5B --data chats.jsonl --out runs/sft --max-length 1024 --too-long drop
"""


class SFT(Settings):
    """Teach a base model to answer, from demonstrations."""

    model: str = opt(..., "base model: a folder or a Hugging Face name")
    data: str = opt(..., "demonstrations: messages, prompt/completion, Alpaca, or world:demonstrations")
    learn: Literal["all", "last"] = opt("all", "learn every assistant turn, or only the last")
    window: Window = Window()
    split: Split = Split()
    batching: Batching = Batching()
    optim: Optim = Optim(lr=3e-4, schedule="cosine", warmup=0.1)
    compute: Compute = Compute()


def settings(name: str) -> type[Settings]:
    return SFT


def lm_loss(model, batch: Forest) -> Loss:
    """One term, per learned token: the gradient of the head is computed in the forward, the weights being known."""
    total, _ = weighted_nll(model, batch)
    return Loss({"nll": Term(total, per="tokens")}, {})


def held_out_loss(model, trees: Sequence[Tree], microbatch: int) -> float:
    """Mean negative log-likelihood per learned token, in nats."""
    total = weight = 0.0
    with torch.no_grad():
        for _, forest in forests(trees, microbatch, device=model.device):
            total += float(weighted_nll(model, forest)[0])
            weight += forest.weights["tokens"]
    return total / weight


def train(settings: SFT, model, trees, resume: State | None = None) -> Iterator[Step]:
    b, how = settings.batching, settings.compute
    steps = b.steps(len(trees))
    return fit(model, offline(trees, b), lm_loss, steps=steps, optim=settings.optim, seed=b.seed, resume=resume, compute=how)


def prepare(settings: SFT, run: Run) -> Job:
    model, tokenizer = load_policy(settings.model, **settings.compute.placed)
    if attach_default_template(tokenizer):
        resize(model, tokenizer)
    records, report = read(settings.data, "chat", skip_bad=settings.window.skip_bad)
    kept, out = split(records, settings.split.held_out, settings.batching.seed)
    trees, cut = chat_trees(tokenizer, kept, model, settings.window, learn=settings.learn)
    tests, test_cut = chat_trees(tokenizer, out, model, settings.window, learn=settings.learn)
    return Job(
        total=settings.batching.steps(len(trees)),
        steps=lambda resume: train(settings, model, trees, resume),
        save=lambda path: save(model, tokenizer, path, stop=stop_ids(tokenizer)),
        card={
            "source": report.summary(),
            "records": len(trees),
            "held_out": len(tests),
            "tokens": sum(len(s.tokens) for t in trees for s in t),
            "learned_tokens": sum(sum(map(bool, s.target or ())) for t in trees for s in t),
            "kept": cut.summary(),
            "kept_held_out": test_cut.summary() if out else "",
        },
        evaluate=(lambda: {"held_out_loss": held_out_loss(model, tests, settings.batching.tokens_per_microbatch)}) if tests else None,
        policy=(model, tokenizer),
        asks=[chat.messages[:-1] for chat in out[:4] if chat.messages[-1].role == "assistant"],
        prepared=Prepared(kept, trees, report, cut, tokenizer, model, lm_loss),
    )
