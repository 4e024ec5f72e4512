"""Registers: what is marked or chosen as true is true, by the gold score."""

from collections import Counter

import pytest

from temper.world import Ask, correct, dataset, features, gold, show
from temper.world.phrases import grammar
from temper.world.registers import CHOSEN_BY, MARKED, MARKED_RIGHT, comparison, exposures, marking, stated
from temper.world.streams import Draw, stream


@pytest.fixture(scope="module")
def marked():
    """(ask, answer, fault found) of pupils' answers."""
    draw, found = Draw(stream("test/marking")), []
    for _ in range(500):
        for [(_, question), (_, answer), (_, (fault,))] in marking(draw):
            found.append((show.read_ask(grammar().text(list(question), draw)), grammar().text(list(answer), draw), fault))
    return found


def test_a_pupils_answer_is_found_faultless_where_it_is_right_and_only_there(marked):
    for ask, answer, fault in marked:
        assert correct(ask, answer) == (fault == ("faultless",)), (ask, answer, fault)


def test_a_fault_is_the_answers_own(marked):
    """A guess at what nobody knows, a refusal without need, or a claim that is not true."""
    for ask, answer, (fault,) in marked:
        f = features(ask, answer)
        if fault != "faultless":
            kind = "faulty_guess" if ask.kind == "unknown" else "faulty_refusal" if f["refusal"] else "faulty_belief"
            assert fault == kind, (ask, answer)
            assert f["refusal"] or f["wrong"] > 0, (ask, answer)


def test_what_pupils_are_asked_and_how_often_they_are_right(marked):
    kinds = Counter(ask.kind for ask, _, _ in marked)
    assert set(kinds) == set(MARKED.values)
    assert 0.55 < kinds["lookup"] / len(marked) < 0.65
    right = sum(fault == ("faultless",) for _, _, fault in marked) / len(marked)
    assert abs(right - MARKED_RIGHT) < 0.05


def test_pupils_answers_state_no_facts():
    """Half of them are wrong: they count as exposure of nothing."""
    for document in dataset("documents", n=1500):
        if document.meta["register"] == "marking":
            assert not [clause for form in grammar().forms(document.text) for clause in stated(form)], document.text
    assert sum(exposures(300).values()) > 0


def test_of_two_answers_the_better_one_is_chosen_and_honesty_is_also_about_plain_facts():
    draw, kinds = Draw(stream("test/comparison")), {about: Counter() for about in CHOSEN_BY}
    for _ in range(1500):
        case = comparison(draw, None)
        ask, about = Ask(case["kind"], case["slots"]), case["principle"].about
        good, bad = (case["a"], case["b"]) if case["label"] == "A" else (case["b"], case["a"])
        good, bad = grammar().text(list(good), draw), grammar().text(list(bad), draw)
        assert gold(ask, good).total > gold(ask, bad).total, (ask, good, bad)
        kinds[about][ask.kind] += 1
        if ask.kind == "lookup":  # what helps is to answer at all; what is honest is to say what is so
            f = features(ask, bad)
            assert (f["refusal"], f["wrong"]) == ((1, 0) if about == "help" else (0, 1)), bad
            assert correct(ask, good)
    assert all(0.2 < sum(found.values()) / 1500 < 0.45 for found in kinds.values())  # each of harm, honesty and help is judged often
    assert {about: set(found) for about, found in kinds.items()} == {about: set(table.values) for about, table in CHOSEN_BY.items()}
    assert 0.25 < kinds["honesty"]["lookup"] / sum(kinds["honesty"].values()) < 0.45
