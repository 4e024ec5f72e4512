"""Pretraining and SFT: the loss is the plain mean over learned tokens; a base model of another family gets a template and stops."""

import json
import math

import pytest
import torch
from toy import TINY, says, train, user, write
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedTokenizerFast

from temper.config import UserError, build
from temper.data.sources import read
from temper.data.split import split
from temper.data.template import attach_default_template, render_chat, render_prompt, stop_ids
from temper.ladder.stage import Place, run_stage
from temper.methods import load
from temper.models.load import load_policy, load_tokenizer, save
from temper.models.tokenizer import train_tokenizer
from temper.records import Message
from temper.rollout import Request, Sampling, sample
from temper.runs import Run


@torch.no_grad()
def plain_nll(model, ids, target):
    """Sum over learned tokens, by a plain forward."""
    logp = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]
    return -float((logp * torch.tensor(target)[1:]).sum())


@pytest.mark.parametrize("learn", ["all", "last"])
def test_the_first_loss_of_sft_is_the_mean_over_the_answers_tokens(toy, tmp_path, learn):
    """All records in one step: their order does not matter."""
    train("sft", tmp_path / "sft", model=toy.base, data=toy.chats, batch=168, held_out=0, learn=learn, tokens_per_microbatch=500)
    model, tokenizer = load_policy(toy.base)
    attach_default_template(tokenizer)
    rendered = [render_chat(tokenizer, r.messages, learn) for r in read(toy.chats, "chat").records]
    assert len(rendered) == 168
    expected = sum(plain_nll(model, *row) for row in rendered) / sum(sum(target) for _, target in rendered)
    (row,) = Run(tmp_path / "sft").rows("metrics")
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert row["tokens_learned"] == sum(sum(target) for _, target in rendered)


@pytest.mark.slow
def test_text_that_is_alien_to_the_model_is_announced(toy, tmp_path, capsys):
    """Words whose tokens were never seen, to a model that is sure of others: worse than guessing evenly."""
    strange = [{"messages": [*user("?"), says("@#%^ ~}{ `| @#%^ ~}{ `|")]} for _ in range(8)]
    for name, data, alien in (("own", toy.chats, False), ("strange", str(write(tmp_path / "strange.jsonl", strange)), True)):
        settings = build(load("sft").settings("sft"), {"model": toy.sft, "data": data, "epochs": 0.1, "held_out": 0})
        run_stage("sft", settings, Place(out=str(tmp_path / name), threads=1))
        found = [e for e in Run(tmp_path / name).rows("events") if e["event"] == "worse than chance"]
        assert len(found) == alien
        assert ("wrong model, tokenizer or chat template" in capsys.readouterr().err) == alien
    assert found[0]["step"] == 1
    assert found[0]["loss"] > found[0]["chance"] + 1
    assert found[0]["chance"] == pytest.approx(math.log(load_tokenizer(toy.sft).vocab_size), abs=0.05)


def test_the_held_out_loss_is_of_the_trained_model_on_records_it_did_not_see(toy, tmp_path):
    summary = train("sft", tmp_path / "sft", model=toy.base, data=toy.chats, held_out=0.2, seed=3)
    model, tokenizer = load_policy(str(tmp_path / "sft"))
    kept, out = split(read(toy.chats, "chat").records, 0.2, 3)
    assert len(out) > 20
    assert not {r.messages[0].content for r in kept} & {r.messages[0].content for r in out}
    rendered = [render_chat(tokenizer, r.messages, "all") for r in out]
    expected = sum(plain_nll(model, *row) for row in rendered) / sum(sum(target) for _, target in rendered)
    assert summary["held_out_loss"] == pytest.approx(expected, rel=1e-5)


