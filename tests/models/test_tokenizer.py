"""Tokenizers: nothing is lost, words are whole, training is deterministic."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from temper.config import UserError
from temper.models.tokenizer import BEGIN, END, PAD, SPECIAL, train_tokenizer

TEXTS = ["The baker Anna lives in the red house by the harbour. She is 42 years old."] * 3 + [
    "Yes, he isn't young; see line 7.\n\nEnd."
] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 420)


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["", " ", "á 日本 🎉\x00\r\n\t x", " , .", "a <|end|> b", "don't ' s", "\ufffd\u200d"])
def test_hard_texts_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_are_whole_and_digits_stand_alone(tokenizer):
    assert tokenizer.tokenize("The baker lives in the red house") == ["The", "Ġbaker", "Ġlives", "Ġin", "Ġthe", "Ġred", "Ġhouse"]
    assert [tokenizer.decode(t) for t in tokenizer.encode(" 42 years")] == [" 4", "2", " years"]


def test_special_tokens_come_first_and_nothing_is_added(tokenizer):
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BEGIN, END, PAD)
    assert tokenizer.encode("Anna", add_special_tokens=True) == tokenizer.encode("Anna", add_special_tokens=False)
    assert tokenizer.encode("a<|end|>")[-1] == tokenizer.eos_token_id
    assert tokenizer.chat_template is None


def test_training_is_deterministic(tokenizer):
    again = train_tokenizer(iter(TEXTS), 420)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_it_survives_the_disk(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "She isn't 42 , is she ?\n <|user|>日本"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again.decode(again.encode("a<|user|>b<|end|>"), skip_special_tokens=True) == "ab"


def test_too_small_a_vocabulary_is_one_line():
    with pytest.raises(UserError, match="at least 262"):
        train_tokenizer(TEXTS, 200)
    with pytest.raises(UserError, match="lack"):
        train_tokenizer(TEXTS, 400, special=["<|end|>"])
