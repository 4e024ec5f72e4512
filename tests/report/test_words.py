"""Numbers and sentences: order is kept by formatting, and nothing is claimed that an interval does not carry."""

import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from temper.evals.harbour import METRICS
from temper.report import words
from temper.report.gather import gather
from temper.report.terminal import summary
from tests.report.synthetic import FIGURES
from tests.report.test_build import EVIL, edit


def read(text: str) -> float:
    return float(text.replace(words.MINUS, "-").replace(",", "").rstrip("%"))


def figure(mean, low, high, n=100):
    return {"mean": mean, "low": low, "high": high, "n": n}


def sentences(run) -> str:
    return " ".join(words.paragraph(gather(run)))


def missed(run) -> list[str]:
    return words.missed(gather(run))


def remarks(run) -> list[str]:
    return words.remarks(gather(run))


def put(run, stage, **figures):
    def change(value):
        for name, m in figures.items():
            value["metrics"].pop(name, None)
            if m is not None:
                value["metrics"][name] = figure(*m)

    edit(run / stage / "evaluation.json", change)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(0, 4))
def test_a_greater_number_never_reads_smaller(a, b, decimals):
    a, b = sorted((a, b))
    assert read(words.plain(a, decimals)) <= read(words.plain(b, decimals))


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_greater_share_never_reads_smaller(a, b):
    a, b = sorted((a, b))
    assert (
        read(words.percent(a)) <= read(words.percent(b)) + 1.0
    )  # 99.6% stays 99.6%, so whole numbers beside it may be apart by less than 1
    assert read(words.value("answers", a)) <= read(words.value("answers", b)) + 0.1


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_longer_times_never_read_shorter(a, b):
    def seconds(text):
        unit = {"h": 3600, "min": 60, "s": 1}
        return sum(float(x) * unit[u] for x, u in re.findall(r"([\d.]+) (h|min|s)", text))

    a, b = sorted((a, b))
    assert seconds(words.duration(a)) <= seconds(words.duration(b))


@pytest.mark.parametrize(
    ("x", "text"), [(1.0, "100%"), (0.0, "0%"), (0.9996, "99.96%"), (0.996, "99.6%"), (0.004, "0.4%"), (0.5, "50%"), (0.0004, "0.04%")]
)
def test_only_all_is_100_percent(x, text):
    assert words.percent(x) == text


def test_numbers_are_written_with_care():
    assert words.plain(-0.0004, 2) == "0.00"
    assert words.plain(-1234.5, 1) == "\u22121,234.5"
    assert words.value("gold", 0.5, 2, True) == "+0.50"
    assert words.value("gold", -0.001, 2, True) == "0.00"
    assert words.amount(1_239_999) == "1.24 million"
    assert words.amount(999_994) == "999,994"
    assert words.digits("gold", [figure(1, 0.95, 1.05)]) == 2
    assert words.digits("length", [figure(30, 20, 40)]) == 0


def test_an_end_near_no_change_shows_its_side():
    near, clear = figure(0.1, -0.046, 0.25), figure(0.2, 0.06, 0.4)
    assert words.digits("gold", [near]) == words.digits("gold_gained", [clear]) == 1
    assert words.between("gold_gained", near, words.digits("gold_gained", [near]), True) == "\u22120.05 to +0.25"
    assert words.told("gold_gained", figure(0.1, -0.004, 0.2), True) == "+0.100 (\u22120.004 to +0.200)"
    assert words.told("win_rate_vs_sft", figure(0.55, 0.496, 0.604)) == "55.0% (49.6% to 60.4%)"
    assert words.told("win_rate_vs_sft", figure(0.55, 0.5, 0.6)) == "55% (50% to 60%)"


def test_a_figure_of_few_prompts_says_so():
    assert words.told("honest", figure(0.0, 0.0, 0.198, 28)) == "0% (0% to 20%, n = 28)"
    assert words.told("honest", figure(0.0, 0.0, 0.07, 50)) == "0% (0% to 7%)"


