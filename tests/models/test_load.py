"""Models on disk: what is written is what any program reads, and mistakes are one line."""

import copy
import json
import logging
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
)

from temper.config import UserError
from temper.forest import Segment, plant
from temper.models import heads
from temper.models.load import (
    ExportError,
    Size,
    check_forest,
    export,
    load_policy,
    load_scalar,
    load_tokenizer,
    new_model,
    parameters_in,
    resize,
    save,
)
from temper.models.tokenizer import train_tokenizer

SIZE = Size(width=32, layers=2, heads=4, kv_heads=2, context=64)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The baker lives in the red house by the harbour."] * 3, 320)


@pytest.fixture
def folder(tmp_path, tokenizer):
    save(new_model(SIZE, len(tokenizer), tokenizer, seed=1), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_the_seed_decides_the_weights():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (new_model(SIZE, 100, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert a.lm_head.weight is a.model.embed_tokens.weight


@pytest.mark.parametrize(("size", "message"), [({"heads": 5}, "width 32 over 5 heads"), ({"kv_heads": 3}, "kv_heads 3 does not divide")])
def test_sizes_that_do_not_divide(size, message):
    with pytest.raises(UserError, match=message):
        new_model(SIZE.model_copy(update=size), 100, seed=0)


def test_any_program_reads_what_is_saved(folder, tokenizer):
    ours, _ = load_policy(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert "forest" not in (folder / "config.json").read_text()
    assert theirs.config._attn_implementation != "forest"
    inputs = AutoTokenizer.from_pretrained(folder)("The baker", return_tensors="pt")
    assert torch.equal(
        theirs.generate(**inputs, max_new_tokens=6, do_sample=False), ours.generate(**inputs, max_new_tokens=6, do_sample=False)
    )
    generation = json.loads((folder / "generation_config.json").read_text())
    ids = {name: generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    assert ids == {name: getattr(tokenizer, f"{name}_token_id") for name in ids}


def test_the_numbers_in_a_models_files_are_counted_without_reading_them(folder, monkeypatch):
    model, _ = load_policy(folder)
    monkeypatch.setattr("temper.models.load._load", lambda *a: pytest.fail("loaded"))
    assert parameters_in(folder) == sum(p.numel() for p in model.parameters())
    (folder / "model.safetensors").write_bytes(b"no header")
    assert parameters_in(folder) == 0
    with pytest.raises(UserError, match="no such folder"):
        parameters_in(folder / "not" / "there")


def test_stop_ids_join_the_generation_config(folder, tokenizer):
    model, _ = load_policy(folder)
    save(model, tokenizer, folder, stop=[7, tokenizer.eos_token_id])
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [tokenizer.eos_token_id, 7]
    assert load_policy(folder)[0].generation_config.eos_token_id == [tokenizer.eos_token_id, 7]


def test_saving_replaces_a_folder_as_a_whole(folder, tokenizer, monkeypatch):
    (folder / "stale").write_text("x")
    model, _ = load_policy(folder)
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    with monkeypatch.context() as m:
        m.setattr(type(tokenizer), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save(model, tokenizer, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert (folder / "stale").exists()
    save(model, tokenizer, folder)
    assert not (folder / "stale").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    assert torch.equal(load_policy(folder)[0].lm_head.weight, model.lm_head.weight)


def test_what_is_exported_is_what_was_trained_or_nothing_is(folder, tokenizer, tmp_path, monkeypatch):
    """Other numbers in a weight, a weight left out, another config: nothing of the kind takes the folder's place."""
    model, _ = load_policy(folder)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    written = type(model).save_pretrained

    def spoilt(how):
        def save_pretrained(self, aside, **more):
            written(self, aside, **more)
            if how == "config":
                text = (aside / "config.json").read_text()
                (aside / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1.0'))
                return
            tensors = load_file(aside / "model.safetensors")
            name = "model.layers.1.mlp.down_proj.weight"
            tensors = {n: x for n, x in tensors.items() if n != name} | ({name: tensors[name] * 2} if how == "number" else {})
            save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})

        return save_pretrained

    for how, what in (
        ("number", "gives other logits"),
        ("config", "gives other logits"),
        ("missing", "1 weights are missing from its files"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "save_pretrained", spoilt(how))
            with pytest.raises(ExportError, match=f"^{folder}: what was saved.*{what}") as caught:
                export(model, tokenizer, folder)
        assert caught.value.code == 1
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
    export(model, tokenizer, folder)
    assert torch.equal(load_policy(folder)[0].lm_head.weight, model.lm_head.weight)


def test_an_exported_score_is_what_was_trained(folder, tmp_path):
    model, tokenizer = load_scalar(folder, seed=3)
    export(model, tokenizer, tmp_path / "reward")
    model.score.bias = torch.nn.Parameter(torch.ones(1))  # the format has no place for it
    with pytest.raises(ExportError, match="reward: what was saved, read back, gives other logits"):
        export(model, tokenizer, tmp_path / "reward")


def test_a_new_scoring_head_and_back(folder, tmp_path):
    a, tokenizer = load_scalar(folder, seed=3)
    b, _ = load_scalar(folder, seed=3)
    c, _ = load_scalar(folder, seed=4)
    language, _ = load_policy(folder)
    assert torch.equal(a.score.weight, b.score.weight)
    assert not torch.equal(a.score.weight, c.score.weight)
    draw = torch.empty(1, 32).normal_(0, 1 / math.sqrt(33), generator=torch.Generator().manual_seed(3))
    assert torch.equal(a.score.weight.detach(), draw)
    assert a.config.pad_token_id == tokenizer.pad_token_id
    for x, y in zip(a.model.parameters(), language.model.parameters(), strict=True):
        assert torch.equal(x, y)
    save(a, tokenizer, tmp_path / "reward")
    again, _ = load_scalar(tmp_path / "reward", seed=9)
    assert torch.equal(again.score.weight, a.score.weight)
    forest = plant([[Segment([1, 2, 3])]])
    assert torch.equal(heads.scalar(a, forest, forest.last), heads.scalar(again, forest, forest.last))
    with pytest.raises(UserError, match="a scoring model"):
        load_policy(tmp_path / "reward")


def test_loading_turns_dropout_off(tmp_path, tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=4))
    save(model, tokenizer, tmp_path / "gpt")
    loaded, _ = load_policy(tmp_path / "gpt")
    forest = plant([[Segment([1, 2, 3], [0, 1, 1])]])
    assert torch.equal(heads.token_logp(loaded.train(), forest), heads.token_logp(loaded.eval(), forest))


def test_resize_adds_rows_for_added_tokens(folder):
    model, tokenizer = load_policy(folder)
    assert not resize(model, tokenizer)
    tokenizer.add_tokens(["<extra>"])
    old = model.lm_head.weight.detach().clone()
    assert resize(model, tokenizer)
    assert model.lm_head.weight.shape[0] == len(tokenizer)
    assert torch.equal(model.lm_head.weight[:-1], old)
    assert heads.token_logp(model, plant([[Segment([1, len(tokenizer) - 1], [0, 1])]])).isfinite().all()


def broken(folder, how):
    if how == "config":
        (folder / "config.json").unlink()
    elif how == "json":
        (folder / "config.json").write_text("{")
    elif how == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif how == "weights":
        (folder / "model.safetensors").unlink()
    elif how == "cut":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50])
    elif how == "shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    elif how == "layers":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    elif how == "tokenizer":
        for file in folder.glob("token*"):
            file.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("config", "no config.json"),
        ("json", "config.json is not readable"),
        ("pickle", "only as pickle"),
        ("weights", "no weights"),
        ("cut", "model.safetensors is damaged"),
        ("shape", "shape"),
        ("layers", "9 weights are missing"),
        ("tokenizer", "no readable tokenizer"),
    ],
)
def test_a_broken_folder_is_one_line(folder, how, message):
    broken(folder, how)
    for load in (load_policy, load_scalar):
        with pytest.raises(UserError, match=message) as error:
            load(folder)
        assert "\n" not in str(error.value)
        assert str(folder) in str(error.value)


def test_missing_folders_and_unreachable_names(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = tmp_path / "file"
    file.write_text("x")
    for name, message in [
        (tmp_path / "none", "no such folder"),
        ("./none", "no such folder"),
        ("", "no such folder"),
        (str(file), "a file"),
        ("nobody-here/nothing", r"nobody-here/nothing: no such folder, not in the cache, and the hub cannot be reached \(.*\); give"),
    ]:
        for load in (load_policy, load_scalar, load_tokenizer):
            with pytest.raises(UserError, match=message) as error:
                load(name)
            assert "\n" not in str(error.value)


def test_without_a_network_a_name_in_the_cache_loads_and_the_hub_is_asked_once(folder, tmp_path, monkeypatch):
    asked = []

    def unreachable(url, **kwargs):
        asked.append(url)
        raise OSError("Name or service not known")

    monkeypatch.setattr("temper.models.load.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(folder, repository / "snapshots" / "abc")
    for load in (load_policy, load_scalar, load_tokenizer):
        load("someone/small")
    assert len(asked) == 1
    with pytest.raises(UserError, match=r"someone/large: .*\(Name or service not known\)"):
        load_policy("someone/large")


SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def test_a_model_that_cannot_see_the_forest_runs_in_rows(caplog):
    """Bloom's attention has its own code and takes no position ids."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)).eval()
    with caplog.at_level(logging.WARNING, "temper"):
        assert check_forest(model, "bloom") == "rows"
    assert "one padded row per sequence" in caplog.text
    forest = plant([[Segment([1, 2, 3]), Segment([4, 5], [1, 1], 0), Segment([6], [1], 0)]])
    logits = model(input_ids=torch.tensor([[1, 2, 3, 4, 5]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(heads.token_logp(model, forest)[:2], torch.stack([logits[2, 4], logits[3, 5]]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [MambaConfig, Mamba2Config])
def test_a_state_space_model_runs_in_rows(config, caplog):
    """Its layers have no attention that could be told who sees whom."""
    torch.manual_seed(0)
    more = {"num_heads": 4, "head_dim": 16, "n_groups": 1} if config is Mamba2Config else {}
    model = AutoModelForCausalLM.from_config(config(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=8, **more)).eval()
    with caplog.at_level(logging.WARNING, "temper"):
        assert check_forest(model, "m") == "rows"
    assert "cannot share prefixes" in caplog.text
    logits = model(input_ids=torch.tensor([[1, 2, 3, 4, 5]])).logits[0].log_softmax(-1)
    forest = plant([[Segment([1, 2, 3]), Segment([4, 5], [1, 1], 0), Segment([6], [1], 0)]])
    logp = heads.token_logp(model, forest)
    torch.testing.assert_close(logp[:2], torch.stack([logits[2, 4], logits[3, 5]]), atol=1e-5, rtol=1e-5)
    logp.sum().backward()


def test_soft_capped_scores_are_those_of_the_model(caplog):
    """The kernels here do not cap scores, so such a model keeps its own attention."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=0.5)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0) if p.dim() > 1 else None
    bare = copy.deepcopy(model)
    assert bare.config._attn_implementation == "eager"
    with caplog.at_level(logging.WARNING, "temper"):
        assert check_forest(model) == "rows"
    assert "softcap" in caplog.text
    forest = plant([[Segment(list(range(12)), [0.0] + [1.0] * 11)]])
    theirs = bare(input_ids=torch.arange(12)[None]).logits[0].log_softmax(-1)[range(11), range(1, 12)]
    torch.testing.assert_close(heads.token_logp(model, forest), theirs, atol=1e-5, rtol=1e-5)


def test_an_attention_that_drops_the_forest_is_noticed(monkeypatch):
    """The keyword is lost on the way: plain causal attention over the packed row would be silently wrong."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0) if p.dim() > 1 else None
    forward = type(model.model).forward

    def deaf(self, *args, forest=None, forest_backend=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", deaf)
    assert check_forest(model) == "rows"
    assert model.config._attn_implementation != "forest"


def test_a_sliding_window_is_kept():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5))
    wide = copy.deepcopy(model)
    wide.config.sliding_window = None
    forest = plant([[Segment(list(range(12)), [0.0] + [1.0] * 11)]])
    for m in (model, wide):
        check_forest(m)
    theirs = model(input_ids=torch.arange(12)[None]).logits[0].log_softmax(-1)[range(11), range(1, 12)]
    torch.testing.assert_close(heads.token_logp(model, forest), theirs, atol=1e-5, rtol=1e-5)
    assert float((heads.token_logp(wide, forest) - theirs).detach().abs().max()) > 1e-4


def test_models_that_temper_cannot_train_are_refused(monkeypatch):
    torch.manual_seed(0)
    bert = AutoModelForCausalLM.from_config(BertConfig(**SMALL))
    with pytest.raises(UserError, match="not causal"):
        check_forest(bert.eval())
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    forward = type(llama).forward

    def odd(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * torch.linspace(0.1, 9, 61)
        return out

    monkeypatch.setattr(type(llama), "forward", odd)
    with torch.no_grad():
        llama.lm_head.weight.mul_(20)
    with pytest.raises(UserError, match="changes its logits"):
        check_forest(llama)


def test_a_stage_folder_stands_for_its_model(folder):
    assert torch.equal(load_policy(folder.parent)[0].lm_head.weight, load_policy(folder)[0].lm_head.weight)
