"""From messages to ids, for training, rollouts, judging and chat alike; ids and target come in one pass. Floor 2.

The model's own chat template is used. Which characters are the assistant's is known from the template's {% generation %}
blocks, else from rendering prefixes; which tokens those are is proven by tokenising text prefixes and comparing tokens.

Only the template writes special tokens. One that is spelled in a message goes through the template in disguise (as many private
characters), which tells where in the text it came out; there it becomes the ordinary tokens of its letters. So no content can forge a
turn or an end, and text that spells none has the ids that it always had.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from temper.config import UserError
from temper.records import Message

SPECIAL_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END = "<|end|>"
DEFAULT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- elif message['role'] == 'system' -%}"
    "{{- '<|system|>' + message['content'] + '<|end|>' -}}"
    "{%- else -%}"
    "{{- '<|user|>' + message['content'] + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
_PROBE = "Qxzq"
_BARE: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
_PRIVATE = range(0xF0000, 0xFFFFE)  # code points that mean nothing
_stops: WeakKeyDictionary[Any, tuple[tuple, list[int]]] = WeakKeyDictionary()
_controls: WeakKeyDictionary[Any, tuple[tuple, _Control]] = WeakKeyDictionary()


def attach_default_template(tokenizer) -> int:
    """Give a tokenizer without a chat template `DEFAULT_TEMPLATE` and its special tokens (the template is then saved with it).

    Returns how many tokens are new to it, so how many embeddings its model lacks; 0 where it has a template already.
    The end token becomes `<|end|>` where it had none; generation stops at `stop_ids(tokenizer)`.
    """
    if tokenizer.chat_template:
        return 0
    known = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in known]
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)}, replace_extra_special_tokens=False)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = END
    tokenizer.chat_template = DEFAULT_TEMPLATE
    return len(missing)


def template_name(tokenizer) -> str:
    """How errors name a tokenizer's template."""
    name = getattr(tokenizer, "name_or_path", "")
    return f"the chat template of {name}" if name else "the chat template"


def chat_template(tokenizer) -> str:
    """The template of a tokenizer. Raises UserError where it has none."""
    if not tokenizer.chat_template:
        name = getattr(tokenizer, "name_or_path", "") or "the model"
        raise UserError(f"{name}: a base model, whose tokenizer has no chat template; fine-tune it first, `temper sft` gives it one")
    return tokenizer.get_chat_template()


class _Control(NamedTuple):
    """The tokens that are a template's to write: their ids, and a pattern of what the assistant's and others' contents may not write."""

    ids: frozenset[int]
    said: re.Pattern[str]  # special tokens; other added ones may be part of an answer, like <think>
    asked: re.Pattern[str]  # and other added tokens that the template holds


def _key(tokenizer) -> tuple:
    return tokenizer.chat_template, tokenizer.eos_token_id, len(tokenizer)


def _control(tokenizer) -> _Control:
    known = _controls.get(tokenizer)
    if known is not None and known[0] == _key(tokenizer):
        return known[1]
    added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if len(token.content.strip()) > 1}
    special = {i for i, token in added.items() if token.special}
    template = tokenizer.chat_template or ""
    control = special | {i for i, token in added.items() if token.content in template and not token.content.isalnum()}

    def pattern(ids: set[int]) -> re.Pattern[str]:
        spelled = sorted((added[i].content for i in ids), key=len, reverse=True)  # where several begin, the longest counts
        return re.compile("|".join(map(re.escape, spelled)) or r"(?!)")

    found = _Control(frozenset(control - {tokenizer.unk_token_id}), pattern(special), pattern(control))
    _controls[tokenizer] = _key(tokenizer), found
    return found


class _Rendered(NamedTuple):
    text: str
    blocks: list[tuple[int, int]]  # character spans of the generation blocks
    spelled: frozenset[int]  # where in text a content spells a control token


def _render(tokenizer, messages: Sequence[Message], *, ask: bool, blocks: bool = False) -> _Rendered:
    """ask: end with the generation prompt. blocks: find the generation blocks."""
    template, control = chat_template(tokenizer), _control(tokenizer)
    patterns = [control.said if m.role == "assistant" else control.asked for m in messages]
    private = (chr(c) for c in _PRIVATE if not any(chr(c) in m.content for m in messages))
    spelled = dict.fromkeys(token for m, pattern in zip(messages, patterns, strict=True) for token in pattern.findall(m.content))
    if spelled and not tokenizer.is_fast:
        raise UserError(f"a message spells {next(iter(spelled))!r}, which this tokenizer (a slow one) would take for the template's own")
    disguise = {token: next(private) * len(token) for token in spelled}
    disguised = [
        {"role": m.role, "content": pattern.sub(lambda found: disguise[found[0]], m.content)}
        for m, pattern in zip(messages, patterns, strict=True)
    ]
    render: Any = render_jinja_template  # its annotation says str
    try:
        texts, spans = render(
            conversations=[disguised],
            chat_template=template,
            add_generation_prompt=ask,
            return_assistant_tokens_mask=blocks,
            **tokenizer.special_tokens_map,
        )
    except jinja2.TemplateError as error:
        raise UserError(f"{template_name(tokenizer)} refuses these messages: {' '.join(str(error).split())}") from None
    except (TypeError, KeyError, ValueError, AttributeError, IndexError, ZeroDivisionError, RecursionError) as error:
        raise UserError(f"{template_name(tokenizer)} fails: {type(error).__name__}: {' '.join(str(error).split())}") from None
    text, places = texts[0], set()
    for token, private_text in disguise.items():
        places |= {found.start() for found in re.finditer(private_text, text)}
        text = text.replace(private_text, token)
    return _Rendered(text, [(int(a), int(b)) for a, b in spans[0]] if blocks else [], frozenset(places))


