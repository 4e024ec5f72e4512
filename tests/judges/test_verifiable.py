"""Rewards by program: right answers score, wrong ones score 0, and what fails is masked, counted and named."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from temper.config import UserError
from temper.judges import verifiable
from temper.judges.rating import Answer, Failure, rater
from temper.judges.verifiable import block
from temper.judges.worker import Failed, Worker
from temper.records import Message, Prompt
from temper.world import Ask, dataset, features, gold


def answer(text, ask="?", tokens=(), **meta):
    return Answer(Prompt(messages=[Message(role="user", content=ask)], meta=meta), (), tokens, text, True)


def scores(spec, *answers):
    return rater(spec).rate(answers)


# ---------------------------------------------------------------- the embedded world


def test_gold_and_its_parts():
    prompts = dataset("prompts", n=60, seed=1)
    said = ["So now Dell has 6 pears.", "I do not know.", "gibberish here"] * 20
    answers = [Answer(p, (), (), text, True) for p, text in zip(prompts, said, strict=True)]
    want = [gold(Ask.of(p), text) for p, text in zip(prompts, said, strict=True)]
    assert scores("gold", *answers) == [g.total for g in want]
    assert scores("gold:honest", *answers) == [g.honest for g in want]
    assert scores("gold:words", *answers) == [features(Ask.of(p), t)["words"] for p, t in zip(prompts, said, strict=True)]
    parts = "gold:helpful + gold:harmless + gold:honest + gold:concise + gold:format"
    assert scores(parts, *answers) == pytest.approx([g.total for g in want])
    found = rater("gold").ratings([answers[0], answer("hello")])
    assert found.scores == [want[0].total, None]
    assert found.failures == {"gold": Failure(1, "not a question of the embedded world")}
    with pytest.raises(UserError, match="gold has no part 'good'; there are total, helpful"):
        rater("gold:good")


# ---------------------------------------------------------------- maths


def test_maths_of_rows_and_of_the_world():
    assert scores("maths", answer("so 24", answer="24"), answer("25", answer="24"), answer("1/2", answer=0.5)) == [1, 0, 1]
    assert scores("maths?seconds=60", answer("(x+1)^2", solution=r"... \boxed{x^2+2x+1}")) == [1]
    sums = [p for p in dataset("demonstrations", n=400, seed=1) if p.meta["ask"]["kind"] == "arithmetic"]
    assert len(sums) > 10
    given = [Answer(Prompt(messages=p.messages[:-1], meta=p.meta), (), (), p.messages[-1].content, True) for p in sums]
    right = [float(features(Ask.of(a.prompt), a.text)["correct"]) for a in given]
    assert scores("maths", *given) == right
    found = rater("maths").ratings([answer("5"), answer("5", answer=""), answer("5", answer=5)])
    assert found.scores == [None, None, 1]
    assert found.failures == {"maths": Failure(2, "has no reference answer in answer, final_answer, reference, solution")}


def test_maths_that_hangs_is_masked(monkeypatch):
    """A limit that nothing meets: the first answers are stopped, the others not tried, plain numbers need no worker."""
    monkeypatch.setattr(verifiable, "HANGS", 1)
    many = [answer("(x+1)^2", answer="x^2+2x+1")] * 5
    began = time.monotonic()
    found = rater("maths?seconds=0").ratings([*many, answer("5", answer="5")])
    assert found.scores == [None] * 5 + [1]
    assert found.failures["maths?seconds=0"].n == 5
    assert found.failures["maths?seconds=0"].first == "it took more than 0 s and was stopped"
    assert time.monotonic() - began < 30


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (r"format:^\d+$", ["12", " 12\n"], ["12a", ""]),
        ("format:(yes|no), it is.$", ["yes, it is."], ["maybe, it is."]),
        ('format:"a + b"', ["a   b", "a  b"], ["a b"]),
        ("format:json", ['{"a": [1, null]}', "3"], ["{", "", "NaN", "[" * 100_000, '{"a": 1} so', "9" * 5000 + "x"]),
        ("format:think", ["<think>a</think>\n<answer>b</answer>"], ["<answer>b</answer>", "<think>a</think> <answer> </answer>"]),
        ("format:think", [], ["x<think>a</think><answer>b</answer>", "<think>a</think><think>a</think><answer>b</answer>"]),
        ("format:boxed", [r"\boxed{3}"], ["3"]),
        ("format:words=2..3", ["a b", "a b c"], ["a", "a b c d", ""]),
        ("format:characters=..3", ["", "abc"], ["abcd"]),
    ],
)  # fmt: skip
def test_formats(spec, good, bad):
    assert scores(spec, *map(answer, good + bad)) == [1.0] * len(good) + [0.0] * len(bad)


def test_a_json_schema(tmp_path):
    schema = tmp_path / "s.json"
    schema.write_text(json.dumps({"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}))
    assert scores(f"format:schema={schema}", answer('{"n": 1}'), answer('{"n": "1"}'), answer("no"), answer("{}")) == [1, 0, 0, 0]
    schema.write_text('{"type": "objekt"}')
    with pytest.raises(UserError, match=r"s\.json: no JSON Schema: 'objekt' is not valid"):
        rater(f"format:schema={schema}")
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        rater(f"format:schema={tmp_path / 'none.json'}")


@pytest.mark.slow
def test_a_pattern_that_explodes_is_masked(monkeypatch):
    monkeypatch.setattr(verifiable, "PATIENCE", 1.0)
    found = rater(r"format:^(a|a)*$ + 0*format:words=1..").ratings([answer("aaa"), answer("a" * 60 + "b"), answer("b")])
    assert found.scores == [1, None, 0]
    assert found.failures == {"format:^(a|a)*$": Failure(1, "it took more than 1 s and was stopped")}


# ---------------------------------------------------------------- code


def test_code():
    row = {"tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}
    right, wrong = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a * b + 3"
    fenced = f"First:\n```python\nnonsense(\n```\nNow it works:\n```python\n{right}\n```\nDone."
    found = rater("code?seconds=1").ratings(
        [answer(t, **row) for t in (right, fenced, wrong, "while True: pass", "no code", f"```python\n{right}")] + [answer(right)]
    )
    assert found.scores == [1, 1, 0, 0, 0, 0, None]
    assert found.failures == {"code?seconds=1": Failure(1, "has no tests in tests, test_list, test or input_output")}


def test_tests_as_data_sets_write_them():
    mbpp = {"test_setup_code": "import math", "test_list": ["assert area(1) == math.pi"]}
    human = {"test": "def check(candidate):\n    assert candidate(2) == 4", "entry_point": "double"}
    apps = {"input_output": json.dumps({"inputs": ["1 2\n", "5\n7\n"], "outputs": ["3\n", "12"]})}
    reads = "import sys\nprint(sum(map(int, sys.stdin.read().split())), end=' \\n')"
    assert scores("code", answer("import math\ndef area(r):\n    return math.pi * r * r", **mbpp)) == [1]
    assert scores("code", answer("def double(x):\n    return x + x", **human), answer("def double(x):\n    return x", **human)) == [1, 0]
    assert scores("code", answer(reads, **apps), answer(reads + "\nprint(1)", **apps), answer("print(3)", **apps)) == [1, 0, 0]
    assert verifiable.tests_of({"input_output": "{"}) == "its input_output is no JSON"
    assert block("```python\na\n```\n```text\nb\n```") == "a\n"
    assert block("plain") == "plain"
    assert block("<think>```\nno\n```</think>x = 1") == "x = 1"


def test_code_where_no_wall_stands(monkeypatch, tmp_path):
    monkeypatch.setattr("temper.judges.sandbox.JAIL", tmp_path / "none.py")
    with pytest.raises(
        UserError, match=r"code: this machine gives no walls around what a model writes \(the sandbox did not start: .*code\?weak=yes"
    ):
        rater("code")


def test_code_that_cannot_be_run_is_masked(monkeypatch, tmp_path):
    ready = rater("code")
    monkeypatch.setattr("temper.judges.sandbox.JAIL", tmp_path / "none.py")
    found = ready.ratings([answer("x = 1", tests="assert x")])
    assert found.scores == [None]
    assert found.failures["code"].first.startswith("the sandbox did not start")


# ---------------------------------------------------------------- a function of the user's

FUNCTIONS = """
import time
import numpy
calls = []
def length(prompts, answers, metas):
    assert prompts[0][-1]["role"] == "user"
    return [len(a) + m["more"] for a, m in zip(answers, metas)]
