"""report.json and report.html: what they hold, what they survive, what they refuse to run."""

import html.parser
import json
import math
import os
import re

import pytest

from temper.config import UserError
from temper.report.build import build, main
from tests.report import synthetic

WANTED = (
    *("gold", "answers", "correct", "correct_phrasing", "correct_entity", "arithmetic"),
    *("honest", "harmful", "over_refusal", "length", "kl", "proxy", "win_rate_vs_sft"),
)
EVIL = "</p><script>alert(1)</script><img src=x onerror=alert(2)> {0} {__class__} \x1b[31m \u202eright \ud800 & \"quoted'"
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Tags and attributes; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page(folder) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def edit(path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_figures_are_those_of_the_run(run):
    found = build(run)
    assert json.loads((run / "report.json").read_text()) == found
    for stage in ("sft", "ppo", "dpo", "constitution"):
        assert set(WANTED) <= set(found["stages"][stage])
    for stage in synthetic.EVALUATED:
        assert found["stages"][stage] == synthetic.metrics(stage)
    assert found["wall_s"] == synthetic.SECONDS
    assert (found["elapsed_s"], found["peak_mb"]) == (561.4, 1624.8)
    assert "1,625 MB at most" in page(run).text
    assert (found["recipe"], found["seed"], found["cores"]) == ("harbour", 0, 2)
    assert found["stages"]["comparisons"] == {}
    assert list(found["stages"]) == list(synthetic.PARENTS)
    assert found["frontier"]["checked"] == 12
    assert found["frontier"]["above"] == 0
    assert found["missing"] == []


def test_the_reward_models_intervals_are_those_it_wrote(run):
    found = build(run)
    m = found["stages"]["reward"]
    assert m["held_out_accuracy"] == {"mean": 0.74, "low": 0.7, "high": 0.77, "n": 1100}
    assert m["ceiling"] == {"mean": 0.749, "low": None, "high": None, "n": 1100}  # of an older run: nothing is made up
    assert "1.1 points (0.6 to 1.6) below it" in [e["found"] for e in found["expectations"]]
    assert "clustered by prompt" in (run / "report.html").read_text()


def test_the_temperature_is_the_evaluations(run):
    build(run)
    text = (run / "report.html").read_text()
    assert text.count("sampled at temperature 0.7") == 2
    assert "clustered by prompt, or by craft" in text
    for stage in synthetic.EVALUATED:
        edit(run / stage / "evaluation.json", lambda value: value["settings"].pop("temperature"))
    build(run)
    assert "at temperature" not in (run / "report.html").read_text()


def test_the_page_is_whole_and_asks_for_nothing(run):
    build(run)
    text, found = (run / "report.html").read_text(encoding="utf-8"), page(run)
    tags = {t for t, _ in found.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    assert not re.search(r"https?:|url\(|@import", text)
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert not any(name.startswith("on") for _, a in found.tags for name in a)
    assert "prefers-color-scheme: dark" in text
    assert any(a.get("name") == "viewport" for t, a in found.tags)
    for name in WANTED:
        assert name in found.text
    for i in range(1, 25):
        assert f"{i} of 24" in found.text
    assert found.text.count(synthetic.REPLIES["dpo"]) == 24
    links = [a["href"] for t, a in found.tags if t == "a"]
    ids = {a.get("id") for _, a in found.tags}
    assert links
    assert all(h.startswith("#") and h[1:] in ids for h in links)
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"(?s)<style>.*?</style>", "", text))


