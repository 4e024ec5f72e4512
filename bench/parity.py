"""The same step by Temper and by TRL: does each loss, and the weights after one update, agree?

    python -m bench.parity               every case; the table in docs/parity.md is made from it
    python -m bench.parity dpo ipo kto   some of them, printed

Both sides start from the same small model on the embedded world, take the same records (of methods that sample: the same answers, ours)
and make the same update, by AdamW with lr = eps = 1 and no clipping: a weight then moves by g / (1 + |g|), so that every gradient counts
by its size. At an eps near 0 the first update would be the gradient's sign alone, equal for many a wrong loss. Reference models differ from
the policy, for at a log-ratio of 0 many losses are the same. Exit code 1 where a case differs that should not, or the other way round.
"""

import argparse
import importlib.metadata
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bench.data import SEED, Setup, make, records
from bench.grpo import EACH, GRPO, RLOO
from bench.preference import DPO, KTO, Reward
from bench.sft import SFT, LoRA
from bench.training import Peer, batching, quiet_peers, run_peer
from temper.losses.preference import RULES
from temper.methods import preference, unpaired
from temper.methods.base import Batching, offline
from temper.methods.comparisons import count_records
from temper.models.adapters import adapted
from temper.runs import atomic_write
from temper.train import Optim, Step, fit, machine

OPTIM = Optim(lr=1.0, schedule="constant", warmup=0.0, beta2=0.999, eps=1.0, max_grad_norm=1e9)
TOLERANCE = 1e-5
NOISE = 0.3  # share by which a reference's weights differ from the policy's, at random
RECORDS = 80
PAGE = Path(__file__).parent.parent / "docs" / "parity.md"
BEGIN, END = "<!-- table: made by `python -m bench.parity` -->", "<!-- end of table -->"


class Case(NamedTuple):
    """One comparison. kind: of task; ours: what it has in the place of its class's; peer: TRL's settings, beside those of all.
    why: the sentence that says why the sides differ, where they do. one: a single record in the step."""

    name: str
    kind: Any
    ours: Mapping[str, Any] = MappingProxyType({})
    peer: Mapping[str, Any] = MappingProxyType({})
    why: str = ""
    one: bool = False


@dataclass
class Found:
    """Losses, the largest difference of a weight after the update, and the largest move of a weight by it."""

    name: str
    ours: float
    peer: float
    difference: float
    moved: float
    why: str
    agrees: bool = field(init=False)

    def __post_init__(self) -> None:
        near = abs(self.ours - self.peer) <= TOLERANCE * max(1.0, abs(self.peer))
        self.agrees = near and self.difference <= TOLERANCE * max(1.0, self.moved)

    @property
    def cells(self) -> list[str]:
        said = "yes" if self.agrees else self.why or "NO"
        return [self.name, f"{self.ours:.6f}", f"{self.peer:.6f}", f"{self.difference:.1e}", f"{self.moved:.2g}", said]


HEAD = ("case", "loss, ours", "loss, TRL", "largest difference of a weight", "largest move", "agrees, or why not")


def reference(setup: Setup) -> Any:
    """The policy with noise on its weights."""
    model = setup.policy()
    draw = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + NOISE * torch.randn(p.shape, generator=draw))
    return model


class Pairs(DPO):
    """Any rule of losses/preference.py, against a reference that is not the policy."""

    rule = "dpo"
    how: ClassVar[dict[str, Any]] = {}

    def ours(self, model: Any, batching: Batching) -> Iterator[Step]:
        if RULES[self.rule].reference:
            preference.with_reference(reference(self.setup), self.trees, batching.tokens_per_microbatch)
        own = preference.settings(self.rule)(model="", data="", **self.how).own()
        loss = preference.make_loss(RULES[self.rule], own)
        return fit(model, offline(self.trees, batching, count_records), loss, steps=1, optim=self.optim, seed=SEED)

    def reference(self, model: Any, peer: Peer) -> Any:
        return self.setup.plain(reference(self.setup))


