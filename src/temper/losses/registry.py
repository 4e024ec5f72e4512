"""What a registered loss can be told, read from its signature: flags, forms and tests follow from it. Floor 1: torch only."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints


class Setting(NamedTuple):
    """One keyword of a loss. `default` is `...` where it has none; `limits` are bounds by name: gt, ge, lt, le."""

    name: str
    kind: Any
    default: Any
    help: str
    limits: dict[str, float]


def settings(fn: Callable[..., Any]) -> dict[str, Setting]:
    """The keyword-only parameters of `fn`, in order.

    A parameter is written once, with its help and its bounds: `beta: Annotated[float, "pull to the reference", {"gt": 0}] = 0.1`.

    Raises:
        TypeError: a parameter has no help text.
    """
    fn = inspect.unwrap(fn)
    hints = get_type_hints(fn, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        kind, *notes = get_args(hints[name]) if get_origin(hints.get(name)) is Annotated else (None,)
        if not notes or not isinstance(notes[0], str):
            raise TypeError(f'{fn.__name__}: {name} says nothing about itself; write {name}: Annotated[<type>, "<help>"]')
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        found[name] = Setting(name, kind, default, notes[0], notes[1] if len(notes) > 1 else {})
    return found
