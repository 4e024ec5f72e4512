"""Soft prompts and prefixes in the forest and in rollouts: PEFT's own forward on padded rows, in values and gradients."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from temper.forest import Segment, dense_mask, graft, plant, unroll
from temper.models import heads
from temper.models.adapters import without_adapter
from temper.models.load import check_forest
from temper.rollout import Request, Sampling, sample

peft = pytest.importorskip("peft")

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=1),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=12),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=6),
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=None),
    "neox": GPTNeoXConfig(**SMALL, hidden_dropout=0.0, attention_dropout=0.0),
    "bloom": BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0),
}
KINDS = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "projected prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8),
}
FOREST = plant(
    [
        [Segment([1, 2, 3, 4], [0, 0, 1, 1]), Segment([5, 6, 7], [1, 1, 1], 0), Segment([8, 9], [1, 0.5], 0)],
        [Segment([10, 11, 12, 13, 14, 15, 16, 17, 18], [0.0] * 8 + [1.0])],
        [Segment([19], [0.0]), Segment([20, 21], [1, 1], 0)],
    ]
)
CASES = [(name, kind) for name in CONFIGS for kind in KINDS if name == "llama" or kind != "projected prefix"]


def soft_model(name, kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    with torch.no_grad():  # bigger weights, so that a wrong mask shows
        for p in model.parameters():
            p.mul_(3.0) if p.dim() > 1 else None
    model = peft.get_peft_model(model, copy.deepcopy(KINDS[kind])).eval()
    check_forest(model)
    return model


def theirs(model):
    """The learned tokens' log-probs from PEFT's forward on rows padded to the right."""
    rows = unroll(FOREST)
    logits = model(input_ids=rows.ids, attention_mask=rows.mask.long()).logits[:, -rows.ids.shape[1] :]
    logp = logits[:, :-1].log_softmax(-1).gather(-1, rows.ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(logp, (1, 0)).flatten()[rows.where][FOREST.learned]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_forest_is_pefts_own_forward(name, kind):
    model = soft_model(name, kind)
    assert (model.forest_backend == "rows") == (name == "bloom")
    ours, expected = heads.token_logp(model, FOREST), theirs(model)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    weight = torch.linspace(0.5, 1.5, len(ours))
    wanted = torch.autograd.grad((expected * weight).sum(), trained)
    for x, y in zip(torch.autograd.grad((ours * weight).sum(), trained), wanted, strict=True):
        assert float((x - y).abs().max()) < 1e-5 * max(1.0, float(y.abs().max()))
        assert float(y.abs().max()) > 0
    with torch.no_grad(), without_adapter(model):
        bare = heads.token_logp(model, FOREST)
        torch.testing.assert_close(bare, heads.token_logp(model.get_base_model(), FOREST), atol=0, rtol=0)
    assert float((bare - ours).detach().abs().max()) > 1e-2
    torch.testing.assert_close(heads.token_logp(model, FOREST), ours, atol=0, rtol=0)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_rollouts_see_what_training_sees(name, kind):
    """The sampler's log-probs are the trainer's, so the virtual tokens stand in the cache, once and in place."""
    model = soft_model(name, kind)
    prompts = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11, 12, 13, 14]]
    groups = sample(model, Request(prompts, sampling=Sampling(max_new=7), stop=[0], n=2, seed=(1,)))
    trees = [
        [Segment(prompt), *(Segment(a.tokens, [1.0] * len(a.tokens), 0) for a in answers)]
        for prompt, answers in zip(prompts, groups, strict=True)
    ]
    with torch.no_grad():
        logp = heads.token_logp(model, plant(trees))
    sampled = torch.tensor([x for answers in groups for a in answers for x in a.logp])
    torch.testing.assert_close(sampled, logp, atol=1e-4, rtol=1e-4)


def test_a_graft_is_one_root_under_all():
    grown = graft(FOREST, 3)
    mask = dense_mask(grown)
    assert mask[3:, :3].all()
    assert torch.equal(mask[3:, 3:], dense_mask(FOREST))
    assert torch.equal(grown.position[3:], FOREST.position + 3)
    assert not grown.learned.lt(3).any()
    assert grown.parent.tolist()[0] == -1
    assert (grown.parent[1:] >= 0).all()
    assert graft(FOREST, 3) is grown
