"""Models in Hugging Face format: making, loading, checking and saving them. Floor 2.

Only safetensors are read and no remote code is run. All dropout is set to 0 on loading: log-probs of the same tokens must be the same
numbers in rollout, reference and policy. Every loaded model has been checked against the forest (`check_forest`).
"""

from __future__ import annotations

import copy
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import get_hf_file_metadata, get_safetensors_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from temper.config import Settings, UserError, opt
from temper.forest import Forest, Rows, Segment, plant, unroll
from temper.models import adapt, adapters, attention, heads, shared
from temper.models.adapt import Adapter
from temper.models.fused import fuse
from temper.runs import fsync

log = logging.getLogger("temper")

Precision = Literal["auto", "float32", "bfloat16"]
PROBE = 8  # tokens of the text on which a saved model is compared; the smallest window there is


class Size(Settings):
    """The sizes of a new model: a Llama with tied embeddings."""

    width: int = opt(128, "size of the hidden states", ge=8)
    layers: int = opt(4, "number of layers", ge=1)
    heads: int = opt(4, "attention heads; they divide the width", ge=1)
    kv_heads: int = opt(0, "key and value heads; they divide the heads, 0 is as many as heads", ge=0)
    mlp: int = opt(0, "inner size of the feed-forward layers; 0 is 3 x width", ge=0)
    context: int = opt(512, "longest sequence in tokens", ge=8)


def new_model(
    size: Size,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    seed: int,
    device: str | torch.device = "cpu",
    precision: Precision = "auto",
) -> PreTrainedModel:
    """A freshly initialised model in float32: the same sizes and seed give the same weights.

    Its config gets the tokenizer's special ids. Raises UserError for sizes that do not divide.
    """
    kv_heads = size.kv_heads or size.heads
    if size.width % size.heads or size.width // size.heads % 2:
        raise UserError(f"width {size.width} over {size.heads} heads: each head needs an even whole size; change width or heads")
    if size.heads % kv_heads:
        raise UserError(f"kv_heads {kv_heads} does not divide heads {size.heads}")
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size.width,
        intermediate_size=size.mlp or 3 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        bos_token_id=getattr(tokenizer, "bos_token_id", None),
        eos_token_id=getattr(tokenizer, "eos_token_id", None),
        pad_token_id=getattr(tokenizer, "pad_token_id", None),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    nn.Module.to(model, device).eval()
    fuse(model)
    check_forest(model)
    compute_in(model, precision)
    return model


