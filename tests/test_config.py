from typing import Literal

import pydantic
import pytest

from temper.config import Settings, UserError, build, dump, leaves, load_yaml, opt, parse


class Optim(Settings):
    """How weights move."""

    lr: float = opt(3e-4, "peak learning rate", gt=0)
    warmup: float = opt(0.1, "share of steps spent warming up", ge=0, lt=1)


class Window(Settings):
    """What happens to long rows."""

    max_length: int | None = opt(None, "tokens a row may have; 100% of the window by default", ge=2)
    too_long: Literal["error", "drop", "cut-prompt"] = opt("error", "what to do with a longer row")


class Sft(Settings):
    """Teach a base model to answer."""

    model: str = opt(..., "base model")
    data: list[str] = opt(..., "files of demonstrations")
    shuffle: bool = opt(True, "draw rows in random order")
    window: Window = Window()
    optim: Optim = Optim(lr=1e-3)


class Ask(Settings):
    """Put prompts to a run."""

    folder: str = opt(..., "run to ask", positional=True)
    prompts: list[str] = opt([], "prompts", positional=True)
    system: str | None = opt(None, "system prompt")


NEEDED = {"model": "m", "data": ["d"]}


def message(function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_flat_and_nested_values_are_the_same():
    flat = build(Sft, {**NEEDED, "lr": "2e-3", "max_length": 64})
    nested = build(Sft, {**NEEDED, "optim": {"lr": 2e-3}, "window": {"max_length": 64}})
    assert flat == nested == build(Sft, dump(flat)) == build(Sft, {**NEEDED, "optim": Optim(lr=2e-3), "max_length": 64})
    assert dump(flat) == {
        **NEEDED,
        "shuffle": True,
        "max_length": 64,
        "too_long": "error",
        "lr": 2e-3,
        "warmup": 0.1,
    }


def test_a_groups_own_default_holds_where_it_is_given_in_part():
    assert build(Sft, {**NEEDED, "warmup": 0.2}).optim == Optim(lr=1e-3, warmup=0.2)
    assert build(Sft, {**NEEDED, "optim": {"warmup": 0.2}}).optim == Optim(lr=1e-3, warmup=0.2)
    assert Optim().lr == 3e-4


def test_unknown_key_names_its_neighbour():
    assert message(build, Sft, {**NEEDED, "larning_rate": 1}, "recipes/x.yaml: sft") == (
        "recipes/x.yaml: sft has no setting 'larning_rate'; did you mean 'lr'?"
    )
    assert "has no setting 'optim.wamup'; did you mean 'warmup'?" in message(build, Sft, {**NEEDED, "optim": {"wamup": 1}})
    assert "did you mean 'max_length'?" in message(build, Sft, {**NEEDED, "max-lenght": 1})
    assert "there are 'lr', 'warmup'" in message(build, Optim, {"zzzz": 1})


def test_all_errors_come_at_once():
    text = message(build, Sft, {"lr": -1, "too_long": "cut", "shufle": 1, "optim": 3}, "r.yaml: sft")
    for part in (
        "'lr': got -1, input should be greater than 0",
        "'too_long': got 'cut', input should be 'error', 'drop' or 'cut-prompt'",
        "has no setting 'shufle'; did you mean 'shuffle'?",
        "'optim' is a group of settings, got 3",
        "'model' is missing (base model)",
        "'data' is missing",
    ):
        assert part in text
    assert "'lr' is given twice" in message(build, Sft, {**NEEDED, "lr": 1, "optim": {"lr": 2}})
    assert "expected settings" in message(build, Sft, ["lr"], "x")
    assert "finite number" in message(build, Optim, {"lr": float("inf")})


def test_flags():
    got = parse(Sft, ["--model", "m", "--data", "a", "b", "--data", "c", "--no-shuffle", "--lr", "1e-2", "--max-length=9"], "temper sft")
    assert dump(got) == {
        "model": "m",
        "data": ["a", "b", "c"],
        "shuffle": False,
        "max_length": 9,
        "too_long": "error",
        "lr": 1e-2,
        "warmup": 0.1,
    }
    assert parse(Sft, ["--model", "m", "--data", "a", "--max-length", "None"], "x").window.max_length is None


def test_positional_settings_mix_with_flags():
    assert parse(Ask, ["runs/a", "--system", "Be brief.", "one", "two"], "x") == Ask(
        folder="runs/a", prompts=["one", "two"], system="Be brief."
    )
    assert parse(Ask, ["runs/a"], "x").prompts == []
    assert "FOLDER is missing (run to ask)" in message(parse, Ask, [], "x")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (
            ["--larning-rate", "3"],
            ["no flag --larning-rate; did you mean --lr?", "--model is missing", "see temper sft --help"],
        ),
        (["--no-shufle"], ["did you mean --shuffle?"]),
        (["--max-lengt=5"], ["no flag --max-lengt; did you mean --max-length?"]),
        (["--lr"], ["--lr: expected one argument"]),
        (
            ["--lr", "-1e-3", "--warmup", "x"],
            ["--lr: got '-1e-3', input should be greater than 0", "--warmup: got 'x', input should be a valid number"],
        ),
        (["stray"], ["unexpected 'stray'"]),
        (["--max-length", "3.5"], ["--max-length: got '3.5', input should be a valid integer"]),
    ],
)
def test_wrong_flags(argv, parts):
    text = message(parse, Sft, argv, "temper sft")
    assert all(part in text for part in parts), text


