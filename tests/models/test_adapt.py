"""Adapters as PEFT keeps them: made, trained on, written, read back, refused."""

import json
import re
import shutil

import pytest
import torch
from torch import nn

from temper.config import UserError, build
from temper.forest import Segment, plant
from temper.models import adapt, heads
from temper.models.adapt import Adapter
from temper.models.adapters import REFERENCE, dropping, using, without_adapter
from temper.models.load import ExportError, Size, check_export, export, load_policy, load_scalar, new_model, resize, save
from temper.models.tokenizer import train_tokenizer

peft = pytest.importorskip("peft")

SIZE = Size(width=32, layers=2, heads=4, kv_heads=2, context=64)
FOREST = plant([[Segment([1, 2, 3, 4], [0, 0, 1, 1]), Segment([5, 6, 7], [1, 1, 1], 0), Segment([8, 9], [1, 0.5], 0)]])
KINDS = ("lora", "dora", "prompt", "prefix")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The baker lives in the red house by the harbour."] * 3, 320)


@pytest.fixture
def base(tmp_path, tokenizer):
    save(new_model(SIZE, len(tokenizer), tokenizer, seed=1), tokenizer, tmp_path / "base" / "model")
    return tmp_path / "base"


SMALL = {"lora": {"lora_rank": 4}, "dora": {"lora_rank": 4}, "prompt": {"virtual_tokens": 3}, "prefix": {"virtual_tokens": 3}}


def adapted(base, kind="lora", **how):
    """A policy under a new adapter that has learned something."""
    model, tokenizer = load_policy(base, adapters=Adapter(adapter=kind, **SMALL[kind], **how))
    move(model)
    return model, tokenizer


def move(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))


def logp(model):
    with torch.no_grad():
        return heads.token_logp(model, FOREST)


def test_lora_by_hand():
    """METHODS: W' = W + alpha/r B A."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for rslora, scale in (False, 2.0), (True, 8**0.5):
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], use_rslora=rslora)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2, bias=False)), config)
        lora = model.base_model.model[0]
        lora.base_layer.weight.data = layer.weight.data.clone()
        x = torch.tensor([1.0, -1.0])
        assert model(x).tolist() == [-1.0, -1.0]
        lora.lora_A["default"].weight.data = torch.tensor([[2.0, 1.0], [0.0, 4.0]])
        lora.lora_B["default"].weight.data = torch.tensor([[0.5, 0.0], [-1.0, 0.25]])
        delta = torch.tensor([[1.0, 0.5], [-2.0, 0.0]])
        torch.testing.assert_close(model(x), (layer.weight.data + scale * delta) @ x)
        if not rslora:
            assert model(x).tolist() == [0.0, -5.0]
            assert adapt.merged(_Whole(model))[0].weight.tolist() == [[3.0, 3.0], [-1.0, 4.0]]


class _Whole:
    """A PEFT model of plain layers, with what `merged` asks a transformers model for."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def get_base_model(self):
        base = self.model.get_base_model()
        base.get_output_embeddings = base.get_input_embeddings = lambda: None
        return base


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter(base, kind):
    """Frozen but for it; LoRA begins as nothing, so the first step is the base's, and moves B alone."""
    bare, _ = load_policy(base)
    model, _ = load_policy(base, adapters=Adapter(adapter=kind, **SMALL[kind]))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) < 0.5 * sum(p.numel() for p in bare.parameters())
    assert model.pace == adapt.PACE[kind]
    again, _ = load_policy(base, adapters=Adapter(adapter=kind, **SMALL[kind]))
    other, _ = load_policy(base, adapters=Adapter(adapter=kind, **SMALL[kind]), seed=1)
    assert torch.equal(logp(model), logp(again))
    parts = [dict(x.named_parameters()) for x in (model, again, other)]
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in trained)
    assert not all(torch.equal(parts[0][name], parts[2][name]) for name in trained)
    heads.weighted_nll(model, FOREST)[0].backward()
    if kind in ("lora", "dora"):
        torch.testing.assert_close(logp(model), logp(bare), atol=1e-5, rtol=0)
        assert {name.split(".")[-3] for name in trained if "lora_" in name and "magnitude" not in name} == {"lora_A", "lora_B"}
        assert all(bool(p.grad.any()) == ("lora_A" not in name) for name, p in trained.items() if "lora_" in name and "magn" not in name)
        layers = {name.split(".")[-4] for name in trained if "lora_A" in name}
        assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    else:
        assert model.config.max_position_embeddings == 64 - 3
        assert all(bool(p.grad.any()) for p in trained.values())
    with without_adapter(model):
        assert torch.equal(logp(model), logp(bare))