def load_policy(
    name_or_dir: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    precision: Precision = "auto",
    adapters: Adapter | None = None,
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model and its tokenizer from a folder or hub name, checked against the forest. An adapter's folder gives its base with
    the adapter on it.

    precision: see `compute_in`. adapters: what of it is to be trained; None: it is for use. seed: of a new adapter.
    Raises UserError for a folder that is missing, incomplete or not a language model, and for a hub name that cannot be reached.
    """
    name = _source(name_or_dir)
    base = adapt.base_of(name) if adapt.is_adapter(name) else name
    config, tokenizer = _config(base), load_tokenizer(name)
    if _scores(config) or (base != name and adapt.described(name).get("task_type") == "SEQ_CLS"):
        raise UserError(f"{name}: a scoring model, not a language model")
    model, report = _load(AutoModelForCausalLM, base, config, dtype, adapters, device)
    _complete(base, report["missing_keys"])
    return _made_ready(_adapted(model, name, base, adapters, tokenizer, seed), name, device, precision), tokenizer


def load_scalar(
    name_or_dir: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    precision: Precision = "auto",
    labels: Sequence[str] | None = ("score",),
    adapters: Adapter | None = None,
    beside: Any = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A scoring model (reward, value): a saved one, or a language model's trunk under a new head.

    A new head has no bias and weights from N(0, 1/sqrt(d + 1)) (arXiv:1909.08593, 2009.01325), drawn from `seed`.
    labels: what it scores, by name, one output each; None: whatever a saved one does. precision, adapters: see `load_policy`.
    beside: a role (`temper.models.shared`) whose backbone an adapter of the same base shares.
    Raises UserError as `load_policy` does, and for a saved model with other labels.
    """
    given, name = name_or_dir, _source(name_or_dir)
    adapter = name if adapt.is_adapter(name) else None
    name = adapt.base_of(name) if adapter else name
    config, tokenizer = _config(name), load_tokenizer(adapter or name)
    if role := shared.beside(beside, adapter or name, name, partial(_new_head, labels=labels, seed=seed), adapters, seed=seed):
        return cast(Any, role), tokenizer
    if beside is not None and adapter and adapters and adapters.adapter != "full":
        adapters = adapters.model_copy(update={"adapter": "auto"})  # the kind is the policy's; this one is trained on as it is
    scoring, saved = _scores(config), adapt.record(adapter).get("labels") if adapter else None
    if saved and labels is None:
        labels = saved
    if saved and list(labels or ()) != list(saved):
        raise UserError(f"{adapter}: scores {', '.join(saved)}; needed are {', '.join(labels or ())}")
    if scoring and labels is not None and (config.num_labels != len(labels) or (len(labels) > 1 and label_names(config) != list(labels))):
        if len(labels) == 1:
            raise UserError(f"{name}: scores {config.num_labels} labels; a reward or value model has one")
        raise UserError(f"{name}: scores {', '.join(label_names(config))}; needed are {', '.join(labels)}")
    if not scoring:
        labels = labels or ("score",)
        config.num_labels = len(labels)
        if len(labels) > 1:
            config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    if tokenizer.pad_token_id is None:  # transformers finds a row's last token by its id; any other than the end's will do
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.pad_token_id = tokenizer.pad_token_id
    model, report = _load(AutoModelForSequenceClassification, name, config, dtype, adapters, device)
    missing = set(report["missing_keys"])
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{name}: {type(model).__name__} has no linear `score` head")
    _complete(name, missing - ({"score.weight", "score.bias"} if not scoring else set()))
    if not scoring:
        model.score = _new_head(cast(nn.Linear, model.score).in_features, labels, seed=seed).to(dtype)
    if adapter and adapt.described(adapter).get("task_type") == "SEQ_CLS":
        model.config.architectures = [type(model).__name__]  # the base may be a language model; the two together score
        for key, value in adapt.record(adapter).items():
            if key.startswith("temper_"):
                setattr(model.config, key, value)
    return _made_ready(_adapted(model, adapter or name, name, adapters, tokenizer, seed), str(given), device, precision), tokenizer


def _new_head(width: int, labels: Sequence[str] | None, *, seed: int) -> nn.Linear:
    head = nn.Linear(width, len(labels or ("score",)), bias=False)
    with torch.no_grad():
        head.weight.normal_(0.0, 1 / math.sqrt(width + 1), generator=torch.Generator().manual_seed(seed))
    return head


def _adapted(model: Any, name: str, base: str, how: Adapter | None, tokenizer: Any, seed: int) -> Any:
    """The model with the adapter of the folder it was asked for by, or a new one, or as it is."""
    kind = how.adapter if how else "auto"
    if name != base:
        if kind not in ("auto", "full"):
            raise UserError(f"--adapter {kind}: {name} is an adapter already; leave --adapter out to train it on, or merge it first")
        out = adapt.read_onto(model, name, how if kind == "auto" else None)
        return adapt.merged(out) if kind == "full" else out
    return adapt.put_on(model, cast(Adapter, how), tokenizer, seed=seed) if kind not in ("auto", "full") else model


def _made_ready(model: Any, name: str, device: str | torch.device, precision: Precision) -> Any:
    if not getattr(model, "is_quantized", False):
        nn.Module.to(model, device)
    fuse(model)
    check_forest(model.eval(), name)
    compute_in(model, precision)
    return model


def label_names(config: Any) -> list[str]:
    """What a scoring model's outputs are called, in order."""
    return [config.id2label[i] for i in range(config.num_labels)]


def compute_in(model: PreTrainedModel, precision: Precision) -> None:
    """Take the model's products in this precision from now on: forwards, log-probs, sampling. The weights stay as they are; losses and
    sums are float32. auto: bfloat16 on a GPU that has it, the weights' own elsewhere (on most CPUs bfloat16 is slower)."""
    half = precision == "bfloat16" or (precision == "auto" and model.device.type == "cuda" and torch.cuda.is_bf16_supported())
    adapters.beneath(model).precision = torch.bfloat16 if half else model.dtype


def load_tokenizer(name_or_dir: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name; an adapter may have its base's. Raises UserError when there is none."""
    name = _source(name_or_dir)
    if adapt.is_adapter(name) and not list(Path(name).glob("tokenizer*")):
        name = adapt.base_of(name)
    try:
        return AutoTokenizer.from_pretrained(name, clean_up_tokenization_spaces=False)
    except Exception as error:
        raise UserError(f"{name}: no readable tokenizer ({_line(error)})") from error


def parameters_in(name_or_dir: str | Path) -> int:
    """How many numbers a model's files hold, by their headers; 0 where these cannot be read. Raises UserError where there is no model."""
    name = _source(name_or_dir)
    try:
        if not Path(name).is_dir():
            return sum(get_safetensors_metadata(name).parameter_count.values())
        total = 0
        for file in Path(name).glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118 (no mapping)
        return total
    except Exception:  # whatever a damaged file or the hub's client raises: loading says what is wrong
        return 0


def resize(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> bool:
    """Give the model embeddings for tokens that were added to its tokenizer; whether it lacked any. New rows are drawn around the mean."""
    have = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) <= have:
        return False
    if adapters.adapted(model):
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens and the model {have}: an adapter cannot add them; use --adapter full")
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    return True


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, stop: Sequence[int] = ()) -> None:
    """Write model and tokenizer in Hugging Face format, for any program that reads it: aside, synced, then renamed into place.

    The generation config gets the tokenizer's begin, pad and end ids; `stop` are more ids that end a turn. A folder that is there
    already is replaced as a whole.
    """
    with _replacing(Path(folder)) as aside:
        _write(model, tokenizer, aside, stop, Path(folder))


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    stop: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> str:
    """`save` for what a stage was trained to make: it takes its place only after what lies on disk, read back, gave the model's logits.

    An adapter is written in PEFT's format. dtype: a model with all weights, any adapter merged in, in this precision.
    Returns what was compared and how far apart it was. Raises ExportError when it was too far; what was in the folder's place before
    is there still.
    """
    with _replacing(Path(folder)) as aside:
        written = model if dtype is None else adapt.merged(copy.deepcopy(model)).to(dtype)
        _write(written, tokenizer, aside, stop, Path(folder))
        return check_export(model, aside, Path(folder), written.dtype)


def restore(model: PreTrainedModel, folder: str | Path) -> None:
    """Give the model the weights that it was saved with in this folder."""
    if adapters.adapted(model):
        adapt.restore(model, folder)
    else:
        model.load_state_dict(load_policy(str(folder))[0].state_dict())


class ExportError(UserError):
    """A saved model that is not the one that was trained."""

    code = 1


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder beside this one that takes its place, whole, when all went well."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}.", dir=folder.parent))
    try:
        yield aside
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".tmp-old-{folder.name}.", dir=folder.parent))
            folder.rename(old / folder.name)
            aside.rename(folder)
            shutil.rmtree(old)
        else:
            aside.rename(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, aside: Path, stop: Sequence[int], target: Path) -> None:
    _fold_ids(adapters.beneath(model), tokenizer, stop)
    with _quiet():
        if adapters.adapted(model):
            role = getattr(type(model), "acting", None) and cast(Any, model)
            own = {"name": role.adapter, "score": role.head, "config_of": role.config} if role else {}
            adapt.write(role.backbone if role else model, aside, target=target, **own)
            cast(Any, adapters.beneath(model)).generation_config.save_pretrained(aside)
        else:
            model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    for file in aside.rglob("*"):
        if file.is_file():
            fsync(file)
            file.chmod(0o644)  # safetensors writes for its owner alone
    aside.chmod(0o755)
    fsync(aside)


