"""Imports go down: a module imports its own package or a lower floor, and packages on one floor are strangers.

Every import counts, wherever it stands: at the top, inside a function, under TYPE_CHECKING, by `import_module("...")`.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import temper

ROOT = Path(temper.__file__).parent

FLOORS = {
    0: ["config", "hollow", "records", "client"],
    1: ["runs", "losses", "forest", "world", "stats"],
    2: ["feedback", "data", "models"],
    3: ["rollout", "train"],
    4: ["judges"],
    5: ["methods", "evals", "safety"],
    6: ["driver", "serve", "checks"],
    7: ["ladder", "report"],
    8: ["redteam", "doctor", "advise", "studio", "trials"],
    9: ["cli"],
    10: ["__main__"],
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
GROUND = "config"  # of floor 0 itself: UserError is what records and client raise

# Which packages from outside the standard library a part may use; the others may use what the project depends on.
ONLY = {"losses": {"torch"}, "stats": {"numpy", "scipy"}}
NO_TORCH = ["world", "studio"]
TORCH = {"torch", "transformers", "safetensors.torch", "peft"}
STUDIO = {"config", "records", "client", "runs", "world", "stats", "feedback"}


def part(path: Path) -> str:
    """The module or package right under temper that a file belongs to; "" for temper/__init__.py."""
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(tree: ast.AST, package: list[str], loaded_only: bool = False) -> Iterator[str]:
    """Full names of what a file imports. `package`: the package it is in; loaded_only: only what importing the file runs."""
    for node in _loaded(tree) if loaded_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.JoinedStr) and name.values:
                name = name.values[0]  # f"temper.methods.{name}" -> its fixed beginning
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value.rstrip(".")


def _loaded(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _loaded(node)


def read(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def package_of(path: Path) -> list[str]:
    return ["temper", *path.relative_to(ROOT).parent.parts]


def parts_used(path: Path) -> set[str]:
    """Parts of temper that a file imports."""
    found = set()
    for name in imports(read(path), package_of(path)):
        root, there = [*name.split("."), ""][:2]
        if root == "temper" and (there in FLOOR or (there and ((ROOT / there).is_dir() or (ROOT / f"{there}.py").is_file()))):
            found.add(there)
    return found


def outside(path: Path, loaded_only: bool = False) -> set[str]:
    """What a file imports from outside temper and the standard library, by full name."""
    names = set(imports(read(path), package_of(path), loaded_only))
    return {n for n in names if n.split(".")[0] not in {"temper", "__future__", *sys.stdlib_module_names}}


def complaint(here: str, there: str) -> str | None:
    """Why the part `here` may not import the part `there`, or None."""
    if here == there or FLOOR[there] < FLOOR[here] or (there == GROUND and FLOOR[here] == FLOOR[GROUND]):
        return None
    if FLOOR[there] == FLOOR[here]:
        return f"{here} and {there} are on the same floor ({FLOOR[here]}): move what they share below both"
    return f"{here} (floor {FLOOR[here]}) is below {there} (floor {FLOOR[there]}): imports go down"


def is_torch(name: str) -> bool:
    return any(name == t or name.startswith(f"{t}.") for t in TORCH)


FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(p.relative_to(ROOT)) for p in FILES]


def of(name: str) -> list[Path]:
    return [p for p in FILES if part(p) == name]


def test_every_module_has_a_floor():
    homeless = sorted({part(p) for p in FILES} - FLOOR.keys() - {""})
    assert not homeless, f"give these a floor in {Path(__file__).name} and in docs/architecture.md: {homeless}"
    assert len(FLOOR) == sum(map(len, FLOORS.values())), "a part stands on two floors"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_go_down(path):
    here, used = part(path), parts_used(path)
    if not here:
        assert not used, f"temper/__init__.py is loaded with everything: it may not import {used}"
        return
    homeless = used - FLOOR.keys()
    assert not homeless, f"these have no floor: {homeless}"
    wrong = [why for there in sorted(used) if (why := complaint(here, there))]
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("name", ONLY)
def test_pure_parts_know_only_their_own_tools(name):
    for path in of(name):
        strange = {n for n in outside(path) if n.split(".")[0] not in ONLY[name]}
        assert not strange, f"{path.relative_to(ROOT)} imports {strange}; {name} knows only {ONLY[name]}"
        assert parts_used(path) <= {name}, f"{path.relative_to(ROOT)} imports {parts_used(path) - {name}}; {name} stands alone"


@pytest.mark.parametrize("name", NO_TORCH)
def test_knows_no_torch(name):
    for path in of(name):
        assert not (found := {n for n in outside(path) if is_torch(n)}), f"{path.relative_to(ROOT)} imports {found}"


def test_the_studio_imports_only_its_list():
    for path in of("studio"):
        strange = parts_used(path) - STUDIO - {"studio"}
        assert not strange, f"{path.relative_to(ROOT)} imports {strange}; the studio runs the rest as processes"


@pytest.mark.parametrize("name", sorted(STUDIO))
def test_what_the_studio_imports_loads_without_torch(name):
    """Inside a function torch may be imported there: what a run directory is can be read without it."""
    for path in of(name):
        assert not (found := {n for n in outside(path, loaded_only=True) if is_torch(n)}), f"{path.relative_to(ROOT)} loads {found}"


# ---- the test itself


@pytest.mark.parametrize(
    ("source", "package", "want"),
    [
        ("import torch.nn as nn", "temper.losses", ["torch.nn"]),
        ("from temper.models import load", "temper.train", ["temper.models.load"]),
        ("from temper import runs", "temper", ["temper.runs"]),
        ("from .. import driver", "temper.train", ["temper.driver"]),
        ("from .kl import k1", "temper.losses", ["temper.losses.kl.k1"]),
        ("def f():\n    import temper.cli", "temper", ["temper.cli"]),
        ("if TYPE_CHECKING:\n    from temper.report import x", "temper.data", ["temper.report.x"]),
        ("importlib.import_module('temper.cli')", "temper", ["temper.cli"]),
        ("import_module(f'temper.methods.{name}')", "temper.methods", ["temper.methods"]),
    ],
)
def test_sees_every_way_to_import(source, package, want):
    assert list(imports(ast.parse(source), package.split("."))) == want


def test_loading_does_not_run_functions():
    blocks = "import a", "def f():\n import b", "class C:\n import c", "if TYPE_CHECKING:\n import d", "try:\n import e\nfinally:\n pass"
    assert set(imports(ast.parse("\n".join(blocks)), [], loaded_only=True)) == {"a", "c", "e"}


@pytest.mark.parametrize(
    ("here", "there", "allowed"),
    [
        ("losses", "losses", True),
        ("records", "config", True),
        ("config", "records", False),
        ("client", "records", False),
        ("train", "models", True),
        ("models", "data", False),
        ("losses", "forest", False),
        ("world", "judges", False),
    ],
)
def test_says_no_when_it_must(here, there, allowed):
    assert (complaint(here, there) is None) == allowed