def _encode(tokenizer, texts: list[str], spelled: frozenset[int] = frozenset()) -> list[list[int]]:
    """ids of texts that begin alike; a control token that is content, at a character in `spelled`, becomes ordinary tokens."""
    if not spelled:
        return tokenizer(texts, **_BARE)["input_ids"]
    control = _control(tokenizer).ids
    encoded = tokenizer(texts, return_offsets_mapping=True, **_BARE)
    out: list[list[int]] = []
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        out.append([])
        for token, (a, b) in zip(ids, offsets, strict=True):
            content = token in control and not spelled.isdisjoint(range(a, b))
            out[-1] += _letters(tokenizer, text[a:b]) if content else [token]
    return out


def _letters(tokenizer, text: str) -> list[int]:
    """ids of text in which nothing is a control token: what the tokenizer's parts make of it, its added tokens left out."""
    backend = tokenizer.backend_tokenizer

    def plain(text: str) -> list[int]:
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
        return [token.id for piece in pieces for token in backend.model.tokenize(piece)]

    line, ids = plain("\n"), plain("\n" + text)  # after a line break: some put a blank before the first letter of a text
    ids = ids[len(line) :] if ids[: len(line)] == line else plain(text)
    _refuse_control(tokenizer, ids, "a message")
    return ids


def _refuse_control(tokenizer, ids: list[int], what: str) -> None:
    if found := _control(tokenizer).ids.intersection(ids):
        token = tokenizer.convert_ids_to_tokens(min(found))
        raise UserError(f"{what} spells {token!r}, which this tokenizer reads as its special token only; write it otherwise")


def encode_plain(tokenizer, texts: list[str], names: Sequence[str]) -> list[list[int]]:
    """ids of texts that no template touches, with special tokens that they spell as ordinary tokens.

    names: how errors call the texts. Raises UserError where a tokenizer can only read a special token.
    """
    batch = tokenizer(texts, split_special_tokens=True, **_BARE)["input_ids"]
    for ids, name in zip(batch, names, strict=True):
        _refuse_control(tokenizer, ids, name)
    return batch


def bos_id(tokenizer) -> int | None:
    """The token every sequence begins with, or None. A bos that is the eos too counts only where the tokenizer adds it itself."""
    bos = tokenizer.bos_token_id
    if bos is None or bos != tokenizer.eos_token_id:
        return bos
    own = tokenizer("a", verbose=False)["input_ids"]
    return bos if own and own[0] == bos else None


def _begin(tokenizer, ids: list[int], what: str) -> list[int]:
    """ids with exactly one beginning token where the tokenizer has one. Raises UserError when there are more."""
    bos = bos_id(tokenizer)
    if bos is None:
        return ids
    if ids[:1] != [bos]:
        ids = [bos, *ids]
    if bos in ids[1:] and bos != tokenizer.eos_token_id:
        token = tokenizer.convert_ids_to_tokens(bos)
        raise UserError(f"{what} renders the beginning token {token!r} {ids.count(bos)} times; it belongs at the start, once")
    return ids