@torch.no_grad()
def check_export(model: PreTrainedModel, aside: Path, folder: Path, dtype: torch.dtype, *, again: Any = None) -> str:
    """Compares the logits (or score) of a few tokens of the model with what lies in `aside` (or with `again`), which is to be in `folder`.
    The second model is on the CPU, where the first one found room when it was loaded.

    An adapter, or weights with one merged in, may also be no further from the model than half of what the adapter changes: rounding must
    not erase what was learned. Raises ExportError.
    """
    scoring = hasattr(model, "score")
    try:
        again = again or (load_scalar(aside, dtype=dtype, labels=None) if scoring else load_policy(aside, dtype=dtype))[0]
    except UserError as error:
        raise ExportError(f"{folder}: what was saved cannot be read back ({str(error).replace(str(aside), folder.name)})") from error
    ids = torch.linspace(0, model.config.get_text_config().vocab_size - 1, PROBE, dtype=torch.int64).tolist()

    def read(one: Any) -> torch.Tensor:
        """In the weights' own precision."""
        with adapters.acting(one):
            states = attention.row_states(one, torch.tensor([ids], device=one.device))[0]
        return (heads.score_of(one, states) if scoring else heads.logits(one, states)).cpu()

    theirs, ours = read(again), read(model)
    off = _difference(theirs, ours) if theirs.shape == ours.shape else math.inf
    allowed, note = _tolerance(min(dtype, model.dtype, key=lambda kind: torch.finfo(kind).bits)), ""
    if adapters.adapted(model):
        with adapters.without_adapter(model):
            changed = _difference(read(model), ours)
        allowed, note = min(allowed, max(changed / 2, _tolerance(torch.float64))), f"; the adapter changes {changed:.1e}"
    if not off <= allowed:
        problem = f"gives other logits than the trained model (by {off:.1e}, {allowed:.1e} allowed{note})"
        raise ExportError(f"{folder}: what was saved, read back, {problem}; it was not kept")
    return f"read back, logits within {off:.1e} of the trained model's, relative to the largest ({allowed:.1e} allowed{note})"


