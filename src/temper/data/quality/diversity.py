"""A small part of the rows that covers them all: greedy k-center (farthest point first) on hashed word n-grams.

Each row taken is the one farthest from those taken before (Gonzalez 1985: the largest distance of any row to the nearest taken one is
at most twice the best possible; for choosing data, arXiv:1708.00489). Holds a kilobyte a row and compares every row with every row taken.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from temper.config import UserError, opt
from temper.data.quality.clean import command
from temper.data.quality.rows import Part, Report, Rows, Step, Verdict, Verdicts, whole
from temper.data.quality.words import ngrams, words

NAME = "diversity"
EXAMPLES = """
  temper data diversity chats.jsonl --keep 1000 --out diverse.jsonl
  temper data diversity chats.jsonl --keep 1000 --part row --out diverse.jsonl
"""
WIDTH = 256


class Options(Step):
    """Keep a number of rows that lie as far from each other as can be."""

    keep: int = opt(..., "rows that stay", ge=1)
    part: Part = opt("prompt", "what rows differ in: the prompt, the answers, or the whole row; of plain text it is the row")


def vector(text: str) -> NDArray[np.float32]:
    """[WIDTH] of length 1: the text's words and pairs of words, each added to or taken from a place by its hash (arXiv:0902.2206)."""
    said = words(text)
    grams = np.concatenate([ngrams(said, n) for n in (1, 2) if len(said) >= n] or [np.empty(0, np.uint64)])
    sign = np.where(grams >> np.uint64(63), 1.0, -1.0)
    out = np.bincount((grams % np.uint64(WIDTH)).astype(np.int64), sign, WIDTH)
    return (out / max(float(np.linalg.norm(out)), 1e-12)).astype(np.float32)


def k_center(x: NDArray[np.float32], k: int) -> tuple[list[int], NDArray[np.int64], NDArray[np.float32]]:
    """(rows taken in their order, the nearest taken row of each, its distance). The first row taken is the nearest to the mean."""
    squared = (x * x).sum(1)
    mean = x.mean(0)
    at = int(np.argmin(squared - 2 * x @ mean))
    taken: list[int] = []
    nearest = np.zeros(len(x), np.int64)
    distance = np.full(len(x), np.inf, np.float32)
    for _ in range(min(k, len(x))):
        taken.append(at)
        d = np.maximum(squared + squared[at] - 2 * (x @ x[at]), 0)
        d[at] = -1  # below any distance: a row that is taken is not taken again
        closer = d < distance
        distance[closer], nearest[closer] = d[closer], at
        at = int(np.argmax(distance))
    return taken, nearest, np.sqrt(np.maximum(distance, 0))


def run(options: Options, rows: Rows, report: Report) -> Verdicts:
    """One pass, and another for the names of the rows."""
    n = len(rows)
    if options.keep > n:
        raise UserError(f"diversity: keep {options.keep} of {n} rows; keep fewer")
    x = np.empty((n, WIDTH), np.float32)
    index = np.empty(n, np.int64)
    names: list[str] = []
    for k, item in enumerate(rows):
        x[k], index[k] = vector(whole(item, options.part) or whole(item)), item.id
        names.append(item.at)
    taken, nearest, distance = k_center(x, options.keep)
    report.numbers.update(radius=float(distance.max()), mean_distance=float(distance.mean()))
    report.notes.append(
        f"every row is within {distance.max():.2f} of a row that stays, on average {distance.mean():.2f} (unlike rows: 1.41)"
    )
    stay = set(taken)
    return {
        int(index[k]): Verdict("covered", f"at distance {distance[k]:.2f} from {names[nearest[k]]}", score=float(distance[k]))
        for k in range(n)
        if k not in stay
    }


main = partial(command, NAME)
