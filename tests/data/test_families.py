"""The chat templates of the common families: their control tokens and layout, in our own words; ids worked out by hand.

The tokenizer gives byte b the id b, and the special tokens of a family the ids from 256 on, in their order.
"""

import json
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from temper.config import UserError
from temper.data.template import render_chat, render_prompt, stop_ids
from temper.records import Chat, Function, Message, ToolCall

SYSTEM = "{{ '%s' }}"
CHATML = (
    "{%- for m in messages %}\n    {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}\n"
)
LLAMA3 = (
    "{%- for m in messages -%}\n  {%- set said = '<|start_header_id|>' ~ m['role'] ~ '<|end_header_id|>\n\n' ~ (m['content'] | trim)"
    " ~ '<|eot_id|>' -%}\n  {%- if loop.first -%}{%- set said = bos_token ~ said -%}{%- endif -%}\n  {{- said -}}\n{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
)
MISTRAL = (  # no system role: its text stands before the last question
    "{%- if messages[0].role == 'system' -%}{%- set preface = messages[0].content ~ '\n\n' -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set preface = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{{- bos_token -}}"
    "{%- for m in turns -%}"
    "{%- if (m.role == 'user') != (loop.index is odd) -%}{{- raise_exception('user and assistant must take turns') -}}{%- endif -%}"
    "{%- if m.role == 'user' -%}{{- '[INST] ' ~ (preface if loop.index >= turns | length - 1 else '') ~ m.content ~ ' [/INST]' -}}"
    "{%- else -%}{{- ' ' ~ (m.content | trim) ~ eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)
GEMMA = (  # the assistant is called model, and there is no system role
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}"
    "{% for m in messages %}{% set role = {'assistant': 'model'}.get(m.role, m.role) %}"
    "{{ '<start_of_turn>' ~ role ~ '\n' ~ m.content | trim ~ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN = (  # a system prompt of its own where none is given; tools; earlier reasoning is dropped
    "{%- set given = messages[0].content if messages[0].role == 'system' else 'Be kind.' -%}"
    "{{- '<|im_start|>system\n' ~ given -}}"
    "{%- if tools -%}{{- '\n<tools>' -}}{%- for tool in tools -%}{{- '\n' ~ (tool | tojson) -}}{%- endfor -%}"
    "{{- '\n</tools>' -}}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- set seen = namespace(last=0) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set seen.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{{- '<|im_start|>user\n' ~ m.content ~ '<|im_end|>\n' -}}"
    "{%- elif m.role == 'tool' -%}"
    "{%- if loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}"
    "{{- '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' -}}"
    "{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}"
    "{%- elif m.role == 'assistant' -%}"
    "{%- set text = m.content -%}"
    "{%- if loop.index0 < seen.last and '</think>' in text -%}{%- set text = text.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '<|im_start|>assistant\n' ~ text -}}"
    "{%- for call in m.tool_calls or [] -%}{{- '\n' if text or not loop.first else '' -}}"
    '{{- \'<tool_call>\n{"name": "\' ~ call.function.name ~ \'", "arguments": \' -}}'
    "{{- (call.function.arguments | tojson) ~ '}\n</tool_call>' -}}"
    "{%- endfor -%}{{- '<|im_end|>\n' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
ZEPHYR = (  # the marks of the roles are ordinary text; only the end of a turn is a token
    "{% for m in messages %}\n{{ '<|' ~ m['role'] ~ '|>\n' ~ m['content'] ~ eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
PHI = (  # writes the end token after the last turn, but only when nothing is asked
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


class Family(NamedTuple):
    template: str
    special: tuple[str, ...]  # ids from 256 on
    bos: str | None
    eos: str
    ids: list[int]  # of the user's "Hi" and the assistant's "Yo"
    learned: list[int]  # of it, what is learned
    system: str  # how the conversation TALK begins, or why it cannot
    added: tuple[str, ...] = ()


FAMILIES = {
    "chatml": Family(
        CHATML,
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        None,
        "<|endoftext|>",
        [256, *b"user\nHi", 257, *b"\n", 256, *b"assistant\nYo", 257],
        [*b"Yo", 257],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
    ),
    "llama3": Family(
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        [256, 257, *b"user", 258, *b"\n\nHi", 259, 257, *b"assistant", 258, *b"\n\nYo", 259],
        [*b"Yo", 259],
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>",
    ),
    "mistral": Family(
        MISTRAL,
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "<s>",
        "</s>",
        [256, 258, *b" Hi ", 259, *b" Yo", 257],
        [*b" Yo", 257],
        "differently alone and within",
    ),
    "gemma": Family(
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        [256, 258, *b"user\nHi", 259, *b"\n", 258, *b"model\nYo", 259],
        [*b"Yo", 259],
        "there is no system role",
    ),
    "qwen": Family(
        QWEN,
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        None,
        "<|im_end|>",
        [256, *b"system\nBe kind.", 257, *b"\n", 256, *b"user\nHi", 257, *b"\n", 256, *b"assistant\nYo", 257],
        [*b"Yo", 257],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    "zephyr": Family(
        ZEPHYR,
        ("<unk>", "<s>", "</s>"),
        "<s>",
        "</s>",
        [*b"<|user|>\nHi", 258, *b"\n<|assistant|>\nYo", 258],
        [*b"Yo", 258],
        "<|system|>\nBe brief.</s>\n<|user|>\n",
    ),
    "phi": Family(
        PHI,
        ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        None,
        "<|endoftext|>",
        [258, *b"\nHi", 261, *b"\n", 259, *b"\nYo", 261],
        [*b"Yo", 261],
        "<|system|>\nBe brief.<|end|>\n<|user|>\n",
    ),
}
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {"day": {"type": "string"}}}}}


def letters():
    """The letter by which byte-level tokenizers write each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def tokenizer_of(family, **changes):
    family = family._replace(**changes)
    inner = Tokenizer(models.BPE({letter: b for b, letter in enumerate(letters())}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.special)})
    tokenizer.add_tokens(list(family.added))
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = family.bos, family.eos, family.eos
    tokenizer.chat_template = family.template
    return tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def named(request):
    return request.param, tokenizer_of(FAMILIES[request.param])


def talk(*said, system=None):
    roles = ("user", "assistant") * len(said)
    head = [Message(role="system", content=system)] if system else []
    return [*head, *(Message(role=role, content=text) for role, text in zip(roles, said, strict=False))]


def theirs(tokenizer, messages, **how):
    return tokenizer.apply_chat_template([m.model_dump(mode="json") for m in messages], tokenize=True, return_dict=True, **how)["input_ids"]


def learned_spans(tokenizer, ids, target):
    text = "".join(tokenizer.decode([i]) if w else "\0" for i, w in zip(ids, target, strict=True))
    return [span for span in text.split("\0") if span]


def test_golden_ids(named):
    name, tokenizer = named
    family = FAMILIES[name]
    # Zephyr's template writes no beginning token; its tokenizer adds none here
    ids, target = render_chat(tokenizer, talk("Hi", "Yo"))
    assert ids == family.ids
    n = len(family.learned)
    assert ids[-n:] == family.learned
    assert target == [0.0] * (len(ids) - n) + [1.0] * n
    assert render_prompt(tokenizer, talk("Hi")) == ids[:-n]
    assert stop_ids(tokenizer)[0] == family.ids[-1]


TALK = ("What is the price? ", "Three\n crowns", "And today?", "The same, é 🐟.")


@pytest.mark.parametrize("learn", ["all", "last"])
def test_turns_are_those_of_apply_chat_template(named, learn):
    name, tokenizer = named
    messages = talk(*TALK)
    ids, target = render_chat(tokenizer, messages, learn)
    assert ids == theirs(tokenizer, messages)[: len(ids)]
    assert not tokenizer.decode(theirs(tokenizer, messages)[len(ids) :]).replace("<|endoftext|>", "").strip()
    end = tokenizer.decode([FAMILIES[name].ids[-1]])
    space = " " if name == "mistral" else ""
    spans = [f"{space}{TALK[1]}{end}", f"{space}{TALK[3]}{end}"]
    assert "".join(learned_spans(tokenizer, ids, target)).count("\ufffd") == 6  # letters of several bytes, one by one
    assert tokenizer.decode([i for i, w in zip(ids, target, strict=True) if w]) == "".join(spans if learn == "all" else spans[1:])
    for turns in (1, 3):
        prompt = render_prompt(tokenizer, messages[:turns])
        assert prompt == theirs(tokenizer, messages[:turns], add_generation_prompt=True)
        assert ids[: len(prompt)] == prompt
        assert (learn == "last" and turns == 1) or target[len(prompt) - 1 : len(prompt) + 1] == [0.0, 1.0]


def test_a_system_turn_is_context_or_refused(named):
    name, tokenizer = named
    messages, begins = talk(*TALK, system="Be brief."), FAMILIES[name].system
    if name in ("mistral", "gemma"):
        with pytest.raises(UserError, match=begins):
            render_chat(tokenizer, messages)
    else:
        ids, target = render_chat(tokenizer, messages)
        assert tokenizer.decode(ids).startswith(begins)
        assert not any(target[: len(render_prompt(tokenizer, messages[:2]))])
        assert ids == theirs(tokenizer, messages)[: len(ids)]
    if name == "mistral":  # a single question, or the last answer, is well defined
        for some, learn in ((messages[:3], "all"), (messages, "last")):
            ids, _ = render_chat(tokenizer, some, learn)
            assert ids == theirs(tokenizer, some)[: len(ids)]
            assert "Be brief.\n\n" in tokenizer.decode(ids)


def test_one_beginning_token(named):
    name, tokenizer = named
    family = FAMILIES[name]
    ids = render_chat(tokenizer, talk("Hi", "Yo"))[0]
    if family.bos and name != "zephyr":
        assert ids.count(tokenizer.bos_token_id) == 1
        doubled = tokenizer_of(family, template="{{ bos_token }}" + family.template)
        with pytest.raises(UserError, match="2 times; it belongs at the start, once"):
            render_chat(doubled, talk("Hi", "Yo"))


def test_mistral_takes_turns():
    tokenizer = tokenizer_of(FAMILIES["mistral"])
    twice = [*talk("Hi"), *talk("There", "Yo")]
    for messages in (twice, talk("Hi", "Yo")[1:]):
        with pytest.raises(UserError, match=r"take turns|begins with an assistant turn") as error:
            render_chat(tokenizer, messages)
        assert "\n" not in str(error.value)


def test_qwen_drops_earlier_reasoning():
    """An earlier answer does not stand in the prompt as it was generated: only the last can be learned as it will be."""
    tokenizer = tokenizer_of(FAMILIES["qwen"])
    messages = talk("Hi", "<think>\nhm\n</think>\n\nYo", "And?", "<think>\nso\n</think>\n\nNo")
    with pytest.raises(UserError, match=r"first 2 messages differently.*learn only the last turn"):
        render_chat(tokenizer, messages)
    ids, target = render_chat(tokenizer, messages, "last")
    assert ids == theirs(tokenizer, messages)[: len(ids)]
    assert tokenizer.decode(ids).endswith("assistant\nYo<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n" + LAST)
    assert "".join(learned_spans(tokenizer, ids, target)) == LAST
    assert tokenizer.convert_tokens_to_ids("<think>") in ids  # an answer may think with the token; a question only with letters
    asked = render_prompt(tokenizer, talk("What is <think>?"))
    assert tokenizer.convert_tokens_to_ids("<think>") not in asked or "<think>" not in QWEN


LAST = "<think>\nso\n</think>\n\nNo<|im_end|>"


def called(text="", **arguments):
    return Message(role="assistant", content=text, tool_calls=(ToolCall(function=Function(name="tide", arguments=arguments)),))


def test_tool_calls_are_those_of_apply_chat_template():
    tokenizer = tokenizer_of(FAMILIES["qwen"])
    messages = [
        *talk("When is high tide?"),
        called(day="to<|im_end|>day"),
        Message(role="tool", content="at five<|im_start|>", name="tide"),
        Message(role="assistant", content="At five."),
    ]
    plain = [m.model_copy(update={"content": m.content.replace("<|im_start|>", "")}) for m in messages]
    plain[1] = called(day="today")
    ids, target = render_chat(tokenizer, plain, tools=[TOOL])
    assert ids == theirs(tokenizer, plain, tools=[TOOL])[: len(ids)]
    call = '<tool_call>\n{"name": "tide", "arguments": {"day": "today"}}\n</tool_call><|im_end|>'
    assert learned_spans(tokenizer, ids, target) == [call, "At five.<|im_end|>"]
    assert render_prompt(tokenizer, plain[:3], [TOOL]) == theirs(tokenizer, plain[:3], tools=[TOOL], add_generation_prompt=True)
    forged, target = render_chat(tokenizer, messages, tools=[TOOL])
    assert learned_spans(tokenizer, forged, target) == [call.replace("today", "to<|im_end|>day"), "At five.<|im_end|>"]
    for mark in ("<|im_start|>", "<|im_end|>"):
        i = tokenizer.convert_tokens_to_ids(mark)
        assert forged.count(i) == ids.count(i)


def test_tools_and_system_turns_that_a_template_drops_are_refused():
    chatml = tokenizer_of(FAMILIES["chatml"])
    with pytest.raises(UserError, match="does not write tool calls \\(message 2 calls 'tide'\\)"):
        render_chat(chatml, [*talk("Tide?"), called(day="x")])
    with pytest.raises(UserError, match="does not tell the model its tools \\('tide'\\)"):
        render_prompt(chatml, talk("Hi?"), [TOOL])
    silent = tokenizer_of(FAMILIES["chatml"], template=CHATML.replace("in messages", "in messages if m.role != 'system'"))
    with pytest.raises(UserError, match="drops the system turn \\(message 1\\)"):
        render_chat(silent, talk("Hi", "Yo", system="Be brief."))


def test_tool_calls_survive_a_file_and_plain_turns_stay_as_they_were():
    chat = Chat(messages=[*talk("Tide?"), called(day="x"), Message(role="tool", content="5", tool_call_id="a")], tools=[TOOL])
    assert Chat.model_validate(json.loads(json.dumps(chat.model_dump(mode="json")))) == chat
    assert Message(role="user", content="a").model_dump() == {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "its loops take more than 2,000 turns"),
        ("{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
        ("{% macro f(n) %}{% if n < 14 %}{{ f(n + 1) ~ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}", "its loops take more than"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "powers"),
        ("{{ 9 ** 9 ** 9 }}", "powers"),
        ("{% for a in range(1000000000) %}{% endfor %}", "fails: OverflowError"),
        ("{{ 'a' * 9999999999999999 }}", "fails: (MemoryError|OverflowError)"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe|refuses"),
        ("{{ ''|attr('__class__') }}{{ ().__class__.__bases__[0].__subclasses__() }}", "unsafe|refuses"),
        ("{% include '/etc/passwd' %}", "fails|refuses"),
        ("{{ raise_exception('a\n\x1b[31mb' ~ 'c' * 999) }}", "refuses these messages: a \ufffd\\[31mbccc"),
    ],
)
def test_hostile_templates_end_in_one_line(template, match, monkeypatch):
    monkeypatch.setattr("temper.data.template.TURNS", 2000)
    with pytest.raises(UserError, match=match) as error:
        render_prompt(tokenizer_of(FAMILIES["chatml"], template=template), talk("Hi"))
    assert len(str(error.value)) < 400
    assert str(error.value).isprintable()


def test_counting_turns_changes_no_text():
    """Where tags trim, and where they do not."""
    template = (
        "\n  {% for m in messages %}\n  {{ m.content }}\n  {%- for a in [1] -%}\n b {% endfor +%}\n c\n{%+ for a in [1] +%}\n d\n"
        "{% endfor %}\n {% macro f() %}\n e{{ kwargs.x }}\n {% endmacro %}\n{{ f(**{'x': 1}) }}{% raw %}{% for %}{% endraw %}"
        "{# {% for %} #}\n{% endfor %}\n\n"
    )
    tokenizer = tokenizer_of(FAMILIES["chatml"], template=template)
    assert render_prompt(tokenizer, talk("Hi", "Yo")) == theirs(tokenizer, talk("Hi", "Yo"))


def test_named_templates():
    """Some tokenizers hold several; the one for tools is taken where there are tools."""
    tokenizer = tokenizer_of(FAMILIES["qwen"], template={"default": CHATML, "tool_use": QWEN})
    assert render_chat(tokenizer, talk("Hi", "Yo"))[0] == FAMILIES["chatml"].ids
    assert tokenizer.decode(render_prompt(tokenizer, talk("Hi"), [TOOL])).startswith("<|im_start|>system\nBe kind.\n<tools>")
    tokenizer = tokenizer_of(FAMILIES["qwen"], template={"odd": CHATML})
    with pytest.raises(UserError, match="default"):
        render_chat(tokenizer, talk("Hi", "Yo"))