class Experimental(Pairs):
    """Against CPOTrainer or ORPOTrainer, which read rendered text. What they made of it is replaced by the tokens of all other cases, for
    they would add an end token of their own."""

    trainer_name = "CPO"

    def trainer(self, model, rows, peer, common, callback):
        from datasets import Dataset
        from trl.experimental import cpo, orpo

        name, module = self.trainer_name, {"CPO": cpo, "ORPO": orpo}[self.trainer_name]
        data = []
        for tree in (self.trees[row] for row in rows):
            prompt, *answers = (list(segment.tokens) for segment in tree)
            row = {"prompt": "", "prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
            for side, ids in zip(("chosen", "rejected"), answers, strict=True):
                whole = prompt + ids
                row |= {side: "", f"{side}_input_ids": whole, f"{side}_attention_mask": [1] * len(whole)}
                row |= {f"{side}_labels": [-100] * len(prompt) + ids}
            data.append(row)
        words = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * len(data)
        trainer = getattr(module, f"{name}Trainer")(
            model=model,
            args=getattr(module, f"{name}Config")(max_length=None, **common),
            train_dataset=Dataset.from_list(words),
            processing_class=self.setup.tokenizer,
            callbacks=[callback],
        )
        trainer.train_dataset = Dataset.from_list(data)
        return trainer


class Odds(Experimental):
    trainer_name = "ORPO"


class Thumbs(KTO):
    """Against a reference that is not the policy."""

    rule = "kto"

    def ours(self, model: Any, batching: Batching) -> Iterator[Step]:
        others = self.written(reference(self.setup), batching)
        source = unpaired.Pointed(model, self.trees, batching, others)
        return fit(model, source, unpaired.make_loss(unpaired.RULES[self.rule], {"beta": 0.1}), steps=1, optim=self.optim, seed=SEED)

    def reference(self, model: Any, peer: Peer) -> Any:
        return self.setup.plain(reference(self.setup))


class Margins(Reward):
    """Pairs that say by how much."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        for i, tree in enumerate(self.trees):
            for segment in tree:
                segment.labels = {**segment.labels, "margin": 0.25 * (i % 5)}


OVER_TOKENS = "TRL averages the likelihood over all chosen tokens of the step, ours over each answer's and then over answers"
BESSEL = "TRL divides by the deviation over n - 1, plus 1e-4; ours over n (`--std bessel`: over n - 1)"
BIAS = "TRL lets the gradient through the ratio that weighs the KL, ours takes the ratio as data; the value is the same"
PER_ANSWER = "the same gradient, another value: at ratio 1 TRL counts an answer's advantage once, ours at each of its tokens"
WHOLE_RATIO = "after the first update on a rollout: TRL clips one ratio for the whole answer, the product of its tokens', ours each token's"
SECOND = {"rollouts": 2}
TWICE = {"updates": 2}

CASES = [
    Case("sft", SFT),
    Case("sft, in micro-batches of one row", SFT, peer={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
    Case("sft, LoRA", LoRA),
    Case("dpo", Pairs, peer={"loss_type": ["sigmoid"]}),
    Case("dpo, beta 0.5", Pairs, {"how": {"beta": 0.5}}, {"beta": 0.5}),
    Case(
        *("dpo --label-smoothing 0.1", Pairs, {"how": {"label_smoothing": 0.1}}, {"label_smoothing": 0.1}),
        "ours is cDPO; TRL's loss `sigmoid` does not read label_smoothing, which only `robust` and `exo_pair` do",
    ),
    Case("rdpo", Pairs, {"rule": "rdpo"}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
    Case("ipo --log-ratios averaged", Pairs, {"rule": "ipo", "how": {"log_ratios": "averaged"}}, {"loss_type": ["ipo"]}),
    Case(
        *("ipo", Pairs, {"rule": "ipo"}, {"loss_type": ["ipo"]}),
        "ours sums an answer's log-ratios as the paper's eq. 17 does, TRL averages them over its tokens",
    ),
    Case("hinge", Pairs, {"rule": "hinge"}, {"loss_type": ["hinge"]}),
    Case("lndpo", Pairs, {"rule": "lndpo"}, {"loss_type": ["sigmoid_norm"], "beta": 5.0}),
    Case("rpo, one pair", Pairs, {"rule": "rpo"}, {"loss_type": ["sigmoid", "sft"]}, one=True),
    Case("rpo", Pairs, {"rule": "rpo"}, {"loss_type": ["sigmoid", "sft"]}, OVER_TOKENS),
    Case("fdpo --divergence forward-kl", Pairs, {"rule": "fdpo", "how": {"divergence": "forward-kl"}}, {"f_divergence_type": "forward_kl"}),
    Case("fdpo --divergence js", Pairs, {"rule": "fdpo"}, {"f_divergence_type": "js_divergence"}),
    Case(
        *("fdpo --divergence alpha --alpha 0.3", Pairs, {"rule": "fdpo", "how": {"divergence": "alpha", "alpha": 0.3}}),
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    Case("simpo", Experimental, {"rule": "simpo"}, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}),
    Case("cpo, one pair", Experimental, {"rule": "cpo"}, {"loss_type": "sigmoid", "cpo_alpha": 1.0}, one=True),
    Case("cpo", Experimental, {"rule": "cpo"}, {"loss_type": "sigmoid", "cpo_alpha": 1.0}, OVER_TOKENS),
    Case(
        *("orpo", Odds, {"rule": "orpo"}, {"beta": 0.1}),
        "TRL's likelihood is of prompt and answer, averaged over all tokens of the step; ours of the answer, as the paper's eq. 6",
    ),
    Case("kto", Thumbs),
    Case("kto, weights 1 and 1.5", Thumbs, {"weights": (1.0, 1.5)}),
    Case(
        *("kto, in micro-batches of two rows", Thumbs, {}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        "TRL finds z0 anew in each micro-batch, ours once over the whole step",
    ),
    Case("reward", Reward, {"centring": 0.0}),
    Case("reward, centred", Reward),
    Case("reward, with margins", Margins),
    Case("grpo --std bessel, the second rollout", GRPO, SECOND),
    Case("grpo, the second rollout", GRPO, {**SECOND, "switches": {"preset": "grpo"}, "unit": 1.0}, {}, BESSEL),
    Case("grpo --std bessel, two updates", GRPO, TWICE, {"use_bias_correction_kl": True}, BIAS),
    Case("grpo --kl none, two updates", GRPO, {**TWICE, "switches": {"preset": "grpo", "std": "bessel", "kl": "none"}}, {"beta": 0.0}),
    Case(
        *("grpo --preset dr-grpo, two updates", GRPO, {**TWICE, "switches": {"preset": "dr-grpo"}, "unit": 1.0}),
        {"loss_type": "dr_grpo", "beta": 0.0, "scale_rewards": "none"},
    ),
    Case(
        *("grpo --preset dapo --dynamic 0 --std bessel, two updates", GRPO),
        {**TWICE, "switches": {"preset": "dapo", "dynamic": 0, "std": "bessel"}},
        {"loss_type": "dapo", "beta": 0.0, "epsilon_high": 0.28},
    ),
    Case(
        *("grpo --preset gspo --std bessel, two updates", GRPO, {**TWICE, "switches": {"preset": "gspo", "std": "bessel"}}),
        {"beta": 0.0, "epsilon": 3e-4, "epsilon_high": 4e-4, "importance_sampling_level": "sequence"},
    ),
    Case("rloo, the second rollout", RLOO, SECOND, {}, PER_ANSWER),
    Case("rloo, two updates", RLOO, TWICE, {}, WHOLE_RATIO),
]  # fmt: skip


def compare(case: Case, setup: Setup) -> Found:
    """Make the step on both sides."""
    task = type(case.kind.__name__, (case.kind,), {"optim": OPTIM, **case.ours})(setup)
    if case.one:
        task.batch = 1
    sampled = isinstance(task, GRPO)
    if sampled:
        task.theirs = {**task.theirs, **case.peer}
    micro = task.batch * (EACH if sampled else 1)
    peer = Peer(micro, sort=False, more={"gradient_checkpointing": False, **({} if sampled else case.peer)})
    before = {name: x.clone() for name, x in task.model().state_dict().items()}
    if sampled:
        mine, module, turns = task.beside(peer)
        ours, trained = mine[-1].loss, module["policy"]
    else:
        step = next(iter(task.ours(task.model(), batching(task, 1))))
        ours, trained, turns = step.metrics["loss"], step.module, run_peer(task, peer, 1)
    one, other = weights(trained), weights(turns.model)
    difference = max(float((one[name] - other[name]).abs().max()) for name in one)
    moved = max(float((one[name] - before[name]).abs().max()) for name in one)
    return Found(case.name, ours, turns.peer[-1].loss, difference, moved, case.why)


def table(found: list[Found]) -> str:
    """What stands between the marks of the page."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("trl", "transformers", "torch"))
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}", *(f"| {' | '.join(one.cells)} |" for one in found)]
    return "\n".join([f"{sum(one.agrees for one in found)} of {len(found)} cases agree; {versions}.", "", *lines])


