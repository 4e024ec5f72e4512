"""The training methods, one file each: what it is, its settings, its metrics, its batches, its loss. Floor 5."""

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType


def _rules(file: str) -> list[str]:
    """The losses registered in a file, read off its text: importing it takes torch, and seconds."""
    text = (Path(__file__).parents[1] / "losses" / file).read_text("utf-8")
    return re.findall(r"^@rule\(.*\)\ndef (\w+)", text, re.MULTILINE)


NAMES = {  # command -> file
    "pretrain": "pretrain",
    "sft": "sft",
    "collect": "collect",
    "reward": "reward",
    "process-reward": "process_reward",
    **dict.fromkeys(_rules("preference.py"), "preference"),
    **dict.fromkeys(_rules("unpaired.py"), "unpaired"),
    "online-dpo": "online",
    "ppo": "ppo",
    "grpo": "grpo",
    "best-of-n": "best_of_n",
    "rejection": "rejection",
    "constitution": "constitution",
}


def load(name: str) -> ModuleType:
    """The module of a method, with its `settings(name)`, METRICS, EXAMPLES and `prepare(settings, run)`."""
    return import_module(f"temper.methods.{NAMES[name]}")


def examples(name: str) -> str:
    """A method's examples of commands; METHOD in them stands for its own name, where several share a file."""
    return load(name).EXAMPLES.replace("METHOD", name)
