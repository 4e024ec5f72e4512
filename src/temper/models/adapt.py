"""Adapters as PEFT keeps them: their settings, a new one on a model, one read from a folder, one written. Floor 2.

LoRA (arXiv:2106.09685) with rsLoRA's scale (2312.03732) and DoRA (2402.09353), prompt tuning (2104.08691), prefix tuning (2101.00190).
Beside PEFT's two files an adapter's folder has export.json: where its base lies as seen from there, and the content of the base's weights,
so that an adapter is never put on another base unseen.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from temper.config import Settings, UserError, idle, opt
from temper.models.adapters import OWN, REFERENCE, adapted, part_of
from temper.runs import fingerprint

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "export.json"
PACE = {"full": 1.0, "lora": 10.0, "dora": 10.0, "prompt": 100.0, "prefix": 100.0}


class Adapter(Settings):
    """What of the model is trained."""

    adapter: Literal["auto", "full", "lora", "dora", "prompt", "prefix"] = opt(
        "auto", "train all weights (full), or a small addition to frozen ones; auto: the adapter of a --model that is one, else full"
    )
    adapter_lr: float | None = opt(
        None, "learning rate of an adapter, as a multiple of --lr; none: 10 for lora and dora, 100 for prompt and prefix", gt=0
    )
    lora_rank: int = opt(16, "LoRA: rank of the matrices that are added", ge=1)
    lora_alpha: float = opt(32.0, "LoRA: what is added is multiplied by alpha / rank", gt=0)
    rslora: bool = opt(False, "LoRA: multiplied by alpha / sqrt(rank) instead, which lets high ranks learn")
    lora_targets: list[str] = opt([], "LoRA: names of the layers that get it; none: all linear layers but the head")
    lora_dropout: float = opt(0.0, "LoRA: dropout on its input, while learning only", ge=0, lt=1)
    virtual_tokens: int = opt(20, "prompt, prefix: tokens that stand before all others; the model's window is shorter by so many", ge=1)
    init_text: str = opt("", "prompt: a text that the virtual tokens begin as; none: random words of the vocabulary")
    quantise: Literal["none", "4bit"] = opt("none", "4bit: the frozen weights in four bits (QLoRA), on a GPU with bitsandbytes")

    @pydantic.model_validator(mode="after")
    def _used(self) -> Adapter:
        lora = ("lora_rank", "lora_alpha", "rslora", "lora_targets", "lora_dropout")
        used = {"lora": lora, "dora": lora, "prompt": ("virtual_tokens", "init_text"), "prefix": ("virtual_tokens",)}.get(self.adapter, ())
        what = ", which makes no new one" if self.adapter == "auto" else ""
        idle(self, [name for name in (*lora, "virtual_tokens", "init_text") if name not in used], f"with --adapter {self.adapter}{what}")
        if self.adapter == "full":
            idle(self, ["adapter_lr"], "with --adapter full")
        return self


# ---------------------------------------------------------------- folders


def is_adapter(folder: str | Path) -> bool:
    """Whether a model folder is an adapter, which needs its base."""
    return (Path(folder) / CONFIG).is_file()


def described(folder: str | Path) -> dict[str, Any]:
    """What an adapter's configuration says. Raises UserError where it cannot be read or names no base."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text("utf-8"))
        base = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: {CONFIG} cannot be read ({error})") from None
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder}: {CONFIG} names no base model; write one under base_model_name_or_path")
    return config


