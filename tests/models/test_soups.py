"""Mixing models: the reference vectors, whose weights may be interpolated, and the command."""

import json
from pathlib import Path

import pytest
import torch

from temper.config import UserError
from temper.models import mix
from temper.models.load import Size, load_policy, new_model, save
from temper.models.mix import interpolate, load_soup, main, mixed_logp, parse_mixture, read
from temper.models.tokenizer import train_tokenizer
from temper.runs import Run, model_fingerprint

VECTORS = json.loads((Path(__file__).parents[1] / "losses" / "vectors.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """start, two experts beside it (a, b), a stranger of another seed, and one with another tokenizer."""
    root = tmp_path_factory.mktemp("mix")
    tokenizer = train_tokenizer(iter(["the boat is red", "the boat is blue"] * 4), 300)
    other = train_tokenizer(iter(["a cat sat on a mat"] * 4), 300)
    size = Size(width=16, layers=1, heads=2, context=64)
    start = new_model(size, len(tokenizer), tokenizer, seed=0)
    save(start, tokenizer, root / "start" / "model")
    for k, name in enumerate("ab"):
        model, _ = load_policy(root / "start")
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.002 * torch.randn(p.shape, generator=generator))
        save(model, tokenizer, root / name / "model")
    save(new_model(size, len(tokenizer), tokenizer, seed=9), tokenizer, root / "stranger" / "model")
    save(new_model(size, len(tokenizer), tokenizer, seed=0), other, root / "babel" / "model")
    save(new_model(Size(width=32, layers=1, heads=2, context=64), len(tokenizer), tokenizer, seed=0), tokenizer, root / "wide" / "model")
    return root


def trained_from(folder, start):
    """Gives a folder the record that a stage trained from `start` has."""
    identity = {"inputs": {"model": model_fingerprint(str(start))}}
    (folder / "stage.json").write_text(json.dumps({"identity": identity, "record": {"named": {"model": str(start)}}}))


def test_vectors():
    found = interpolate([{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([3.0, -2.0])}], [0.75, 0.25])
    assert found["x"].tolist() == VECTORS["soup"]["theta"]
    logits = [torch.tensor(p, dtype=torch.double).log() for p in ((0.7, 0.2, 0.1), (0.1, 0.3, 0.6))]
    want = torch.tensor(VECTORS["logit_mix_0.5"]["pi"], dtype=torch.double)
    torch.testing.assert_close(mixed_logp(logits, [0.5, 0.5]).exp(), want, rtol=0, atol=1e-9)
    torch.testing.assert_close(mixed_logp([x + 5 for x in logits], [0.5, 0.5]).exp(), want, rtol=0, atol=1e-9)


def test_the_mixture_of_optimal_policies_is_optimal_for_the_mixed_reward():
    """pi_k ~ ref exp(r_k / beta): prod pi_k^w_k ~ ref exp(sum w_k r_k / beta), for whole answers."""
    ref, beta, w = torch.tensor([0.2, 0.5, 0.3]).double().log(), 0.5, 0.3
    r = [torch.tensor([1.0, 0.0, -1.0]).double(), torch.tensor([-2.0, 1.0, 0.5]).double()]
    got = mixed_logp([ref + x / beta for x in r], [w, 1 - w])
    torch.testing.assert_close(got, (ref + (w * r[0] + (1 - w) * r[1]) / beta).log_softmax(-1))


def test_a_soup_lies_between_its_experts(folders):
    a, b, soup = (
        load_policy(folders / "a")[0],
        load_policy(folders / "b")[0],
        load_soup({str(folders / "a"): 0.25, str(folders / "b"): 0.75})[0],
    )
    for (name, x), y, z in zip(soup.state_dict().items(), a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, 0.25 * y + 0.75 * z, msg=name)


def test_experts_of_other_starts_are_refused(folders):
    a, b, start = (folders / name for name in ("a", "b", "start"))
    with pytest.raises(UserError, match=r"not experts of one start \(the cosine between their weights is -?0\.\d+\)"):
        load_soup({str(a): 0.5, str(folders / "stranger"): 0.5})
    with pytest.raises(UserError, match=r"babel: has another tokenizer or chat template than"):
        load_soup({str(a): 0.5, str(folders / "babel"): 0.5})
    with pytest.raises(UserError, match="weights of other names or shapes"):
        load_soup({str(a): 0.5, str(folders / "wide"): 0.5})
    trained_from(a, start)
    trained_from(b, start)
    mix.check_start([str(a), str(b), str(start)])  # records agree; the start itself has none
    trained_from(b, folders / "stranger")
    with pytest.raises(UserError, match=r"a is itself and trained from .*start, .*b is itself and trained from .*stranger\): between them"):
        mix.check_start([str(a), str(b)])
    trained_from(b, a)
    mix.check_start([str(a), str(b)])  # an expert and what was trained on from it
    for folder in a, b:
        (folder / "stage.json").unlink()


def test_the_command_writes_a_stage_that_others_can_read(folders, tmp_path, capsys):
    a, b, out = str(folders / "a"), str(folders / "b"), tmp_path / "soup"
    assert main([f"{a}=0.3", f"{b}=0.7", "--out", str(out)]) == 0
    assert f"model in {out / 'model'}: 0.3 {a} + 0.7 {b}; next: temper chat {out}" in capsys.readouterr().out
    model, want = load_policy(out)[0], load_soup({a: 0.3, b: 0.7})[0]
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), want.state_dict().values(), strict=True))
    stage = Run(out).stage
    assert stage["status"] == "done"
    assert stage["identity"]["inputs"] == {"expert_1": model_fingerprint(a), "expert_2": model_fingerprint(b)}
    with pytest.raises(UserError, match="belongs to another run"):
        main([f"{a}=0.5", f"{b}=0.5", "--out", str(out)])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["a=0.5", "b=0.6"], "the weights sum to 1.1; give weights of at least 0 that sum to 1"),
        (["a=-1", "b=2"], "give weights of at least 0"),
        (["a=x", "b=1"], "the weight of a is 'x'; give a number"),
        (["a", "b=1"], "a: no weight; write a=0.5"),
        (["a=0.5", "a=0.5"], "a is given twice"),
        (["./no/such=1"], "./no/such: no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(argv, said, tmp_path):
    with pytest.raises(UserError) as caught:
        read([*argv, "--out", str(tmp_path / "out")])
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_mixture_in_words():
    assert parse_mixture("0.3*runs/a + 0.7*runs/b") == {"runs/a": 0.3, "runs/b": 0.7}
    assert parse_mixture(".25 * a+b +.75*c") == {"a+b": 0.25, "c": 0.75}
    for spec, said in {"a*b": "the weight of b is 'a'", "0.5*a + b": "sum to 0.5", "0.5*": "is no weighted model"}.items():
        with pytest.raises(UserError, match=said):
            parse_mixture(spec)