def test_what_a_run_says_is_never_markup(run):
    def poison(value):
        for row in value["side_by_side"]:
            row["answer"] = row["kind"] = EVIL
            row["messages"] = [{"role": EVIL, "content": EVIL}, {"role": "user", "content": EVIL}]
        for row in value.get("frontier", []):
            row["prompt"] = EVIL
        value["metrics"][EVIL] = {"mean": 1.0, "low": 0.5, "high": 1.5, "n": 3}
        value["settings"] = {"samples": EVIL, "eval_seed": EVIL}

    def poison_stage(value):
        value["identity"]["settings"] = {EVIL: EVIL, "lr": EVIL}
        value["card"] = {EVIL: {EVIL: [EVIL]}}
        value["versions"] = {EVIL: EVIL}
        value["code"] = EVIL
        value["record"]["named"] = {EVIL: EVIL}

    def poison_ladder(value):
        value["name"] = value["command"] = EVIL
        value["stages"]["dpo"] |= {"method": EVIL, "status": "failed", "error": EVIL, "command": EVIL}
        for name in ("../../etc", EVIL, EVIL[:-20].replace("/", "")):
            value["stages"][name] = {"method": EVIL, "parent": "sft", "inputs": [EVIL]}

    build(run)
    before = {t for t, _ in page(run).tags}
    edit(run / "ppo" / "evaluation.json", poison)
    edit(run / "ppo" / "stage.json", poison_stage)
    edit(run / "ladder.json", poison_ladder)
    build(run)
    found = page(run)
    assert {t for t, _ in found.tags} <= before | {"i", "ul", "li"}
    assert not any(name.startswith("on") for _, a in found.tags for name in a)
    assert "alert(1)" in found.text
    assert "whose name cannot be a folder's" in found.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff]", found.text)
    assert "\x1b" not in (run / "report.json").read_text()


@pytest.mark.parametrize("stages", [("base",), ("base", "sft"), ("sft", "dpo"), ("reward",), ("comparisons", "reward")])
@pytest.mark.parametrize("ladder", [True, False])
def test_a_part_of_a_ladder(tmp_path, stages, ladder):
    folder = synthetic.make(tmp_path / "part", stages, ladder)
    found = build(folder)
    assert list(found["stages"]) == [s for s in synthetic.PARENTS if s in stages]
    assert (found["elapsed_s"] is None) == (not ladder)
    assert any("ladder.json" in m for m in found["missing"]) == (not ladder)
    page(folder)


@pytest.mark.parametrize("lost", ["stage.json", "metrics.jsonl", "evaluation.json"])
@pytest.mark.parametrize("how", ["gone", "torn", "another shape"])
def test_a_lost_file_is_said(run, lost, how):
    path = run / "ppo" / lost
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(b'{"metr' if how == "torn" else b"[1, 2]\n")
    found = build(run)
    assert any("ppo" in m for m in found["missing"])
    assert "Not in this run" in page(run).text
    if lost == "evaluation.json":
        assert found["stages"]["ppo"] == {}


def test_wrong_types_inside_are_left_out(run):
    def change(value):
        value["metrics"] = {
            "gold": {"mean": None},
            "kl": 3,
            "length": {"mean": 4.0},
            "answers": {"mean": 0.5, "low": None, "high": None, "n": 1},
        }
        value["side_by_side"] = [7, {"messages": None, "answer": None, "gold": {"total": None}}, {}]
        value["frontier"] = [{"kl": None}, {"kl": 0.0}, 3]

    edit(run / "ppo" / "evaluation.json", change)
    (run / "ppo" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": null}\n{"step": 2, "loss": 1}\n{"step": 3, "eval": 3}\n[]\n{"loss": 1}\n'
    )
    found = build(run)["stages"]["ppo"]
    assert found == {
        "length": {"mean": 4.0, "low": None, "high": None, "n": 0},
        "answers": {"mean": 0.5, "low": None, "high": None, "n": 1},
    }
    page(run)


def test_all_values_equal_or_huge(run):
    def change(value):
        for m in value["metrics"].values():
            m.update(mean=0.0, low=0.0, high=0.0)
        value["metrics"]["gold"] = {"mean": 1e300, "low": -1e300, "high": 1e300, "n": 2}

    edit(run / "ppo" / "evaluation.json", change)
    (run / "ppo" / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(1, 4)))
    build(run)
    page(run)


def test_a_stage_by_hand(run):
    found = build(run / "dpo")
    assert list(found["stages"]) == ["dpo"]
    assert found["stages"]["dpo"]["gold"]["n"] == 800
    page(run / "dpo")


def test_a_stage_that_was_planned_and_never_made(run):
    edit(
        run / "ladder.json", lambda v: v["stages"].update(grpo={"method": "grpo", "status": "waiting", "parent": "sft", "inputs": ["sft"]})
    )
    found = build(run)
    assert found["stages"]["grpo"] == {}
    assert "grpo: has not been run" in found["missing"]