def record(folder: str | Path) -> dict[str, Any]:
    """What Temper wrote down beside the adapter; nothing for one from elsewhere."""
    try:
        found = json.loads((Path(folder) / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def base_of(folder: str | Path) -> str:
    """The base of an adapter: the path or hub name in its configuration, or where it lies as seen from the adapter.

    Raises UserError where it is not there, or has other weights than the adapter was trained on.
    """
    folder, known = Path(folder), record(folder)
    named = described(folder)["base_model_name_or_path"]
    path = next((p for p in (Path(named).expanduser(), folder / known.get("base", named)) if p.is_dir()), None)
    if path is None:
        if os.path.isabs(named) or named.startswith((".", "~")) or named.count("/") > 1:
            raise UserError(f"{folder}: an adapter for {named}, which is not there; put its base back, or name it in {CONFIG}")
        return named
    path = path / "model" if (path / "model").is_dir() else path
    if is_adapter(path):
        raise UserError(f"{folder}: an adapter for {named}, which is an adapter itself; merge that one first (temper adapter merge)")
    if known.get("weights") not in (None, weights_of(path)):
        raise UserError(f"{folder}: an adapter for other weights than {path} holds now; it was trained on another base of that name")
    return str(path)


def same_base(one: str, other: str) -> bool:
    """Whether two bases, as `base_of` gives them, are one."""
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def weights_of(folder: str | Path) -> str | None:
    """SHA-256 (hex) of a model folder's weight files; None for a name of the hub."""
    files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    return fingerprint([_content(str(f), *_stamp(f)) for f in files]) if files else None


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size


@cache
def _content(file: str, changed: int, size: int) -> str:
    return fingerprint(Path(file))


# ---------------------------------------------------------------- new ones


def put_on(model: Any, how: Adapter, tokenizer: Any, *, seed: int) -> Any:
    """The model with a new adapter, frozen but for it (and the head `score` of a scoring model): the same seed gives the same one.

    Raises UserError for target layers that the model lacks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = _wrap(model, _config_of(how, "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"))
    if how.adapter == "prompt" and how.init_text:
        ids = tokenizer(how.init_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"--init-text {how.init_text!r}: has no tokens; give some text")
        with torch.no_grad():
            words = model.get_input_embeddings()(torch.tensor(ids, device=model.device))
            out.prompt_encoder[OWN].embedding.weight.copy_(words.repeat(-(-how.virtual_tokens // len(ids)), 1)[: how.virtual_tokens])
    return _ready(out, how)


def put_beside(model: Any, how: Adapter, name: str, *, seed: int) -> None:
    """One more new adapter of that name on an adapted model; the one at work stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _wrap(model, _config_of(how, "CAUSAL_LM"), name)


def _config_of(how: Adapter, task: str) -> Any:
    peft = _peft()
    if how.adapter in ("lora", "dora"):
        return peft.LoraConfig(
            task_type=task,
            r=how.lora_rank,
            lora_alpha=how.lora_alpha,
            lora_dropout=how.lora_dropout,
            use_rslora=how.rslora,
            use_dora=how.adapter == "dora",
            target_modules=list(how.lora_targets) or "all-linear",
        )
    if how.adapter == "prompt":
        return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=how.virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB")
    return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=how.virtual_tokens)


def _wrap(model: Any, config: Any, name: str = OWN) -> Any:
    peft = _peft()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters in them is checked here
            if not adapted(model):
                return peft.get_peft_model(model, config, adapter_name=name)
            model.add_adapter(name, config)  # frozen; what learned before goes on learning
            return model
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"the adapter does not fit the model: {' '.join(str(error).split())[:300]}") from None


def _ready(model: Any, how: Adapter) -> Any:
    """Dropout off (it is on while learning only), the window shorter by what stands before the tokens, the learning rate's factor."""
    kind = model.active_peft_config.peft_type.value
    if k := getattr(model.active_peft_config, "num_virtual_tokens", 0):
        config = model.config.get_text_config()
        if window := getattr(config, "max_position_embeddings", None):
            if window - k < 8:
                raise UserError(f"--virtual-tokens {k}: the model's window is {window} tokens, which leaves no room; take fewer")
            config.max_position_embeddings = window - k
    model.pace = how.adapter_lr or PACE["lora" if not k else "prefix" if kind == "PREFIX_TUNING" else "prompt"]
    return model.eval()


