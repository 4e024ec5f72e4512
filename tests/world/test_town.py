"""Facts: their number, what is never stated, how often each is stated."""

import math
from collections import Counter

import pytest

from temper.world import dataset, exposure, exposures, registers, town
from temper.world.grammar import words
from temper.world.lookups import PEOPLE, PLACES, RELATIONS
from temper.world.phrases import grammar


def test_sizes_and_shares():
    facts = town()
    assert len(set(PEOPLE)) == 60
    assert len(set(PLACES)) == 20
    assert (len(facts.people), len(facts.places)) == (48, 16)  # those of the names that are used
    every = sum(len(facts.relations(entity)) for entity in facts.entities)
    assert every == 48 * 5 + 16 * 3
    assert len(facts.never) == 5 * round(0.1 * 48) + 3 * round(0.1 * 16)
    assert 0.04 <= len(facts.rumour) / len(facts.truth) <= 0.06
    assert len(facts.held) == len(facts.entities) // 4
    assert abs(max(facts.weight.values()) / min(facts.weight.values()) - 3) < 1e-9
    assert all(value != facts.truth[key] for key, value in facts.rumour.items())
    assert all(len(facts.known(entity)) >= 1 for entity in facts.entities)


def test_values_are_spread_so_that_guessing_is_hard():
    """Every value is used about equally often; seven days for sixteen places leave the least to guess at."""
    facts = town()
    for name, relation in RELATIONS.items():
        counts = Counter(value for (_, relation), value in facts.truth.items() if relation == name)
        members = facts.people if relation.of == "person" else facts.places
        values = facts.people if name == "keeper" else relation.values
        assert max(counts.values()) <= math.ceil(len(members) / len(values)), name
        assert max(counts.values()) / sum(counts.values()) < (0.25 if name == "day" else 0.2), name


@pytest.mark.slow
def test_never_stated_facts_are_never_stated():
    facts = town()
    never = set(facts.never)
    for document in dataset("documents", n=2500, seed=5):
        for form in grammar().forms(document.text):
            for clause in registers.stated(form):
                assert (clause[1], clause[0]) not in never, document.text


def test_every_fact_is_exposed_enough():
    counts = exposures(3000)
    tokens = sum(len(words(document.text)) for document in dataset("documents", n=3000))
    least, most = min(counts.values()), max(counts.values())
    assert least * 6e6 / tokens >= 40
    assert most > 2 * least
    key = max(counts, key=lambda k: counts[k])
    assert exposure(*key, 6000) == 2 * counts[key]
    assert exposure(*town().never[0]) == 0


def test_exposures_count_the_documents_themselves():
    counts = Counter()
    for document in dataset("documents", n=150, seed=2, split="test"):
        for form in grammar().forms(document.text):
            for clause in registers.stated(form):
                if town().true(clause):
                    counts[clause[1], clause[0]] += 1
    assert {key: n for key, n in exposures(150, 2, "test").items() if n} == dict(counts)
