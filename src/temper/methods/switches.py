"""The switches of GRPO and the published settings of them, by name. Floor 5.

GRPO arXiv:2402.03300, Dr. GRPO 2503.20783, DAPO 2503.14476, RLOO 2402.14740, REINFORCE++ 2501.03262, GSPO 2507.18071.
"""

from typing import Annotated, Any, Literal, TypeVar

import pydantic

from temper.config import Settings, UserError, opt

BASE: dict[str, Any] = {
    "baseline": "group", "scale": "std", "std": "population", "ratio": "token", "clip": 0.2, "clip_high": 0.2, "dual_clip": None,
    "aggregation": "sequence", "constant": None, "kl": "none", "beta": 0.0, "kl_credit": "answer", "dynamic": 0, "overlong": 0.0,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {  # what each changes of BASE
    "grpo": {"kl": "k3-in-loss", "beta": 0.04},
    "dr-grpo": {"scale": "none", "aggregation": "constant"},
    "dapo": {"clip_high": 0.28, "aggregation": "token", "dynamic": 4, "overlong": 0.2},
    "rloo": {"baseline": "leave-one-out", "scale": "none", "aggregation": "constant", "constant": 1.0, "kl": "k1-in-reward", "beta": 0.03},
    "reinforce++": {
        **{"baseline": "none", "scale": "global", "aggregation": "token"},
        **{"kl": "k1-in-reward", "beta": 0.01, "kl_credit": "to-go"},
    },
    "gspo": {"ratio": "sequence", "clip": 3e-4, "clip_high": 4e-4},
}
P = "preset"  # a switch that was not given
AS = Literal["preset"]
Positive = Annotated[float, pydantic.Field(gt=0)]
REFUSED = {
    "k1-in-loss": "its gradient is 0 on average, so it holds nothing back; use k2-in-loss, the gradient of the KL itself",
    "k2-in-reward": "it is biased there, and penalises what is less likely than in the reference too; use k1-in-reward",
    "k3-in-reward": "its gradient there is not that of the KL; use k1-in-reward",
}


class Switches(Settings):
    """What the presets set; a value given here goes before theirs."""

    preset: Literal["grpo", "dr-grpo", "dapo", "rloo", "reinforce++", "gspo"] = opt("grpo", "published settings of what follows")
    baseline: Literal["preset", "group", "leave-one-out", "none"] = opt(
        P, "subtracted: the group's mean reward, that of the others, nothing"
    )
    scale: Literal["preset", "std", "global", "none"] = opt(P, "divide by the group's standard deviation; z-score over all tokens; neither")
    std: Literal["preset", "population", "bessel"] = opt(P, "standard deviation over n or n - 1")
    ratio: Literal["preset", "token", "sequence"] = opt(P, "importance ratio of each token, or one for the answer: its mean in logs")
    clip: Positive | AS = opt(P, "range of the ratio below 1 without clipping")
    clip_high: Positive | AS = opt(P, "range above 1; more than --clip is clip-higher; a --clip alone is symmetric")
    dual_clip: Annotated[float, pydantic.Field(gt=1)] | AS | None = opt(P, "bound of the loss where A < 0, in |A|; none: no bound")
    aggregation: Literal["preset", "sequence", "token", "constant"] = opt(
        P, "mean over answers of their token means; mean over tokens; mean over answers of token sums / --constant"
    )
    constant: Positive | AS | None = opt(P, "what --aggregation constant divides by; none: --max-new")
    kl: Literal["preset", "none", "k1-in-reward", "k2-in-loss", "k3-in-loss"] = opt(
        P, "where the KL to the reference is, by which estimator"
    )
    beta: Annotated[float, pydantic.Field(ge=0)] | AS = opt(P, "weight of the KL")
    kl_credit: Literal["preset", "answer", "to-go"] = opt(
        P, "k1-in-reward: taken off the answer's reward before the baseline, or from each token's advantage as summed from it on"
    )
    dynamic: Annotated[int, pydantic.Field(ge=0)] | AS = opt(
        P, "rounds in which groups of equal rewards are replaced by those of other prompts"
    )

    @pydantic.field_validator("kl", mode="before")
    @classmethod
    def _valid(cls, kl: object) -> object:
        if isinstance(kl, str) and kl in REFUSED:
            raise ValueError(REFUSED[kl])
        return kl


S = TypeVar("S", bound=Any)


def resolved(s: S) -> S:
    """Settings of GRPO with every switch as it will be. Raises UserError for switches that contradict each other."""
    published = BASE | PRESETS[s.switches.preset]
    given = {name: value for name, value in s.switches.model_dump().items() if value != P}
    if "clip" in given and "clip_high" not in given and "clip_high" not in PRESETS[s.switches.preset]:
        given["clip_high"] = given["clip"]  # symmetric
    values = {name: given.get(name, published[name]) for name in BASE if name != "overlong"}
    if values["kl"] == "none" and given.get("beta"):
        raise UserError(f"--beta {given['beta']:g}, but --kl is none; say where the KL is: --kl k1-in-reward, k2-in-loss or k3-in-loss")
    if values["kl"] != "none" and not values["beta"]:
        raise UserError(f"--kl {values['kl']} with --beta 0 has no effect; give a --beta above 0, or --kl none")
    if given.get("constant") and values["aggregation"] != "constant":
        raise UserError(f"--constant {given['constant']:g}, but --aggregation is {values['aggregation']}; give --aggregation constant")
    if given.get("kl_credit") and values["kl"] != "k1-in-reward":
        raise UserError(f"--kl-credit {given['kl_credit']}, but --kl is {values['kl']}; it is about k1-in-reward")
    values["beta"] = values["beta"] if values["kl"] != "none" else 0.0
    values["constant"] = values["constant"] or float(s.sampling.max_new)
    if s.plan.samples_per_prompt < 2 and (values["baseline"] != "none" or values["scale"] == "std" or values["dynamic"]):
        what = f"--baseline {values['baseline']}, --scale {values['scale']}"
        raise UserError(f"--samples-per-prompt {s.plan.samples_per_prompt}: {what} compare the answers of a group; give at least 2")
    overlong = published["overlong"] if s.ending.overlong is None else s.ending.overlong
    changed = {"switches": s.switches.model_copy(update=values), "ending": s.ending.model_copy(update={"overlong": overlong})}
    return s.model_copy(update=changed)
