import copy

import pytest

from temper.config import UserError
from temper.data.template import attach_default_template, bos_id, render_chat, render_prompt, stop_ids
from temper.records import Message


def talk(*turns):
    return [Message(role=role, content=content) for role, content in turns]


TALK = talk(
    ("system", "Be brief."),
    ("user", "What is the price of herring?"),
    ("assistant", "Three crowns."),
    ("user", "And today?"),
    ("assistant", "The same."),
)


def spans(tokenizer, ids, target):
    """The learned spans as text."""
    out, run = [], []
    for token, weight in [*zip(ids, target, strict=True), (0, 0.0)]:
        if weight:
            run.append(token)
        elif run:
            out.append(tokenizer.decode(run))
            run = []
    return out


@pytest.mark.parametrize("name", ["chatml", "chatml_blocks", "llama3"])
def test_each_assistant_turn_and_its_end_are_learned(name, request):
    tokenizer = request.getfixturevalue(name)
    end = "<|eot_id|>" if name == "llama3" else "<|im_end|>"
    assert spans(tokenizer, *render_chat(tokenizer, TALK)) == [f"Three crowns.{end}", f"The same.{end}"]
    assert spans(tokenizer, *render_chat(tokenizer, TALK, learn="last")) == [f"The same.{end}"]


@pytest.mark.parametrize("name", ["chatml", "chatml_blocks", "llama3"])
def test_ids_are_those_of_the_template_and_a_prompt_is_their_prefix(name, request):
    tokenizer = request.getfixturevalue(name)
    ids, target = render_chat(tokenizer, TALK)
    whole = tokenizer.apply_chat_template([m.model_dump() for m in TALK], tokenize=True)["input_ids"]
    assert ids == whole[: len(ids)]
    assert target[-1] == 1.0  # the end of the turn; of what the template writes after it nothing is kept
    assert not tokenizer.decode(whole[len(ids) :]).strip()
    for turn in (2, 4):
        prompt = render_prompt(tokenizer, TALK[:turn])
        assert ids[: len(prompt)] == prompt
        assert target[len(prompt) - 1 : len(prompt) + 1] == [0.0, 1.0]


def test_blocks_and_prefixes_agree(chatml, chatml_blocks):
    assert render_chat(chatml, TALK)[1] == render_chat(chatml_blocks, TALK)[1]


def test_blocks_agree_with_the_mask_of_transformers(make_tokenizer):
    tokenizer = make_tokenizer(eos="<|end|>")
    attach_default_template(tokenizer)
    ids, target = render_chat(tokenizer, TALK)
    theirs = tokenizer.apply_chat_template(
        [m.model_dump() for m in TALK], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == theirs["input_ids"]
    assert target == [float(x) for x in theirs["assistant_masks"]]


def test_one_beginning_token_whether_the_template_writes_it_or_not(llama3):
    bos = llama3.bos_token_id
    silent = copy.deepcopy(llama3)
    silent.chat_template = llama3.chat_template.replace("{{ bos_token }}", "")
    for tokenizer in (llama3, silent):
        assert render_chat(tokenizer, TALK)[0].count(bos) == 1
        assert render_prompt(tokenizer, TALK[:2])[0] == bos
    assert render_chat(llama3, TALK) == render_chat(silent, TALK)
    double = copy.deepcopy(llama3)
    double.chat_template = "{{ bos_token }}" + llama3.chat_template
    with pytest.raises(UserError, match=r"beginning token '<\|begin_of_text\|>' 2 times"):
        render_chat(double, TALK)


def test_bos_that_is_eos_counts_only_where_the_tokenizer_adds_it(make_tokenizer):
    assert bos_id(make_tokenizer(bos="<|x|>", eos="<|x|>")) is None
    assert bos_id(make_tokenizer(bos="<|x|>", eos="<|x|>", adds_bos=True)) is not None


def test_stop_ids_put_the_end_of_turn_first(chatml, llama3, base, make_tokenizer):
    ids = chatml.convert_tokens_to_ids
    assert stop_ids(chatml) == [ids("<|im_end|>"), ids("<|endoftext|>")]
    assert stop_ids(llama3) == [llama3.convert_tokens_to_ids("<|eot_id|>"), llama3.eos_token_id]
    assert stop_ids(base) == [base.eos_token_id]
    with pytest.raises(UserError, match="no end token"):
        stop_ids(make_tokenizer())


def test_pad_equal_to_end_token_does_not_unlearn_it(chatml_blocks):
    ids, target = render_chat(chatml_blocks, TALK)
    assert chatml_blocks.pad_token_id == chatml_blocks.eos_token_id
    assert sum(w for t, w in zip(ids, target, strict=True) if t == chatml_blocks.eos_token_id) == 2


def test_base_prompts_are_lines(base):
    assert base.decode(render_prompt(base, talk(("system", "A"), ("user", "B")))) == "A\nB\n"
    with pytest.raises(UserError, match="no chat template"):
        render_chat(base, TALK)


def test_default_template_is_attached_once_and_works(make_tokenizer):
    tokenizer = make_tokenizer()
    before = len(tokenizer)
    assert attach_default_template(tokenizer) == 4 == len(tokenizer) - before
    assert attach_default_template(tokenizer) == 0
    assert tokenizer.eos_token == "<|end|>"
    ids, target = render_chat(tokenizer, TALK)
    assert tokenizer.decode(ids).startswith("<|system|>Be brief.<|end|><|user|>What")
    assert spans(tokenizer, ids, target) == ["Three crowns.<|end|>", "The same.<|end|>"]


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}", "no token"),
        ("{% generation %}{{ messages[0].content + '<|im_end|>' }}{% endgeneration %}", "every token would be learned"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.at_all }}", "refuses"),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
            ".",
        ),
        ("{{ messages | length }}CHATML", "differently alone and within"),
        ("CHATML without end", "no end-of-turn token"),
        ("{{ ''.__class__.__mro__ }}CHATML", "unsafe"),
        ("{% for", "."),
    ],
)
def test_templates_that_cannot_be_trusted_are_refused(chatml, template, match):
    tokenizer = copy.deepcopy(chatml)
    plain = chatml.chat_template
    template = template.replace("CHATML without end", plain.replace("+ '<|im_end|>'", "")).replace("CHATML", plain)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=match) as error:
        render_chat(tokenizer, TALK)
    assert "\n" not in str(error.value)


def test_a_token_across_the_border_is_refused(chatml):
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = chatml.chat_template.replace("assistant\n", "assistant\n ").replace("m.role + '\n'", "m.role + '\n '")
    with pytest.raises(UserError, match="span the border"):
        render_chat(tokenizer, talk(("user", "the price"), ("assistant", "the herring")))


def test_no_assistant_turn_is_refused(chatml):
    with pytest.raises(UserError, match="no assistant turn"):
        render_chat(chatml, TALK[:2])
