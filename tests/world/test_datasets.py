"""Data sets: deterministic, disjoint where they must be, of the shares that are promised."""

import hashlib
import json
from collections import Counter

import pytest

from temper.config import UserError
from temper.world import Ask, answered, complied, correct, dataset, gold, town
from temper.world.asks import named
from temper.world.crafts import TWIN_OF, held_task
from temper.world.datasets import DATASETS, SIDE_BY_SIDE, SIZES, TWINS
from temper.world.grammar import words
from temper.world.phrases import grammar
from temper.world.registers import LONGEST

# SHA-256 of each data set's canonical JSON: a change here is a change of the world (world.VERSION tells published worlds apart).
GOLDEN = {
    "documents": "33b086bdc7c98d20",
    "demonstrations": "a055a3e3b50cd47a",
    "prompts": "640b044eba22698d",
    "red_team": "2e62ed4802f3bd6d",
    "harmless": "bf878cca347454dc",
    "evaluation": "c974fc7ba9cb7a66",
    "side_by_side": "41ac0e6343a1b10b",
    "enumerable": "e46852253603956a",
    "wrapped": "fb1f778a34d227d5",
    "sums": "81b04e5c93aff551",
    "news": "542d13a11573146b",
}


def canonical(records) -> str:
    lines = [json.dumps(record.model_dump(), sort_keys=True, ensure_ascii=False) for record in records]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", list(DATASETS))
def test_golden_hashes(name):
    assert canonical(dataset(name, n=100)) == GOLDEN[name]


def test_every_data_set_has_a_usual_size():
    assert set(SIZES) == set(DATASETS)
    assert len(dataset("wrapped")) == SIZES["wrapped"]


def test_seed_and_split_matter():
    assert dataset("prompts", n=5, seed=1) != dataset("prompts", n=5, seed=2)
    assert dataset("documents", n=5) != dataset("documents", n=5, split="validation")


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(UserError, match="no data set 'document'"):
        dataset("document")
    with pytest.raises(UserError, match="at least 1"):
        dataset("prompts", n=0)


def test_documents_fit_the_context_and_hold_no_assistant():
    for document in dataset("documents", n=2000):
        assert len(words(document.text)) <= LONGEST + 5
        assert "assistant" not in document.text.lower()


def test_quiz_lists_are_questions_only():
    quizzes = [document.text for document in dataset("documents", n=2000) if document.meta["register"] == "quiz"]
    assert 120 < len(quizzes) < 300
    assert all(len(text.split("\n")) >= 3 for text in quizzes)


@pytest.fixture(scope="module")
def demonstrations():
    return dataset("demonstrations", n=5000)


@pytest.fixture(scope="module")
def trained(demonstrations):
    return [*demonstrations, *dataset("prompts", n=3000)]


@pytest.fixture(scope="module")
def evaluation():
    return [*dataset("evaluation", n=1500), *dataset("side_by_side")]


def grams(text: str, n: int = 13) -> set[tuple[str, ...]]:
    found = [token for token in words(text) if token.isalnum()]
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


@pytest.mark.slow
def test_no_thirteen_words_shared_between_training_and_evaluation(trained, evaluation):
    seen = {gram for record in trained for message in record.messages for gram in grams(message.content)}
    for record in evaluation:
        for message in record.messages:
            assert not grams(message.content) & seen, message.content


@pytest.mark.slow
def test_prompts_are_disjoint_from_evaluation(evaluation):
    def text(record):
        return "\n".join(message.content for message in record.messages)

    talk = {text(r) for r in evaluation if r.meta["ask"]["kind"] == "smalltalk"}
    assert not ({text(r) for r in evaluation} - talk) & {text(r) for r in dataset("prompts", n=3000, seed=9)}


@pytest.mark.slow
def test_held_out_phrasings_and_entities_are_not_in_training(trained):
    for record in trained:
        ask = Ask.of(record)
        for message in record.messages:
            if message.role == "user":
                assert not any(sentence.held for sentence in grammar().parse(message.content)[1]), message.content
        slots = ask.slots.get("inner", {}).get("slots", ask.slots)
        assert not any(entity in town().held for entity in named(ask.kind, slots))
        assert not held_task(slots.get("task", ""))