@torch.no_grad()
def check_forest(model: PreTrainedModel, name: str = "model", tolerance: float | None = None) -> str:
    """Compare small forests with plain forwards and set the model's backend: the device's best that agrees (see
    `attention.backends`), "rows" with a message where the model's attention does not see the forest. Returns it.

    tolerance: allowed difference relative to the largest hidden value; by default 1e-4 in float32 and what rounding allows in less.
    Raises UserError when not even rows agree (the model is not causal), and when its logits are not what `heads` makes of its states.
    """
    tolerance = tolerance or _tolerance(model.dtype)
    was_training = model.training
    model.eval()
    forest = _trial(model)
    rows, alone = _one_by_one(model, forest)
    packed = plant([[Segment(ids[own].tolist())] for ids, own in zip(rows.ids, rows.mask, strict=True)]).to(model.device)
    plain = alone.flatten(0, 1)[rows.where]
    off = _difference(alone[rows.mask], plain[rows.source[rows.mask]])  # a prefix in one row against the same one in another
    if not off <= tolerance:
        raise UserError(f"{name}: {type(model).__name__} is not causal: earlier states depend on later tokens (by {off:.1e})")
    usual = model.config._attn_implementation
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    problem = ""
    for backend in attention.backends(model.device):
        try:
            if layers:
                raise NotImplementedError(f"layers of type {', '.join(sorted(layers))}")
            model.set_attn_implementation("forest")
            off = max(
                _difference(heads.hidden_by(model, forest, backend), plain),
                _difference(heads.hidden_by(model, packed, backend), alone[rows.mask]),
            )
            if off <= tolerance:
                if problem:
                    log.warning("%s: %s attention, for want of a faster one (%s)", name, backend, problem)
                break
            problem = problem or f"it differs by {off:.1e}"
        except Exception as error:
            problem = problem or _line(error)
    else:
        if model.config._attn_implementation != usual:
            model.set_attn_implementation(usual)
        off = _difference(heads.hidden_by(model, forest, "rows"), plain)
        if not off <= tolerance:
            raise UserError(f"{name}: {type(model).__name__} depends on padding (by {off:.1e}); temper needs a causal language model")
        log.warning("%s: %s cannot share prefixes (%s); it runs with one padded row per sequence", name, type(model).__name__, problem)
        backend = "rows"
    adapters.beneath(model).forest_backend = backend
    if model.get_output_embeddings() is not None:
        ids = rows.ids[:1, : int(rows.mask[0].sum())]
        theirs = model(input_ids=ids).logits[0, -ids.shape[1] : -1].float().log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        off = _difference(heads.log_probs(model, alone[0, : ids.shape[1] - 1], ids[0, 1:]), theirs)
        if not off <= tolerance:
            raise UserError(f"{name}: {type(model).__name__} changes its logits in an unknown way (log-probs off by {off:.1e})")
    model.train(was_training)
    return backend


# ---------------------------------------------------------------- the trial


