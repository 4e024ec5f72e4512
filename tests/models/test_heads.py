"""The chunked heads against the naive product."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
)

from temper.config import UserError
from temper.forest import Segment, plant
from temper.models import heads
from temper.models.load import check_forest

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "tied": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "untied": LlamaConfig(**SMALL, num_key_value_heads=2),
    "bias": GPTJConfig(vocab_size=61, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "divided": GraniteConfig(**SMALL, num_key_value_heads=2, logits_scaling=3.0),
    "scaled": CohereConfig(**SMALL, num_key_value_heads=2, logit_scale=0.2),
    "capped": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=None),
}
TREES = [
    [Segment([1, 2, 3, 4], [0, 0, 1, 1]), Segment([5, 6, 7], [1, 1, 1], 0), Segment([8, 9], [1, 0.5], 0)],
    [Segment([10, 11, 12], [0, 2, 1])],
]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[request.param]))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    check_forest(model)
    return model.eval()


@pytest.fixture
def small_chunks(monkeypatch):
    """Two rows at a time, so that every test crosses chunk borders."""
    monkeypatch.setattr(heads, "_chunks", lambda n, vocabulary, device: [slice(i, min(i + 2, n)) for i in range(0, n, 2)])


def naive(model, forest, temperature=1.0):
    """[n, V] log-probs by the model's own logits, each path as a row of its own."""
    out = []
    for t in forest.learned.tolist():
        path, at = [], t
        while at >= 0:
            path.insert(0, int(forest.tokens[at]))
            at = int(forest.previous[at])
        out.append(model(input_ids=torch.tensor([path[:-1]])).logits[0, -1].float() / temperature)
    return torch.stack(out).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logp_is_the_models_own(model, small_chunks, temperature):
    forest = plant(TREES)
    full = naive(model, forest, temperature)
    expected = full.gather(1, forest.tokens[forest.learned, None])[:, 0]
    logp, entropy = heads.token_logp_entropy(model, forest, temperature=temperature)
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1), atol=1e-5, rtol=1e-5)
    assert not entropy.requires_grad
    weight = torch.linspace(-1, 1, len(logp))
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad((expected * weight).sum(), parameters)
    scale = max(float(g.abs().max()) for g in wanted)
    for x, y in zip(torch.autograd.grad((logp * weight).sum(), parameters), wanted, strict=True):
        assert float((x - y).abs().max()) < 1e-5 * scale


def test_weighted_nll_is_the_same_gradient(model, small_chunks):
    forest = plant(TREES)
    parameters = [p for p in model.parameters() if p.requires_grad]
    total, logp = heads.weighted_nll(model, forest)
    grads = torch.autograd.grad(total * 0.3, parameters, retain_graph=True)
    again = torch.autograd.grad(total * 0.3, parameters)
    own = heads.token_logp(model, forest)
    expected = torch.autograd.grad(-0.3 * (own * forest.target[forest.learned]).sum(), parameters)
    torch.testing.assert_close(logp, own.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(total, -(own * forest.target[forest.learned]).sum())
    scale = max(float(g.abs().max()) for g in expected)
    for x, y, z in zip(grads, expected, again, strict=True):
        assert float((x - y).abs().max()) < 1e-5 * scale
        assert torch.equal(x, z)  # a second backward is not scaled twice
    assert not logp.requires_grad


def largest(tensors):
    return max(float(x.abs().max()) for x in tensors)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_is_that_of_torch(model, small_chunks, smoothing):
    forest = plant(TREES)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weight = torch.linspace(-1, 2, len(forest.learned))
    total, logp = heads.weighted_nll(model, forest, weight, smoothing=smoothing)
    full = naive(model, forest)
    labels = forest.tokens[forest.learned]
    expected = (F.cross_entropy(full, labels, reduction="none", label_smoothing=smoothing) * weight).sum()
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(logp, full.gather(1, labels[:, None])[:, 0].detach(), atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad(expected, parameters)
    for x, y in zip(torch.autograd.grad(total, parameters), grads, strict=True):
        assert float((x - y).abs().max()) < 1e-5 * largest(grads)


def test_the_likeliest_tokens(model, small_chunks):
    forest = plant(TREES)
    logp, tokens = heads.token_top(model, forest, 5, temperature=0.7)
    expected = naive(model, forest, 0.7).topk(5)
    torch.testing.assert_close(logp, expected.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens, expected.indices)
    assert not logp.requires_grad
    torch.testing.assert_close(heads.token_top(model, forest, 2, temperature=0.7, indices=forest.learned[[3]])[0], logp[[3], :2])


@pytest.mark.parametrize("forward", [False, True])
def test_kl_between_two_models_is_that_of_their_full_distributions(model, small_chunks, forward):
    forest = plant(TREES)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1 + 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    sure = naive(model, forest).detach().max() > -1e-2  # logits so large that both are sure of one token
    temperature = 8.0 if sure else 0.7
    kl = heads.token_kl(model, other, forest, forward=forward, temperature=temperature)
    p, q = naive(model, forest, temperature), naive(other, forest, temperature).detach()
    expected = (q.exp() * (q - p)).sum(-1) if forward else (p.exp() * (p - q)).sum(-1)
    assert float(expected.detach().max()) > 1e-3
    torch.testing.assert_close(kl, expected, atol=1e-5, rtol=1e-5)
    weight = torch.linspace(-1, 2, len(kl))
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad((expected * weight).sum(), parameters)
    for x, y in zip(torch.autograd.grad((kl * weight).sum(), parameters), grads, strict=True):
        assert float((x - y).abs().max()) < 2e-5 * largest(grads)
    assert all(p.grad is None for p in other.parameters())
    same = heads.token_kl(model, model, forest, forward=forward)
    assert float(same.detach().abs().max()) < 1e-6


def test_kl_of_models_with_different_vocabularies_is_one_line():
    models = []
    for size in (61, 64):
        config = copy.deepcopy(CONFIGS["untied"])
        config.vocab_size = size
        models.append(AutoModelForCausalLM.from_config(config))
        check_forest(models[-1])
    with pytest.raises(UserError, match="a policy with 61 tokens against a reference with 64"):
        heads.token_kl(*models, plant(TREES))


def test_function_against_finite_differences(small_chunks):
    torch.manual_seed(0)
    x, w, b = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7)
    tokens, weight = torch.randint(7, (5,)), torch.randn(5)
    for final in (heads.Final(1.5, None, 0.8), heads.Final(1.5, 2.0, 0.8)):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        logp = heads._LogProbs.apply(final, tokens, False, leaves[2], *leaves[:2])[0]
        grads = torch.autograd.grad((logp * weight).sum(), leaves)

        def total(values, final=final):
            z = values[0].double() @ values[1].double().t() + values[2].double()
            z = z * final.scale
            z = z if final.softcap is None else final.softcap * torch.tanh(z / final.softcap)
            return ((z / final.temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0] * weight).sum()

        for i, grad in enumerate(grads):
            for j in range(grad.numel()):
                up, down = ([t.double().clone() for t in (x, w, b)] for _ in range(2))
                up[i].view(-1)[j] += 1e-5
                down[i].view(-1)[j] -= 1e-5
                assert float(grad.view(-1)[j]) == pytest.approx(float(total(up) - total(down)) / 2e-5, abs=2e-5)


def test_no_gradient_is_computed_where_none_is_wanted(model):
    forest = plant(TREES)
    with torch.no_grad():
        total, _ = heads.weighted_nll(model, forest)
    assert not total.requires_grad
    head = model.get_output_embeddings().weight
    head.requires_grad_(False)
    try:
        total, _ = heads.weighted_nll(model, forest)
        total.backward()
        assert head.grad is None
    finally:
        head.requires_grad_(True)
        model.zero_grad()


def test_bfloat16_accumulates_in_float32():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["untied"])).to(torch.bfloat16)
    check_forest(model)
    forest = plant(TREES)
    logp = heads.token_logp(model, forest)
    assert logp.dtype == torch.float32
    expected = naive(model, forest).gather(1, forest.tokens[forest.learned, None])[:, 0]
    torch.testing.assert_close(logp, expected, atol=2e-2, rtol=0)
    logp.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.bfloat16