def _peft() -> Any:
    if not find_spec("peft"):
        raise UserError("adapters need the package peft: pip install peft")
    import peft

    return peft


def in_four_bits(device: str) -> Any:
    """How transformers loads frozen weights in four bits (arXiv:2305.14314): NF4, twice quantised, products in bfloat16.

    Raises UserError where that cannot be done.
    """
    lacks = {
        "--device cuda": device == "cuda",
        "a GPU that PyTorch finds": torch.cuda.is_available(),
        "the package bitsandbytes": bool(find_spec("bitsandbytes")),
    }
    if missing := [what for what, there in lacks.items() if not there]:
        raise UserError(f"--quantise 4bit needs {', '.join(lacks)}; here it lacks {' and '.join(missing)}: leave it out")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )


# ---------------------------------------------------------------- reading and writing


def read_onto(model: Any, folder: str | Path, how: Adapter | None = None, *, name: str = OWN, trainable: bool = False) -> Any:
    """The model with the adapter of a folder beside those it has. With `how` it is to be trained on: a frozen copy stays as the
    reference. A scoring model's head comes along where the folder has one.

    Raises UserError where the adapter is damaged, of a kind that cannot be used, or made for another model.
    """
    peft = _peft()
    weights = _weights(folder)
    kinds = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    try:
        config = kinds[described(folder)["peft_type"]].from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: {CONFIG} is of no kind that PEFT knows ({error})") from None
    if config.is_prompt_learning and config.peft_type.value not in ("PROMPT_TUNING", "PREFIX_TUNING"):
        raise UserError(f"{folder}: an adapter of kind {config.peft_type.value}; prompt tuning, prefix tuning and LoRA can be used")
    scoring = hasattr(model, "score")
    config.task_type = "SEQ_CLS" if scoring else "CAUSAL_LM"
    config.inference_mode = not (trainable or how)
    config.base_model_name_or_path = None
    if config.is_prompt_learning and getattr(config, "prefix_projection", False):
        config.prefix_projection = False  # what is saved is what the projection gave
    if not scoring:
        weights = {key: x for key, x in weights.items() if "score" not in key.split(".")}
        if getattr(config, "modules_to_save", None):
            config.modules_to_save = [part for part in config.modules_to_save if part not in ("score", "classifier")] or None
    for each in (name, *([REFERENCE] if how else [])):
        with torch.random.fork_rng(devices=[]):
            model = _wrap(model, copy.deepcopy(config), each)
        _fill(model, weights, each, folder, lacking="score" if scoring else "")
    for key, p in model.named_parameters():
        if part_of(key, name) or part_of(key, REFERENCE):
            p.requires_grad = part_of(key, name) and (trainable or how is not None)
    return _ready(model, how or Adapter()) if name == OWN else model.eval()


def hold(model: Any) -> None:
    """From now on the reference (`without_adapter`) is the model as it is now. A model without an adapter needs its values instead."""
    if adapted(model):
        peft = _peft()
        state = {key: x.clone() for key, x in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items()}
        if REFERENCE not in model.peft_config:
            _wrap(model, copy.deepcopy(model.peft_config[OWN]), REFERENCE).to(model.device)
        _fill(model, state, REFERENCE, "the adapter", "")


def restore(model: Any, folder: str | Path) -> None:
    """Give an adapter on the model the weights that it was saved with."""
    _fill(model, _weights(folder), OWN, folder, "")


def head_of(folder: str | Path) -> nn.Linear | None:
    """The scalar head in a reward model's adapter, if there is one."""
    found = {key.rpartition(".")[2]: x for key, x in _weights(folder).items() if "score" in key.split(".")}
    if "weight" not in found:
        return None
    head = nn.Linear(found["weight"].shape[1], found["weight"].shape[0], bias="bias" in found)
    head.load_state_dict(found)
    return head


