"""The training methods, one file each: what it is, its settings, its metrics, its batches, its loss. Floor 5."""

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType


def _rules() -> list[str]:
    """The losses over pairs, read off the text of their file: importing it takes torch, and seconds."""
    text = (Path(__file__).parents[1] / "losses" / "preference.py").read_text("utf-8")
    return re.findall(r"^@rule\(.*\)\ndef (\w+)", text, re.MULTILINE)


NAMES = {  # command -> file
    "pretrain": "pretrain",
    "sft": "sft",
    "collect": "collect",
    "reward": "reward",
    **dict.fromkeys(_rules(), "preference"),
    "ppo": "ppo",
    "grpo": "grpo",
    "constitution": "constitution",
}


def load(name: str) -> ModuleType:
    """The module of a method, with its `settings(name)`, METRICS, EXAMPLES and `prepare(settings, run)`."""
    return import_module(f"temper.methods.{NAMES[name]}")
