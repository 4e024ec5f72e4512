"""Typed settings: one pydantic model serves flags, recipe files and JSON Schema (floor 0).

Settings compose: a field whose type is another `Settings` is a group. Leaf names are unique in a composed model, so that
flags (`--max-length`) and recipe keys (`max_length`) are flat whatever the groups are.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import pydantic
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


class UserError(Exception):
    """A mistake in what the user gave: one line saying where, what came and what to do. The command line exits with `code`."""

    code = 2


class Settings(pydantic.BaseModel):
    """Base of all settings: unknown keys are errors, values cannot change, NaN and infinity are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


S = TypeVar("S", bound=Settings)


def opt(default: Any, help: str, *, positional: bool = False, **constraints: Any) -> Any:
    """A documented field: `lr: float = opt(3e-4, "peak learning rate", gt=0)`. `...` as the default makes it required.

    positional: on the command line the value stands without a flag (a list takes all that remain).
    """
    extra: dict[str, Any] | None = {"positional": True} if positional else None
    return pydantic.Field(default, description=help, json_schema_extra=extra, **constraints)


def idle(settings: Settings, names: Iterable[str], why: str) -> None:
    """For validators: raises ValueError for the first of these settings that was changed, where it has no effect."""
    for name in names:
        if (value := getattr(settings, name)) != type(settings).model_fields[name].default:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            raise ValueError(f"{flag(name)} {shown} has no effect {why}; leave it out")


# ---------------------------------------------------------------- the shape of a model


def _group(annotation: Any) -> type[Settings] | None:
    return annotation if inspect.isclass(annotation) and issubclass(annotation, Settings) else None


def leaves(cls: type[Settings]) -> dict[str, tuple[tuple[str, ...], FieldInfo]]:
    """Leaf name -> (path of field names from `cls`, its FieldInfo), in order. Raises TypeError when a leaf name comes twice."""
    found: dict[str, tuple[tuple[str, ...], FieldInfo]] = {}
    groups: set[str] = set()

    def walk(model: type[Settings], path: tuple[str, ...]) -> None:
        for name, field in model.model_fields.items():
            sub = _group(field.annotation)
            if sub is not None:
                groups.add(name)
                walk(sub, (*path, name))
            elif name in found:
                raise TypeError(f"{cls.__name__}: the leaf name {name!r} comes twice: in {found[name][0]} and in {(*path, name)}")
            else:
                found[name] = ((*path, name), field)

    walk(cls, ())
    if both := groups & found.keys():
        raise TypeError(f"{cls.__name__}: {sorted(both)} name both a group and a setting")
    return found


def _defaults(cls: type[Settings]) -> dict[str, Any]:
    """Leaf name -> default, an outer group's default instance winning over its class; PydanticUndefined where required."""
    out: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        sub = _group(field.annotation)
        value = field.get_default(call_default_factory=True)
        if sub is None:
            out[name] = value
        elif isinstance(value, Settings):
            out.update({leaf: _at(value, path) for leaf, (path, _) in leaves(sub).items()})
        else:
            out.update(_defaults(sub))
    return out


def _at(settings: Any, path: Iterable[str]) -> Any:
    for name in path:
        settings = getattr(settings, name)
    return settings


def dump(settings: Settings) -> dict[str, Any]:
    """Flat and JSON-able: every leaf with its value, defaults written out. `build(cls, dump(x)) == x`."""
    nested = settings.model_dump(mode="json")
    out = {}
    for leaf, (path, _) in leaves(type(settings)).items():
        value: Any = nested
        for name in path:
            value = value[name]
        out[leaf] = value
    return out


# ---------------------------------------------------------------- building from values


