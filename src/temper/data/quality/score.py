"""A small trained scorer: logistic regression on hashed word n-grams, learned from a labelled file.

The labelled file is data of any format with one more field, `label`: true or 1 for rows worth keeping, false or 0 for others. How
well the scorer tells the two apart is measured on rows that it has not seen (five-fold), and shown before anyone relies on it.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from temper.config import UserError, opt
from temper.data import sources
from temper.data.packing import epoch_order
from temper.data.quality.clean import command
from temper.data.quality.rows import Item, Part, Report, Rows, Step, Verdict, Verdicts, records, whole
from temper.data.quality.words import Grams, ngrams, words
from temper.stats.intervals import share_interval

NAME = "score"
EXAMPLES = """
  temper data score chats.jsonl --labelled good-and-bad.jsonl --out clean.jsonl
  temper data score chats.jsonl --labelled clear-or-not.jsonl --part prompt --below 0.3 --out clean.jsonl
"""
FEATURES = 1 << 18
FOLDS = 5
PENALTY = 1e-4  # of the squared weights, against the mean loss


class Options(Step):
    """Remove rows by a scorer that is trained on labelled rows."""

    labelled: str = opt(..., "rows with a field `label`: true or 1 to keep such, false or 0 to remove such")
    below: float = opt(0.5, "rows with a lower P(keep) are removed", ge=0, le=1)
    part: Part = opt("row", "what is scored: the whole row, its prompt (is it clear?), or its answers (are they good?)")


def features(text: str) -> Grams:
    """The distinct places of a text's words and pairs of words among FEATURES."""
    said = words(text, signs=True)
    grams = [ngrams(said, n) for n in (1, 2) if len(said) >= n]
    return np.unique(np.concatenate(grams) % np.uint64(FEATURES)) if grams else np.empty(0, np.uint64)


class Scorer(NamedTuple):
    """weights [FEATURES], and the bias: P(keep) = sigmoid(sum of the weights of what a text holds / sqrt(how much) + bias)."""

    weights: NDArray[np.float64]
    bias: float

    def __call__(self, text: str) -> float:
        at = features(text)
        return float(1 / (1 + np.exp(-(self.weights[at].sum() / max(1, len(at)) ** 0.5 + self.bias))))


def fit(texts: list[Grams], labels: NDArray[np.float64]) -> Scorer:
    """Logistic regression with a quadratic penalty, by L-BFGS from zero: the minimum is unique."""
    from scipy.optimize import minimize
    from scipy.sparse import csr_array

    values = np.concatenate([np.full(len(at), max(1, len(at)) ** -0.5) for at in texts])
    ends = np.cumsum([0, *map(len, texts)])
    used, columns = np.unique(np.concatenate(texts), return_inverse=True)
    x = csr_array((values, columns, ends), shape=(len(texts), len(used)))

    def loss(w: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        z = x @ w[:-1] + w[-1]
        off = 1 / (1 + np.exp(-z)) - labels
        value = float((np.logaddexp(0, z) - labels * z).mean() + PENALTY / 2 * (w[:-1] @ w[:-1]))
        return value, np.append(x.T @ off / len(labels) + PENALTY * w[:-1], off.mean())

    found = minimize(loss, np.zeros(len(used) + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    weights = np.zeros(FEATURES)
    weights[used.astype(np.int64)] = found[:-1]
    return Scorer(weights, float(found[-1]))


def auc(scores: NDArray[np.float64], labels: NDArray[np.float64]) -> float:
    """P(a row to keep scores higher than one to remove), ties counting half."""
    good, bad = np.sort(scores[labels == 1]), scores[labels == 0]
    low, high = np.searchsorted(good, bad), np.searchsorted(good, bad, side="right")
    return float((len(good) - high + (high - low) / 2).mean() / len(good))


def read_labelled(spec: str, part: Part) -> tuple[list[str], NDArray[np.float64]]:
    """(texts, labels). Raises UserError naming the row without a label, or the label that is missing altogether."""
    texts: list[str] = []
    labels: list[float] = []
    for name, stream in sources._places(spec):
        for row in stream:
            at, value = f"{name}:{row.line}", row.value
            if row.broken or not isinstance(value, dict):
                raise UserError(f"{at}: {row.broken or 'not an object with named fields'}; correct the row")
            if value.get("label") not in (0, 1, True, False):
                raise UserError(f"{at}: field 'label' is {value.get('label')!r}; it should be true or false (or 1 or 0)")
            plain = row._replace(value={k: v for k, v in value.items() if k != "label"})
            try:
                texts.append(whole(Item(0, at, spec, plain.value, records(plain)), part))
            except ValueError as error:
                raise UserError(f"{at}: {' '.join(str(error).split())}; correct the row") from None
            labels.append(float(value["label"]))
    if min(labels.count(0.0), labels.count(1.0)) < FOLDS:
        raise UserError(f"{spec}: {labels.count(1.0)} rows labelled 1 and {labels.count(0.0)} labelled 0; give at least {FOLDS} of each")
    return texts, np.array(labels)


def run(options: Options, rows: Rows, report: Report) -> Verdicts:
    """Train, measure, and score every row: one pass."""
    texts, labels = read_labelled(options.labelled, options.part)
    held = [features(text) for text in texts]
    fold = np.empty(len(labels), np.int64)
    for label in (0, 1):  # each fold has its share of both
        at = np.flatnonzero(labels == label)
        fold[at[epoch_order(len(at), 0, label)]] = np.arange(len(at)) % FOLDS
    scores = np.empty(len(labels))
    for k in range(FOLDS):
        scorer = fit([held[i] for i in np.flatnonzero(fold != k)], labels[fold != k])
        scores[fold == k] = [scorer(texts[i]) for i in np.flatnonzero(fold == k)]
    right = share_interval((scores >= options.below) == labels)
    report.numbers.update(auc=auc(scores, labels), accuracy=right.to_dict(), share_good=float(labels.mean()))
    report.notes.append(
        f"on labelled rows it had not seen: AUC {auc(scores, labels):.2f}; {right.mean:.0%} right [{right.low:.0%}, {right.high:.0%}] "
        f"of {right.n}, where always saying the commoner label is {max(labels.mean(), 1 - labels.mean()):.0%} right"
    )
    scorer = fit(held, labels)
    found: Verdicts = {}
    for item in rows:
        p = scorer(whole(item, options.part))
        if p < options.below:
            found[item.id] = Verdict("scored poor", f"P(keep) {p:.2f} < {options.below:g}", score=p)
    return found


main = partial(command, NAME)