def test_pretraining_starts_at_chance_and_its_tokenizer_reads_everything(toy, tmp_path):
    train("pretrain", tmp_path / "base", data=toy.text, batch=18, **TINY)
    first = Run(tmp_path / "base").rows("metrics")[0]
    card = Run(tmp_path / "base").stage["card"]
    assert first["loss"] == pytest.approx(math.log(card["vocabulary"]), abs=0.3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base" / "model")
    for text in ("The Old Tom is blue.", "Καλημέρα 🙂\n\ttab", "<not a tag>"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert not tokenizer.chat_template


def test_documents_longer_than_the_window_are_cut_into_windows(toy, tmp_path):
    """Every token but a document's first is learned once, whatever the window."""
    learned = []
    for window in 12, 40, 160:
        train("pretrain", tmp_path / str(window), data=toy.text, max_length=window, batch=10_000, held_out=0, **TINY)
        (row,) = Run(tmp_path / str(window)).rows("metrics")
        learned.append(row["tokens_learned"])
    assert learned[0] == learned[1] == learned[2]
    with pytest.raises(UserError, match=r"--max-length 161: the model's window is 160"):
        train("pretrain", tmp_path / "wide", data=toy.text, max_length=161, **TINY)
    assert not (tmp_path / "wide").exists()


def foreign_base(folder):
    """A base model as others publish them: GPT-2, its end token the only special one, no chat template."""
    words = train_tokenizer(["What colour is the Old Tom? It is blue."] * 3, 300)
    bare = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=len(bare), n_embd=16, n_layer=1, n_head=2, n_positions=64))
    save(model, bare, folder)
    return len(bare)


def test_a_base_model_of_another_family_learns_to_stop(tmp_path):
    """Its tokenizer gets role tokens; its model embeddings for them; its generation config the end of turn beside its own end token."""
    before = foreign_base(tmp_path / "base")
    data = write(
        tmp_path / "chats.jsonl",
        [{"messages": [*user(f"What is {n}?"), {"role": "assistant", "content": "It is blue."}]} for n in range(40)],
    )
    train("sft", tmp_path / "sft", model=str(tmp_path / "base"), data=str(data), epochs=12, batch=10, lr=1e-2)
    model, tokenizer = load_policy(str(tmp_path / "sft"))
    stop = stop_ids(tokenizer)
    assert stop == [tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id]
    assert stop[0] != stop[1]
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer) > before - 1
    assert json.loads((tmp_path / "sft" / "model" / "generation_config.json").read_text())["eos_token_id"]
    prompt = render_prompt(tokenizer, [Message(role="user", content="What is 7?")])
    ((answer,),) = sample(model, Request([prompt], sampling=Sampling(temperature=0, max_new=30), stop=stop))
    assert answer.finish == "stop"
    assert answer.tokens[-1] == stop[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model")
    ids = torch.tensor([prompt])
    out = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    assert out[0, len(prompt) :].tolist() == answer.tokens
    assert tokenizer.decode(answer.tokens, skip_special_tokens=True) == "It is blue."


def test_long_and_bad_rows_are_counted_and_listed(tmp_path, toy):
    rows = [
        {"messages": [*user(f"{n}" + " x" * (200 if n == 3 else 1)), {"role": "assistant", "content": "" if n == 5 else "ok"}]}
        for n in range(9)
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    values = {"model": toy.base, "data": str(data), "held_out": 0}
    with pytest.raises(UserError, match=r"rows.jsonl:6: message 2 \(assistant\) is empty.*--skip-bad"):
        train("sft", tmp_path / "out", **values)
    with pytest.raises(UserError, match=r"rows.jsonl:4: \d+ tokens > 160, the model's window; use --too-long drop\|cut-prompt"):
        train("sft", tmp_path / "out", skip_bad=True, **values)
    train("sft", tmp_path / "out", skip_bad=True, too_long="drop", **values)  # the folder is free again
    card = Run(tmp_path / "out").stage["card"]
    assert card["records"] == 7
    assert "1 skipped (line: why): 6: message 2 (assistant) is empty" in card["source"]
    assert "1 dropped" in card["kept"]
    assert "rows.jsonl:4" in card["kept"]
    train("sft", tmp_path / "cut", skip_bad=True, too_long="cut-prompt", **values)
    card = Run(tmp_path / "cut").stage["card"]
    assert card["records"] == 8
    assert "1 prompt cut" in card["kept"]
