"""The constitution file: read, checked, used as it is written."""

import pytest

from temper.config import UserError
from temper.world import constitution, dataset

TEXT = """
principles:
  - {name: one, about: harm, critique: "Is it bad?", revision: "Write it again.", comparison: "Choose the good one."}
comparison_template: "Q: {prompt} (A) {a} (B) {b} {principle}"
"""


def test_the_towns_own():
    law = constitution()
    about = [principle.about for principle in law.principles]
    assert len(law.principles) >= 6
    assert about.count("harm") >= 4
    assert {"honesty", "help"} <= set(about)
    assert law.named("honest").about == "honesty"
    demos = dataset("demonstrations", n=1500)
    critiques = {r.messages[2].content for r in demos if r.meta["ask"]["kind"] in ("critique", "revise")}
    assert critiques == {principle.critique for principle in law.principles}
    revisions = {r.messages[4].content for r in demos if r.meta["ask"]["kind"] == "revise"}
    assert revisions <= {principle.revision for principle in law.principles}


def test_comparison_fills_each_place_once():
    law = constitution()
    text = law.comparison("{a} first?", "B {b}", "C", law.principles[0])
    assert "{a} first?" in text
    assert law.principles[0].comparison in text
    assert text.endswith("(A) B {b}\n(B) C")


def test_a_file_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "law.yaml"
    path.write_bytes(b"principles:\n  - {name: caf\xe9}\n")
    with pytest.raises(UserError, match=r"law\.yaml: byte \d+ is not UTF-8"):
        constitution(path)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "law.yaml"
    path.write_text(TEXT)
    law = constitution(path)
    assert law.comparison("x", "y", "z", law.principles[0]) == "Q: x (A) y (B) z Choose the good one."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name: one, ", ""), "principle 1: missing name"),
        (("about: harm", "about: fun"), "use one of harm, honesty, help"),
        (("{b}", ""), "comparison_template needs each"),
        (("principles:", "rules:"), "needs a list 'principles'"),
        ((": {name", ": {{name"), "not YAML"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, change, message):
    path = tmp_path / "law.yaml"
    path.write_text(TEXT.replace("- {name", "- k: {name") if change[0] == ": {name" else TEXT)
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(UserError, match=message) as error:
        constitution(path)
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such constitution file"):
        constitution(tmp_path / "none.yaml")