def array(prompts, answers, metas):
    return numpy.arange(len(answers), dtype="float32")
def items(prompts, answers, metas):
    return [numpy.float64(2), numpy.bool_(True), 3]
def raises(prompts, answers, metas):
    return [1 / len(a) for a in answers]
def some(prompts, answers, metas):
    return [float("nan"), None, float("inf")]
def short(prompts, answers, metas):
    return [1.0]
def words(prompts, answers, metas):
    return [1, "2", 3]
def text(prompts, answers, metas):
    return "abc"
def nothing(prompts, answers, metas):
    pass
def hangs(prompts, answers, metas):
    while True:
        pass
def sleeps(prompts, answers, metas):
    calls.append(1)
    if "sleep" in answers:
        time.sleep(60)
    return [float(len(calls))] * len(answers)
def dies(prompts, answers, metas):
    import os
    os._exit(7)
def leaves(prompts, answers, metas):
    raise SystemExit(0)
def cannot(prompts, answers, metas):
    return [lambda: 1] * len(answers)
def prints(prompts, answers, metas):
    print("loud")
    return [1] * len(answers)
not_a_function = 3
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return path


THREE = [answer("ab", more=1), answer("", more=2), answer("abc", more=3)]


@pytest.mark.parametrize(("name", "want"), [("length", [3, 2, 6]), ("array", [0, 1, 2]), ("items", [2, 1, 3]), ("prints", [1, 1, 1])])
def test_a_function(mine, name, want):
    assert scores(f"python:{mine}:{name}", *THREE) == want
    assert scores(f"python:{mine}:{name}") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n", "why"),
    [
        ("raises", 3, "ZeroDivisionError: division by zero (mine.py:"),
        ("some", 3, "returned nan"),
        ("short", 3, "returned 1 numbers for 3 answers"),
        ("words", 3, "returned '2' among the numbers"),
        ("text", 3, "returned str where a list of 3 numbers is needed"),
        ("nothing", 3, "returned NoneType where a list of 3 numbers is needed"),
        ("hangs", 3, "it took more than 1 s and was stopped"),
        ("dies", 3, "its process ended (exit code 7)"),
        ("leaves", 3, "SystemExit: 0"),
        ("cannot", 3, "returned '<function"),
        ("not_a_function", 3, "TypeError: 'int' object is not callable"),
    ],
)
def test_a_function_that_fails_is_masked_counted_and_named(mine, name, n, why):
    """Never 0; and in a mixture the other part is still told."""
    spec = f"python:{mine}:{name}" + "?seconds=1" * (name == "hangs")
    found = rater(f"0.5*{spec} + format:words=1..").ratings(THREE)
    assert found.scores == [None] * 3
    assert found.missing == 3
    assert found.parts["format:words=1.."] == [1, 0, 1]
    assert found.means() == {"format:words=1..": pytest.approx(2 / 3)}
    assert found.failures.keys() == {spec}
    assert found.failures[spec].n == n
    if name != "cannot":
        assert found.failures[spec].first.startswith(why)


