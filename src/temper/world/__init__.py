"""The embedded world: a small harbour town in plain English, with facts, skills, temptations and an exact score. Floor 1, numpy only."""

from temper.world.asks import Ask
from temper.world.constitution import constitution
from temper.world.datasets import DATASETS, SIZES, dataset
from temper.world.gold import FEATURES, Gold, answered, complied, correct, features, gold, refused
from temper.world.registers import REGISTERS, exposure, exposures
from temper.world.streams import VERSION, stream
from temper.world.town import town

__all__ = [
    "DATASETS",
    "FEATURES",
    "REGISTERS",
    "SIZES",
    "VERSION",
    "Ask",
    "Gold",
    "answered",
    "complied",
    "constitution",
    "correct",
    "dataset",
    "exposure",
    "exposures",
    "features",
    "gold",
    "refused",
    "stream",
    "town",
]