def test_every_metric_has_a_name_a_meaning_and_a_place():
    placed = {n for group in words.GROUPS.values() for n in group}
    assert set(METRICS) <= placed
    assert set(METRICS) | set(words.SCORED) == set(words.LABELS) == set(words.MEANING)
    assert set(words.LABELS) >= words.SHARES
    assert set(FIGURES) == set(METRICS)


def test_clean_text_cannot_steer():
    assert words.clean(EVIL).isprintable()
    assert words.clean("a\r\nb\tc\x00\x1b\x7f") == "a\nb\tc\u2400\u241b\u2421"


def test_the_whole_story(run):
    said = sentences(run)
    assert "it answers 3% (2% to 4%) of the time: it continues the text" in said
    assert "PPO wins against SFT 71% (69% to 74%)" in said
    assert "gold rose by 0.89 (0.81 to 0.97)" in said
    assert "1.1 points (0.6 to 1.6) below the 74.9%" in said
    assert "Harmful help fell from 81% to 4%." in said
    assert "PPO against SFT: harmful help fell from 81% to 62%" in " ".join(remarks(run))
    assert "Every expectation was met." in said
    assert said.endswith("The whole run took 9 min 21 s on 2 cores, with seed 0.")


def test_an_interval_that_includes_no_change_shows_none(run):
    put(run, "ppo", win_rate_vs_sft=(0.55, 0.49, 0.61), gold_gained=(0.1, -0.1, 0.3))
    said = sentences(run)
    assert "PPO shows no clear change against SFT: it wins 55% (49% to 61%)" in said
    assert "gold shows no clear change: +0.10 (\u22120.10 to +0.30)" in said
    assert "PPO wins" not in said
    assert "ppo, wins over SFT: 55% (49% to 61%), wanted more than 60%" in missed(run)[0]
    assert "1 of 16 expectations was missed." in said
    assert "wanted" not in said
    assert "over-optimisation" not in said  # its proxy rose, but that gold fell is not shown
    put(run, "ppo", gold_gained=(-0.2, -0.3, -0.1))
    assert "The reward model scores it higher while gold falls: the sign of over-optimisation." in sentences(run)


def test_a_loss_is_called_one(run):
    put(run, "dpo", win_rate_vs_sft=(0.3, 0.25, 0.35), gold_gained=(-0.4, -0.5, -0.3))
    said = sentences(run)
    assert "DPO does worse than SFT: it wins only 30% (25% to 35%)" in said
    assert "gold fell by 0.40 (0.30 to 0.50)" in said


def test_touching_intervals_are_no_change(run):
    put(run, "sft", harmful=(0.80, 0.70, 0.90), over_refusal=(0.02, 0.0, 0.2))
    put(run, "constitution", harmful=(0.60, 0.50, 0.70), over_refusal=(0.3, 0.2, 0.4))
    assert "armful help fell from 80% to 60%" not in sentences(run)
    said = " ".join(remarks(run) + missed(run))
    assert "harmful help (constitution)" in said
    assert "refusals of safe prompts rose" not in said
    assert "helps with harm: 60% (50% to 70%), wanted at most half of SFT's 80%" in said
    assert "refuses safe prompts: 30% (20% to 40%), wanted less than 15%" in said


def test_what_was_not_measured_is_not_claimed(run):
    put(run, "ppo", win_rate_vs_sft=None, gold_gained=None, kl=None)
    edit(run / "reward" / "stage.json", lambda v: v.update(summary={}))
    (run / "reward" / "metrics.jsonl").unlink()
    said = sentences(run)
    assert "PPO was not compared with SFT." in said
    assert "accuracy on held-out pairs is not known" in said
    assert "Everything that was measured is as expected." in said


def test_a_base_that_answers_and_a_slow_stage_are_missed(run):
    put(run, "base", answers=(0.4, 0.35, 0.45))
    edit(run / "ladder.json", lambda v: v["stages"]["sft"].update(seconds=45.0))
    assert "already answers 40%" in sentences(run)
    said = " ".join(missed(run))
    assert "base, answers: 40% (35% to 45%), wanted less than 20%" in said
    assert "sft took 45 s of 30 s" in said


def test_a_point_above_the_frontier_is_an_alarm(run):
    edit(run / "ppo" / "evaluation.json", lambda v: v["frontier"][0].update(above=0.2))
    said = " ".join(remarks(run) + missed(run))
    assert "ppo lies above the exact frontier, which cannot be" in said
    assert "11 of 12 points on or below it" in said


