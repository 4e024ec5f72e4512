"""Tiny tokenizers and chat templates, written for these tests."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The harbour master weighs the herring before the boats go out again.",
    "What is the price of herring today? It is three crowns.",
    "system user assistant Human: Assistant: Hello there, how are you? Fine, thank you!",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_BLOCKS = (  # the block leaves out the end of turn
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def make_tokenizer(special=(), template=None, bos=None, eos=None, adds_bos=False, pad=None):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    inner.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=pad)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
        )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session", name="make_tokenizer")
def _make_tokenizer():
    return make_tokenizer


@pytest.fixture(scope="session")
def chatml():
    return make_tokenizer(["<|im_start|>", "<|im_end|>"], CHATML, eos="<|endoftext|>")


@pytest.fixture(scope="session")
def chatml_blocks():
    return make_tokenizer(["<|im_start|>", "<|im_end|>"], CHATML_BLOCKS, eos="<|im_end|>", pad="<|im_end|>")


@pytest.fixture(scope="session")
def llama3():
    special = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return make_tokenizer(special, LLAMA3, bos="<|begin_of_text|>", eos="<|end_of_text|>", adds_bos=True)


@pytest.fixture(scope="session")
def base():
    return make_tokenizer(eos="<|endoftext|>")


@pytest.fixture
def window():
    def make(max_length=None, too_long="error", skip_bad=False):
        return SimpleNamespace(max_length=max_length, too_long=too_long, skip_bad=skip_bad)

    return make
