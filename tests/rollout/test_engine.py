"""The rollout engine against transformers' own generation, against the trainer's log-probs, and against itself in other batches."""

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from temper.config import UserError
from temper.forest import Segment, plant
from temper.models.heads import token_logp
from temper.models.load import check_forest
from temper.rollout import Request, Sampling, decode, sample
from temper.rollout.sampling import draw, uniforms

V, WINDOW = 61, 48
SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": WINDOW, "initializer_range": 0.3}
GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 9, "pad_token_id": 0}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-gqa": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=WINDOW, initializer_range=0.3),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),
    "mistral": lambda: MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=9),
    "gpt-neox": lambda: GPTNeoXConfig(**SIZES),
    "phi": lambda: PhiConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=20.0, final_logit_softcapping=5.0),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **GEMMA),
    "mixtral": lambda: MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
}
PROMPTS = [[5, 7, 9], [1], [4, 4, 8, 15, 16, 23, 42, 3, 14, 1, 59, 26], [60, 2], [33, 12, 33, 12, 33], [10, 20, 30, 40, 50, 60, 1]]


@pytest.fixture(scope="module")
def models():
    """Random models by name, made once."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(len(name))
            model = AutoModelForCausalLM.from_config(CONFIGS[name]())
            torch.nn.Module.eval(model)
            check_forest(model)
            made[name] = model
        return made[name]

    return get


def tied(model, ids):
    """Whether the two most likely next tokens are as good as equal."""
    with torch.no_grad():
        top = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2).values
    return float(top[0] - top[1]) < 1e-5


def generate(model, prompt, new, stop):
    with torch.no_grad():
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=stop,
            pad_token_id=0,
            use_cache=True,
        )
    return out[0, len(prompt) :].tolist()


def same_until_a_tie(model, prompt, mine, theirs):
    for t, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if a != b:
            assert tied(model, prompt + mine[:t])
            return
    assert len(mine) == len(theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_transformers_greedy(models, name):
    model, sampling = models(name), Sampling(temperature=0, max_new=20)
    free = sample(model, Request(PROMPTS, sampling=sampling, stop=[V + 1]))
    stop = [free[0][0].tokens[4], free[2][0].tokens[9]]  # so that rows end at different times
    for ends in ([V + 1], stop):
        for prompt, (mine,) in zip(PROMPTS, sample(model, Request(PROMPTS, sampling=sampling, stop=ends)), strict=True):
            same_until_a_tie(model, prompt, mine.tokens, generate(model, prompt, 20, ends))


@pytest.mark.parametrize(("name", "temperature"), [*((name, 0.6) for name in CONFIGS), ("llama", 1.0), ("llama", 1.7)])
def test_log_probs_are_the_trainers(models, name, temperature):
    """One temperature everywhere: what the sampler wrote down is what the trainer recomputes on the forest."""
    model = models(name)
    groups = sample(model, Request(PROMPTS, sampling=Sampling(temperature=temperature, max_new=14), stop=[3, 8, 20], n=3, seed=(1,)))
    trees = [
        [Segment(p, [0.0] * len(p)), *(Segment(a.tokens, [1.0] * len(a.tokens), parent=0) for a in group)]
        for p, group in zip(PROMPTS, groups, strict=True)
    ]
    with torch.no_grad():
        again = token_logp(model, plant(trees), temperature=temperature)
    sampled = torch.tensor([x for group in groups for a in group for x in a.logp])
    torch.testing.assert_close(sampled, again, atol=1e-5, rtol=1e-5)


def test_greedy_log_probs_are_those_of_temperature_one(models):
    model = models("llama")
    ((answer,),) = sample(model, Request(PROMPTS[:1], sampling=Sampling(temperature=0, max_new=6), stop=[V + 1]))
    ids = torch.tensor([PROMPTS[0] + answer.tokens])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0].log_softmax(-1)
    at = torch.arange(len(answer.tokens)) + len(PROMPTS[0]) - 1
    torch.testing.assert_close(torch.tensor(answer.logp), logp[at, torch.tensor(answer.tokens)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_a_sample_does_not_depend_on_its_batch(models, name, monkeypatch):
    """All at once, one prompt at a time, and alone: the same tokens. Rows that ended leave the batch on the way."""
    model, evicted = models(name), []
    keep = decode.SharedBatch.keep
    monkeypatch.setattr(decode.SharedBatch, "keep", lambda self, *how: (evicted.append(how[0]), keep(self, *how)))
    how = {"stop": [3, 8, 20, 41, 59], "n": 4, "seed": (7, 2)}
    many = sample(model, Request(PROMPTS, sampling=Sampling(max_new=30), **how))
    assert evicted, "no row was ever evicted"
    evicted.clear()
    few = sample(model, Request(PROMPTS, sampling=Sampling(max_new=30, rows=1), **how))
    alone = sample(model, Request(PROMPTS[:1], sampling=Sampling(max_new=30), **how))
    for a, b in zip([*many, many[0]], [*few, alone[0]], strict=True):
        assert [x.tokens for x in a] == [x.tokens for x in b]
        assert [x.finish for x in a] == [x.finish for x in b]
        np.testing.assert_allclose([v for x in a for v in x.logp], [v for x in b for v in x.logp], atol=1e-5)


def test_each_row_has_its_own_numbers(models):
    model, how = models("llama"), {"sampling": Sampling(max_new=12), "stop": [V + 1]}

    def tokens(prompts, n=1, seed=(0,)):
        return [a.tokens for group in sample(model, Request(prompts, n=n, seed=seed, **how)) for a in group]

    assert tokens(PROMPTS) == tokens(PROMPTS)
    assert all(a != b for a, b in zip(tokens(PROMPTS), tokens(PROMPTS, seed=(1,)), strict=True))
    assert len(set(map(tuple, tokens([PROMPTS[0]] * 3, n=3)))) == 9  # the same prompt again, and other samples of it
    assert tokens(PROMPTS[:1], n=2)[0] == tokens(PROMPTS[:1], n=5)[0]


def test_an_answer_ends_with_the_stop_id_or_by_its_length(models):
    model, stop, new = models("llama"), [3, 8, 20, 41, 59], 9
    answers = [a for group in sample(model, Request(PROMPTS, sampling=Sampling(max_new=new), stop=stop, n=40)) for a in group]
    assert {a.finish for a in answers} == {"stop", "length"}
    for a in answers:
        assert len(a.tokens) == len(a.logp) <= new
        assert not set(a.tokens[:-1]) & set(stop)
        assert (a.finish == "stop") == (a.tokens[-1] in stop)
        assert a.finish == "stop" or len(a.tokens) == new
    assert any(len(a.tokens) == new and a.finish == "stop" for a in answers)  # ended with its last token


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_sampled_tokens_follow_the_models_distribution(temperature):
    torch.manual_seed(0)
    config = LlamaConfig(**(SIZES | {"vocab_size": 9, "num_hidden_layers": 1, "initializer_range": 0.5}))
    model = AutoModelForCausalLM.from_config(config).eval()
    n = 4000
    (group,) = sample(model, Request([[1, 2]], sampling=Sampling(temperature=temperature, max_new=2, rows=n), stop=[100], n=n))
    first = np.bincount([a.tokens[0] for a in group], minlength=9)
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([[1, 2]])).logits[0, -1].double() / temperature).softmax(-1).numpy()
    assert stats.chisquare(first, n * p).pvalue > 1e-3
    # the second token given the first, over all first tokens; cells expected below 5 are pooled
    with torch.no_grad():
        after = (model(input_ids=torch.tensor([[1, 2, t] for t in range(9)])).logits[:, -1].double() / temperature).softmax(-1).numpy()
    seen, expected = np.zeros((9, 9)), first[:, None] * after
    np.add.at(seen, tuple(np.array([a.tokens for a in group]).T), 1)
    rare = expected < 5
    cells = [np.append(x[~rare], x[rare].sum() + 1e-9) for x in (seen, expected)]
    statistic = ((cells[0] - cells[1]) ** 2 / cells[1]).sum()
    assert stats.chi2.sf(statistic, (~rare).sum() - 9) > 1e-3


def test_uniform_numbers_stay_below_one():
    """Rounded from double, one in 2^25 would be 1 and pick the vocabulary's last token whatever its probability."""
    logits = torch.tensor([[0.0, 0.0, -200.0]])
    token, _ = draw(logits, torch.tensor([1 - 2**-24]), Sampling())
    assert int(token) == 1
    u = uniforms((0,), range(50), 4, 1000)
    assert u.dtype == torch.float32
    assert float(u.max()) < 1.0
    assert stats.kstest(u.flatten().double().numpy(), "uniform").pvalue > 1e-3