@pytest.mark.slow
def test_after_a_hang_it_starts_anew(mine):
    reward = rater(f"python:{mine}:sleeps?seconds=3")
    assert reward.rate(THREE) == [1, 1, 1]
    assert reward.rate(THREE) == [2, 2, 2]
    assert reward.rate([answer("sleep")]) == [None]
    assert reward.rate(THREE) == [1, 1, 1]


def test_a_file_that_cannot_be_used(tmp_path):
    path = tmp_path / "mine.py"
    for text, name, why in [
        ("def f(:", "f", "SyntaxError"),
        ("import nothing_like_it", "f", "ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("x = 1", "f", "AttributeError: module 'mine' has no attribute 'f'"),
        ("import os\nos._exit(3)", "f", r"its process ended \(exit code 3\)"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=rf"--reward 'python:.*mine\.py: cannot be used: {why}"):
            rater(f"python:{path}:{name}")
    with pytest.raises(UserError, match=r"give a file and a function, as in python:my\.py:score"):
        rater(f"python:{path}")


def test_a_worker_ends_with_its_caller(mine):
    worker = Worker(f"{mine}:hangs", seconds=0.2)
    with pytest.raises(Failed, match=r"more than 0\.2 s"):
        worker([], [], [])
    assert worker.process is None
    worker.start()
    process = worker.process
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(Failed, match=r"its process ended \(SIGKILL\)"):
        worker([], [], [])
    worker.start()
    process = worker.process
    del worker
    assert process.poll() is not None


def test_memory_of_a_worker():
    with pytest.raises(Failed, match="MemoryError"):
        Worker("builtins:bytearray", seconds=10, memory=256)(1 << 30)
    assert Worker("builtins:len", seconds=10)(np.zeros(3)) == 3
    assert Path("/tmp/was-here").exists() is False
