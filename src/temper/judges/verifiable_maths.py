r"""Is this the right answer? Final answers of worked solutions, read and compared symbolically. Floor 4.

What a model wrote is read by the small parser here, never by `eval` (which sympy's own parser is): numbers, fractions, roots, powers, the
usual functions, in plain text or LaTeX; sets, tuples, intervals, equations, units, percent. Numbers that would not fit into memory are not
computed: `10**10**10` is read as no number at all.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

MOST = 20_000  # characters at the end of a text in which the answer is looked for
LONGEST = 1000  # characters of a formula that is read
DIGITS, BITS = 400, 20_000  # of a number that is written, of one that is computed
DEPTH = 40  # of brackets within brackets
DEGREE = 64  # of a power of something that is not a number
CLOSE = 1e-6  # relative; where one side is a decimal, which may be rounded

# ---------------------------------------------------------------- which part of a text is the answer

_FUNCTIONS = (
    *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln"),
    *("exp", "sqrt", "abs"),
)
_MARKS = (
    re.compile(r"####[ \t]*([^\n]+)"),
    re.compile(r"\banswer\b(?:\s{1,9}is\b)?\s{0,9}[:=]?\s{0,9}(\S[^\n]*?)(?:\.(?=\s|$)|(?=\n)|$)", re.IGNORECASE),
)
_UNIT = re.compile(r"^(.*[\d)}\]!])\s*(%|¢|[A-Za-z][A-Za-z .-]*?)\s*$", re.DOTALL)
_FRACTION = r"\\[dt]?frac\{-?\d+\}\{-?\d+\}"
_NUMBER = re.compile(
    rf"(?<![\w.\\])[-−]?\s?(?:[$€£]\s?)?(?:{_FRACTION}|\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?|\d+\.\d+|\.\d+|\d+(?:\s+\d+)?\s*/\s*\d+|\d+)(?:\s?\\?%)?"
)


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...}, braces within it counted."""
    at = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    depth = 0
    for end in range(text.find("{", at), len(text)) if at >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[text.find("{", at) + 1 : end].strip()
    return None


def tagged(text: str) -> str | None:
    """What stands in the last <answer>...</answer>."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def marked(text: str) -> tuple[str, bool] | None:
    r"""(what the text marks as its answer, whether by a formal mark): \boxed{}, <answer></answer>, ####, "the answer is"; the last such."""
    if found := boxed(text) or tagged(text):
        return found, True
    for mark in _MARKS:
        if every := [one.strip() for one in mark.findall(text) if one.strip()]:
            return every[-1], mark is not _MARKS[-1]
    return None


def final(text: str) -> list[str]:
    """What the text may mean as its answer, the likeliest first: what it marks, or all of it where it is a formula, or its last number."""
    text = text.rpartition("</think>")[2].strip()[-MOST:]
    part, formal = marked(text) or (text, False)
    numbers = [m.group().strip() for m in _NUMBER.finditer(part)]
    whole = [part] if formal or _formula(part) else []
    return [*whole, *(numbers[-1:] if part is text else numbers[:1])]  # "the answer is 8, not 7"


def right(text: str) -> str:
    """The answer in a reference, which may be a whole solution."""
    return (marked(text) or (text, True))[0]


def _formula(text: str) -> bool:
    """One line without words, but for a unit at its end."""
    if "\n" in text.strip() or len(text) > LONGEST:
        return False
    found = _UNIT.match(text)
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", found[1] if found else text)
    return all(word.lower() in (*_FUNCTIONS, "pi", "and", "or") for word in words)


# ---------------------------------------------------------------- from text to values


class Unreadable(ValueError):
    """No formula, or one that is too large."""


