"""One model of several, the weights chosen when it is used: interpolated weights, or mixed log-probs. Floor 2.

    soup    theta = sum_k w_k theta_k                 rewarded soups, arXiv:2306.04488: experts of one SFT start, each for its own reward
    mixed   p(token) ~ prod_k p_k(token)^w_k          decoding-time mixing, MOD, arXiv:2406.18853; costs a pass of every model a token

For experts that are each the optimum of KL-regularised RL from one reference, prod_k p_k(answer)^w_k over whole *answers* is the optimum
for the rewards so weighted (arXiv:2406.18853, prop. 1). Token by token, as any decoder must, it is an approximation: each token is
normalised by itself. A soup is a further approximation of that, linear in the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from temper.config import Settings, UserError, opt, parse
from temper.models.adapt import merged
from temper.models.load import export, load_policy
from temper.runs import Run, model_fingerprint

EXAMPLES = """
  temper mix runs/helpful=0.3 runs/harmless=0.7 --out runs/balanced
  temper chat '0.3*runs/helpful + 0.7*runs/harmless'
"""
ALIKE = 0.5  # least cosine between the weights of two experts of one start; of two starts it is near 0


def parse_weights(terms: Sequence[tuple[str, str]], where: str) -> dict[str, float]:
    """Name -> weight of (name, weight) pairs. Raises UserError unless the weights are at least 0 and sum to 1, each name given once."""
    found: dict[str, float] = {}
    for name, text in terms:
        try:
            found[name] = float(text)
        except ValueError:
            raise UserError(f"{where}: the weight of {name} is {text!r}; give a number") from None
    if len(found) < len(terms):
        raise UserError(f"{where}: {next(n for n, _ in terms if [m for m, _ in terms].count(n) > 1)} is given twice; add its weights up")
    if not found or min(found.values()) < 0 or abs(sum(found.values()) - 1) > 1e-6:
        raise UserError(f"{where}: the weights sum to {sum(found.values()):g}; give weights of at least 0 that sum to 1")
    return found


def is_mixture(spec: str) -> bool:
    """Whether a model is asked for as a mixture: `0.3*A + 0.7*B`."""
    return "*" in spec


def parse_mixture(spec: str) -> dict[str, float]:
    """`0.3*A + 0.7*B` -> {A: 0.3, B: 0.7}. Raises UserError for what does not read so."""
    terms = []
    for part in re.split(r"\s*\+\s*(?=[\d.]+\s*\*)", spec.strip()):
        weight, star, name = (word.strip() for word in part.partition("*"))
        if not star or not name:
            raise UserError(f"{spec}: {part!r} is no weighted model; write 0.3*runs/a + 0.7*runs/b")
        terms.append((name, weight))
    return parse_weights(terms, spec)


# ---------------------------------------------------------------- soups


def interpolate(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_k w_k theta_k for each tensor, summed in float64. Integers (buffers that count) are the first model's."""
    return {
        name: x
        if not x.is_floating_point()
        else sum((w * s[name].double() for w, s in zip(weights, states, strict=True)), torch.zeros((), dtype=torch.double)).to(x.dtype)
        for name, x in states[0].items()
    }


def load_soup(experts: Mapping[str, float]) -> tuple[Any, Any]:
    """(model, tokenizer) with the interpolated weights of the experts named.

    Raises UserError where they are not of one start (`check_start`), or differ in shape or tokenizer.
    """
    check_start(list(experts))
    models, tokenizer = _load(list(experts))
    models = [merged(m) for m in models]  # the mean of adapters' factors is not the mean of what they add
    states = [m.state_dict() for m in models]
    for name, state in zip(experts, states, strict=True):
        if {k: x.shape for k, x in state.items()} != {k: x.shape for k, x in states[0].items()}:
            raise UserError(f"{name}: weights of other names or shapes than in {next(iter(experts))}; mix their log-probs instead")
        if (cosine := _cosine(states[0], state)) < ALIKE:
            why = f"the cosine between their weights is {cosine:.2f}"
            raise UserError(_apart(next(iter(experts)), name, why))
    models[0].load_state_dict(interpolate(states, list(experts.values())))
    return models[0], tokenizer


def check_start(folders: Sequence[str]) -> None:
    """Raises UserError where the folders' records say that two experts were trained from different models.

    What is known of a folder are the fingerprints of its model and of the one it was trained from; two experts share a start
    where these have one in common (so an expert may be mixed with its own start). A folder without records says nothing:
    `load_soup` compares the weights as well.
    """
    known = {name: _start(name) for name in folders}
    first = next((name for name, start in known.items() if start), None)
    for name, start in known.items():
        if first and start and not start.keys() & known[first].keys():
            here, there = (" and ".join(s.values()) for s in (known[first], start))
            raise UserError(_apart(first, name, f"{first} is {here}, {name} is {there}"))


def _apart(a: str, b: str, why: str) -> str:
    return f"{a} and {b} are not experts of one start ({why}): between them is no model (arXiv:2306.04488); mix their log-probs instead"


def _start(name: str) -> dict[str, str]:
    """Fingerprint -> in words, of the model itself and of what its stage says it was trained from; {} where there is no record."""
    folder = Path(name).expanduser()
    stage = Run(folder.parent if folder.name == "model" else folder).stage
    inputs = stage.get("identity", {}).get("inputs", {})
    if "model" not in inputs:
        return {}
    return {model_fingerprint(name): "itself", inputs["model"]: f"trained from {stage['record']['named']['model']}"}


