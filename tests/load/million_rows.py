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
from array import array
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from temper.data.packing import pack
from temper.data.quality.clean import clean, plan, write
from temper.data.quality.rows import Rows
from temper.data.sources import Report, stream
from temper.data.template import attach_default_template
from temper.data.trees import chat_trees

RANKS, CHUNK, BUDGET = 2, 512, 4096
COPIES, CHANGED = 50, 50  # one row in so many is a copy of the one before, or of it with a word changed
SYLLABLES = [c + v for c in "bdfghjklmnprstvw" for v in "aeiou"]
WORDS = ["".join(p) for p in itertools.islice(itertools.product(SYLLABLES, repeat=3), 0, 512_000, 25)]
ODDS = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(WORDS))))  # as words are used: few often, most seldom


def generate(path: Path, n: int) -> tuple[int, int]:
    """Write n conversations of about 200 tokens; returns how many are copies, and how many have one word changed."""
    draw, copies, changed = random.Random(0), 0, 0
    answer: list[str] = []
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
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator((" ".join(WORDS[:k]) for k in (1 << i for i in range(15))), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    attach_default_template(made)
    made.save_pretrained(folder)


def tokenise(rank: int, data: Path, folder: Path) -> None:
    """This rank's chunks of rows as ids and targets in files; sizes beside them."""
    mine = PreTrainedTokenizerFast.from_pretrained(folder)
    window = SimpleNamespace(max_length=BUDGET, too_long="drop", skip_bad=False)
    records, sizes = stream(str(data), "chat", Report(str(data))), array("I")
    with (folder / f"ids.{rank}").open("wb") as ids, (folder / f"target.{rank}").open("wb") as target:
        for k in itertools.count():
            chunk = list(itertools.islice(records, CHUNK))
            if not chunk:
                break
            if k % RANKS == rank:
                for (segment,) in chat_trees(mine, chunk, None, window)[0]:
                    sizes.append(len(segment.tokens))
                    array("I", segment.tokens).tofile(ids)
                    array("B", map(int, segment.target)).tofile(target)
    with (folder / f"sizes.{rank}").open("wb") as file:
        sizes.tofile(file)


def peak(who: int) -> float:
    return resource.getrusage(who).ru_maxrss / 1024


def main(n: int, folder: Path) -> dict:
    data, out = folder / "rows.jsonl", folder / "clean.jsonl"
    copies, changed = generate(data, n)
    tokenizer(folder)
    begin, began = time.perf_counter(), time.process_time()
    result = clean(Rows({"rows": str(data)}), plan({"data": ["rows"], "steps": ["dedup"]}, "load")[1])
    write(result, out)
    deduplicated, cpu = time.perf_counter(), time.process_time() - began
    spawn = get_context("spawn")
    ranks = [spawn.Process(target=tokenise, args=(rank, out, folder)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert all(rank.exitcode == 0 for rank in ranks)
    tokenised = time.perf_counter()
    sizes = array("I")
    for rank in range(RANKS):
        sizes.frombytes((folder / f"sizes.{rank}").read_bytes())
    groups = pack(sizes, BUDGET)
    packed = time.perf_counter()
    tokens = sum(sizes)
    assert sum((folder / f"ids.{rank}").stat().st_size for rank in range(RANKS)) == 4 * tokens
    assert len(sizes) == len(result.rows)
    return {
        "rows": n,
        "kept": len(result.rows),
        "tokens_per_row": tokens / len(sizes),
        "planted": {"exact duplicate": copies, "near duplicate": changed},
        "found": result.reports[0].reasons,
        "packed_share": tokens / (len(groups) * BUDGET),
        "seconds": {"dedup": deduplicated - begin, "tokenise": tokenised - deduplicated, "pack": packed - tokenised},
        "cpu_s": {"dedup": cpu, "tokenise": sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])},  # of all processes together
        "wall_s": packed - begin,
        "peak_mb": peak(resource.RUSAGE_SELF) + RANKS * peak(resource.RUSAGE_CHILDREN),  # as if all peaked at once
        "dedup_peak_mb": peak(resource.RUSAGE_SELF),
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), Path(sys.argv[2]))))
