"""Byte-level BPE tokenizers of our own. Floor 2.

BOS: the tokenizer never adds it by itself, so decode(encode(text)) is the text. Whoever writes a document puts `bos_token_id` in front
and `eos_token_id` behind it; the chat template writes its own. So there is always exactly one. <|end|> ends turns and documents alike.
A new tokenizer has the role tokens but no chat template: it belongs to a base model, and fine-tuning attaches one (`data.template`).
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from temper.config import UserError

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIAL = (BEGIN, END, PAD, "<|system|>", "<|user|>", "<|assistant|>")

# Words and marks take the space before them along; digits stand alone, so that numbers are spelled the same way everywhere.
_PIECES = r"'(?:[sdmt]|ll|ve|re)(?!\p{L})| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, special: Iterable[str] = SPECIAL, *, context: int = 0
) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on texts: the same texts give the same tokenizer, and any UTF-8 string comes back unchanged.

    vocab_size counts the special tokens and the 256 bytes and is an upper bound: few texts have few merges. special must contain
    <|begin|>, <|end|> and <|pad|>; they get the first ids, in order. context: the model's, kept as model_max_length; 0 is no limit.
    Raises UserError when vocab_size has no room for specials and bytes.
    """
    special = list(dict.fromkeys(special))
    missing = {BEGIN, END, PAD} - set(special)
    if missing:
        raise UserError(f"special tokens lack {', '.join(sorted(missing))}")
    floor = 256 + len(special)
    if vocab_size < floor:
        raise UserError(f"vocab_size {vocab_size}: 256 bytes and {len(special)} special tokens need at least {floor}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(texts, trainer)
    return wrapped(bpe, special, context)


def wrapped(bpe: Tokenizer, special: Iterable[str] = SPECIAL, context: int = 0) -> PreTrainedTokenizerFast:
    """What `train_tokenizer` returns, of what it trained (its `backend_tokenizer`)."""
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[token for token in special if token not in (BEGIN, END, PAD)],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **({"model_max_length": context} if context else {}),
    )
