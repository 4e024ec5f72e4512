"""Norms and gated units in fewer passes: the same numbers and gradients as transformers' own, less kept."""

import copy

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from temper.models.fused import Gated, Norm, Rotary, fuse, unfuse

SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
    "head_dim": 12,
    "attn_implementation": "sdpa",
}


def made(model=LlamaForCausalLM, config=LlamaConfig, **more):
    torch.manual_seed(0)
    out = model(config(**SMALL | more))
    with torch.no_grad():
        for module in out.modules():
            if "RMSNorm" in type(module).__name__:
                module.weight.normal_()
    return out


def learned(model, ids):
    out = model(ids).logits
    out.float().logsumexp(-1).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("model", "config"), [(LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)])
def test_values_and_gradients_are_those_of_transformers(model, config):
    usual = made(model, config)
    fused = copy.deepcopy(usual)
    fuse(fused)
    norms = 5 if model is LlamaForCausalLM else 9  # Qwen3 norms each head's queries and keys
    assert [sum(isinstance(m, kind) for m in fused.modules()) for kind in (Norm, Gated, Rotary)] == [norms, 2, 2]
    ids = torch.randint(50, (3, 300))  # more rows than are computed at a time
    (out, grads), (theirs, others) = learned(fused, ids), learned(usual, ids)
    torch.testing.assert_close(out, theirs, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-4, atol=1e-4 * float(others[name].abs().max()), msg=name)
    with torch.no_grad():
        torch.testing.assert_close(fused(ids).logits, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_derivatives():
    fused = made()
    fuse(fused)
    layer = fused.model.layers[0]
    for module in layer.mlp, layer.input_layernorm:
        module.double()
        assert torch.autograd.gradcheck(lambda x, module=module: module.compute(module, x), torch.randn(3, 24).double().requires_grad_())
        for parameter in module.parameters():
            x = torch.randn(3, 24).double()
            assert torch.autograd.gradcheck(lambda _, module=module, x=x: module.compute(module, x), parameter)


def test_positions_turn_as_transformers_turns_them():
    usual = LlamaAttention.forward.__globals__["apply_rotary_pos_emb"]
    q, k, angles = (torch.randn(shape).double() for shape in ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8)))
    q, k = q.float().requires_grad_(), k.float().requires_grad_()
    cos, sin = angles.cos().float(), angles.sin().float()  # halves that differ: each half has its own place
    ours, theirs = Rotary.turning(usual)(q, k, cos, sin), usual(q, k, cos, sin)
    weights = [torch.randn_like(x) for x in ours]
    ours, theirs = ((*pair, *torch.autograd.grad(pair, (q, k), weights)) for pair in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_other_formulas_stay_as_they_are():
    gemma = made(GemmaForCausalLM, GemmaConfig)  # 1 + w, and gelu
    gelu = made(hidden_act="gelu")
    for model in gemma, gelu:
        fuse(model)
        assert not any(isinstance(m, Gated) for m in model.modules())
    assert not any(isinstance(m, Norm) for m in gemma.modules())


def test_a_unit_with_an_adapter_on_its_last_product():
    class Beside(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.mean()

    usual = made()
    for layer in usual.model.layers:
        beside = Beside(40, 24, bias=False)
        beside.load_state_dict(layer.mlp.down_proj.state_dict())
        layer.mlp.down_proj = beside
    fused = copy.deepcopy(usual)
    fuse(fused)
    ids = torch.randint(50, (1, 9))
    (out, grads), (theirs, others) = learned(fused, ids), learned(usual, ids)
    torch.testing.assert_close(out, theirs, rtol=1e-5, atol=1e-5)
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(grads[name], others[name], rtol=1e-4, atol=1e-5)


def test_half_precision_and_unfused_models_run_as_transformers_wrote_them():
    usual = made().bfloat16()
    fused = copy.deepcopy(usual)
    fuse(fused)
    ids = torch.randint(50, (1, 9))
    assert torch.equal(fused(ids).logits, usual(ids).logits)
    unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in usual.modules()]


def test_less_is_kept_for_the_backward_pass():
    def kept(model):
        many = {}

        def pack(x):
            many[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(torch.randint(50, (1, 300)), use_cache=False)
        return sum(many.values())

    usual = made(num_hidden_layers=4)
    before = kept(usual)
    fuse(usual)
    assert kept(usual) < 0.85 * before
