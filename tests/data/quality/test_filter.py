"""Rules on single rows."""

import pytest
from data.quality.conftest import chat, text

from temper.config import UserError
from temper.data.quality.filter import REFUSALS, Options, language, repetition


def reasons(found):
    return {i: v.reason for i, v in found.items()}


def test_lengths_are_counted_in_words(look):
    rows = [chat("Why?", "one two three"), chat("Why is it so?", "one"), chat("Why is it so?", "one two three four five")]
    assert reasons(look("filter", rows, min_words=2)[0]) == {1: "answer too short"}
    assert reasons(look("filter", rows, max_words=4, min_prompt_words=2)[0]) == {0: "prompt too short", 2: "answer too long"}
    found, _ = look("filter", rows, max_words=1, min_prompt_words=2)
    assert found[0].why == "answer too long: 3 words, at most 1; prompt too short: 1 words, at least 2"


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I am really sorry but no.",
        "As an AI language model, I do not have feelings.",
        "I cannot assist with that request.",
        "I apologize, but this is not something I do.",
        "Unfortunately, I'm unable to provide that.",
    ],
)
def test_refusals(look, answer):
    assert reasons(look("filter", [chat("Q", answer)], refusals=True)[0]) == {0: "refusal"}


@pytest.mark.parametrize(
    "answer",
    [
        "I was sorry to hear it. Try again.",
        "He said he cannot swim.",
        text(60, 1) + " I cannot help it.",
        "The provider cannot assist you.",
    ],
)
def test_no_refusals(answer):
    assert not REFUSALS.search(answer[:200])


def test_boilerplate_is_found_anywhere_in_the_answer_and_of_a_pair_only_the_chosen_counts(look):
    said = f"{text(80, 2)}. As of my last update, it was blue."
    rows = [chat("Q", said), chat(said, "Blue."), {"prompt": "Q", "chosen": "Blue.", "rejected": said}]
    assert reasons(look("filter", rows, boilerplate=True)[0]) == {0: "boilerplate"}


def test_repetition_is_the_share_of_lines_or_5_grams_that_stood_before(look):
    assert repetition("a b c d e f g h i j") == 0
    assert repetition("short short short") == 0
    words20 = text(10, 5)
    assert repetition(f"{words20} {words20}") == pytest.approx(6 / 16)  # 16 grams: 6 of the first half come again
    assert repetition("\n".join([text(12, 1), text(12, 1), text(12, 2), text(12, 3)])) == pytest.approx(1 / 4)
    rows = [chat("Q", "I am well. " * 20), chat("Q", text(60, 4))]
    assert reasons(look("filter", rows, max_repetition=0.3)[0]) == {0: "repetition"}


GERMAN = "Der Hafenmeister wiegt den Hering, bevor die Boote am Nachmittag wieder auslaufen, und schreibt das Gewicht in sein Buch."
ENGLISH = "The harbour master weighs the herring before the boats go out again in the afternoon, and writes the weight into his book."


def test_languages_other_than_those_asked_for_go_and_unsure_ones_are_flagged(look):
    assert language(GERMAN)[0] == "de"
    rows = [chat(GERMAN, GERMAN), chat(ENGLISH, ENGLISH), chat("x1", "q9 z")]
    found, _ = look("filter", rows, languages=["en"])
    assert reasons({i: v for i, v in found.items() if not v.flag}) == {0: "language"}
    assert found[0].detail.startswith("de (")
    assert not look("filter", rows[:2], languages=["en", "de"])[0]
    with pytest.raises(UserError, match="no language 'english'; there are"):
        look("filter", rows, languages=["english"])


def test_toxic_words_only_flag(look, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("Herring\n")
    rows = [chat("Q", "What a shit day."), chat("Q", "Scunthorpe is a town."), chat("No herring!", "Fine.")]
    found, _ = look("filter", rows, toxic=True)
    assert {i: (v.flag, v.detail) for i, v in found.items()} == {0: (True, "shit")}
    assert list(look("filter", rows, toxic_words=str(listed))[0]) == [2]
    listed.write_text("two words\n")
    with pytest.raises(UserError, match=r"list\.txt:1: got 'two words'"):
        look("filter", rows, toxic_words=str(listed))


def test_a_filter_without_a_rule_or_with_one_that_no_row_passes_is_refused():
    with pytest.raises(ValueError, match="no rule is given"):
        Options()
    with pytest.raises(ValueError, match="no row has both"):
        Options(min_words=5, max_words=3)
