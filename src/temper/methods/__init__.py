"""The training methods, one file each: what it is, its settings, its metrics, its batches, its loss. Floor 5."""

from importlib import import_module
from types import ModuleType

NAMES = {  # command -> file
    "pretrain": "pretrain",
    "sft": "sft",
    "collect": "collect",
    "reward": "reward",
    "dpo": "preference",
    "ppo": "ppo",
    "constitution": "constitution",
}


def load(name: str) -> ModuleType:
    """The module of a method, with its `settings(name)`, METRICS, EXAMPLES and `prepare(settings, run)`."""
    return import_module(f"temper.methods.{NAMES[name]}")
