"""Parity with TRL: every case is as the page says, and the page is of these cases."""

import importlib.util

import pytest

from bench.data import Setup, make, records
from bench.parity import BEGIN, CASES, END, PAGE, RECORDS, Case, Found, chosen, compare
from bench.training import quiet_peers

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed (it is part of .[dev])")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("parity")
    quiet_peers()
    make("smoke", place, records(world=True)[0][:RECORDS])
    return place


@pytest.mark.slow
@needs_trl
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_step_is_that_of_trl_or_differs_as_it_is_said_to(case: Case, folder):
    found = compare(case, Setup("smoke", folder))
    assert found.agrees == (not case.why), found
    assert found.moved > 0


@pytest.mark.parametrize(
    ("loss", "difference", "agrees"), [(2.0, 0.0, True), (2.0, 2e-5, False), (2.0001, 0.0, False), (float("nan"), 0.0, False)]
)
def test_a_case_agrees_in_its_loss_and_in_all_weights(loss, difference, agrees):
    assert Found("a", loss, 2.0, difference, moved=1.0, why="").agrees is agrees


def test_cases_are_chosen_by_name_or_by_their_first_word():
    assert [case.name for case in chosen(["rdpo"])] == ["rdpo"]
    assert [case.name for case in chosen(["kto, weights 1 and 1.5"])] == ["kto, weights 1 and 1.5"]
    assert {case.name.split()[0].strip(",") for case in chosen(["kto", "sft"])} == {"kto", "sft"}
    assert chosen([]) == CASES
    with pytest.raises(KeyError, match="dop"):
        chosen(["dop"])


def test_the_page_has_every_case():
    rows = PAGE.read_text("utf-8").partition(BEGIN)[2].partition(END)[0].splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows if row.startswith("| ")][1:] == [case.name for case in CASES]
