"""Adapted models: the head with its adapter, and the reference beneath it."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from temper.config import UserError
from temper.forest import Segment, plant
from temper.models import heads
from temper.models.adapters import beneath, without_adapter
from temper.models.load import check_forest

peft = pytest.importorskip("peft")

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FOREST = plant([[Segment([1, 2, 3, 4], [0, 0, 1, 1]), Segment([5, 6, 7], [1, 1, 1], 0), Segment([8, 9], [1, 0.5], 0)]])
PATHS = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 8, 9]]


def adapted(tied=False, **how):
    """A small Llama under an adapter that has learned something, and the Llama alone."""
    torch.manual_seed(0)
    bare = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        bare.get_output_embeddings().weight.mul_(10.0)
    check_forest(bare)
    model = peft.get_peft_model(copy.deepcopy(bare), peft.LoraConfig(r=3, lora_alpha=6, **how)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape))
    return model, bare


def full(model):
    """[n, V] log-probs at the learned tokens, by the model's own logits of each path."""
    logits = [model(input_ids=torch.tensor([path])).logits[0].float().log_softmax(-1) for path in PATHS]
    return torch.cat([logits[0][1:6], logits[1][3:5]])


def compare(model):
    expected = full(model)
    logp = heads.token_logp(model, FOREST)
    picked = expected.gather(1, FOREST.tokens[FOREST.learned, None])[:, 0]
    torch.testing.assert_close(logp, picked, atol=1e-5, rtol=1e-5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weight = FOREST.target[FOREST.learned]
    wanted = torch.autograd.grad(-(picked * weight).sum(), list(trained.values()))
    scale = max(float(g.abs().max()) for g in wanted)
    for loss in (-(logp * weight).sum(), heads.weighted_nll(model, FOREST)[0]):
        for name, x, y in zip(trained, torch.autograd.grad(loss, list(trained.values())), wanted, strict=True):
            assert float((x - y).abs().max()) < 1e-5 * scale, name
    return sorted(trained)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("tied", [False, True])
def test_lora_on_the_head(tied, monkeypatch):
    monkeypatch.setattr(heads, "_chunks", lambda n, vocabulary, device: [slice(i, min(i + 2, n)) for i in range(0, n, 2)])
    model, _ = adapted(tied, target_modules=["q_proj", "lm_head"])
    trained = compare(model)
    assert any("lm_head.lora_B" in name for name in trained)
    assert not any("base_layer" in name for name in trained)
    check_forest(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    p, q = full(model), full(other)
    torch.testing.assert_close(heads.token_kl(model, other, FOREST), (p.exp() * (p - q)).sum(-1), atol=1e-5, rtol=1e-5)
    if not tied:  # merging into a tied head would change the embeddings too
        model.merge_adapter()
        picked = p.gather(1, FOREST.tokens[FOREST.learned, None])[:, 0]
        torch.testing.assert_close(heads.token_logp(model, FOREST), picked, atol=1e-4, rtol=1e-5)


def test_a_head_trained_as_a_whole_beside_an_adapter():
    model, _ = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert any("lm_head" in name for name in compare(model))


def test_the_reference_is_the_policy_without_its_adapter():
    for how in ({"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):
        model, bare = adapted(**how)
        assert type(beneath(model)) is type(bare)
        with_it = heads.token_logp(model, FOREST)
        with torch.no_grad(), without_adapter(model):
            assert torch.equal(heads.token_logp(model, FOREST), heads.token_logp(bare, FOREST))
        assert torch.equal(heads.token_logp(model, FOREST), with_it)
        assert float((with_it - heads.token_logp(bare, FOREST)).detach().abs().max()) > 1e-2
    with without_adapter(bare):
        assert beneath(bare) is bare


def test_adapters_that_the_head_cannot_take_apart_are_refused():
    model, _ = adapted(target_modules=["q_proj", "lm_head"], use_dora=True)
    with pytest.raises(UserError, match="only plain LoRA"):
        heads.token_logp(model, FOREST)
    torch.manual_seed(0)
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    check_forest(llama)
    soft = peft.get_peft_model(llama, peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UserError, match="an adapter of kind P_TUNING"):
        heads.token_logp(soft, FOREST)
