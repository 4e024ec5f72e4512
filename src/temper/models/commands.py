"""`temper adapter COMMAND`: merge, combine, export and check adapters. Floor 2."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from temper.config import Settings, UserError, opt, parse
from temper.models import adapt
from temper.models.adapters import OWN, adapted, part_of
from temper.models.load import check_export, export, load_policy, load_scalar

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Merge(Settings):
    """Fold an adapter into its base: one model with all weights, which needs no PEFT. It is read back and its logits are compared."""

    adapter: str = opt(..., "folder of the adapter, or of a stage that trained one", positional=True)
    out: str = opt(..., "folder to write")
    precision: Literal["float32", "bfloat16", "float16"] = opt("float32", "of the weights that are written")
    json_: bool = opt(False, "print the result as JSON")


class Export(Settings):
    """Write an adapter again, as an adapter in PEFT's format or merged into its base. It is read back and its logits are compared."""

    adapter: str = opt(..., "folder of the adapter, or of a stage that trained one", positional=True)
    out: str = opt(..., "folder to write")
    form: Literal["adapter", "merged"] = opt("adapter", "PEFT's format, or all weights")
    precision: Literal["float32", "bfloat16", "float16"] = opt("float32", "of merged weights")
    json_: bool = opt(False, "print the result as JSON")


class Combine(Settings):
    """Combine LoRA adapters of one base into one: the sum of what each adds, by weight. Exact: its rank is the sum of their ranks."""

    adapters: list[str] = opt(..., "folders of the adapters", positional=True)
    out: str = opt(..., "folder to write")
    weights: list[float] = opt([], "weight of each; none: 1 each for stack, their share of 1 for average")
    json_: bool = opt(False, "print the result as JSON")


class Check(Settings):
    """Look whether an adapter is whole and its base is the one it was trained on; and whether it equals another model."""

    adapter: str = opt(..., "folder of the adapter, or of a stage that trained one", positional=True)
    against: str | None = opt(None, "a model whose logits must be the adapter's, one that it was merged into for example")
    json_: bool = opt(False, "print the result as JSON")


def _load(folder: str) -> tuple[Any, Any]:
    """A policy or scoring model with its adapter. Raises UserError for a folder that is no adapter."""
    place = Path(folder).expanduser()
    place = place / "model" if adapt.is_adapter(place / "model") else place
    if not adapt.is_adapter(place):
        raise UserError(f"{folder}: no adapter ({adapt.CONFIG}); give the folder of one")
    return (load_scalar if adapt.described(place).get("task_type") == "SEQ_CLS" else load_policy)(place)


def merge(s: Merge) -> dict[str, Any]:
    model, tokenizer = _load(s.adapter)
    return {"out": s.out, "check": export(model, tokenizer, s.out, dtype=PRECISIONS[s.precision], stop=_stop(model))}


def write(s: Export) -> dict[str, Any]:
    model, tokenizer = _load(s.adapter)
    dtype = PRECISIONS[s.precision] if s.form == "merged" else None
    return {"out": s.out, "check": export(model, tokenizer, s.out, dtype=dtype, stop=_stop(model))}


def stack(s: Combine) -> dict[str, Any]:
    return combine(s, s.weights or [1.0] * len(s.adapters))


def average(s: Combine) -> dict[str, Any]:
    weights = s.weights or [1.0] * len(s.adapters)
    if not sum(weights):
        raise UserError("--weights: they sum to 0, so they have no mean")
    return combine(s, [w / sum(weights) for w in weights])


