"""From messages to ids, for training, rollouts, judging and chat alike; ids and target come in one pass. Floor 2.

The model's own chat template is used, in the sandbox of transformers, its loops counted. Which characters are the assistant's is
known from the template's {% generation %} blocks, else from rendering prefixes: an answer begins where the generation prompt ends and
ends with the first end-of-turn token, as when it is generated. Which tokens those are is proven by tokenising text prefixes and
comparing tokens.

Only the template writes special tokens. One that is spelled in a message goes through the template in disguise (as many private
characters), which tells where in the text it came out; there it becomes the ordinary tokens of its letters. So no content can forge a
turn or an end, and text that spells none has the ids that it always had.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import jinja2
from transformers import TokenizersBackend
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
TURNS = 1_000_000  # that the loops of a template may take in one rendering
_caches: WeakKeyDictionary[Any, tuple[tuple, dict[str, Any]]] = WeakKeyDictionary()


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


def written(tokenizer) -> list[Any]:
    """All that decides which ids a text gets: what caches of ids go by."""
    inner = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    return [type(tokenizer).__name__, inner, tokenizer.special_tokens_map, tokenizer.chat_template]


def template_name(tokenizer) -> str:
    """How errors name a tokenizer's template."""
    name = getattr(tokenizer, "name_or_path", "")
    return f"the chat template of {name}" if name else "the chat template"


def chat_template(tokenizer, tools: Any = None) -> str:
    """The template of a tokenizer, the one for tools where it has such. Raises UserError where it has none."""
    if not tokenizer.chat_template:
        name = getattr(tokenizer, "name_or_path", "") or "the model"
        raise UserError(f"{name}: a base model, whose tokenizer has no chat template; fine-tune it first, `temper sft` gives it one")
    try:
        return tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise UserError(f"{template_name(tokenizer)}: {_line(error)}") from None


def _cache(tokenizer) -> dict[str, Any]:
    """What is known of a tokenizer; forgotten when it changes."""
    key = (tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer))
    known = _caches.get(tokenizer)
    if known is None or known[0] != key:
        known = _caches[tokenizer] = key, {}
    return known[1]


class _Control(NamedTuple):
    """The tokens that are a template's to write: their ids, and a pattern of what the assistant's and others' contents may not write."""

    ids: frozenset[int]
    said: re.Pattern[str]  # special tokens; other added ones may be part of an answer, like <think>
    asked: re.Pattern[str]  # and other added tokens that the template holds


def _control(tokenizer) -> _Control:
    cache = _cache(tokenizer)
    if "control" in cache:
        return cache["control"]
    added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if len(token.content.strip()) > 1}
    special = {i for i, token in added.items() if token.special}
    template = tokenizer.chat_template or ""
    written = " ".join(template.values()) if isinstance(template, dict) else template
    for probe in [["user", "assistant"], ["system", "user"]] if template else []:  # and marks that it puts together of pieces
        try:
            written += _jinja(tokenizer, [{"role": role, "content": _PROBE} for role in probe], ask=True)[0]
        except UserError:
            continue
    control = special | {i for i, token in added.items() if token.content in written and not token.content.isalnum()}

    def pattern(ids: set[int]) -> re.Pattern[str]:
        spelled = sorted((added[i].content for i in ids), key=len, reverse=True)  # where several begin, the longest counts
        return re.compile("|".join(map(re.escape, spelled)) or r"(?!)")

    cache["control"] = found = _Control(frozenset(control - {tokenizer.unk_token_id}), pattern(special), pattern(control))
    return found


