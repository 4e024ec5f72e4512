"""Pretraining: a tokenizer and a causal language model from plain text. Floor 5.

L = -sum_t log p(x_t | x_<t) / tokens, over the whole optimiser step. Documents are packed as roots of one forest: no padding,
no attention across documents. The first token of a document is read, not predicted.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from temper.config import Settings, opt
from temper.data.sources import Report, stream
from temper.data.split import key
from temper.data.store import CODE, content, parts
from temper.data.template import written
from temper.data.trees import limit_of, text_chunk
from temper.methods.base import TOKENS, Batching, Job, Prepared, Split, Way, epoch, given, held_out_of
from temper.methods.sft import held_out_loss, lm_loss, train_on
from temper.models.load import Size, export, new_model
from temper.models.tokenizer import train_tokenizer, wrapped
from temper.runs import Run, atomic_write, code_version, fingerprint
from temper.train import Compute, Optim, State, Step, ranks

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
    with ranks.leader_first():
        tokenizer = _tokenizer(settings, run.folder.parent / TOKENS)
    context = limit_of(settings.size.context, settings.max_length)[0] or settings.size.context
    how = Way(partial(text_chunk, tokenizer=tokenizer, window=context), [written(tokenizer), context], None, settings.skip_bad)
    trees, tests, _, (documents, out), card, corpus, whole = given(settings, run, "text", how)
    model = new_model(settings.size, len(tokenizer), tokenizer, seed=settings.batching.seed, **settings.compute.placed)
    return Job(
        total=settings.batching.steps(epoch(trees)),
        steps=lambda resume: train(settings, model, trees, resume),
        save=lambda path: export(model, tokenizer, path),
        card={
            **card,
            "documents": documents,
            "windows": len(trees),
            "held_out": out,
            "vocabulary": len(tokenizer),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        evaluate=(lambda: {"held_out_loss": held_out_loss(model, tests, settings.batching.tokens_per_microbatch)}) if tests else None,
        policy=(model, tokenizer),
        prepared=Prepared(corpus, tokenizer, model, lm_loss, whole=whole),
    )


def _tokenizer(settings: Pretrain, folder: Path) -> PreTrainedTokenizerFast:
    """Trained on the documents that are not held out, one after the other; kept in the folder by what it was made of."""
    share, b = settings.split.held_out, settings.batching
    made_of = [content(settings.data), settings.vocab, share, b.seed, settings.skip_bad, code_version("temper.models.tokenizer", *CODE)]
    file = folder / f"{fingerprint(made_of)[:32]}.json"
    if file.exists():
        return wrapped(Tokenizer.from_file(str(file)), context=settings.size.context)

    def documents() -> Iterator[Iterator[Any]]:
        return (stream(spec, "text", Report(spec), settings.skip_bad) for spec in parts(settings.data))

    masks = held_out_of([np.fromiter(map(key, records), np.uint64) for records in documents()], share, b.seed)
    texts = (r.text for records, mask in zip(documents(), masks, strict=True) for r, out in zip(records, mask, strict=True) if not out)
    tokenizer = train_tokenizer(texts, settings.vocab, context=settings.size.context)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(file, tokenizer.backend_tokenizer.to_str())
    return tokenizer