def test_parents_in_a_circle(run):
    def change(value):
        value["stages"]["base"]["parent"] = "dpo"
        value["stages"]["dpo"]["parent"] = "base"

    edit(run / "ladder.json", change)
    build(run)
    assert page(run).text.count("supervised fine-tuning") == 3  # twice in the ladder's two sizes, once on its card


@pytest.mark.parametrize("value", [[], {}, 3, "x", None, [[]], {"a": {}}])
def test_another_shape_anywhere_is_no_crash(run, value):
    for name, keys in {
        "ladder.json": ("name", "seed", "elapsed_s", "cores", "command", "evaluations"),
        "sft/stage.json": ("status", "identity", "versions", "code", "record", "card", "summary"),
        "ppo/evaluation.json": ("settings", "metrics", "gold_deviation", "helpful_deviation", "side_by_side", "frontier"),
    }.items():
        edit(run / name, lambda v, keys=keys: v.update(dict.fromkeys(keys, value)))
    edit(run / "ladder.json", lambda v: v["stages"]["dpo"].update(dict.fromkeys(v["stages"]["dpo"], value)))
    edit(run / "sft" / "evaluation.json", lambda v: v["side_by_side"][0].update(dict.fromkeys(v["side_by_side"][0], value)))
    build(run)
    page(run)


def test_no_run_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        build(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no stage"):
        build(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a file"):
        build(tmp_path / "file")
    with pytest.raises(UserError, match="DIR is missing"):
        main([])


def test_a_report_replaces_the_last_as_a_whole(run, monkeypatch):
    build(run)
    before = (run / "report.html").read_bytes()
    edit(run / "ladder.json", lambda v: v.update(name="other"))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="no space left"):
        build(run)
    assert (run / "report.html").read_bytes() == before
    assert sorted(p.name for p in run.iterdir() if p.is_file()) == ["ladder.json", "recipe.yaml", "report.html", "report.json"]


def test_commands(run, capsys):
    assert main([str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"]["ppo"]["gold"]["mean"] == 1.31
    assert main([str(run)]) == 0
    said = capsys.readouterr().out
    assert "PPO wins against SFT 71%" in " ".join(said.split())
    assert "report.html" in said
    assert math.isclose(json.loads((run / "report.json").read_text())["wall_s"]["ppo"], 121.9)


def test_what_was_missed_stands_under_the_paragraph(run):
    edit(run / "ppo" / "evaluation.json", lambda v: v["metrics"]["win_rate_vs_sft"].update(mean=0.55, low=0.5, high=0.6))
    assert len(build(run)["remarks"]) > 1
    text = (run / "report.html").read_text()
    order = ['class="lede"', "Not as expected", "<li>ppo, wins over SFT", "Worth knowing", "<nav"]
    assert [text.count(x) for x in order] == [1] * len(order)
    assert sorted(order, key=text.index) == order


def test_sft_is_not_compared_with_itself(run):
    assert build(run)["stages"]["sft"]["win_rate_vs_sft"]["mean"] == 0.5
    text = (run / "report.html").read_text()
    row = re.search(r'<tr><th scope="row"><details class="term"><summary[^>]*>wins over SFT<.*?</tr>', text)[0]
    assert re.findall(r"<td[^>]*>(?:<b>)?([^<]*)", row) == ["\u2013", "\u2013", "\u2013", "71.2%", "68.8%", "58.1%"]


def test_few_prompts_and_little_mass_are_marked(run):
    build(run)
    text = (run / "report.html").read_text()
    assert '<small class="few">n = 36</small>' in text
    assert '<small class="few">n = 59</small>' not in text
    assert '<b>says it does not know</b><span>, more is better</span><span class="few">, n = 36</span>' in text
    assert "1,200 answers listed; on them: ppo 93%, dpo 93%, constitution 93%" in text
    assert "rung above" not in text


def test_the_title_says_what_was_run(run, tmp_path):
    def title(folder):
        build(folder)
        return re.search("<title>(.*)</title>", (folder / "report.html").read_text())[1]

    assert title(run) == "harbour: from a base model to an assistant"
    assert title(run / "dpo") == "dpo: DPO"
    assert title(synthetic.make(tmp_path / "two", ("sft", "dpo"), ladder=False)) == "two: a run of 2 stages"