def _trial(model: PreTrainedModel) -> Forest:
    """Random tokens: prompts with several answers, a chain with branches, single tokens; long enough to leave a short sliding window."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    long = window + 3 if 0 < window <= 256 else 9
    shapes = ([(long, -1), (4, 0), (1, 0), (3, 2), (2, 2), (5, 0)], [(1, -1)], [(6, -1), (2, 0), (3, 1)])
    generator = torch.Generator().manual_seed(0)
    trees = []
    for shape in shapes:
        tree = []
        for length, parent in shape:
            tokens = torch.randint(config.vocab_size, (length,), generator=generator).tolist()
            tree.append(Segment(tokens, [0.0 if parent < 0 else 1.0] * length, parent))
        trees.append(tree)
    return plant(trees).to(model.device)


def _one_by_one(model: PreTrainedModel, forest: Forest) -> tuple[Rows, torch.Tensor]:
    """(the forest's rows, hidden states [R, L, d]): every path alone and unpadded, by the model's own forward."""
    rows = unroll(forest)
    states = [attention.row_states(model, ids[own][None])[0] for ids, own in zip(rows.ids, rows.mask, strict=True)]
    return rows, torch.nn.utils.rnn.pad_sequence(states, batch_first=True)


def _tolerance(dtype: torch.dtype) -> float:
    """What hidden states or logits of the same tokens may differ by, relative to the largest, in models of this precision."""
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 4e-2)


def _difference(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.float() - y.float()).abs().max() / y.float().abs().max().clamp(min=1e-6))


# ---------------------------------------------------------------- files


def _line(error: BaseException) -> str:
    """An error's first line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _source(name_or_dir: str | Path) -> str:
    """A folder that looks like a model, or a hub name as it is."""
    name = os.fspath(name_or_dir)
    path = Path(name).expanduser()
    if (path / "model" / "config.json").is_file() or adapt.is_adapter(path / "model"):  # a stage's folder
        path = path / "model"
    if name and path.is_dir():
        files = {file.name for file in path.iterdir()}
        if adapt.CONFIG in files:
            return str(path)
        if "config.json" not in files:
            raise UserError(f"{name}: no config.json, so not a model folder")
        if not any(file.endswith(".safetensors") for file in files):
            pickled = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt")))
            found = f"weights only as pickle ({pickled[0]}), which can run code; convert them to safetensors" if pickled else "no weights"
            raise UserError(f"{name}: {found}")
        return str(path)
    if name and path.exists():
        raise UserError(f"{name}: a file; give the model's folder")
    if isinstance(name_or_dir, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):  # what a hub name looks like
        raise UserError(f"{name or 'model'}: no such folder")
    return _reachable(name)


@cache
def _reachable(name: str) -> str:
    """A hub name as it is, or its folder in the cache where the hub cannot be reached. Asked once; loading asks six times per file."""
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except HfHubHTTPError:
        pass  # it answered; loading says what is wrong
    except Exception as error:  # of whichever HTTP library the hub's client uses
        cached = try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str):
            why = f"no such folder, not in the cache, and the hub cannot be reached ({_line(error)})"
            raise UserError(f"{name}: {why}; give a model's folder, or this name once where there is a network") from error
        return _source(Path(cached).parent)
    return name


def _scores(config: PreTrainedConfig) -> bool:
    return any(kind.endswith("ForSequenceClassification") for kind in config.architectures or [])


def _config(name: str) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:
        if not Path(name).is_dir():
            raise UserError(f"{name}: no such folder, and not loadable from the hub ({_line(error)})") from error
        raise UserError(f"{name}: config.json is not readable ({_line(error)})") from error
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def _load(
    kind: Any, name: str, config: PreTrainedConfig, dtype: torch.dtype, how: Adapter | None = None, device: Any = "cpu"
) -> tuple[PreTrainedModel, dict[str, Any]]:
    bits: dict[str, Any] = {}
    if how and how.quantise != "none":
        if how.adapter == "full":
            raise UserError("--quantise 4bit: weights in four bits cannot be trained; add --adapter lora")
        bits = {"quantization_config": adapt.in_four_bits(str(device)), "device_map": {"": str(device)}}
    try:
        with torch.random.fork_rng(devices=[]), _quiet():
            model, report = kind.from_pretrained(
                name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **bits
            )
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError, ImportError) as error:
        raise UserError(f"{name}: {_blame(name) or 'cannot load it'} ({_line(error)})") from error
    if report.get("mismatched_keys"):
        raise UserError(f"{name}: weights of another shape than config.json says, {min(report['mismatched_keys'])[0]} first")
    return model, report


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports of what was loaded: what matters in them is checked here."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _blame(name: str) -> str:
    """Which weight file cannot be opened, if one cannot."""
    for file in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            return f"{file.name} is damaged"
    return ""


def _complete(name: str, missing: Any) -> None:
    if missing:
        raise UserError(f"{name}: {len(missing)} weights are missing from its files, {sorted(missing)[0]} first")


def _fold_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: Sequence[int]) -> None:
    """Put the tokenizer's special ids into the model's config and generation config."""
    generation = model.generation_config if getattr(model, "generation_config", None) is not None else GenerationConfig()
    known = generation.eos_token_id
    ends = [*([] if known is None else known if isinstance(known, list) else [known]), tokenizer.eos_token_id, *stop]
    ends = list(dict.fromkeys(int(end) for end in ends if end is not None))
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids["eos_token_id"] = tokenizer.eos_token_id
    for key, value in ids.items():
        if value is not None:
            setattr(model.config, key, value)
            setattr(generation, key, value)
    if ends:
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends
    model.generation_config = generation