def test_many_small_gradients_add_up_in_bfloat16(small_chunks):
    """A sum kept in bfloat16 would stop growing at 256 times its steps."""
    n = 2000
    x, w = torch.ones(n, 2, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    tokens, weight, final = torch.zeros(n, dtype=torch.int64), torch.ones(n), heads.Final(1.0, None, 1.0)
    for weights in (w, w.detach().float().requires_grad_()):
        total, _ = heads._WeightedNll.apply(final, tokens, weight, 0.0, True, None, x, weights)
        logp, _ = heads._LogProbs.apply(final, tokens, False, None, x, weights)
        grads = [torch.autograd.grad(loss, weights)[0] for loss in (total, -logp.sum())]
        assert {grad.dtype for grad in grads} == {weights.dtype}
        for grad in grads:
            torch.testing.assert_close(grad[:, 0].float(), torch.tensor([-0.75, 0.25, 0.25, 0.25]) * n, rtol=1e-2, atol=0)


def test_indices_choose_tokens(model):
    forest = plant(TREES)
    logp = heads.token_logp(model, forest)
    torch.testing.assert_close(heads.token_logp(model, forest, indices=forest.learned[[4, 1]]), logp[[4, 1]])
    with pytest.raises(ValueError, match="token 0 begins its path"):
        heads.token_logp(model, forest, indices=torch.tensor([3, 0]))
    with pytest.raises(ValueError, match="weights for 9 learned"):
        heads.weighted_nll(model, forest, torch.ones(2))


def test_a_path_longer_than_the_model_is_named():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=24))
    model.forest_backend = "flash"
    with pytest.raises(ValueError, match="a path of 30 tokens for a model of 24"):
        heads.hidden(model, plant([[Segment([1] * 20), Segment([2] * 10, parent=0)]]))


@pytest.mark.parametrize("config", [CONFIGS["untied"], GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4)])
def test_scores_are_those_of_hugging_face_however_padded_or_packed(config):
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.num_labels, config.pad_token_id = 1, 60
    model = AutoModelForSequenceClassification.from_config(config).eval()
    rows = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 8, 9]]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
        right = torch.tensor([rows[0], rows[1] + [60]])
        left = torch.tensor([rows[0], [60] + rows[1]])
        mask = (left != 60).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = model(input_ids=right, attention_mask=(right != 60).long()).logits[:, 0]
        before = model(input_ids=left, attention_mask=mask, position_ids=positions).logits[:, 0]
        check_forest(model)
        shared = plant([[Segment([1, 2, 3, 4]), Segment([5, 6, 7], parent=0), Segment([8, 9], parent=0)]])
        packed = plant([[Segment(rows[1])], [Segment(rows[0])]])
        ours = heads.scalar(model, shared, shared.last[1:])
        others = heads.scalar(model, packed, packed.last).flip(0)
    for scores in (padded, before, ours, others):
        torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-5)
    assert abs(float(alone[0] - alone[1])) > 1e-3