_DROPPED = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|,|!|;|:|quad|qquad|\s|\(|\)|\[|\])|[$~`]|\{,\}|\\text\{\s*\}")
_WORDS = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|textit|operatorname)\s*\{([^{}]*)\}")
_PLAIN = {
    "−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "⁄": "/", "π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ", "≤": "<=", "≥": ">=",
    "²": "^2", "³": "^3", "°": " degrees", r"^\circ": " degrees", r"^{\circ}": " degrees", r"\cdot": "*", r"\times": "*", r"\div": "/",
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\%": "%", r"\{": "⟨", r"\}": "⟩", r"\pm": "±", r"\lbrace": "⟨", r"\rbrace": "⟩", "**": "^",
    r"\cup": "∪", r"\cap": "∩", r"\le ": "<= ", r"\ge ": ">= ", r"\$": "",
}  # fmt: skip
_TOKEN = re.compile(
    r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d{1,3}(?![\w]))?|\.\d+)|\\([A-Za-z]+)|([A-Za-z]+)|(<=|>=|[-+*/^()\[\]{}⟨⟩|!=%,;±_<>∪∩]))"
)


def tidy(text: str) -> str:
    """LaTeX's spaces, dollars, sizes and fonts away; one sign for each thing."""
    text = text.strip()
    for old, new in _PLAIN.items():
        text = text.replace(old, new)
    text = _WORDS.sub(r" \1 ", _DROPPED.sub("", text)).strip().rstrip(".").strip()
    text = re.sub(r"(?<![\d.A-Za-z)])(\d+)\s+(\d+)\s*/\s*(\d+)", r"(\1+\2/\3)", text)  # 1 1/2
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)  # \frac12
    return re.sub(r"(?<![\d.A-Za-z)])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1+\2/\3)", text)


def tokens(text: str) -> list[str]:
    """Raises Unreadable for signs that no formula has."""
    out, at = [], 0
    while at < len(text.rstrip()):
        found = _TOKEN.match(text, at)
        if not found:
            raise Unreadable(text[at])
        number, command, word, sign = found.groups()
        if word and word.lower() not in (*_FUNCTIONS, "pi", "inf", "infinity", "i", "e") and len(word) > 1:
            out += [*word] if len(word) <= 3 else [word]  # xy is x y; a longer word is none
        else:
            out.append(number or (f"\\{command}" if command else word.lower() if word and word.lower() in _FUNCTIONS else word) or sign)
        at = found.end()
    return out


class Parser:
    """Recursive descent over tokens; values are sympy's, or (kind, parts) for what holds several."""

    def __init__(self, text: str) -> None:
        import sympy

        self.s: Any = sympy
        self.tokens, self.at, self.depth = tokens(text), 0, 0

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        if self.next and self.next in wanted:
            self.at += 1
            return self.tokens[self.at - 1]
        return ""

    def need(self, sign: str) -> None:
        if not self.take(sign):
            raise Unreadable(f"{sign} expected")

    def whole(self) -> Any:
        """Everything: one value, several with commas between (a set), an equation, a union of intervals."""
        values = [self.union()]
        while self.take(",", ";"):
            values.append(self.union())
        if self.next:
            raise Unreadable(f"{self.next!r} after the end")
        return values[0] if len(values) == 1 else ("set", values)

    def union(self) -> Any:
        values = [self.relation()]
        while self.take("∪"):
            values.append(self.relation())
        return values[0] if len(values) == 1 else ("union", values)

    def relation(self) -> Any:
        left = self.sum()
        if sign := self.take("=", "<", ">", "<=", ">="):
            right = self.sum()
            if sign[0] == ">":
                left, right, sign = right, left, "<" + sign[1:]
            if isinstance(left, tuple) or isinstance(right, tuple):
                raise Unreadable("a relation between sets")
            return (sign, [left, right])
        return left

    def sum(self) -> Any:
        value = self.product()
        while sign := self.take("+", "-", "±"):
            other = self.product()
            if isinstance(value, tuple) or isinstance(other, tuple):
                raise Unreadable("a sum of sets")
            value = ("set", [value + other, value - other]) if sign == "±" else value + other if sign == "+" else value - other
        return value

    def product(self) -> Any:
        if self.take("±"):
            value = self.product()
            return ("set", [value, -value])
        value = self.factor()
        while True:
            if sign := self.take("*", "/"):
                other = self.factor()
            elif self.next and (self.next[0].isalpha() or self.next[0] in "\\(|") and self.next not in (r"\in", r"\infty"):
                sign, other = "*", self.power()
            else:
                return value
            if isinstance(value, tuple) or isinstance(other, tuple):
                raise Unreadable("a product of sets")
            if sign == "/" and other == 0:
                raise Unreadable("division by zero")
            value = bounded(value * other if sign == "*" else value / other)

    def factor(self) -> Any:
        if self.take("-"):
            value = self.factor()
            if isinstance(value, tuple):
                raise Unreadable("minus a set")
            return -value
        self.take("+")
        return self.power()

    def power(self) -> Any:
        base = self.postfix()
        if not self.take("^"):
            return base
        exponent = self.factor()
        return raised(base, exponent)

    def postfix(self) -> Any:
        value = self.atom()
        while sign := self.take("!", "%"):
            if isinstance(value, tuple) or (sign == "!" and not (value.is_Integer and 0 <= value <= DEPTH)):
                raise Unreadable(f"{sign} after this")
            value = self.s.factorial(value) if sign == "!" else value / 100
        return value

    def group(self, close: str) -> Any:
        """{...} of LaTeX, or one atom."""
        if self.take("{"):
            value = self.deeper(self.sum)
            self.need(close)
            return value
        return self.atom()

    def deeper(self, read: Callable[[], Any]) -> Any:
        self.depth += 1
        if self.depth > DEPTH:
            raise Unreadable("too many brackets")
        value = read()
        self.depth -= 1
        return value

    def atom(self) -> Any:
        token = self.next
        if not token:
            raise Unreadable("it ends too soon")
        self.at += 1
        if token[0].isdigit() or token[0] == ".":
            return number(token)
        if token in ("(", "[", "⟨", "{"):
            return self.deeper(lambda: self.bracket(token))
        if token == "|":
            value = self.deeper(self.sum)
            self.need("|")
            return self.s.Abs(single(value))
        if token == r"\frac":
            over, under = self.group("}"), self.group("}")
            if single(under) == 0:
                raise Unreadable("division by zero")
            return bounded(single(over) / single(under))
        name = token.removeprefix("\\")
        if name.lower() in _FUNCTIONS:
            return self.function(name.lower())
        if name.lower() in ("pi", "infty", "inf", "infinity"):
            return self.s.pi if name.lower() == "pi" else self.s.oo
        if name in ("i", "e"):
            return self.s.I if name == "i" else self.s.E
        if name.isalpha() and (len(name) == 1 or token[0] == "\\"):
            if token[0] == "\\" and name not in GREEK:
                raise Unreadable(token)
            if self.take("_"):
                name += f"_{self.group('}')}"
            return self.s.Symbol(name)
        raise Unreadable(token)

    def function(self, name: str) -> Any:
        root = None
        if name == "sqrt" and self.take("["):
            root = self.sum()
            self.need("]")
        base = self.group("}") if name == "log" and self.take("_") else None
        power = self.group("}") if self.take("^") else None
        value = single(self.group("}") if self.next in ("{", "(") else self.deeper(self.power))
        if name == "sqrt":
            out = raised(value, 1 / single(root) if root is not None and root != 0 else self.s.Rational(1, 2))
        elif name == "exp":
            out = raised(self.s.E, value)
        elif name in ("log", "ln"):
            if value == 0:
                raise Unreadable("the logarithm of zero")
            out = self.s.log(value) if base is None else self.s.log(value, single(base))
        else:
            out = getattr(self.s, "Abs" if name == "abs" else name.replace("arc", "a"))(value)
        return out if power is None else raised(out, power)

    def bracket(self, opened: str) -> Any:
        """( ), [ ], { }: one value in round ones or braces is itself; several are a tuple, list or interval, in escaped braces a set."""
        if self.take({"(": ")", "[": "]", "{": "}", "⟨": "⟩"}[opened]):
            return ("set" if opened == "⟨" else opened, [])
        values = [self.relation()]
        while self.take(",", ";"):
            values.append(self.relation())
        closed = self.take("⟩") if opened == "⟨" else self.take("}") if opened == "{" else self.take(")", "]")
        if not closed:
            raise Unreadable("a bracket stays open")
        if opened == "⟨" or (opened == "{" and len(values) > 1):
            return ("set", values)
        return values[0] if len(values) == 1 and opened + closed in ("()", "{}") else (opened + closed, values)


GREEK = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "phi", "varphi", "chi"),
    *("psi", "omega", "zeta", "eta", "kappa"),
)


def single(value: Any) -> Any:
    """Raises Unreadable for several values where one is needed."""
    if isinstance(value, tuple):
        raise Unreadable("one value is needed")
    return value


def number(text: str) -> Any:
    """Exactly what is written: 0.1 is 1/10. Raises Unreadable for more digits than DIGITS."""
    import sympy

    digits, _, exponent = text.lower().partition("e")
    if len(digits) > DIGITS or abs(int(exponent or 0)) > DIGITS:
        raise Unreadable("a number of too many digits")
    return sympy.Rational(digits) * sympy.Integer(10) ** int(exponent or 0)


def bounded(value: Any) -> Any:
    """Raises Unreadable for numbers of more than BITS bits."""
    if value.is_Rational and max(int(value.p).bit_length(), int(value.q).bit_length()) > BITS:
        raise Unreadable("a number too large")
    return value


def raised(base: Any, exponent: Any) -> Any:
    """base ** exponent. Raises Unreadable, before anything is computed, where the power would be too large."""
    base, exponent = single(base), single(exponent)
    if base == 0 and (not exponent.is_number or exponent <= 0):
        raise Unreadable("zero to the power of zero or less")
    if exponent.is_Rational and base.is_Pow and base.exp.is_number and not abs((base.exp * exponent).evalf(10)) <= DEGREE:
        raise Unreadable("a power too large")
    if exponent.is_Rational:
        size = max(int(base.p).bit_length(), int(base.q).bit_length()) if base.is_Rational else BITS / DEGREE
        if abs(exponent.p) / exponent.q * size > BITS or exponent.q > DEGREE:
            raise Unreadable("a power too large")
    elif exponent.is_number and not abs(exponent.evalf(10)) < BITS:
        raise Unreadable("a power too large")
    return base**exponent


# ---------------------------------------------------------------- numbers with units

UNITS: dict[str, tuple[str, Fraction]] = {}  # name -> (what it measures, how many of the basic unit)
for _what, _names in {
    "length": {"mm millimeter millimetre": "1/1000", "cm centimeter centimetre": "1/100", "m meter metre": "1",
               "km kilometer kilometre": "1000", "inch inches": "0.0254", "ft foot feet": "0.3048", "yd yard": "0.9144",
               "mile mi": "1609.344"},
    "time": {"s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400", "week": "604800"},
    "mass": {"mg milligram": "1/1000000", "g gram": "1/1000", "kg kilogram": "1", "lb pound": "0.45359237", "oz ounce": "0.028349523125"},
    "volume": {"ml milliliter millilitre": "1/1000", "l liter litre": "1"},
    "dollars": {"$ dollar usd": "1", "cent ¢": "1/100"}, "euros": {"€ euro eur": "1"}, "share": {"% percent": "1/100"},
}.items():  # fmt: skip
    for _same, _factor in _names.items():
        UNITS |= {_name: (_what, Fraction(_factor)) for _name in _same.split()}

_SIMPLE = re.compile(r"(-?)\$?(\d{1,30}|\d{1,3}(?:,\d{3}){1,9})(\.\d{1,30})?\.?")
_MONEY = re.compile(r"^(-?)\s*(?:\\?([$€£])|USD|EUR|Rs\.?)\s*(?=[\d.\\(-])")


def unit(text: str) -> tuple[str, Fraction] | None:
    """What a unit measures and its size; None for words that are no unit known here."""
    word = text.strip().strip(".").lower()
    return UNITS.get(word) or UNITS.get(word.removesuffix("s"))


def readings(text: str) -> Iterator[tuple[Any, tuple[str, Fraction] | None, bool]]:
    """(value, unit or None, written as a decimal): every way to read a text. Bare commas part thousands, else the members of a set."""
    if len(text) > LONGEST:
        return
    decimal = bool(re.search(r"\d\.\d|\.\d", text))
    money = _MONEY.match(text.strip().lstrip("\\("))
    bare = tidy(text.replace(r"\$", "$"))
    spelled = [re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", bare)] if not re.search(r"[(\[⟨]", bare) else []
    spelled = list(dict.fromkeys([*spelled, bare]))
    spelled += [re.sub(r"\s+(?:and|or)\s+", ", ", bare)] if re.search(r"\d\s+(?:and|or)\s+", bare) else []
    for form in spelled:
        yield from ((value, unit(money[2] or "") if money else None, decimal) for value in _read(form))
        if found := _UNIT.match(form):
            yield from ((value, unit(found[2]), decimal) for value in _read(found[1]) if not isinstance(value, tuple) and value.is_number)


def _read(text: str) -> Iterator[Any]:
    try:
        yield Parser(text).whole()
    except (Unreadable, ArithmeticError, TypeError, AttributeError, ValueError, RecursionError):  # sympy's own ways to say no
        return


# ---------------------------------------------------------------- comparing


class Undecided(Exception):
    """Neither equal nor different could be shown."""


def zero(value: Any, scale: Any, decimal: bool) -> bool:
    """Whether an expression is identically zero. Exact for rationals and polynomials; else evaluated at points, then proven by sympy.

    decimal: numbers within CLOSE of it, relative to `scale`, count as zero. Raises Undecided.
    """
    import sympy

    if value == 0:
        return True
    if value.has(sympy.zoo, sympy.nan, sympy.oo):
        return False
    names = sorted(value.free_symbols | scale.free_symbols, key=str)
    for k, point in enumerate(((3, 7), (-5, 3), (11, 13)) if names else ((1, 1),)):
        at = {name: sympy.Rational(point[0] + 2 * i + k, point[1] + i) for i, name in enumerate(names)}
        here, size = (complex(sympy.N(x.subs(at), 30)) for x in (value, scale))
        if here != here or abs(here) == float("inf"):
            continue
        if abs(here) > (CLOSE if decimal else 1e-12) * max(abs(size), 1e-12):
            return False
        if decimal and not names:
            return True
    if value.is_Rational:
        return False
    if sympy.expand(value) == 0:
        return True
    shown = value.equals(0)
    if shown is None:
        raise Undecided
    return bool(shown)


def same(a: Any, b: Any, decimal: bool) -> bool:
    """Two values; what holds several is compared part by part, sets in any order. Raises Undecided."""
    if isinstance(a, tuple) != isinstance(b, tuple):
        relation, value = (a, b) if isinstance(a, tuple) else (b, a)
        return relation[0] == "=" and relation[1][0].is_Symbol and same(relation[1][1], value, decimal)  # x = 5 is 5
    if not isinstance(a, tuple):
        return a == b or zero(a - b, b, decimal)
    (kind, left), (other, right) = a, b
    if kind != other or len(left) != len(right):
        return False
    if kind == "=" and not left[0].is_Symbol:
        d, e = left[0] - left[1], right[0] - right[1]
        return same(d, e, decimal) or same(d, -e, decimal)
    if kind not in ("set", "union"):
        return all(same(x, y, decimal) for x, y in zip(left, right, strict=True))
    rest = list(right)
    for x in left:
        at = next((k for k, y in enumerate(rest) if same(x, y, decimal)), None)
        if at is None:
            return False
        rest.pop(at)
    return True


def _plain(text: str) -> str:
    return re.sub(r"[\s.]+", "", re.sub(r"^\(?([A-Za-z])\)?$", r"\1", tidy(text))).casefold()


def _simple(text: str) -> Fraction | None:
    found = _SIMPLE.fullmatch(text.strip())
    return Fraction(found[1] + found[2].replace(",", "") + (found[3] or "")) if found else None


def simple(reference: str, answer: str) -> bool | None:
    """The verdict where there is no answer, or both are plain numbers or the same text; None where they have to be read."""
    wanted, found = right(reference), final(answer)
    whole = answer.rpartition("</think>")[2][-MOST:]
    for text in (marked(whole) or (whole, False))[0], whole:
        if len(text) <= LONGEST and _plain(wanted) == _plain(text) != "":
            return True
    if not found:
        return False
    a, b = _simple(wanted), _simple(found[0])
    return None if a is None or b is None else a == b or ("." in wanted + found[0] and abs(a - b) <= CLOSE * abs(a))


def equal(reference: str, answer: str) -> bool:
    """Whether the final answer of `answer` is the reference's. Raises Undecided. May take long: run it in a `Worker`."""
    known = simple(reference, answer)
    if known is not None:
        return known
    wanted = list(readings(right(reference)))
    undecided = False
    for text in final(answer):
        found = list(readings(text))
        for (a, one, rough), (b, other, also) in itertools.product(wanted, found):
            try:
                if _agree(a, one, b, other, rough or also):
                    return True
            except Undecided:
                undecided = True
        if found:
            break  # it was read, and is another
    if undecided:
        raise Undecided("neither equal nor different could be shown")
    return False


def _agree(a: Any, one: tuple[str, Fraction] | None, b: Any, other: tuple[str, Fraction] | None, decimal: bool) -> bool:
    if one and other and (one[0] != other[0] or one[1] != other[1]):
        if one[0] != other[0] or isinstance(a, tuple) or isinstance(b, tuple):
            return False
        import sympy

        a, b = (x * sympy.Rational(u[1].numerator, u[1].denominator) for x, u in ((a, one), (b, other)))
    return same(a, b, decimal)
