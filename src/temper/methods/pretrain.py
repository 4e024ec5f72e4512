"""Pretraining: a tokenizer and a causal language model from plain text. Floor 5.

L = -sum_t log p(x_t | x_<t) / tokens, over the whole optimiser step. Documents are packed as roots of one forest: no padding,
no attention across documents. The first token of a document is read, not predicted.
"""

from collections.abc import Iterator

from temper.config import Settings, opt
from temper.data.sources import read
from temper.data.split import split
from temper.data.trees import limit_of, text_trees
from temper.methods.base import Batching, Corpus, Job, Prepared, Split
from temper.methods.sft import held_out_loss, lm_loss, train_on
from temper.models.load import Size, export, new_model
from temper.models.tokenizer import train_tokenizer
from temper.runs import Run
from temper.train import Compute, Optim, State, Step

METRICS = {
    "loss": "negative log-likelihood per token, in nats",
    "held_out_loss": "the same on documents kept out of training",
}
EXAMPLES = """
  temper pretrain --data books.txt --out runs/base
  temper pretrain --data 'world:documents?n=20000' --out runs/base --width 192 --layers 6
"""


class Pretrain(Settings):
    """Train a tokenizer and a language model from scratch."""

    data: str = opt(..., "plain text: a file, a folder, or world:documents")
    vocab: int = opt(1536, "entries of the byte-level BPE", ge=300)
    size: Size = Size()
    max_length: int | None = opt(None, "tokens of a window; default: the model's context", ge=2)
    skip_bad: bool = opt(False, "leave out rows that cannot be read, and list them")
    split: Split = Split(held_out=0.01)
    batching: Batching = Batching(batch=8)
    optim: Optim = Optim(lr=3e-3, schedule="cosine", warmup=0.05, beta2=0.99)
    compute: Compute = Compute()


def settings(name: str) -> type[Settings]:
    return Pretrain


def train(settings: Pretrain, model, trees, resume: State | None = None) -> Iterator[Step]:
    return train_on(model, trees, settings.batching, settings.optim, resume, settings.compute)


def prepare(settings: Pretrain, run: Run) -> Job:
    """Read the text, train the tokenizer, cut documents that are longer than the window into windows."""
    records, report = read(settings.data, "text", skip_bad=settings.skip_bad)
    kept, out = split(records, settings.split.held_out, settings.batching.seed)
    tokenizer = train_tokenizer((r.text for r in kept), settings.vocab, context=settings.size.context)
    context = limit_of(settings.size.context, settings.max_length)[0] or settings.size.context
    trees, cut = text_trees(tokenizer, kept, context)
    tests, _ = text_trees(tokenizer, out, context)
    model = new_model(settings.size, len(tokenizer), tokenizer, seed=settings.batching.seed, **settings.compute.placed)
    return Job(
        total=settings.batching.steps(len(trees)),
        steps=lambda resume: train(settings, model, trees, resume),
        save=lambda path: export(model, tokenizer, path),
        card={
            "source": report.summary(),
            "documents": len(kept),
            "windows": len(trees),
            "tokens": sum(len(s.tokens) for t in trees for s in t),
            "held_out": len(out),
            "vocabulary": len(tokenizer),
            "parameters": sum(p.numel() for p in model.parameters()),
            "kept": cut.summary(),
        },
        evaluate=(lambda: {"held_out_loss": held_out_loss(model, tests, settings.batching.tokens_per_microbatch)}) if tests else None,
        policy=(model, tokenizer),
        prepared=Prepared(Corpus(kept, trees, report, cut), tokenizer, model, lm_loss),
    )
