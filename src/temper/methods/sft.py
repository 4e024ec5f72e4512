"""Supervised fine-tuning: raise the likelihood of the assistant's words, its end-of-turn token included. Floor 5.

L = -sum_i sum_t m_it log p(x_it | x_i,<t) / sum m_it, both sums over the whole optimiser step (arXiv:2306.04751, sec. 3.2);
m is 1 on the assistant's tokens, 0 on everything else.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from temper.config import Settings, opt
from temper.data.template import attach_default_template, stop_ids
from temper.data.trees import chat_chunk
from temper.forest import Forest, Tree
from temper.methods.base import Batching, Job, Prepared, Split, Window, epoch, forests, given, learn, way
from temper.models.adapt import Adapter
from temper.models.heads import weighted_nll
from temper.models.load import export, load_policy, resize
from temper.runs import Run
from temper.train import Compute, Loss, Optim, State, Step, Term

METRICS = {
    "loss": "negative log-likelihood per learned token, in nats",
    "held_out_loss": "the same on records kept out of training",
}
ALIEN = 1.0  # nats above chance at the first step that are announced: random logits, which a new model begins with, cost less
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
    adapters: Adapter = Adapter()


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


def train_on(model, trees: Sequence[Tree], b: Batching, optim: Optim, resume: State | None, compute: Compute) -> Iterator[Step]:
    """Learn the trees by `lm_loss`. A first step that is worse than chance is announced."""
    chance = math.log(model.config.get_text_config().vocab_size)
    for step in learn(model, trees, lm_loss, b, optim, resume, compute):
        if step.n == 1 and step.metrics.get("nll", 0.0) > chance + ALIEN:
            step.events.append(_alien(step.metrics["nll"], chance))
        yield step


def _alien(loss: float, chance: float) -> dict:
    note = (
        f"before any update the model gives the tokens to be learned {loss:.1f} nats each, and guessing evenly among all tokens would give "
        f"{chance:.1f}; is this the wrong model, tokenizer or chat template for this data?"
    )
    return {"event": "worse than chance", "loss": loss, "chance": chance, "note": note}


def train(settings: SFT, model, trees, resume: State | None = None) -> Iterator[Step]:
    return train_on(model, trees, settings.batching, settings.optim, resume, settings.compute)


def prepare(settings: SFT, run: Run) -> Job:
    model, tokenizer = load_policy(settings.model, **settings.compute.placed, adapters=settings.adapters, seed=settings.batching.seed)
    if attach_default_template(tokenizer):
        resize(model, tokenizer)
    how = way(chat_chunk, tokenizer, model, settings.window, learn=settings.learn)
    trees, tests, out, _, card, corpus, whole = given(settings, run, "chat", how)
    return Job(
        total=settings.batching.steps(epoch(trees)),
        steps=lambda resume: train(settings, model, trees, resume),
        save=lambda path: export(model, tokenizer, path, stop=stop_ids(tokenizer)),
        card={**card, "records": len(trees)},
        evaluate=(lambda: {"held_out_loss": held_out_loss(model, tests, settings.batching.tokens_per_microbatch)}) if tests else None,
        policy=(model, tokenizer),
        asks=[chat.messages[:-1] for chat in out[:4] if chat.messages[-1].role == "assistant"],
        prepared=Prepared(corpus, tokenizer, model, lm_loss, whole=whole),
    )