def page(found: list[Found]) -> None:
    """Put the table into docs/parity.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    atomic_write(PAGE, f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{rest.partition(END)[2]}")


def weights(model: Any) -> dict[str, Tensor]:
    return model.state_dict() if not adapted(model) else {name: x for name, x in model.state_dict().items() if "lora_" in name}


def chosen(names: list[str]) -> list[Case]:
    """The cases of these names, whole or of their first word; of none, all. Raises KeyError for a name that no case has."""
    short = {case.name: case.name.split()[0].strip(",") for case in CASES}
    for name in names:
        if name not in short and name not in short.values():
            raise KeyError(name)
    return [case for case in CASES if not names or {case.name, short[case.name]} & set(names)]


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a case as the table has it, or its first word")
    names = parser.parse_args().names
    try:
        cases = chosen(names)
    except KeyError as problem:
        parser.error(f"no case {problem}; there are {', '.join(dict.fromkeys(c.name.split()[0].strip(',') for c in CASES))}")
    quiet_peers()
    wrong, found = 0, []
    with tempfile.TemporaryDirectory() as folder:
        make("smoke", Path(folder), records(world=True)[0][:RECORDS])
        for case in cases:
            found.append(compare(case, Setup("smoke", folder)))
            print(" | ".join(found[-1].cells), flush=True)
            wrong += found[-1].agrees == bool(case.why)
    if not names:
        page(found)
    return int(wrong > 0)


if __name__ == "__main__":
    machine.use(1)
    sys.exit(main())