def _line(error: Exception) -> str:
    """An error in one printable line of bounded length."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(error).split()))
    return text if len(text) <= 300 else text[:299] + "\u2026"


@lru_cache
def _bounded(template: str, most: int) -> str:
    """The template with the turns of its loops and macros counted, at most so many; it renders the same text.

    Raises jinja2.TemplateError for one that cannot be read, or that raises numbers to powers (which can take for ever, uncounted).
    """
    out, before, tag = ["{% set temper_turns = namespace(n=0) %}\n"], "", ""  # trim_blocks takes the line break
    turn = (
        "{% set temper_turns.n = temper_turns.n + 1 %}"
        f"{{% if temper_turns.n > {most} %}}{{{{ raise_exception('its loops take more than {most:,} turns') }}}}{{% endif "
    )
    for _, kind, text in jinja2.Environment(keep_trailing_newline=True).lex(template):
        out.append(text)
        if kind == "operator" and text == "**" and before not in ("(", ","):  # after those it passes named arguments
            raise jinja2.TemplateRuntimeError("it takes powers of numbers, which no chat template needs")
        if kind == "block_begin":
            tag = ""
        elif kind == "name" and not tag:
            tag = text
        elif kind == "block_end" and tag in ("for", "macro", "call"):
            out.append(f"{turn}{text[0] if text[0] in '-+' else ''}%}}")
        if kind != "whitespace":
            before = text
    return "".join(out)


def _jinja(
    tokenizer, messages: list[dict[str, Any]], *, ask: bool, blocks: bool = False, tools: Any = None
) -> tuple[str, list[tuple[int, int]]]:
    """(text, character spans of the generation blocks). Whatever a template does, it is a UserError of one line: it is foreign code."""
    template = chat_template(tokenizer, tools)
    texts: Any
    spans: Any
    try:
        texts, spans = render_jinja_template(  # type: ignore[str-unpack]
            conversations=[messages],
            tools=tools,
            chat_template=_bounded(template, TURNS),
            add_generation_prompt=ask,
            return_assistant_tokens_mask=blocks,
            **tokenizer.special_tokens_map,
        )
    except jinja2.TemplateError as error:
        raise UserError(f"{template_name(tokenizer)} refuses these messages: {_line(error)}") from None
    except (Exception, MemoryError) as error:
        raise UserError(f"{template_name(tokenizer)} fails: {type(error).__name__}: {_line(error)}") from None
    return texts[0], [(int(a), int(b)) for a, b in spans[0]] if blocks else []


class _Rendered(NamedTuple):
    text: str
    blocks: list[tuple[int, int]]  # character spans of the generation blocks
    spelled: frozenset[int]  # where in text a content spells a control token


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """JSON with every string in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(k): _mapped(v, change) for k, v in value.items()}
    return [_mapped(v, change) for v in value] if isinstance(value, list) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _strings(item)


def _render(tokenizer, messages: Sequence[Message], *, ask: bool, blocks: bool = False, tools: Any = None) -> _Rendered:
    """ask: end with the generation prompt. blocks: find the generation blocks."""
    chat_template(tokenizer, tools)
    control = _control(tokenizer)
    said = [
        m.model_dump(mode="json", exclude={"role"}) if m.tool_calls or m.name or m.tool_call_id else {"content": m.content}
        for m in messages
    ]
    patterns = [control.said if m.role == "assistant" else control.asked for m in messages]
    known = [*zip(said, patterns, strict=True), *([(tools, control.asked)] if tools else [])]
    spelled = dict.fromkeys(token for value, pattern in known for text in _strings(value) for token in pattern.findall(text))
    if spelled and not tokenizer.is_fast:
        raise UserError(f"a message spells {next(iter(spelled))!r}, which this tokenizer (a slow one) would take for the template's own")
    if spelled:
        used = {character for value, _ in known for text in _strings(value) for character in text}
        private = (chr(c) for c in _PRIVATE if chr(c) not in used)
        disguise = {token: next(private) * len(token) for token in spelled}
        said = [_mapped(value, partial(pattern.sub, lambda found: disguise[found[0]])) for value, pattern in known]
        tools = said.pop() if tools else tools
    texts = [{"role": m.role, **value} for m, value in zip(messages, said, strict=True)]
    text, spans = _jinja(tokenizer, texts, ask=ask, blocks=blocks, tools=tools)
    _refuse_lost(tokenizer, text, texts, tools)
    places: set[int] = set()
    for token in spelled:
        places |= {found.start() for found in re.finditer(disguise[token], text)}
        text = text.replace(disguise[token], token)
    return _Rendered(text, spans, frozenset(places))


def _refuse_lost(tokenizer, text: str, messages: list[dict[str, Any]], tools: Any) -> None:
    """Raises UserError where the template leaves out a system turn, a tool call or a tool without a word."""
    name = template_name(tokenizer)
    for i, message in enumerate(messages, 1):
        if message["role"] == "system" and message["content"].strip() not in text:
            raise UserError(f"{name} drops the system turn (message {i}); put its text into the user's turn")
        for call in message.get("tool_calls", []):
            if call["function"]["name"] not in text:
                raise UserError(f"{name} does not write tool calls (message {i} calls {call['function']['name']!r})")
    for tool in tools or []:
        function = tool.get("function", tool)
        called = function.get("name", "") if isinstance(function, dict) else ""
        if str(called) not in text:
            raise UserError(f"{name} does not tell the model its tools ({called!r})")


