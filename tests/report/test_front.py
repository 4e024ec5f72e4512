"""The trade-off front: its ends are the experts, its points and picture are whole, and what cannot be drawn is said."""

import json

import pytest
import torch

from temper.config import UserError
from temper.models.load import load_policy, save
from temper.report import front
from temper.report.build import build
from temper.report.gather import gather
from tests.models.test_soups import trained_from


@pytest.fixture(scope="module")
def experts(toy, tmp_path_factory):
    """Two policies beside the toy's SFT model."""
    root = tmp_path_factory.mktemp("experts")
    for k, name in enumerate("ab"):
        model, tokenizer = load_policy(toy.sft)
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
        save(model, tokenizer, root / name / "model")
    return str(root / "a"), str(root / "b")


def test_the_front_of_two_experts(toy, experts, tmp_path, capsys):
    a, b = experts
    flags = ["--prompts", "world:prompts?n=12", "--out", str(tmp_path / "f"), "--max-new", "8", "--threads", "1"]
    assert front.main([a, b, *flags, "--weights", "1", "0", "0.5", "--trained", toy.sft, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "f" / "front.json").read_text())
    points = {(p["kind"], p["weight"]): p for p in found["points"]}
    assert points.keys() == {(kind, w) for kind in ("soup", "mixed") for w in (0.0, 0.5, 1.0)} | {("trained", None)}
    for w, name in (0.0, b), (1.0, a):  # an expert alone is a soup and a mixture
        assert points["soup", w]["name"] == points["mixed", w]["name"] == name
        assert points["soup", w]["x"] == points["mixed", w]["x"]
    for p in found["points"]:
        assert p["x"]["n"] == p["y"]["n"] == 24 - p["unrated"]
        assert p["x"]["low"] <= p["x"]["mean"] <= p["x"]["high"]
        better = [q for q in found["points"] if q["x"]["mean"] > p["x"]["mean"] and q["y"]["mean"] > p["y"]["mean"]]
        assert p["dominated"] == bool(better)
    page = (tmp_path / "f" / "front.html").read_text()
    assert page.count("<svg") == 1
    assert page.count("<circle") == 7
    assert "gold:harmless against gold:helpful" in page
    assert "<script" not in page
    assert front.main([a, b, *flags, "--weights", "1", "--no-mixed"]) == 0
    assert "interpolated weights" in capsys.readouterr().out


def test_what_cannot_be_drawn(toy, experts, tmp_path):
    a, b = experts
    out = ["--out", str(tmp_path / "f")]
    with pytest.raises(UserError, match="a weight is a share between 0 and 1"):
        front.read([a, b, *out, "--weights", "0", "1.5"])
    with pytest.raises(UserError, match="at least 2 items"):
        front.read([a, *out])
    with pytest.raises(UserError, match="no such folder"):
        front.read([a, "./none/such", *out])
    with pytest.raises(UserError, match=r"rate none of the answers both; give other --rewards"):
        front.main([a, b, *out, "--prompts", toy.prompts, "--weights", "1", "--max-new", "4", "--threads", "1"])
    assert not (tmp_path / "f").exists()
    from pathlib import Path

    trained_from(Path(a), toy.sft)
    trained_from(Path(b), toy.base)
    with pytest.raises(UserError, match="not experts of one start"):
        front.read([a, b, *out])
    front.read([a, b, *out, "--no-soups"])
    for name in experts:
        (Path(name) / "stage.json").unlink()


def test_the_curve_of_best_of_n_in_the_report(tmp_path):
    """Who chooses and who reports, each with a picture of a point for every n; nothing where a curve is damaged."""
    folder = tmp_path / "run" / "best"
    folder.mkdir(parents=True)
    identity = {"method": "best-of-n", "settings": {}}
    (folder / "stage.json").write_text(json.dumps({"status": "done", "identity": identity, "card": {"prompts": 5}}))
    rows = [
        {"n": n, "bound": k} | {name: {"mean": k, "low": k - 0.1, "high": k + 0.1, "n": 5} for name in ("reward", "report", "kl")}
        for k, n in enumerate((1, 2, 4))
    ]
    (folder / "curve.json").write_text(json.dumps({"rows": rows, "raters": {"reward": "runs/rm", "report": "gold"}}))
    build(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Best of n</h2>" in page
    assert page.count("of the best of n against its KL") == 2
    assert "runs/rm, which chooses" in page
    assert "gold, which reports" in page
    assert page.count("<circle") == 6
    assert not [line for line in gather(tmp_path / "run").missing if "best" in line]
    (folder / "curve.json").write_text('{"rows": [{"n": 1}, "x"], "raters": 3}')
    build(tmp_path / "run")
    assert "Best of n</h2>" not in (tmp_path / "run" / "report.html").read_text()
