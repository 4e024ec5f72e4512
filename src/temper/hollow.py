"""Importing Temper's modules without the libraries that take seconds: while a command line is read they are hollow. Floor 0.

Settings stand beside the code that they are for, so that reading the flags of `temper sft` imports all of it. That code only defines:
to be imported it needs the names of PyTorch's things and nothing that they do. So a mistake or `--help` is answered within a second.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from temper.config import UserError

HEAVY = {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "peft", "scipy"}


class _Anything(type):
    """A class that has every attribute and item, can be called and inherited from, and does nothing."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _Anything(cls.__name__, (), {})

    __getitem__ = __call__


class _Module(ModuleType):
    __getattr__ = _Anything.__getattr__


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in HEAVY else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def hollow() -> Iterator[None]:
    """Inside, heavy libraries that are not yet imported are hollow; what was imported with them is forgotten at the end."""
    before, finder = {*sys.modules}, _Finder()
    if before & HEAVY:  # the seconds are spent
        yield
        return
    sys.meta_path.insert(0, finder)
    try:
        yield
    except UserError:
        raise
    except Exception:
        pass  # something needs more than names to be imported: its command line is read in earnest, later
    finally:
        sys.meta_path.remove(finder)
        for name in {*sys.modules} - before:
            if name.split(".")[0] in {"temper", *HEAVY}:
                del sys.modules[name]
                parent, _, child = name.rpartition(".")
                vars(sys.modules.get(parent, finder)).pop(child, None)