def _nearest(key: str, known: dict[str, str]) -> str | None:
    """The name nearest to `key`, by the names themselves and by runs of words in their help (so 'larning_rate' finds 'lr')."""

    def like(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    key = key.lower().replace("-", "_")
    n = key.count("_") + 1

    def score(name: str) -> float:
        words = re.findall(r"[a-z0-9]+", known[name].lower())
        runs = ["_".join(words[i : i + n]) for i in range(len(words))]
        return max([like(key, name.lower()), *(0.9 * like(key, run) for run in runs)])

    best = max(known, key=score, default=None)
    return best if best is not None and score(best) >= 0.6 else None


def _unknown(key: str, known: dict[str, str], shown: Callable[[str], str] = repr) -> str:
    near = _nearest(key, known)
    return f"; did you mean {shown(near)}?" if near else f"; there are {', '.join(map(shown, known))}" if 0 < len(known) <= 20 else ""


def _collect(
    cls: type[Settings], values: dict[str, Any], shown: Callable[[str], str]
) -> tuple[Settings | None, list[tuple[str, str | None]]]:
    """The settings, or what is wrong as (message, unknown key or None)."""
    known = leaves(cls)
    help_of = {name: field.description or "" for name, (_, field) in known.items()}
    wrong: list[tuple[str, str | None]] = []
    given: dict[str, Any] = {}

    def put(leaf: str, value: Any) -> None:
        if leaf in given:
            wrong.append((f"{shown(leaf)} is given twice", None))
        given[leaf] = value

    def take(model: type[Settings], source: dict[str, Any], inside: str) -> None:
        own = leaves(model)
        groups = {name: sub for name, field in model.model_fields.items() if (sub := _group(field.annotation)) is not None}
        for key, value in source.items():
            if key in groups:
                if isinstance(value, Settings):
                    value = dump(value)
                if isinstance(value, dict):
                    take(groups[key], value, f"{inside}{key}.")
                else:
                    wrong.append((f"{shown(str(key))} is a group of settings, got {value!r}", None))
            elif key in own:
                put(key, value)
            else:
                wrong.append((f"has no setting {inside + str(key)!r}{_unknown(str(key), help_of, shown)}", str(key)))

    take(cls, values, "")
    nested: dict[str, Any] = {}
    defaults = _defaults(cls)
    for leaf, (path, _) in known.items():
        node = nested
        for name in path[:-1]:
            node = node.setdefault(name, {})
        if leaf in given:
            node[path[-1]] = given[leaf]
        elif defaults[leaf] is not PydanticUndefined:
            node[path[-1]] = defaults[leaf]
    try:
        settings = cls.model_validate(nested)
    except pydantic.ValidationError as error:
        settings = None
        seen: dict[str, str] = {}
        for e in error.errors(include_url=False):
            names = [str(part) for part in e["loc"]]
            leaf = next((name for name in names if name in known), "")
            message = e["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            message = message.split(", unable to parse")[0]
            message = message[:1].lower() + message[1:] if not message[:2].isupper() else message
            if e["type"] == "missing":
                text = f"{shown(leaf)} is missing ({help_of.get(leaf, '')})"
            elif not leaf:
                text = message
            else:
                text = f"{shown(leaf)}: got {given.get(leaf, e['input'])!r}, {message}"
            if leaf and leaf in seen:  # a union reports once per member
                seen[leaf] += f", or {message.removeprefix('input should be ')}"
            else:
                seen[leaf or f"#{len(seen)}"] = text
        wrong += [(text, None) for text in seen.values()]
    return settings, wrong


def build(cls: type[S], values: dict[str, Any], where: str = "") -> S:
    """Make the settings from a flat or nested dict.

    where: what stands at the front of an error, e.g. "recipes/x.yaml: sft".
    Raises UserError with everything that is wrong in one line; an unknown key names its nearest neighbour.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where or cls.__name__}: expected settings as `key: value`, got {values!r}")
    settings, wrong = _collect(cls, values, repr)
    where = where or cls.__name__
    if wrong:
        first = f"{where} " if wrong[0][1] is not None else f"{where}: "
        raise UserError(first + "; ".join(text for text, _ in wrong))
    assert isinstance(settings, cls)
    return settings


# ---------------------------------------------------------------- the command line


def _members(annotation: Any) -> list[Any]:
    """The members of a union, None among them as NoneType; `Annotated` unwrapped."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [m for a in get_args(annotation) for m in _members(a)]
    return [annotation]


def _metavar(annotation: Any) -> str:
    names = []
    for m in _members(annotation):
        if get_origin(m) is Literal:
            names += [str(a) for a in get_args(m)]
        elif m is types.NoneType:
            names.append("none")
        elif get_origin(m) in (list, tuple) or m in (list, tuple):
            names.append(_metavar(get_args(m)[0]) if get_args(m) else "TEXT")
        else:
            names.append({int: "INT", float: "NUMBER", bool: "true|false"}.get(m, "TEXT"))
    return "|".join(names)


def _default_text(value: Any) -> str:
    if value is PydanticUndefined:
        return " (required)"
    if value is None or value == []:
        return ""
    return f" (default: {' '.join(map(str, value)) if isinstance(value, list | tuple) else value})"


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are a UserError."""

    _negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def flag(name: str) -> str:
    """The command-line flag of a leaf name: max_length -> --max-length."""
    return "--" + name.rstrip("_").replace("_", "-")


def parser(cls: type[Settings], prog: str, examples: str = "") -> argparse.ArgumentParser:
    """An argparse parser with one flag per leaf; values stay strings until pydantic sees them."""
    out = Parser(
        prog=prog,
        description=inspect.getdoc(cls),
        epilog=f"examples:\n{inspect.cleandoc(examples)}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    # argparse sets the matcher on the instance
    out._negative_number_matcher = Parser._negative_number_matcher
    defaults = _defaults(cls)
    titled: dict[tuple[str, ...], argparse._ArgumentGroup] = {}
    for name, (path, field) in leaves(cls).items():
        at = path[:-1]
        if at not in titled:
            title = "settings" if not at else " ".join(at).replace("_", " ")
            titled[at] = out.add_argument_group(title)
        extra = field.json_schema_extra
        members = _members(field.annotation)
        many = any(get_origin(m) in (list, tuple) or m in (list, tuple) for m in members)
        text = f"{field.description or ''}{_default_text(defaults[name])}".replace("%", "%%")
        if isinstance(extra, dict) and extra.get("positional"):
            titled[at].add_argument(name, nargs="*" if many else "?", metavar=name.upper(), help=text)
        elif members == [bool]:
            titled[at].add_argument(flag(name), dest=name, action=argparse.BooleanOptionalAction, help=text)
        elif many:
            titled[at].add_argument(flag(name), dest=name, nargs="+", action="extend", metavar=_metavar(field.annotation), help=text)
        else:
            titled[at].add_argument(flag(name), dest=name, metavar=_metavar(field.annotation), help=text)
    return out


def parse(cls: type[S], argv: Sequence[str], prog: str, examples: str = "") -> S:
    """Settings from command-line flags. `--help` prints and leaves with SystemExit(0).

    Raises UserError with everything that is wrong in one line; an unknown flag names its nearest neighbour.
    """
    known = leaves(cls)
    positional = {name for name, (_, field) in known.items() if isinstance(field.json_schema_extra, dict)}
    given, rest = parser(cls, prog, examples).parse_known_intermixed_args(list(argv))
    values = vars(given)
    for name, value in list(values.items()):
        members = _members(known[name][1].annotation)
        if types.NoneType in members and isinstance(value, str) and value.lower() == "none":
            values[name] = None
        if value == [] and name in positional:  # a list that was not given
            del values[name]
    unknown = [token.split("=")[0] for token in rest if token.startswith("-") and token != "--"]
    flags = {"help": "", **{name: field.description or "" for name, (_, field) in known.items() if name not in positional}}
    wrong = [f"no flag {token}{_unknown(token.lstrip('-').removeprefix('no-'), flags, flag)}" for token in unknown]
    if rest and not unknown:
        wrong.append(f"unexpected {' '.join(rest)!r}")

    def shown(leaf: str) -> str:
        return leaf.upper() if leaf in positional else flag(leaf)

    settings, more = _collect(cls, values, shown)
    wrong += [text for text, _ in more]
    if wrong:
        raise UserError(f"{'; '.join(wrong)}; see {prog} --help")
    assert isinstance(settings, cls)
    return settings


# ---------------------------------------------------------------- recipe files


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML itself keeps the last one in silence)."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises UserError naming file and line."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise UserError(f"{where}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    if value is None:
        raise UserError(f"{path}: is empty; it should hold `key: value` lines")
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold `key: value` lines, holds a {type(value).__name__}")
    return value