def _weights(folder: str | Path) -> dict[str, Any]:
    file = Path(folder) / WEIGHTS
    if not file.is_file():
        pickled = (Path(folder) / "adapter_model.bin").is_file()
        what = "only as pickle (adapter_model.bin), which can run code; convert it to safetensors" if pickled else "missing"
        raise UserError(f"{folder}: an adapter whose {WEIGHTS} is {what}")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: {WEIGHTS} is damaged ({error})") from None


def _fill(model: Any, weights: Mapping[str, Any], name: str, folder: str | Path, lacking: str) -> None:
    """Give the adapter of that name these weights: all of them, and nothing else. lacking: a part that may keep its new weights."""
    peft = _peft()
    there = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    missing = sorted(key for key in there.keys() - weights.keys() if not lacking or lacking not in key.split("."))
    unknown = sorted(weights.keys() - there.keys())
    other = sorted(key for key in there.keys() & weights.keys() if there[key].shape != weights[key].shape)
    if missing or unknown or other:
        key = (missing + unknown + other)[0]
        shapes = [tuple(x[key].shape) for x in (weights, there) if key in x]
        what = "is missing from its file" if missing else "fits no layer" if unknown else f"has shape {shapes[0]}, not {shapes[-1]}"
        raise UserError(f"{folder}: an adapter for another base: {key} {what}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.set_peft_model_state_dict(model, {**there, **weights}, adapter_name=name)


def merged(model: Any) -> Any:
    """The model with its adapter folded into the weights, W + scale · B A, as a plain model; one without an adapter as it is.

    Raises UserError for what cannot be folded in: tokens or keys that stand before the text, weights in four bits, a head that is also
    the embeddings.
    """
    if not adapted(model):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise UserError("what stands before the tokens cannot be merged into weights; keep it as an adapter")
    base = model.get_base_model()
    if getattr(base, "is_quantized", False):
        raise UserError("weights in four bits would lose what was learned; merge the adapter into the base in its own precision")
    head, words = base.get_output_embeddings(), base.get_input_embeddings()
    if hasattr(head, "lora_A") and head.get_base_layer().weight is getattr(words, "weight", None):
        raise UserError("the head with the adapter is also the embeddings, which merging would change; keep it as an adapter")
    out = model.merge_and_unload()
    out.requires_grad_(True)
    return out


def write(
    model: Any, folder: Path, *, name: str = OWN, score: nn.Linear | None = None, config_of: Any = None, target: Path | None = None
) -> None:
    """Write one adapter in PEFT's format, and what its base is. score: a head of its own (see `shared`). config_of: where what Temper
    notes of a reward model stands, if not in the model's configuration. target: where it will lie."""
    peft = _peft()
    config = copy.deepcopy(model.peft_config[name])
    base = Path(model.get_base_model().name_or_path)
    local = base.is_dir()
    config.base_model_name_or_path = str(base.absolute()) if local else str(base)
    config.inference_mode = True
    for key in ("target_modules", "modules_to_save"):
        if isinstance(getattr(config, key, None), (set, list)):
            setattr(config, key, sorted(set(getattr(config, key))))  # PEFT's sets have no order
    state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if score is not None:
        config.task_type = "SEQ_CLS"
        state |= {f"base_model.model.score.{key}": x for key, x in score.state_dict().items()}
    if getattr(config, "prefix_projection", False):
        config.prefix_projection = False
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file({key: x.detach().cpu().contiguous().clone() for key, x in sorted(state.items())}, folder / WEIGHTS, {"format": "pt"})
    known: dict[str, Any] = {}
    if local:
        known = {"base": os.path.relpath(base.absolute(), (target or folder).absolute()), "weights": weights_of(base)}
    about = config_of or model.config
    known |= {key: value for key, value in vars(about).items() if key.startswith("temper_")}
    if config.task_type == "SEQ_CLS":
        known["labels"] = [about.id2label[i] for i in range(about.num_labels)] if about.num_labels > 1 else ["score"]
    (folder / RECORD).write_text(json.dumps(known, indent=1) + "\n", "utf-8")