@pytest.mark.parametrize("kind", KINDS)
def test_written_and_read_back(base, tmp_path, kind):
    """By Temper, by PEFT alone, and where it trains on with a frozen copy as its reference."""
    model, tokenizer = adapted(base, kind, **({"rslora": True} if kind == "lora" else {}))
    said = export(model, tokenizer, tmp_path / "out" / "model")
    assert "read back, logits within" in said
    assert "the adapter changes" in said
    files = {p.name for p in (tmp_path / "out" / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "export.json"} <= files
    assert not {"model.safetensors", "README.md"} & files
    again, _ = load_policy(tmp_path / "out")
    assert torch.equal(logp(again), logp(model))
    assert not any(p.requires_grad and ".default." in n for n, p in again.named_parameters())
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "model").eval()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    torch.testing.assert_close(theirs(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    on, _ = load_policy(tmp_path / "out", adapters=Adapter())
    assert {n for n, p in on.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}
    before = logp(on)
    move(on, seed=3)
    assert float((logp(on) - before).abs().max()) > 1e-4
    with without_adapter(on):
        assert torch.equal(logp(on), before)
    export(on, tokenizer, tmp_path / "on" / "model")
    assert torch.equal(logp(load_policy(tmp_path / "on")[0]), logp(on))
    first, second = (tmp_path / name / "model" / "adapter_config.json" for name in ("out", "on"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_is_the_adapter(base, tmp_path, kind):
    model, tokenizer = adapted(base, kind)
    before = logp(model)
    export(model, tokenizer, tmp_path / "whole", dtype=torch.float32)
    export(model, tokenizer, tmp_path / "half", dtype=torch.bfloat16)
    assert torch.equal(logp(model), before)
    whole, _ = load_policy(tmp_path / "whole")
    torch.testing.assert_close(logp(whole), before, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.6 * (tmp_path / "whole" / "model.safetensors").stat().st_size
    full, _ = load_policy(tmp_path / "whole", adapters=Adapter(adapter="full"))
    assert all(p.requires_grad for p in full.parameters())


def test_the_gate_closes(base, tmp_path):
    """Weights that are not those that were trained; and rounding that is as large as what was learned."""
    model, tokenizer = adapted(base)
    export(model, tokenizer, tmp_path / "out")
    move(model, seed=5)
    with pytest.raises(ExportError, match=r"out: what was saved, read back, gives other logits than the trained model .by .* allowed; the"):
        check_export(model, tmp_path / "out", tmp_path / "out", torch.float32)
    faint, _ = load_policy(base, adapters=Adapter(adapter="lora"))
    with torch.no_grad():
        for name, p in faint.named_parameters():
            if "lora_B" in name:
                p.add_(1e-5 * torch.randn(p.shape))
    export(faint, tokenizer, tmp_path / "faint")
    with pytest.raises(ExportError, match="the adapter changes"):
        export(faint, tokenizer, tmp_path / "half", dtype=torch.bfloat16)
    assert not (tmp_path / "half").exists()


def test_scoring_adapters(base, tmp_path):
    model, tokenizer = load_scalar(base, adapters=Adapter(adapter="lora", lora_rank=4), seed=2)
    move(model)
    model.config.temper_reward = {"mean": 0.5, "std": 2.0}
    export(model, tokenizer, tmp_path / "reward" / "model")
    again, _ = load_scalar(tmp_path / "reward")
    at = FOREST.last
    assert torch.equal(heads.scalar(again, FOREST, at), heads.scalar(model, FOREST, at))
    assert again.config.temper_reward == {"mean": 0.5, "std": 2.0}
    with pytest.raises(UserError, match="a scoring model, not a language model"):
        load_policy(tmp_path / "reward")
    policy, _ = adapted(base)
    export(policy, tokenizer, tmp_path / "sft")
    started, _ = load_scalar(tmp_path / "sft", adapters=Adapter(), seed=4)  # a reward model that begins as the SFT adapter
    trunk = {n: p for n, p in policy.named_parameters() if ".default." in n}
    assert all(torch.equal(p, dict(started.named_parameters())[n]) for n, p in trunk.items())
    assert sum(p.requires_grad for p in started.parameters()) == len(trunk) + 1


def test_another_base_is_refused(base, tmp_path, tokenizer):
    model, _ = adapted(base)
    out = tmp_path / "out"
    export(model, tokenizer, out)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(UserError, match=r"out: an adapter for .*base/model, which is not there"):
        load_policy(out)
    save(new_model(SIZE, len(tokenizer), tokenizer, seed=2), tokenizer, tmp_path / "base" / "model")
    with pytest.raises(UserError, match="trained on another base of that name"):
        load_policy(out)
    (out / "export.json").unlink()  # one from elsewhere: what can be seen is whether it fits
    load_policy(out)
    shutil.rmtree(tmp_path / "base")
    save(new_model(SIZE.model_copy(update={"width": 48}), len(tokenizer), tokenizer, seed=2), tokenizer, tmp_path / "base" / "model")
    with pytest.raises(UserError, match=r"an adapter for another base: .*lora_A.weight has shape \(4, \d+\), not \(4, \d+\)"):
        load_policy(out)


def test_a_moved_pair_finds_its_base(base, tmp_path, tokenizer):
    """Runs are moved as a whole: the base is also known as it lies from the adapter."""
    model, _ = adapted(base)
    export(model, tokenizer, tmp_path / "run" / "model")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("base", "run"):
        shutil.move(tmp_path / name, elsewhere / name)
    assert torch.equal(logp(load_policy(elsewhere / "run")[0]), logp(model))


def test_what_is_refused(base, tmp_path, tokenizer):
    for how, message in (
        ({"adapter": "lora", "lora_targets": ["nothing_of_that_name"]}, "the adapter does not fit the model"),
        ({"adapter": "lora", "quantise": "4bit"}, "--quantise 4bit needs --device cuda.*lacks --device cuda"),
        ({"adapter": "full", "quantise": "4bit"}, "weights in four bits cannot be trained"),
        ({"quantise": "4bit"}, "weights in four bits cannot be trained"),
        ({"adapter": "prompt", "virtual_tokens": 60}, "--virtual-tokens 60: the model's window is 64"),
    ):
        with pytest.raises(UserError, match=message):
            load_policy(base, adapters=Adapter(**how))
    model, _ = adapted(base)
    export(model, tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="is an adapter already; leave --adapter out"):
        load_policy(tmp_path / "out", adapters=Adapter(adapter="lora"))
    config = tmp_path / "out" / "adapter_config.json"
    (tmp_path / "out" / "adapter_model.safetensors").rename(tmp_path / "out" / "adapter_model.bin")
    with pytest.raises(UserError, match="only as pickle"):
        load_policy(tmp_path / "out")
    (tmp_path / "out" / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors is missing"):
        load_policy(tmp_path / "out")
    config.write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(UserError, match="cannot be read"):
        load_policy(tmp_path / "out")
    soft, _ = adapted(base, "prefix")
    with pytest.raises(UserError, match="cannot be merged"):
        adapt.merged(soft)
    tied, _ = adapted(base, lora_targets=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="also the embeddings"):
        adapt.merged(tied)


def test_settings_without_effect_are_refused():
    for how, message in (
        ({"lora_rank": 8}, "--lora-rank 8 has no effect with --adapter auto, which makes no new one"),
        ({"adapter": "full", "lora_targets": ["q_proj", "v_proj"]}, "--lora-targets q_proj v_proj has no effect with --adapter full"),
        ({"adapter": "full", "adapter_lr": 3}, "--adapter-lr 3.0 has no effect"),
        ({"adapter": "prompt", "rslora": True}, "--rslora True has no effect with --adapter prompt"),
        ({"adapter": "prefix", "init_text": "Be kind."}, "--init-text Be kind. has no effect"),
        ({"adapter": "lora", "virtual_tokens": 4}, "--virtual-tokens 4 has no effect"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            build(Adapter, how)
    for how in {"adapter_lr": 3}, {"adapter": "lora", "lora_rank": 16, "virtual_tokens": 20}:  # defaults are what a recipe writes out
        build(Adapter, how)


def test_no_tokens_can_be_added_under_an_adapter(base):
    model, tokenizer = adapted(base)
    tokenizer.add_tokens([f"<|new {i}|>" for i in range(9)])
    with pytest.raises(UserError, match="an adapter cannot add them"):
        resize(model, tokenizer)


def test_prompts_begin_as_a_text(base):
    model, tokenizer = load_policy(base, adapters=Adapter(adapter="prompt", virtual_tokens=5, init_text="the red house"))
    ids = tokenizer("the red house")["input_ids"]
    words = model.get_input_embeddings()(torch.tensor((ids * 5)[:5]))
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, words)


def test_dropout_is_on_while_learning_only(base):
    model, _ = adapted(base, lora_dropout=0.5)
    still = logp(model)
    assert torch.equal(logp(model), still)
    with dropping(model):
        assert float((logp(model) - still).abs().max()) > 1e-4
    assert torch.equal(logp(model), still)


def test_several_adapters_switched_at_run_time(base, tmp_path, tokenizer):
    made = {}
    for seed, name in enumerate(("one", "two")):
        model, _ = load_policy(base, adapters=Adapter(adapter="lora", lora_rank=2 + seed))
        move(model, seed)
        export(model, tokenizer, tmp_path / name)
        made[name] = logp(model)
    bare = logp(load_policy(base)[0])
    model, _ = load_policy(tmp_path / "one")
    adapt.read_onto(model, tmp_path / "two", name="two")
    for name, expected in ("default", made["one"]), ("two", made["two"]), (None, bare), ("default", made["one"]):
        with using(model, name):
            assert torch.equal(logp(model), expected)
    assert torch.equal(logp(model), made["one"])
    assert REFERENCE not in model.peft_config