def end_id(tokenizer) -> int:
    """The token that ends a document. Raises UserError where there is none."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no end token; set its eos_token")
    return tokenizer.eos_token_id


def stop_ids(tokenizer) -> list[int]:
    """The ids at which an answer ends: first the token the template writes after an assistant turn, then the end token.

    Raises UserError where there is none: a model could never learn to stop.
    """
    cached = _stops.get(tokenizer)
    if cached is not None and cached[0] == _key(tokenizer):
        return list(cached[1])
    found: list[int] = []
    if tokenizer.chat_template:
        try:
            text = _render(tokenizer, [Message(role="user", content="a"), Message(role="assistant", content=_PROBE)], ask=False).text
        except UserError:
            text = ""  # a template that wants something else first; then the end token alone counts
        after = text.rpartition(_PROBE)[2]
        special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        for token in _encode(tokenizer, [after])[0] if after.strip() else []:
            if token in special:
                found.append(token)
                break
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in found:
        found.append(tokenizer.eos_token_id)
    if not found:
        raise UserError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no end token, so a model could never learn to stop; "
            "set its eos_token, or a template that ends the assistant's turns with a special token"
        )
    _stops[tokenizer] = _key(tokenizer), found
    return list(found)


def render_prompt(tokenizer, messages: Sequence[Message]) -> list[int]:
    """ids of a prompt, up to where the answer begins: the template with its generation prompt, one beginning token.

    A tokenizer without a template is a base model's: the contents on lines of their own.
    """
    if not tokenizer.chat_template:
        text = "\n".join(m.content for m in messages) + "\n"
        return _begin(tokenizer, encode_plain(tokenizer, [text], ["the prompt"])[0], "the prompt")
    text, _, spelled = _render(tokenizer, messages, ask=True)
    return _begin(tokenizer, _encode(tokenizer, [text], spelled)[0], template_name(tokenizer))


def _assistant_spans(tokenizer, messages: Sequence[Message], turns: list[int]) -> tuple[_Rendered, list[tuple[int, int]]]:
    """The rendered conversation and the character span of each assistant turn in `turns` (indices into messages)."""
    name = template_name(tokenizer)
    if re.search(r"\{%[-+]?\s*generation\b", chat_template(tokenizer)):
        whole = _render(tokenizer, messages, ask=False, blocks=True)
        spans = whole.blocks
        if not any(a < b for a, b in spans):
            raise UserError(f"{name} marks no token of these messages as the assistant's; nothing would be learned")
        every = [i for i, m in enumerate(messages) if m.role == "assistant"]
        if len(turns) < len(every):
            if len(spans) != len(every):
                raise UserError(f"{name} marks {len(spans)} blocks for {len(every)} assistant turns; learn all turns instead of the last")
            spans = [spans[every.index(i)] for i in turns]
        return whole, [(a, b) for a, b in spans if a < b]
    whole = _render(tokenizer, messages, ask=False)
    spans = []
    for i in turns:
        head = _render(tokenizer, messages[:i], ask=True).text
        upto = _render(tokenizer, messages[: i + 1], ask=False).text if i + 1 < len(messages) else whole.text
        if not (whole.text.startswith(head) and whole.text.startswith(upto) and len(head) < len(upto)):
            raise UserError(
                f"{name} renders the first {i + 1} messages differently alone and within the conversation, so the assistant's tokens"
                " cannot be told; learn only the last turn, or add {% generation %} blocks to the template"
            )
        spans.append((len(head), len(upto)))
    return whole, spans


def render_chat(tokenizer, messages: Sequence[Message], learn: Literal["all", "last"] = "all") -> tuple[list[int], list[float]]:
    """(ids [n], target [n]): 1 on the tokens of the assistant's turns and the end-of-turn token after each, 0 elsewhere.

    The last token is the last learned one: what a template writes after it is left out.
    learn: every assistant turn, or only the last. Exactly one beginning token where the tokenizer has one.
    Raises UserError when the assistant's tokens cannot be told with certainty, when no or every token would be learned, or
    when no end-of-turn token follows a learned turn.
    """
    name = template_name(tokenizer)
    turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
    if not turns:
        raise UserError("the conversation has no assistant turn; nothing would be learned")
    stops = set(stop_ids(tokenizer))
    (text, _, spelled), spans = _assistant_spans(tokenizer, messages, turns if learn == "all" else turns[-1:])
    borders = [at for span in spans for at in span]
    places = [len(text), *sorted({*borders} - {len(text)})]
    encoded = dict(zip(places, _encode(tokenizer, [text[:at] for at in places], spelled), strict=True))
    ids, prefixes = encoded[len(text)], [encoded[at] for at in borders]
    for prefix in prefixes:
        if ids[: len(prefix)] != prefix:
            shown = tokenizer.decode(prefix[-4:])
            raise UserError(f"{name} lets a token span the border of an assistant turn (near {shown!r}), so a prompt is not a token prefix")
    target = [0.0] * len(ids)
    for start, end in zip(prefixes[::2], prefixes[1::2], strict=True):
        a, b = len(start), len(end)
        last = max((t for t in range(a, b) if ids[t] in stops), default=None)
        if last is not None and not tokenizer.decode(ids[last + 1 : b]).strip():
            b = last + 1  # a line break that the template puts after the end of turn is never generated
        else:
            t = b  # the block leaves out the end of turn: learn it too, and blanks before it
            while t < len(ids) and ids[t] not in stops and not tokenizer.decode([ids[t]]).strip():
                t += 1
            if t == len(ids) or ids[t] not in stops:
                raise UserError(f"{name} writes no end-of-turn token after an assistant turn, so a model could never learn to stop")
            b = t + 1
        target[a:b] = [1.0] * (b - a)
    while not target[-1] and any(target):  # a line break after the last end of turn: nothing comes after it
        ids, target = ids[:-1], target[:-1]
    whole = _begin(tokenizer, ids, name)
    target = [0.0] * (len(whole) - len(ids)) + target
    learned = sum(target)
    if learned == 0 or learned == len(target):
        raise UserError(f"{name}: {'no' if learned == 0 else 'every'} token would be learned; its mask cannot be right")
    return whole, target