def test_evaluation_is_tagged_as_it_is(evaluation):
    cells = Counter()
    for record in evaluation:
        ask = Ask.of(record)
        held = any(sentence.held for sentence in grammar().parse(ask.messages[-1]["content"])[1])
        assert (ask.tags["phrasing"] == "held_out") == held
        assert ask.tags["answerable"] == (ask.kind not in ("unknown", "unsafe"))
        if ask.kind == "lookup":
            assert ask.tags["exposure"] > 40
        if ask.kind == "unknown":
            assert ask.tags["exposure"] == 0
        cells[ask.kind, ask.tags["entity"], ask.tags["phrasing"]] += 1
    for cell in (
        ("lookup", "seen", "seen"),
        ("lookup", "seen", "held_out"),
        ("lookup", "held_out", "seen"),
        ("unsafe", "seen", "held_out"),
    ):
        assert cells[cell] > 50, cell


def test_demonstrations_do_what_they_should(demonstrations):
    by: dict[str, list] = {}
    for record in demonstrations:
        ask, text = Ask.of(record), record.messages[-1].content
        by.setdefault(ask.kind, []).append((ask, text, record.meta))
        assert answered(ask, text), text
        if ask.kind not in ("unsafe", "belief", "unknown"):
            assert correct(ask, text), (ask.messages, text)
        assert correct(ask, text) == record.meta["good"], (ask.messages, text)
        assert len(text.split()) <= 70
    complies = [complied(ask, text) for ask, text, _ in by["unsafe"]]
    assert 0.78 < sum(complies) / len(complies) < 0.92
    wrong = [gold(ask, text).features for ask, text, _ in by["belief"] if ask.tags["belief"] == "wrong"]
    assert 0.25 < sum(f["endorses_false"] for f in wrong) / len(wrong) < 0.45
    honest = [correct(ask, text) for ask, text, _ in by["unknown"]]
    assert 0.67 < sum(honest) / len(honest) < 0.83
    tiers = Counter(meta["tier"] for _, _, meta in by["lookup"])
    assert 0.28 < tiers["tight"] / sum(tiers.values()) < 0.42
    many = [gold(ask, text).features["flourishes"] >= 5 for ask, text, _ in by["lookup"]]
    assert 0.005 < sum(many) / len(many) < 0.05
    labels = Counter(ask.slots["label"] for ask, _, _ in by["judge"])
    assert 0.4 < labels["A"] / sum(labels.values()) < 0.6


def test_judge_answers_begin_with_their_letter(demonstrations):
    for record in demonstrations:
        if record.meta["ask"]["kind"] == "judge":
            assert record.messages[-1].content.split()[0] == record.meta["ask"]["slots"]["label"]


def test_critiques_and_judgements_are_of_plain_facts_too(demonstrations):
    found = Counter()
    for record in demonstrations:
        ask = Ask.of(record)
        inner = ask.slots.get("inner", {})
        if inner.get("kind") == "lookup":
            found[ask.kind] += 1
            if ask.kind == "critique":
                assert correct(Ask(**inner), record.messages[1].content) == (ask.slots["fault"] == ["faultless"])
    assert min(found[kind] for kind in ("critique", "revise", "judge")) > 3


def test_side_by_side_is_fixed():
    records = dataset("side_by_side", seed=3)
    assert len(records) == len(SIDE_BY_SIDE) == 24
    assert records == dataset("side_by_side", seed=4)


@pytest.mark.slow
def test_harmless_requests_hold_no_harm_and_often_look_as_if_they_did(evaluation):
    records = dataset("harmless", n=1500)
    asks = [Ask.of(record) for record in records]
    assert not any(ask.tags["unsafe"] for ask in asks)
    twins = [ask.slots["task"] for ask in asks if ask.kind == "safe_twin"]
    assert abs(len(twins) / 1500 - TWINS) < 0.05
    counts = Counter(twins)
    assert set(counts) == {task for task in TWIN_OF if not held_task(task)}
    even = len(twins) / len(counts)
    assert all(abs(n - even) < 5 * even**0.5 for n in counts.values())  # each craft as often
    for ask in asks:
        assert not any(entity in town().held for entity in named(ask.kind, ask.slots))
    asked = [record.messages for record in evaluation if record.meta["ask"]["kind"] != "smalltalk"]
    assert not any(record.messages in asked for record in records)


def test_wrapped_attacks_are_not_in_training(trained):
    wrappers = {"as_story", "as_role", "as_order", "as_net_talk"}
    assert {record.meta["ask"]["tags"]["attack"] for record in dataset("wrapped", n=100)} == wrappers
    for record in trained:
        for message in record.messages:
            assert not any(form and form[0] in wrappers for form in grammar().forms(message.content))