def _encode(tokenizer, texts: list[str], spelled: frozenset[int] = frozenset()) -> list[list[int]]:
    """ids of texts that begin alike; a control token that is content, at a character in `spelled`, becomes ordinary tokens."""
    if not spelled:
        backend = _plain_backend(tokenizer)
        if backend is None:
            return tokenizer(texts, **_BARE)["input_ids"]
        return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
    control = _control(tokenizer).ids
    encoded = tokenizer(texts, return_offsets_mapping=True, **_BARE)
    out: list[list[int]] = []
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        out.append([])
        for token, (a, b) in zip(ids, offsets, strict=True):
            content = token in control and not spelled.isdisjoint(range(a, b))
            out[-1] += _letters(tokenizer, text[a:b]) if content else [token]
    return out


def _plain_backend(tokenizer) -> Any:
    """What reads a text as the tokenizer itself does, without the offsets, which take a third of the time; None where there is no such."""
    if not tokenizer.is_fast or type(tokenizer)._encode_plus is not TokenizersBackend._encode_plus or tokenizer.split_special_tokens:
        return None
    backend = tokenizer.backend_tokenizer
    if backend.truncation or backend.padding:
        return None
    backend.encode_special_tokens = False  # what `encode_plain` leaves behind
    return backend


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
    """The token every sequence begins with, or None.

    A bos that is the eos too counts only where the tokenizer adds it itself; and one that neither the tokenizer nor its chat template
    writes does not count: its model never saw it.
    """
    cache = _cache(tokenizer)
    if "bos" not in cache:
        bos, template = tokenizer.bos_token_id, str(tokenizer.chat_template or "bos_token")
        added = bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
        written = bos is not None and bos != tokenizer.eos_token_id and ("bos_token" in template or tokenizer.bos_token in template)
        cache["bos"] = bos if added or written else None
    return cache["bos"]


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
    cache = _cache(tokenizer)
    if "stops" in cache:
        return list(cache["stops"])
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
    cache["stops"] = found
    return list(found)


def render_prompt(tokenizer, messages: Sequence[Message], tools: Any = None) -> list[int]:
    """ids of a prompt, up to where the answer begins: the template with its generation prompt, one beginning token.

    tools: JSON schemas of the functions that the model may call. A tokenizer without a template is a base model's: the contents on lines
    of their own.
    """
    if not tokenizer.chat_template:
        text = "\n".join(m.content for m in messages) + "\n"
        return _begin(tokenizer, encode_plain(tokenizer, [text], ["the prompt"])[0], "the prompt")
    text, _, spelled = _render(tokenizer, messages, ask=True, tools=tools)
    return _begin(tokenizer, _encode(tokenizer, [text], spelled)[0], template_name(tokenizer))


class _Turn(NamedTuple):
    """An assistant turn in the rendered text, in characters."""

    start: int
    stop: int  # of a generation block its end; else how far the text is the same when the conversation ends with this turn
    block: bool
    number: int  # how many messages end with it


def _assistant_turns(tokenizer, messages: Sequence[Message], turns: list[int], tools: Any) -> tuple[_Rendered, list[_Turn]]:
    """The rendered conversation and where in it the assistant turns in `turns` (indices into messages) stand."""
    name = template_name(tokenizer)
    if re.search(r"\{%[-+]?\s*generation\b", chat_template(tokenizer, tools)):
        whole = _render(tokenizer, messages, ask=False, blocks=True, tools=tools)
        spans = whole.blocks
        if not any(a < b for a, b in spans):
            raise UserError(f"{name} marks no token of these messages as the assistant's; nothing would be learned")
        every = [i for i, m in enumerate(messages) if m.role == "assistant"]
        if len(turns) < len(every):
            if len(spans) != len(every):
                raise UserError(f"{name} marks {len(spans)} blocks for {len(every)} assistant turns; learn all turns instead of the last")
            spans = [spans[every.index(i)] for i in turns]
        return whole, [_Turn(a, b, True, 0) for a, b in spans if a < b]
    whole = _render(tokenizer, messages, ask=False, tools=tools)
    found = []
    for i in turns:
        if i == 0:
            raise UserError(f"the conversation begins with an assistant turn, for which {name} has no prompt; begin with a user turn")
        head = _render(tokenizer, messages[:i], ask=True, tools=tools).text
        alone = whole.text if i + 1 == len(messages) else _render(tokenizer, messages[: i + 1], ask=False, tools=tools).text
        same = len(alone) if whole.text.startswith(alone) else common(whole.text, alone)
        if not whole.text.startswith(head) or same <= len(head):
            raise _differs(name, i + 1)
        found.append(_Turn(len(head), same, False, i + 1))
    return whole, found


