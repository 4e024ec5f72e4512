"""Experiments: what a file comes to, the arithmetic over seeds, the table, and that a run of one resumes."""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml
from toy import values_of

from temper.config import UserError
from temper.judges.process import exact_labels
from temper.ladder.recipe import PACKAGED
from temper.records import Prompt
from temper.runs import atomic_write
from temper.stats.intervals import mean_interval
from temper.trials import command
from temper.trials.figures import number, over_seeds, passes, table
from temper.trials.measures import MEASURES, _share_of, told, trace
from temper.trials.plan import Experiment, Measure, read_experiment, trials
from temper.world import dataset

EXPERIMENTS = sorted(p.stem for p in (PACKAGED / "bench").glob("*.yaml"))
ARMS = {
    "sft": {"of": "@sft"},
    "dpo": {"method": "dpo", "model": "@sft", "data": "@comparisons/pairs.jsonl", "batch": 8, "vary": {"beta": [0.5, 2], "batch": [0.5]}},
    "again": {"method": "sft", "model": "@dpo", "data": "x.jsonl", "measure": "sums"},
}


def finished(folder: Path, *names: str) -> Path:
    """A run whose stages of these names are done."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "stage.json").write_text('{"status": "done"}')
    return folder


@pytest.fixture
def run(tmp_path):
    folder = finished(tmp_path / "run", "base", "sft", "comparisons", "reward")
    (folder / "recipe.yaml").write_text("name: x\nevaluation: {prompts_each: 24}\n")
    (folder / "sft" / "evaluation.json").write_text("{}")
    return folder


def experiment(tmp_path: Path, arms=ARMS, **more) -> str:
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"name": "mine", "title": "Mine", "columns": {"gold": "gold"}, "arms": arms, **more}, sort_keys=False)
    )
    return str(tmp_path / "mine.yaml")


def planned(tmp_path, run, seeds=(0, 1), **more):
    path, plan = read_experiment(experiment(tmp_path, **more))
    return trials(path, plan, run, tmp_path / "out", seeds)


# ---------------------------------------------------------------- what a file comes to


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_experiments_that_come_with_temper_can_be_read(name, run, tmp_path):
    path, plan = read_experiment(name)
    found = trials(path, plan, run, tmp_path / "out", range(3))
    assert plan.name == name
    assert {t.arm for t in found} == plan.arms.keys()
    assert all(sum(t.arm == arm and not t.changed for t in found) == (1 if "of" in given else 3) for arm, given in plan.arms.items())


def test_an_arm_is_a_stage_for_each_seed_and_a_changed_setting_one_more(tmp_path, run):
    found = {t.name: t for t in planned(tmp_path, run)}
    assert [*found] == ["sft", "dpo-0", "dpo-1", "dpo-beta-x0_5-0", "dpo-beta-x2-0", "dpo-batch-x0_5-0", "again-0", "again-1"]
    assert found["dpo-1"].stage.values == {"model": str(run / "sft"), "data": str(run / "comparisons/pairs.jsonl"), "batch": 8, "seed": 1}
    assert found["dpo-beta-x2-0"].changed == ("beta", 0.2, 2)  # of the default
    assert found["dpo-beta-x2-0"].stage.values["beta"] == 0.2
    assert found["dpo-batch-x0_5-0"].stage.values["batch"] == 4
    assert found["again-1"].stage.needs == ["dpo-1"]
    assert (found["again-1"].measure, found["dpo-1"].measure) == ("sums", "policy")
    assert found["sft"].stage is None
    assert found["sft"].folder == run / "sft"


@pytest.mark.parametrize(
    ("arms", "what"),
    [
        ({"dpo": {**ARMS["dpo"], "lrr": 1}}, r"mine.yaml: dpo-0 has no setting 'lrr'; did you mean 'lr'\?"),
        ({"dpo": {**ARMS["dpo"], "model": "@sfd"}}, r"dpo-0 needs .*sfd, which is no finished stage; make the run first: temper run --out"),
        ({"dpo": {**ARMS["dpo"], "vary": {"adapter": [2]}}}, r"dpo: vary: 'adapter' is 'auto', no number"),
        ({"dpo": {**ARMS["dpo"], "vary": {"betta": [2]}}}, r"dpo: vary: 'betta' is None, no number"),
        ({"sft": {"of": "@sft", "lr": 1}}, r"sft: `of: \"@STAGE\"` names a stage of the run and takes no settings"),
        (
            {"a": {"method": "sft", "model": "@b", "data": "x"}, "b": {"method": "sft", "model": "@a", "data": "x"}},
            "need each other in a cycle",
        ),
        ({"dpo": {**ARMS["dpo"], "vary": {"lr": 2}}}, "dpo: vary.lr: .*list"),
        ({"dpo": {**ARMS["dpo"], "measure": "golden"}}, "dpo: measure: .*'policy', 'chosen'"),
        ({}, "arms: .*at least 1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(tmp_path, run, arms, what):
    with pytest.raises(UserError, match=what):
        planned(tmp_path, run, arms=arms)


def test_only_some_arms_with_what_they_need(tmp_path, run):
    found = planned(tmp_path, run)
    assert [t.name for t in command.wanted(found, ["again"])] == ["dpo-0", "dpo-1", "again-0", "again-1"]
    assert command.wanted(found, []) == found
    with pytest.raises(UserError, match=r"--only ppo: no such arm; there are sft, dpo, again"):
        command.read([experiment(tmp_path), "--run", str(run), "--only", "ppo"])
    (run / "sft" / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"run: its stage sft was not evaluated"):
        command.read([experiment(tmp_path), "--run", str(run)])
    with pytest.raises(UserError, match=r"no experiment 'method'; there are adapters, arithmetic, methods"):
        command.read(["method"])


# ---------------------------------------------------------------- figures


def one(mean, low, high):
    return {"metrics": {"win": {"mean": mean, "low": low, "high": high, "n": 9}}, "items": {}, "costs": {"seconds": 60 * mean}}


def test_several_seeds_have_the_interval_of_their_means_and_one_seed_its_own():
    found = over_seeds([one(0.5, 0.4, 0.6), one(0.6, 0.5, 0.7), one(0.7, 0.6, 0.8)])
    assert found["win"]["mean"] == pytest.approx(0.6)
    assert found["win"]["high"] - 0.6 == pytest.approx(4.302653 * 0.1 / 3**0.5)  # t(2)
    assert found["seconds"]["mean"] == pytest.approx(36)
    assert over_seeds([one(0.5, 0.4, 0.6)])["win"]["low"] == 0.4


def test_an_arm_passes_over_seeds_and_over_prompts():
    plan = Experiment(name="x", title="x", columns={"win": "win"}, better="win", arms={"a": {}})
    assert passes(plan, over_seeds([one(0.6, 0.55, 0.65), one(0.61, 0.56, 0.66)]))
    assert not passes(plan, over_seeds([one(0.6, 0.55, 0.65), one(0.61, 0.49, 0.73)]))  # one trial's own prompts
    assert not passes(plan, over_seeds([one(0.6, 0.55, 0.65), one(0.7, 0.65, 0.75)]))  # the seeds: 0.65 +- 0.64
    assert passes(plan, {}) is None


def test_an_arm_is_counted_from_another_of_its_seed(tmp_path, run):
    """By prompt where both have their items; a stage as it is stands for every seed."""
    path, plan = read_experiment(experiment(tmp_path, better="win", against="sft", above=0.1))
    found, out = trials(path, plan, run, tmp_path / "out", (0, 1), vary=False), tmp_path / "out"
    for name, items in {"sft": [0, 0, 1, 0], "dpo-0": [1, 0, 1, 1], "dpo-1": [1, 1, 1, 1]}.items():
        (out / name).mkdir(parents=True)
        rows = {"metrics": {"win": {"mean": sum(items) / 4, "low": 0, "high": 1, "n": 4}}, "items": {"win": items}}
        atomic_write(out / name / "evaluation.json", json.dumps(rows))
    dpo = command.gathered(plan, found, out)["rows"][1]
    each = dpo["metrics"]["gained"]["each"]
    assert [x["mean"] for x in each] == [0.5, 0.75]
    assert each[0]["high"] == pytest.approx(mean_interval([1, 0, 0, 1]).high)
    assert dpo["metrics"]["gained"]["mean"] == 0.625
    assert dpo["passes"] is False
    with pytest.raises(UserError, match=r"against: 'base' is no arm; there are sft, dpo"):
        planned(tmp_path, run, against="base")


def test_numbers_are_short():
    assert [number(x) for x in (0.12345, 0, -1.2345, 12.345, 1234.5, None)] == ["0.123", "0.000", "−1.23", "12.3", "1234", "?"]


def test_the_table_has_a_row_per_arm_and_says_what_is_missing(tmp_path, run):
    path, plan = read_experiment(experiment(tmp_path, better="gold", above=0.5))
    out = tmp_path / "out"
    found = trials(path, plan, run, out, (0, 1))
    for name, gold in {"sft": 0.4, "dpo-0": 0.7, "dpo-1": 0.71, "dpo-beta-x2-0": 0.3}.items():
        (out / name).mkdir(parents=True)
        rows = {"metrics": {"gold": {"mean": gold, "low": gold - 0.1, "high": gold + 0.1, "n": 5}}}
        atomic_write(out / name / "evaluation.json", json.dumps(rows))
    atomic_write(out / "again-0.stopped.json", '{"why": "no answer ends"}')
    results = command.gathered(plan, found, out)
    rows = {row["arm"]: row for row in results["rows"]}
    assert rows["dpo"]["metrics"]["gold"]["mean"] == pytest.approx(0.705)
    assert [v["factor"] for v in rows["dpo"]["varied"]] == [2]
    assert rows["dpo"]["missing"] == ["dpo-beta-x0_5-0", "dpo-batch-x0_5-0"]
    assert [rows[arm]["passes"] for arm in ("sft", "dpo", "again")] == [None, True, None]
    text = table(results)
    lines = text.splitlines()
    assert lines[2].startswith("| `sft` | 0.400 (0.300 to 0.500) |")
    assert lines[0] == "|  | gold | models held | learns from |"  # all arms are alike in the rest
    assert lines[3] == "| `dpo` | 0.705 (0.641 to 0.769) | policy, reference before it | pairs |"
    assert lines[4].startswith("| `again` | stopped |")
    assert "`again-0` stopped: no answer ends." in text
    assert "| `dpo` | 0.700 | `beta`  × 2: 0.300 |" in text


def test_the_table_takes_its_place_in_a_document(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- mine -->\nold\n<!-- /mine -->\nafter\n")
    assert command.section(page, "mine", "new\n") == "before\n<!-- mine -->\nnew\n<!-- /mine -->\nafter\n"
    for text in ("", "<!-- mine --> <!-- mine --> <!-- /mine -->"):
        page.write_text(text)
        with pytest.raises(UserError, match="no place for the table; write <!-- mine --> and <!-- /mine -->"):
            command.section(page, "mine", "new\n")


def test_a_check_that_stops_a_trial_is_a_result_and_wrong_input_is_not(tmp_path, run, monkeypatch):
    trial = next(t for t in planned(tmp_path, run) if t.stage)

    def stops(code):
        def make(*_):
            error = UserError("the loss is no number")
            error.code = code
            raise error

        monkeypatch.setattr(command, "make", make)
        (tmp_path / "out").mkdir(exist_ok=True)
        return command.attempt(trial, run, tmp_path / "out", "")

    assert stops(1)["status"] == "done"
    assert json.loads((tmp_path / "out" / f"{trial.name}.stopped.json").read_text()) == {"why": "the loss is no number"}
    with pytest.raises(UserError):
        stops(2)


# ---------------------------------------------------------------- measures


def test_every_measure_that_may_be_named_is_there():
    assert tuple(MEASURES) == get_args(Measure)


def test_a_new_fact_is_told_by_its_value_alone():
    for chat in dataset("news", n=50, split="evaluation"):
        assert told(chat, chat.messages[-1].content)
        assert not told(chat, "I do not know that.")
    chat = next(c for c in dataset("news", n=50) if c.meta["ask"]["slots"]["relation"] == "pet")
    assert not told(chat, f"{chat.messages[-1].content} It is a goat or a seal.")


def test_a_trace_is_right_when_every_step_is():
    right, wrong = "4 plus 3 makes 7. Now {} has 7 {}.", "4 plus 3 makes 8. Now {} has 7 {}."
    for prompt in dataset("sums", n=3, split="evaluation"):
        slots = {**prompt.meta["ask"]["slots"], "start": 4, "changes": [3]}
        asked = Prompt(messages=prompt.messages, meta={**prompt.meta, "ask": {**prompt.meta["ask"], "slots": slots}})
        for text, ok in (right, True), (wrong, False):
            answer = text.format(slots["person"], slots["thing"])
            assert trace(asked, answer) == ok, exact_labels(asked, answer, "sentence")


def test_a_ratio_over_prompts_has_the_interval_of_its_linearisation():
    part, whole = np.array([0.5, 0.2, 0.4]), np.array([1.0, 0.5, 0.5])
    found = _share_of(part, whole)
    residual = mean_interval((part - 0.55 * whole) / whole.mean())
    assert found.mean == pytest.approx(1.1 / 2)
    assert found.high - found.mean == pytest.approx(residual.high - residual.mean)


# ---------------------------------------------------------------- end to end


@pytest.mark.slow
def test_an_experiment_from_end_to_end_and_again(toy, tmp_path, capsys):
    from temper.config import build
    from temper.evals.harbour import Evaluation, measure

    look = {"prompts_each": 24, "samples": 2, "max_new": 12}
    run = tmp_path / "run"
    run.mkdir()
    for name in ("sft", "reward"):
        (run / name).symlink_to(toy.folder / name)
    (run / "recipe.yaml").write_text(yaml.safe_dump({"name": "toy", "seed": 0, "evaluation": look}))
    own = toy.folder / "sft" / "evaluation.json"
    found = measure(run / "sft", stages={"sft": run / "sft"}, how=build(Evaluation, {**look, "enumerable": 0}))
    own.write_text(json.dumps(found))
    try:
        arms = {"sft": {"of": "@sft"}, "dpo": {"method": "dpo", **values_of("dpo", toy), "model": "@sft", "vary": {"lr": [2]}}}
        arms["best"] = {"method": "best-of-n", **values_of("best-of-n", toy), "measure": "chosen"}
        arms["best"] |= {"prompts": "world:evaluation?n=24&split=evaluation", "reward": "@reward", "model": "@sft"}
        page = tmp_path / "page.md"
        page.write_text("<!-- mine --><!-- /mine -->")
        argv = [experiment(tmp_path, arms, better="win_rate_vs_sft"), "--run", str(run), "--out", str(tmp_path / "out"), "--seeds", "2"]
        assert command.main([*argv, "--docs", str(page), "--json"]) == 0
        results = json.loads(capsys.readouterr().out)
        rows = {row["arm"]: row for row in results["rows"]}
        assert rows["dpo"]["seeds"] == [0, 1]
        assert rows["dpo"]["metrics"]["gold"]["n"] == 2
        assert rows["dpo"]["metrics"]["cpu_seconds"]["mean"] > 0
        assert rows["sft"]["metrics"]["win_rate_vs_sft"]["mean"] == 0.5
        assert {"gold", "win_rate_vs_sft", "kl"} <= rows["best"]["metrics"].keys()
        assert len(rows["dpo"]["varied"]) == 1
        assert "| `dpo`" in page.read_text()
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.json")}
        assert command.main([*argv, "--json"]) == 0
        assert {p for p, at in before.items() if p.stat().st_mtime_ns != at} <= {tmp_path / "out" / "bench.json"}
    finally:
        own.unlink()
