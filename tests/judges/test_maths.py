"""Final answers: what is the same, what is not, and what must not be computed."""

import time

import pytest

from temper.data.sources import read
from temper.judges.verifiable_maths import boxed, equal, final, simple

SAME = [
    ("72", "48/2 = 24.\nNatalia sold 48+24 = 72.\n#### 72"),
    ("72", "Natalia sold 72 clips."),
    ("6", "4 minus 2 is 2. 2 plus 4 is 6. So now Dell has 6 pears."),
    ("1,234", "The answer is 1234."),
    ("1234", r"\boxed{1{,}234}"),
    ("#### 18", "$18.00"),
    ("70000", "He made a profit of $70,000."),
    (r"\frac{1}{2}", "0.5"),
    ("1/2", r"\boxed{\dfrac12}"),
    ("0.5", "50%"),
    ("50", "50%"),
    (r"50\%", "1/2"),
    ("0.333333333", "1/3"),
    ("1 1/2", r"1\frac{1}{2}"),
    ("1e3", "1000"),
    ("-3", "−3"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    (r"\frac{\sqrt{3}}{3}", r"$\frac{1}{\sqrt 3}$"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\sqrt[3]{8}", "2"),
    ("sin^2(x)+cos^2(x)", "1"),
    (r"\log_2 8", "3"),
    ("e^2", r"\exp(2)"),
    ("10!", "3628800"),
    ("3+4i", "4i+3"),
    ("a_1+2", "2+a_{1}"),
    ("(1,2)", r"\boxed{(1, 2)}"),
    (r"\left(\frac{1}{2}, 3\right)", "(0.5,3)"),
    (r"\{1,2\}", r"\boxed{\{2, 1\}}"),
    ("1,2", "x=1 or x=2"),
    (r"\pm 3", "3, -3"),
    (r"(-\infty,3)\cup(5,\infty)", r"(5, \infty) \cup (-\infty, 3)"),
    ("x<5", "5>x"),
    ("5", "x = 5"),
    ("y=2x+1", "y = 1+2x"),
    ("2x+y=3", "3-y=2x"),
    ("5 dollars", "The answer is 500 cents."),
    ("3 km", "3000 m"),
    ("$18", "18 dollars"),
    ("90^\\circ", "90"),
    (r"\frac{3}{4}", "3/4 cup"),
    ("B", "(B)"),
    (r"\text{Monday}", "The answer is Monday."),
    ("12", "<think>is it \\boxed{13}?</think><answer>12</answer>"),
    ("8", "The answer is 8, not 7."),
]
OTHER = [
    ("72", "73"),
    ("72", "I have no idea."),
    ("72", ""),
    ("72", "It is 27"),
    ("1/2", "0.51"),
    ("3.14", r"\pi"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "(0,1)"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("1", "1, 2"),
    ("3 km", "3 m"),
    ("3 km", "3 hours"),
    ("x+1", "x-1"),
    ("2", "x"),
    ("B", "C"),
    ("123456789123456789123456789123456789", "123456789123456789123456789123456788"),  # equal in floating point
    ("5", "5/0"),
    ("5", "0/0"),
    ("7", "The answer is 8, not 7."),
]
HOSTILE = [
    "10**10**10",
    "(9^9^9)!",
    r"\frac{1}{10^{10^{10}}}",
    "3!!!!!!",
    "9" * 5000,
    "(" * 3000,
    "2^" * 400 + "2",
    "((((x+1)^64)^64)^64)",
    "1.5e999999999",
    "__import__('os').system('touch /tmp/was-here')",
    "().__class__.__bases__[0].__subclasses__()",
    r"\boxed{" * 2000,
    "<answer>" * 5000,
    "answer" + " " * 20000,
    "1 " * 20000,
    "1/" * 20000,
    "\\frac" * 2000,
    "-" * 20000 + "1",
    r"\input{/etc/passwd}",
]


@pytest.mark.parametrize(("reference", "answer"), SAME)
def test_the_same(reference, answer):
    assert equal(reference, answer) is True


@pytest.mark.parametrize(("reference", "answer"), OTHER)
def test_another(reference, answer):
    assert equal(reference, answer) is False


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda text: text[:12])
def test_what_a_model_may_write_costs_little(answer):
    """No evaluation, no power that does not fit into memory, no search that explodes."""
    began = time.process_time()
    assert equal("42", answer) is False
    assert equal("x+1", answer) is False
    assert time.process_time() - began < 1.5


def test_where_the_answer_stands():
    assert boxed(r"so \boxed{\frac{1}{2}} and \boxed{\{1,2\}}.") == r"\{1,2\}"
    assert boxed(r"\boxed{1") is None
    assert final(r"\boxed{1} or \boxed{2}")[0] == "2"
    assert final("2 + 2 = 4\nTherefore 4 pears and 3 figs") == ["3"]
    assert final("x+1") == ["x+1", "1"]
    assert simple("72", "... #### 72") is True
    assert simple("72", "so 71") is False or simple("72", "so 71") is None
    assert simple("1/2", "0.5") is None  # has to be read


def test_gsm8k(real):
    """Every solution of the set has its own answer and no other's."""
    records = read(str(real / "gsm8k-test.jsonl"), "chat").records
    assert len(records) == 1319
    wanted = [r.meta["answer"] for r in records]
    said = [r.messages[-1].content for r in records]
    assert all(equal(a, text) for a, text in zip(wanted, said, strict=True))
    assert not any(equal(a, text) for a, b, text in zip(wanted, wanted[1:], said[1:], strict=False) if a != b)