class TurnsDiffer(UserError):
    """A template renders a turn otherwise when others follow it: it takes the reasoning out of earlier answers, say."""


def _differs(name: str, messages: int) -> UserError:
    return TurnsDiffer(
        f"{name} renders the first {messages} messages differently alone and within the conversation, so the assistant's tokens"
        " cannot be told; learn only the last turn, or add {% generation %} blocks to the template"
    )


def common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many tokens (or characters) two sequences begin with alike."""
    least = min(len(a), len(b))
    if a[:least] == b[:least]:  # far faster than one by one, and mostly so
        return least
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), least)


def render_chat(
    tokenizer, messages: Sequence[Message], learn: Literal["all", "last"] = "all", tools: Any = None
) -> tuple[list[int], list[float]]:
    """(ids [n], target [n]): 1 on the tokens of the assistant's turns and the end-of-turn token after each, 0 elsewhere.

    The last token is the last learned one: what a template writes after it is left out.
    learn: every assistant turn, or only the last. tools: as for `render_prompt`. Exactly one beginning token where the tokenizer has one.
    Raises UserError when the assistant's tokens cannot be told with certainty, when no or every token would be learned, or
    when no end-of-turn token follows a learned turn.
    """
    name = template_name(tokenizer)
    turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
    if not turns:
        raise UserError("the conversation has no assistant turn; nothing would be learned")
    stops = set(stop_ids(tokenizer))
    (text, _, spelled), found = _assistant_turns(tokenizer, messages, turns if learn == "all" else turns[-1:], tools)
    places = [len(text), *sorted({at for turn in found for at in (turn.start, turn.stop)} - {len(text)})]
    encoded = dict(zip(places, _encode(tokenizer, [text[:at] for at in places], spelled), strict=True))
    ids = encoded[len(text)]
    target = [0.0] * len(ids)
    for turn in found:
        for at in (turn.start, turn.stop) if turn.block else (turn.start,):
            if common(ids, encoded[at]) < len(encoded[at]):
                near = tokenizer.decode(encoded[at][-4:])
                raise UserError(
                    f"{name} lets a token span the border of an assistant turn (near {near!r}), so a prompt is not a token prefix"
                )
        a, b = len(encoded[turn.start]), common(ids, encoded[turn.stop])
        end = _block_end(tokenizer, ids, a, b, stops) if turn.block else next((t for t in range(a, b) if ids[t] in stops), None)
        if end is None and not turn.block and any(i in stops for i in ids[b:]):
            raise _differs(name, turn.number)
        if end is None:
            raise UserError(f"{name} writes no end-of-turn token after an assistant turn, so a model could never learn to stop")
        target[a : end + 1] = [1.0] * (end + 1 - a)
    while not target[-1] and any(target):  # a line break after the last end of turn: nothing comes after it
        ids, target = ids[:-1], target[:-1]
    whole = _begin(tokenizer, ids, name)
    target = [0.0] * (len(whole) - len(ids)) + target
    learned = sum(target)
    if learned == 0 or learned == len(target):
        raise UserError(f"{name}: {'no' if learned == 0 else 'every'} token would be learned; its mask cannot be right")
    return whole, target


def _block_end(tokenizer, ids: list[int], a: int, b: int, stops: set[int]) -> int | None:
    """Index of the end-of-turn token of the generation block [a, b): in it, or after it and blanks; None where there is none."""
    last = next((t for t in reversed(range(a, b)) if ids[t] in stops), None)
    if last is not None and (last + 1 == b or not tokenizer.decode(ids[last + 1 : b]).strip()):
        return last  # a line break that the template puts after the end of turn is never generated
    while b < len(ids) and ids[b] not in stops and not tokenizer.decode([ids[b]]).strip():
        b += 1
    return b if b < len(ids) and ids[b] in stops else None
