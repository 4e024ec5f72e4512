"""Cleaning data in steps, each of which says of every row that it removes why. Floor 2.

A step is one file in this package, found by itself. It defines
    NAME, EXAMPLES              what it is called, and commands with it
    Options                     its settings, with a docstring
    run(options, rows, report)  the verdicts on rows by their index; rows without one stay
    main(argv)                  the step as a command of its own: `command(NAME, argv)`
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import types


@functools.cache
def steps() -> dict[str, types.ModuleType]:
    """Every step of this package by its name."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return {m.NAME: m for m in modules if hasattr(m, "Options")}
