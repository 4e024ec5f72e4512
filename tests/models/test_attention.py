"""Packed, shared, padded and one by one: the same values and gradients, on unmodified models."""

import copy
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from temper.forest import Segment, dense_mask, plant
from temper.models import attention, heads
from temper.models.attention import attend
from temper.models.load import check_forest

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=1),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=6),
}


def model_of(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    with torch.no_grad():  # bigger weights, so that a wrong mask shows
        for p in model.parameters():
            p.mul_(4.0) if p.dim() > 1 else None
    check_forest(model)
    return model.eval()


def grow(seed: int, kind: str = "mixed"):
    rng = random.Random(seed)

    def segment(n, parent):
        tokens = [rng.randrange(61) for _ in range(n)]
        return Segment(tokens, [0.0 if parent < 0 else 1.0] * n, parent)

    if kind == "chain":  # deep, with and without branches
        return [[segment(rng.randint(1, 3), s - 1) for s in range(20)] + [segment(2, rng.randrange(20)) for _ in range(5)]]
    if kind == "wide":
        return [[segment(7, -1)] + [segment(rng.randint(1, 12), 0) for _ in range(9)] for _ in range(2)]
    if kind == "roots":
        return [[segment(rng.choice([1, 1, 3, 8, 33]), -1)] for _ in range(25)]
    if kind == "long":  # neighbours of equal length, long and short answers to one prompt
        equal = [[segment(70, -1)] for _ in range(3)]
        pairs = [[segment(rng.randint(60, 120), -1), *(segment(rng.choice([5, 66, 130]), 0) for _ in range(3))] for _ in range(2)]
        return [*equal, *pairs, [segment(80, -1), segment(3, 0), segment(70, 1), segment(90, 1), segment(2, 0)]]
    return [
        [segment(rng.choice([1, 1, 2, 5, 9, 40]), rng.randrange(-1, s) if s else -1) for s in range(rng.randint(1, 8))] for _ in range(4)
    ]


@pytest.mark.parametrize("shape", [(4, 4, 8), (4, 2, 12), (3, 1, 7)])
@pytest.mark.parametrize("kind", ["mixed", "chain", "wide", "roots", "long"])
def test_flash_equals_the_dense_oracle(kind, shape):
    heads_, groups, size = shape
    for seed in range(3):
        forest = plant(grow(seed, kind))
        torch.manual_seed(seed)
        q, k, v = (torch.randn(forest.T, n, size) for n in (heads_, groups, groups))
        if seed % 2:  # as after a rotary embedding: heads are outermost in memory
            q, k = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k))
        for x in (q, k, v):
            x.requires_grad_()
        weight = torch.randn(forest.T, heads_, size)
        scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(heads_ // groups, 1)) * 0.3
        scores = scores.masked_fill(~dense_mask(forest), -torch.inf).softmax(-1)
        naive = torch.einsum("hij,jhd->ihd", scores, v.repeat_interleave(heads_ // groups, 1))
        expected = torch.autograd.grad((naive * weight).sum(), (q, k, v))
        for backend in ("flash", "dense"):
            out = attend(q, k, v, forest, scale=0.3, backend=backend)
            torch.testing.assert_close(out, naive, atol=1e-5, rtol=1e-5)
            for x, y in zip(torch.autograd.grad((out * weight).sum(), (q, k, v)), expected, strict=True):
                torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def blocks_of(count, index):
    """[n, n] bool: the blocks of keys that a block of queries is given."""
    n = count.shape[-1]
    out = torch.zeros(n, n, dtype=torch.bool)
    for row in range(n):
        out[row, index[0, 0, row, : int(count[0, 0, row])].long()] = True
    return out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", ["mixed", "chain", "wide", "roots", "long"])
def test_the_block_mask_is_the_dense_oracle(kind, window, monkeypatch):
    """On the CPU FlexAttention has no backward pass and ignores which blocks it is given, so both are looked at."""
    monkeypatch.setattr(attention, "BLOCK", 16)
    forest = plant(grow(3, kind))
    torch.manual_seed(0)
    q, k, v = (torch.randn(forest.T, n, 12) for n in (4, 2, 2))
    flex, dense = (attend(q, k, v, forest, scale=0.3, backend=backend, window=window) for backend in ("flex", "dense"))
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=1e-5)
    mask, n = attention.block_mask(forest, window), -(-forest.T // 16)
    seen = torch.zeros(n * 16, n * 16, dtype=torch.bool)
    seen[: forest.T, : forest.T] = dense_mask(forest)
    if window:
        seen[: forest.T, : forest.T] &= forest.position[:, None] - forest.position[None, :] < window
    seen = seen.view(n, 16, n, 16).transpose(1, 2).flatten(2)
    whole = blocks_of(mask.full_kv_num_blocks, mask.full_kv_indices)
    given = whole | blocks_of(mask.kv_num_blocks, mask.kv_indices)
    assert not (seen.any(-1) & ~given).any()
    assert not (whole & ~seen.all(-1)).any()
    if not window:  # then nothing is computed in vain
        assert torch.equal(given, seen.any(-1))
        assert torch.equal(whole, seen.all(-1))
    assert attention.block_mask(forest, window) is mask


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: FlexAttention's backward pass and varlen flash")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kind", ["mixed", "wide", "roots", "long"])
def test_cuda_equals_the_dense_oracle(kind, window, dtype):
    forest = plant(grow(3, kind)).to("cuda")
    torch.manual_seed(0)
    q, k, v, weight = (torch.randn(forest.T, n, 64, device="cuda", dtype=dtype) for n in (4, 2, 2, 4))
    for x in (q, k, v):
        x.requires_grad_()
    flex, dense = (attend(q, k, v, forest, scale=0.125, backend=backend, window=window) for backend in ("flex", "dense"))
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    torch.testing.assert_close(flex, dense, **close)
    both = [torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (flex, dense)]
    for x, y in zip(*both, strict=True):
        torch.testing.assert_close(x, y, **close)


def test_large_scores_stay_finite():
    """Padding must not overflow: its log-sum-exp is not its own."""
    forest = plant(grow(1))
    torch.manual_seed(0)
    q, k, v = (torch.randn(forest.T, 2, 8, dtype=torch.float64).mul(60).requires_grad_() for _ in range(3))
    out = [attend(q, k, v, forest, scale=1.0, backend=backend) for backend in ("flash", "dense")]
    grads = [torch.autograd.grad(x.sum(), (q, k, v)) for x in out]
    torch.testing.assert_close(out[0], out[1])
    for x, y in zip(*grads, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, atol=1e-7, rtol=1e-6)


def one_by_one(model, forest, weight):
    """Every path alone, by the model's own forward: Σ weight · hidden over each segment's own tokens, and hidden."""
    total, states = 0.0, []
    for s in range(forest.S):
        path = [s]
        while forest.parent[path[0]] >= 0:
            path.insert(0, int(forest.parent[path[0]]))
        ids = torch.cat([forest.tokens[forest.start[p] : forest.end[p]] for p in path])[None]
        own = slice(int(forest.start[s]), int(forest.end[s]))
        x = model.base_model(input_ids=ids).last_hidden_state[0, -(own.stop - own.start) :]
        total = total + (x * weight[own]).sum()
        states.append(x)
    return total, torch.cat(states)


@pytest.mark.parametrize("kind", ["mixed", "chain", "wide"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_models_agree_in_values_and_gradients(name, kind):
    model = model_of(name)
    assert model.forest_backend == "flash"
    forest = plant(grow(5, kind))
    torch.manual_seed(0)
    weight = torch.randn(forest.T, 32)
    parameters = [p for p in model.base_model.parameters() if p.requires_grad]
    total, expected = one_by_one(model, forest, weight)
    grads = torch.autograd.grad(total, parameters)
    scale = max(float(g.abs().max()) for g in grads)
    for backend in ("flash", "dense", "rows"):
        states = heads.hidden_by(model, forest, backend)
        torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-5)
        for x, y in zip(torch.autograd.grad((states * weight).sum(), parameters), grads, strict=True):
            assert float((x - y).abs().max()) < 1e-5 * scale, backend


def test_gradient_reaches_the_shared_prompt_once_per_answer():
    """The embedding gradient at a shared prompt is the sum of what two separate rows give."""
    model = model_of("llama")
    prompt, answers = [3, 4, 5, 6], ([7, 8], [9, 10, 11])
    shared = plant([[Segment(prompt), *(Segment(a, [1.0] * len(a), 0) for a in answers)]])
    embedding = model.get_input_embeddings().weight

    def grad(forest):
        return torch.autograd.grad(heads.token_logp(model, forest).sum(), embedding)[0][prompt]

    apart = [plant([[Segment(prompt), Segment(a, [1.0] * len(a), 0)]]) for a in answers]
    torch.testing.assert_close(grad(shared), grad(apart[0]) + grad(apart[1]), atol=1e-5, rtol=1e-4)
    assert float((grad(shared) - grad(apart[0])).abs().max()) > 1e-3


def test_packing_does_not_change_a_document():
    model = model_of("llama")
    trees = grow(2, "roots")
    packed = heads.hidden(model, plant(trees))
    alone = torch.cat([heads.hidden(model, plant([tree])) for tree in trees])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_layout_is_made_once_per_forest(monkeypatch):
    model, forest, made = model_of("llama"), plant(grow(0)), []
    lay_out = attention._lay_out
    monkeypatch.setattr(attention, "_lay_out", lambda f: made.append(f) or lay_out(f))
    heads.token_logp(model, forest).sum().backward()
    assert made == [forest]


def test_without_a_forest_the_model_is_itself():
    """Padded batches and generation of a loaded model are those of plain SDPA."""
    model = model_of("llama")
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    ids = torch.randint(1, 61, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, plain(input_ids=ids, attention_mask=mask).logits)
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_dropout_is_refused():
    model = model_of("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(NotImplementedError, match="no dropout"):
        heads.hidden(model, plant(grow(0)))