def test_what_the_user_did_wrong(models):
    how = {"sampling": Sampling(max_new=10), "stop": [1]}
    with pytest.raises(UserError, match=r"prompt 1: is empty"):
        sample(models("llama"), Request([[1], []], **how))
    with pytest.raises(UserError, match=rf"prompt 0: 39 tokens \+ --max-new 10 > the model's window of {WINDOW}"):
        sample(models("gpt2"), Request([[1] * 39], **how))
    with pytest.raises(UserError, match=rf"prompt 1: token {V} for a model of {V} tokens; use the model's own tokenizer"):
        sample(models("llama"), Request([[1], [2, V, 3]], **how))
    ((fits,),) = sample(models("gpt2"), Request([[1] * 38], **{**how, "stop": [V + 1]}))
    assert len(fits.tokens) == 10
    assert sample(models("llama"), Request([], **how)) == []


def test_the_model_is_left_as_it_was(models):
    model, told = models("llama"), []
    model.train()
    before = model.config._attn_implementation
    sample(model, Request(PROMPTS, sampling=Sampling(max_new=3, rows=4), stop=[1], n=2), progress=told.append)
    assert sum(told) == len(PROMPTS)
    assert max(told) == 2
    assert model.training
    assert model.config._attn_implementation == before == "forest"
    model.eval()
