"""Everything rendered parses back to its form; templates are many; every text is in the town's words."""

import re

import pytest

from temper.world import asks, dataset, registers
from temper.world.crafts import CRAFTS
from temper.world.grammar import Grammar, words
from temper.world.lookups import RELATIONS
from temper.world.phrases import ACTS, REQUESTS, grammar
from temper.world.streams import Draw, stream
from temper.world.tales import TALES


def test_documents_parse_back_to_their_forms():
    lines = 0
    for _, document, draw in registers.compose(1200, 7, "test"):
        for line in document:
            text = grammar().text(line, draw)
            assert grammar().forms(text) == list(line), text
            lines += 1
    assert lines > 3000


@pytest.mark.parametrize("name", list(asks.KINDS))
def test_requests_parse_back(name):
    draw = Draw(stream(f"test/{name}"))
    for phrasing in ("seen", "held_out", "any"):
        for _ in range(60):
            ask = asks.make(name, draw, None, phrasing)
            assert grammar().forms(ask.messages[-1]["content"]) == asks.request(name, ask.slots)


@pytest.mark.parametrize("name", ["demonstrations", "prompts", "evaluation", "side_by_side", "enumerable", "wrapped"])
def test_every_message_is_grammatical(name):
    for record in dataset(name, n=400):
        for message in record.messages:
            assert None not in grammar().forms(message.content), message.content


def test_five_paraphrases_and_eight_questions():
    for name, templates in {**ACTS, **REQUESTS, **TALES}.items():
        enough = 1 if name in ("say",) else 5
        assert len([t for t in templates if not t.startswith("~")]) >= enough, name
    for name, relation in RELATIONS.items():
        held = [q for q in relation.questions if q.startswith("~")]
        assert len(held) == 3, name
        assert len(relation.questions) == 8, name
        assert len(relation.statements) >= 5, name


def test_case_and_spacing_do_not_matter():
    assert grammar().forms("ADA   keeps\na goat .") == grammar().forms("Ada keeps a goat.")


def test_cut_and_unknown_sentences_are_told_apart():
    _, (cut,) = grammar().parse("Ada keeps a")
    assert cut.form is None
    assert cut.cut
    _, (unknown,) = grammar().parse("Ada goat a")
    assert unknown.form is None
    assert not unknown.cut
    _, found = grammar().parse("This is junk. Ada keeps a goat. More junk")
    assert [s.form is None for s in found] == [True, False, True]


def test_templates_must_agree_on_their_slots():
    with pytest.raises(ValueError, match="must have the slots"):
        Grammar({"x": ["a"]}, {"f": ["{x} b", "b"]}, {"sentence": ["f"]})
    with pytest.raises(ValueError, match="no words and no frame"):
        Grammar({"x": ["a"]}, {"f": ["{y} b"]}, {"sentence": ["f"]})


def test_words_are_few():
    texts = [document.text for document in dataset("documents", n=4000)]
    pieces = {piece for text in texts for piece in re.findall(r" ?[A-Za-z]+| ?\d+| ?[^\sA-Za-z\d]+", text)}
    assert len(pieces) < 1000
    assert all(ord(c) < 128 for text in texts for c in text)


def test_no_two_crafts_share_a_step():
    steps = [step for craft in CRAFTS.values() for step in (craft.first, craft.then)]
    assert len(set(steps)) == len(steps)
    assert words("To brew") == ["to", "brew"]


def test_no_text_has_two_readings():
    """Where two frames could write the same sentence, its form would depend on their order."""
    engine = grammar()
    draw = Draw(stream("test/ambiguity"))
    for _, document, _ in registers.compose(200, 11, "test"):
        for line in document:
            for form in line:
                tokens = tuple(words(engine.sentence(form, draw)))
                found: list = []
                engine._walk(engine.tries["sentence"], tokens, 0, (), found, [0, 0])
                whole = {repr(entry[0]) for entry in found if entry[1] == len(tokens)}
                assert whole == {repr(form)}, tokens