def combine(s: Combine, weights: Sequence[float]) -> dict[str, Any]:
    """One LoRA adapter with A = [A_1; A_2; ...] and B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]: B A is the weighted sum of all s_i B_i A_i."""
    if len(s.adapters) < 2:
        raise UserError("give two adapters or more")
    if len(weights) != len(s.adapters):
        raise UserError(f"--weights: {len(weights)} weights for {len(s.adapters)} adapters; give one for each")
    model, tokenizer = _load(s.adapters[0])
    base = str(model.get_base_model().name_or_path)
    layers: dict[str, dict[str, list[torch.Tensor]]] = {}
    config: Any = None
    for folder, weight in zip(s.adapters, weights, strict=True):
        one, _ = _load(folder)
        config = one.peft_config[OWN]
        own = [name.split(".") for name, _ in one.named_parameters() if part_of(name, OWN)]
        beside = any(not {"lora_A", "lora_B"} & set(name) for name in own)  # embeddings, or layers that are trained as a whole
        if config.peft_type.value != "LORA" or config.use_dora or config.bias != "none" or hasattr(one, "score") or beside:
            raise UserError(
                f"{folder}: only plain LoRA adapters of language models can be combined; merge the others, then mix the weights"
            )
        if not adapt.same_base(base, str(one.get_base_model().name_or_path)):
            raise UserError(f"{folder}: an adapter of another base than {s.adapters[0]}; they must share one")
        for name, part in one.named_modules():
            if OWN in getattr(part, "lora_A", {}):
                down, up = part.lora_A[OWN].weight.detach(), part.lora_B[OWN].weight.detach()
                found = layers.setdefault(name, {"A": [], "B": []})
                found["A"].append(down)
                found["B"].append(up * (weight * part.scaling[OWN]))
    ranks = {name: sum(len(a) for a in found["A"]) for name, found in layers.items()}
    most = max(ranks.values())
    made, _ = load_policy(
        base,
        adapters=adapt.Adapter(adapter="lora", lora_rank=most, lora_alpha=most, lora_targets=sorted({n.split(".")[-1] for n in ranks})),
    )
    for name, part in made.named_modules():
        if OWN in getattr(part, "lora_A", {}):
            down, up = part.lora_A[OWN].weight.data.zero_(), part.lora_B[OWN].weight.data.zero_()
            if name in layers:
                down[: ranks[name]], up[:, : ranks[name]] = torch.cat(layers[name]["A"]), torch.cat(layers[name]["B"], 1)
    said = export(made, tokenizer, s.out, stop=_stop(model))
    return {"out": s.out, "rank": most, "weights": list(weights), "check": said}


def check(s: Check) -> dict[str, Any]:
    model, _ = _load(s.adapter)
    said = check_export(model, Path(s.adapter), Path(s.adapter), torch.float32)
    found = {"adapter": s.adapter, "base": str(model.get_base_model().name_or_path), "check": said}
    if not model.active_peft_config.is_prompt_learning:
        whole = adapt.merged(copy.deepcopy(model))
        found["merged"] = check_export(model, Path(s.adapter), Path(f"{s.adapter} merged"), torch.float32, again=whole)
    if s.against:
        other, _ = (load_scalar if hasattr(model, "score") else load_policy)(s.against, dtype=torch.float32)
        found["against"] = check_export(model, Path(s.against), Path(s.against), other.dtype, again=other)
    return found


def _stop(model: Any) -> list[int]:
    """The ids that end an answer, as they were saved."""
    ends = getattr(getattr(model.get_base_model() if adapted(model) else model, "generation_config", None), "eos_token_id", None)
    return ends if isinstance(ends, list) else []


COMMANDS: dict[str, tuple[type[Settings], Callable[[Any], dict[str, Any]], str, str]] = {
    "merge": (Merge, merge, "fold an adapter into its base", "temper adapter merge runs/sft --out runs/whole --precision bfloat16"),
    "stack": (Combine, stack, "add up several LoRA adapters of one base", "temper adapter stack runs/tone runs/facts --out runs/both"),
    "average": (
        Combine,
        average,
        "average several LoRA adapters of one base",
        "temper adapter average runs/a runs/b --weights 3 1 --out runs/mean",
    ),
    "export": (Export, write, "write an adapter in PEFT's format, or merged", "temper adapter export runs/sft --out adapters/sft"),
    "check": (Check, check, "is an adapter whole, and its base the right one?", "temper adapter check runs/sft --against runs/whole"),
}


def usage() -> str:
    lines = "\n".join(f"  {name:<8}  {text}" for name, (_, _, text, _) in COMMANDS.items())
    return f"usage: temper adapter COMMAND [OPTIONS]\n\n{lines}\n\ntemper adapter COMMAND --help shows a command's options and examples."


def read(argv: list[str]) -> Any:
    """The settings of the command that is asked for. Raises SystemExit after help, UserError for a command that there is not, and wrong
    flags."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        raise SystemExit(0)
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        raise UserError(f"no command 'adapter {argv[0]}'; {f'did you mean {near[0]!r}?' if near else 'temper adapter --help lists them'}")
    return parse(COMMANDS[argv[0]][0], argv[1:], f"temper adapter {argv[0]}", f"\n  {COMMANDS[argv[0]][3]}\n")


def main(argv: list[str]) -> int:
    """Exit code 0; what was written and did not give the model's logits again is an error with code 1."""
    settings = read(argv)
    found = COMMANDS[argv[0]][1](settings)
    if settings.json_:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        print(f"{name}: {value}")
    return 0