def test_help_shows_groups_defaults_and_examples(capsys):
    with pytest.raises(SystemExit) as leave:
        parse(Sft, ["--help"], "temper sft", "temper sft --model m --data x.jsonl")
    text = " ".join(capsys.readouterr().out.split())
    assert leave.value.code == 0
    for part in (
        "Teach a base model to answer.",
        "--max-length INT|none",
        "100% of the window by default --too-long",  # none is no default to speak of
        "--too-long error|drop|cut-prompt",
        "peak learning rate (default: 0.001)",
        "base model (required)",
        "--shuffle, --no-shuffle",
        "optim:",
        "examples: temper sft --model m --data x.jsonl",
    ):
        assert part in text, part


def test_leaf_names_must_be_unique():
    class Both(Settings):
        lr: float = opt(1.0, "other")
        optim: Optim = Optim()

    with pytest.raises(TypeError, match="'lr' comes twice"):
        leaves(Both)
    assert leaves(Sft)["lr"][0] == ("optim", "lr")


def test_settings_are_frozen_and_have_a_schema():
    settings = build(Sft, NEEDED)
    with pytest.raises(pydantic.ValidationError):
        settings.model = "other"
    schema = Sft.model_json_schema()
    assert schema["$defs"]["Optim"]["properties"]["lr"]["description"] == "peak learning rate"
    assert Ask.model_json_schema()["properties"]["folder"]["positional"] is True


def test_errors_of_validators_are_shown_plainly():
    class Range(Settings):
        low: int = opt(0, "low end")
        high: int = opt(1, "high end")

        @pydantic.model_validator(mode="after")
        def _ordered(self):
            if self.low > self.high:
                raise ValueError(f"low {self.low} > high {self.high}; swap them")
            return self

    assert message(build, Range, {"low": 2}, "r.yaml: range") == "r.yaml: range: low 2 > high 1; swap them"


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"a: 1\nb: [1, 2\nc: 3\n", "x.yaml:3: expected ',' or ']'"),
        (b"a: 1\nb: 2\na: 3\n", "x.yaml:3: the key 'a' is given twice"),
        (b"a:\n  b: 1\n  b: 2\n", "x.yaml:3: the key 'b' is given twice"),
        (b"", "x.yaml: is empty"),
        (b"- a\n- b\n", "x.yaml: should hold `key: value` lines, holds a list"),
        (b"a: \xff\n", "x.yaml: byte 3 is not UTF-8"),
        (b"a: !!python/object:os.system x\n", "x.yaml:1: could not determine a constructor"),
        (b"a: \x01\n", "x.yaml: not YAML"),
        (b"? [1, 2]\n: 3\n", "x.yaml:1: a key must be plain text"),
    ],
)
def test_yaml_errors_name_file_and_line(tmp_path, monkeypatch, data, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_bytes(data)
    assert match in message(load_yaml, "x.yaml")


def test_yaml(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("base: &b {lr: 1e-3}\nsft:\n  <<: *b\n  warmup: 0.2\n")
    assert build(Optim, load_yaml(path)["sft"]) == Optim(lr=1e-3, warmup=0.2)
    assert message(load_yaml, tmp_path / "no.yaml").endswith("no.yaml: no such file")
    assert "is a folder" in message(load_yaml, tmp_path)