def _cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Between all matrices of two models, as one vector each."""
    names = [name for name, x in a.items() if x.dim() > 1 and x.is_floating_point()]
    dot, aa, bb = (sum(float((x[n].double() * y[n].double()).sum()) for n in names) for x, y in ((a, b), (a, a), (b, b)))
    return dot / (aa * bb) ** 0.5


# ---------------------------------------------------------------- mixed log-probs


def mixed_logp(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """log of prod_k p_k^w_k, normalised: logits of K models, each [..., V], float32 or better -> [..., V]."""
    total = sum(w * x.log_softmax(-1) for w, x in zip(weights, logits, strict=True))
    return cast(Tensor, total).log_softmax(-1)


class Mixed:
    """Several language models asked as one by `temper.rollout.sample` and `stream`, which run them in lockstep."""

    def __init__(self, models: Sequence[Any], weights: Sequence[float]) -> None:
        held = [(m, w) for m, w in zip(models, weights, strict=True) if w]
        self.models, self.weights = [m for m, _ in held], [w for _, w in held]
        windows = [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in self.models]
        self.config = self.models[min(range(len(held)), key=lambda k: windows[k] or float("inf"))].config  # the smallest window
        self.device = self.models[0].device

    @property
    def training(self) -> bool:
        return any(m.training for m in self.models)

    def modules(self) -> Iterator[nn.Module]:
        """Those of every model."""
        for m in self.models:
            yield from m.modules()

    def train(self, mode: bool = True) -> Mixed:
        for m in self.models:
            cast(nn.Module, m).train(mode)
        return self

    def eval(self) -> Mixed:
        return self.train(False)


def load_mixed(experts: Mapping[str, float]) -> tuple[Mixed, Any]:
    """(the mixture, tokenizer). Raises UserError where the experts' tokenizers differ."""
    models, tokenizer = _load([name for name, weight in experts.items() if weight])
    return Mixed(models, [w for w in experts.values() if w]), tokenizer


def load_askable(spec: str) -> tuple[Any, Any]:
    """(what can be sampled from, tokenizer): a model by folder or hub name, or a mixture `0.3*A + 0.7*B` of them."""
    return load_mixed(parse_mixture(spec)) if is_mixture(spec) else load_policy(spec)


def _load(names: Sequence[str]) -> tuple[list[Any], Any]:
    """The models and the first one's tokenizer. Raises UserError where another has other tokens or another template."""
    found = [load_policy(name) for name in names]
    tokenizer = found[0][1]
    for name, (_, other) in zip(names, found, strict=True):
        if other.get_vocab() != tokenizer.get_vocab() or other.chat_template != tokenizer.chat_template:
            raise UserError(f"{name}: has another tokenizer or chat template than {names[0]}; models are mixed token by token")
    return [model for model, _ in found], tokenizer


# ---------------------------------------------------------------- the command


class Mix(Settings):
    """Interpolate the weights of experts of one SFT model into one model: rewarded soups (arXiv:2306.04488).

    What for: one trade-off between rewards after another without training again. When: the experts were trained from the same model,
    each for its own reward. For others, or to write no model, mix log-probs: temper chat '0.3*A + 0.7*B' (arXiv:2406.18853).
    """

    experts: list[str] = opt(..., "MODEL=WEIGHT, two or more, whose weights sum to 1", positional=True)
    out: str = opt(..., "folder for the new model")
    fresh: bool = opt(False, "replace what temper wrote in --out")


class Asked(NamedTuple):
    settings: Mix
    experts: dict[str, float]


def read(argv: list[str]) -> Asked:
    """What is asked for. Raises UserError for wrong flags and weights, and folders that are not there."""
    s = parse(Mix, argv, "temper mix", EXAMPLES)
    for word in s.experts:
        if "=" not in word:
            raise UserError(f"{word}: no weight; write {word}=0.5")
    experts = parse_weights([cast(tuple[str, str], tuple(word.rsplit("=", 1))) for word in s.experts], "temper mix")
    for name in experts:
        if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).expanduser().exists():
            raise UserError(f"{name}: no such folder")
    return Asked(s, experts)


def main(argv: list[str]) -> int:
    """Write the soup as a stage: its model, and a record of what it was made of; exit code 0."""
    s, experts = read(argv)
    numbered = {f"expert_{k}": name for k, name in enumerate(experts, 1)}
    inputs = {k: model_fingerprint(name) for k, name in numbered.items()}
    identity = {"method": "mix", "settings": {"weights": list(experts.values())}, "inputs": inputs}
    model, tokenizer = load_soup(experts)
    record = {"command": " ".join(["temper", "mix", *argv]), "named": numbered}
    with Run.claim(s.out, identity, fresh=s.fresh, record=record, code=[__name__]) as run:
        if not run.done:
            export(model, tokenizer, run.model)
            run.update(card={"experts": experts}, artefact="model")
            run.finish({"steps": 0, "seconds": 0.0})
    print(f"model in {run.model}: {' + '.join(f'{w:g} {name}' for name, w in experts.items())}; next: temper chat {s.out}")
    return 0