def test_that_facts_are_made_up_is_said(run):
    assert not any("never states" in line for line in remarks(run))
    for stage in ("sft", "dpo"):
        put(run, stage, honest=(0.0, 0.0, 0.2))
    put(run, "ppo", honest=(0.4, 0.2, 0.6))  # may be half
    first = remarks(run)[0]
    assert "never states, sft and dpo said \u201cI do not know\u201d 0% (0% to 20%) of the time; the rest was made up" in first
    assert "6% of its demonstrations ask for such facts, and 75% of those are honest" in first
    edit(run / "sft" / "stage.json", lambda v: v["record"]["named"].update(data="mine.jsonl"))
    assert "demonstrations" not in remarks(run)[0]


def test_a_judge_without_preference_is_said(run):
    def labels(*soft):
        (run / "constitution" / "ai_pairs.jsonl").write_text("".join(f'{{"soft": {x}}}\n' for x in soft))
        return " ".join(remarks(run))

    assert "second phase" not in labels(0.7, 0.9)
    assert "had hardly any preference to learn from its judge: its judge's labels are 51.0% sure on average" in labels(0.5, 0.52)
    rows = [{"step": i, "loss": 0.6925, "phase": 2} for i in range(1, 9)]
    (run / "constitution" / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    assert "shows next to nothing learned" in labels(0.7, 0.9)
    assert "its loss ended at 0.693 (0.69315 is" in labels(0.7, 0.9).replace("ln 2 = 0.693", "0.69315")


def test_a_frontier_of_little_mass_is_said(run):
    assert "no policy lies above" in " ".join(remarks(run))
    assert "says little" not in " ".join(remarks(run))
    edit(run / "dpo" / "evaluation.json", lambda v: [p.update(mass=0.004 * (i + 1)) for i, p in enumerate(v["frontier"])])
    assert "the listed answers are, in the median prompt, 1% for dpo" in " ".join(remarks(run))
    frontier = next(e for e in words.expectations(gather(run)) if e.what == "the exact frontier")
    assert frontier.found.endswith("in 4 the listed answers are less than 10% of what the policy says")


def test_gold_is_gained_over_the_stage_it_started_from(run):
    edit(run / "ladder.json", lambda v: v["stages"]["dpo"].update(parent="ppo"))
    said = sentences(run)
    assert "gold rose by 3.03 (2.95 to 3.11) over base." in said
    assert "gold rose by 0.80 (0.72 to 0.88) over ppo." in said
    assert "gold rose by 0.89 (0.81 to 0.97)." in said


def test_a_failed_stage_is_said(run):
    edit(run / "ladder.json", lambda v: v["stages"]["ppo"].update(status="failed", error="Traceback\nout of memory"))
    assert "The stage ppo failed: out of memory." in sentences(run)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_summary_breaks_no_cell(run, width):
    put(run, "ppo", gold=(-12.31, -12.4, -12.2), honest=(0.0, 0.0, 0.2))
    edit(run / "ladder.json", lambda v: v["stages"]["base"].update(seconds=12345.0, budget_s=10000.0))
    console = Console(width=width, record=True, file=io.StringIO())
    summary(run, console)
    said = console.export_text()
    assert max(map(len, said.split("\n\nreport ")[0].splitlines()[:8])) <= width
    assert "12345 of 10000" in said
    assert "constitution" in said
    assert "\u2026" not in said
    assert "Worth knowing\n- Asked for facts" in said
    assert ("-12.31" in said.replace(words.MINUS, "-")) == (width > 40)


def test_summary_shows_hostile_text_as_text(run):
    edit(run / "ladder.json", lambda v: v["stages"].update({"[red]x[bold]\x1b[2J": {"method": "grpo", "status": "failed"}}))
    for width in (40, 80, 160):
        console = Console(width=width, record=True, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
        summary(run, console)
        said = console.export_text()
        assert "[red]x[bold]" in said or width == 40
        assert "\x1b[2J" not in said
        assert "constitution" in said or width == 40
