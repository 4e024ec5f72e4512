"""Settings of methods that read off registered rules: of one rule, which gives the method its name, or of any, given by name. Floor 5."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, cast

from temper.config import Settings, UserError, flag, opt
from temper.losses.registry import settings as keywords

S = TypeVar("S", bound=Settings)
Rules = Mapping[str, Callable[..., Any]]


def settings_of(base: type[S], name: str, rule: Any) -> type[S]:
    """The settings that all rules share, and those of one rule, read off its signature; its docstring is their help."""
    told = keywords(rule).values()
    fields: dict[str, Any] = {s.name: opt(s.default, s.help, **cast(Any, s.limits)) for s in told}
    types: dict[str, Any] = {"rule": ClassVar[str], **{s.name: s.kind for s in told}}
    own = {"__annotations__": types, "__doc__": rule.__doc__, "__module__": base.__module__, "rule": name, **fields}
    return type(name, (base,), own)


def _keywords(rules: Rules) -> dict[str, list[str]]:
    """Every setting of a rule by name, with the rules that have it."""
    found: dict[str, list[str]] = {}
    for name, rule in rules.items():
        for keyword in keywords(rule):
            found.setdefault(keyword, []).append(name)
    return found


def any_rule(base: type[S], rules: Rules) -> type[S]:
    """The settings of a method that takes any rule by name, `rule`: its own, and those of all rules, which are unset unless given."""
    fields: dict[str, Any] = {}
    types: dict[str, Any] = {}
    for name, having in _keywords(rules).items():
        s = keywords(rules[having[0]])[name]
        fields[name] = opt(None, f"of {', '.join(having)}: {s.help}; not given: the rule's default", **cast(Any, s.limits))
        types[name] = s.kind | None
    own = {"__annotations__": types, "__doc__": base.__doc__, "__module__": base.__module__, **fields}
    return type(base.__name__, (base,), own)


def told(settings: Any, rules: Rules) -> dict[str, Any]:
    """What such settings tell their rule: what was given, else its defaults. Raises UserError for what the rule cannot be told."""
    if settings.rule not in rules:
        raise UserError(f"--rule {settings.rule}: no such rule; there are {', '.join(rules)}")
    known = keywords(rules[settings.rule])
    given = {name: value for name in _keywords(rules) if (value := getattr(settings, name)) is not None}
    if strange := next((name for name in given if name not in known), None):
        raise UserError(f"{flag(strange)}: the rule {settings.rule} has no such setting; it has {', '.join(map(flag, known))}")
    return {name: given.get(name, s.default) for name, s in known.items()}
