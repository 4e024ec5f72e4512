"""Generated conversations are deduplicated, tokenised and packed on two cores: `python -m load.million_rows ROWS FOLDER`.

Prints JSON: seconds of each part, peak memory in MB of all processes together, what was found of what was planted. Writing the rows
does not count.
"""

from __future__ import annotations

import itertools
import json
import random
import resource
import sys
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from temper.data.packing import pack
from temper.data.quality.clean import clean, plan, write
from temper.data.quality.rows import Rows

RANKS, BUDGET = 2, 4096
COPIES, CHANGED = 50, 50  # one row in so many is a copy of the one before, or of it with a word changed
SYLLABLES = [c + v for c in "bdfghjklmnprstvw" for v in "aeiou"]
WORDS = ["".join(p) for p in itertools.islice(itertools.product(SYLLABLES, repeat=3), 0, 512_000, 25)]
ODDS = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(WORDS))))  # as words are used: few often, most seldom


def generate(path: Path, n: int) -> tuple[int, int]:
    """Write n conversations of about 200 tokens; returns how many are copies, and how many have one word changed."""
    draw, copies, changed = random.Random(0), 0, 0
    answer: list[str] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for k in range(n):
            if k % COPIES == 1:
                copies += 1
            elif k % CHANGED == 2 and k > 2:
                changed += 1
                answer = [*answer[:80], "changed", *answer[81:]]
            else:
                question, answer = draw.choices(WORDS, cum_weights=ODDS, k=20), draw.choices(WORDS, cum_weights=ODDS, k=130)
            file.write(json.dumps({"prompt": " ".join(question), "completion": " ".join(answer)}) + "\n")
    return copies, changed


def tokenizer(folder: Path) -> None:
    """In a process of its own: those that help with duplicates begin as this one, and need no torch, as the command line's do not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from temper.data.template import attach_default_template

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator((" ".join(WORDS[:k]) for k in (1 << i for i in range(15))), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    attach_default_template(made)
    made.save_pretrained(folder)


def tokenise(data: Path, folder: Path, done) -> None:
    """In a process of its own, as training does it, with two that help: into a store. Gives (seconds to open it again, MB, ...)."""
    import torch
    from transformers import PreTrainedTokenizerFast

    from temper.data.store import Store, Trees, kept
    from temper.data.template import written
    from temper.data.trees import chat_chunk
    from temper.methods.base import Batching, Window, offline

    torch.set_num_threads(RANKS)
    mine = PreTrainedTokenizerFast.from_pretrained(folder)
    window = Window(max_length=BUDGET, too_long="drop")
    make = partial(chat_chunk, tokenizer=mine, model=None, window=window, learn="all")

    def open_it() -> Store:
        return kept(folder / "tokens", str(data), "chat", make, by=[written(mine), BUDGET], skip_bad=False)

    open_it()
    began = time.perf_counter()
    store = open_it()
    again = time.perf_counter() - began
    trees = Trees([(store, np.arange(len(store)))], [1.0])
    source = offline(trees, Batching(batch=64, tokens_per_microbatch=BUDGET))
    began = time.perf_counter()
    for step in range(100):
        source(step * (len(trees) // 6400))
    made = (time.perf_counter() - began) / 100
    done.put({"open_s": again, "step_s": made, "mb": peak(resource.RUSAGE_SELF), "helper_mb": peak(resource.RUSAGE_CHILDREN)})


def peak(who: int) -> float:
    return resource.getrusage(who).ru_maxrss / 1024


def main(n: int, folder: Path) -> dict:
    data, out = folder / "rows.jsonl", folder / "clean.jsonl"
    copies, changed = generate(data, n)
    spawn = get_context("spawn")
    made = spawn.Process(target=tokenizer, args=(folder,))
    made.start()
    made.join()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin, began = time.perf_counter(), time.process_time()
    result = clean(Rows({"rows": str(data)}), plan({"data": ["rows"], "steps": ["dedup"]}, "load")[1])
    write(result, out)
    deduplicated, helped = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu, own_mb = time.process_time() - began + sum(helped[:2]) - sum(before[:2]), peak(resource.RUSAGE_SELF)
    answer = spawn.Queue()
    process = spawn.Process(target=tokenise, args=(out, folder, answer))
    process.start()
    stored = answer.get()
    process.join()
    assert process.exitcode == 0
    tokenised = time.perf_counter()
    from temper.data.store import Store

    (place,) = [p for p in (folder / "tokens").iterdir() if p.is_dir()]
    store = Store(place)
    sizes = store.sizes(np.arange(len(store))).tolist()
    groups = pack(sizes, BUDGET)
    packed = time.perf_counter()
    tokens = sum(sizes)
    assert len(sizes) == len(result.rows)
    return {
        "rows": n,
        "kept": len(result.rows),
        "tokens_per_row": tokens / len(sizes),
        "planted": {"exact duplicate": copies, "near duplicate": changed},
        "found": result.reports[0].reasons,
        "packed_share": tokens / (len(groups) * BUDGET),
        "seconds": {"dedup": deduplicated - begin, "tokenise": tokenised - deduplicated, "pack": packed - tokenised},
        "cpu_s": {"dedup": cpu, "tokenise": sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - sum(helped[:2])},  # of all processes
        "wall_s": packed - begin,
        # of all processes together, as if all of a part peaked at once
        "peak_mb": own_mb + max(RANKS * own_mb, stored["mb"] + RANKS * stored["helper_mb"]),
        "stored": stored,
        "stored_mb": sum(f.stat().st_size for f in place.iterdir()) / 2**20,
        "dedup_mb": own_mb,
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), Path(sys.argv[2]))))
