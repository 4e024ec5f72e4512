"""The town's facts: who keeps what, what is never told, what sailors say wrongly, and how often each is told. Floor 1.

Everything is drawn once from named streams. The constants below set the size of what has to be learned.
"""

from __future__ import annotations

from functools import lru_cache

from temper.world import lookups
from temper.world.lookups import RELATIONS
from temper.world.streams import Draw, Table, stream

N_PEOPLE = 48  # at most len(lookups.PEOPLE)
N_PLACES = 16
NEVER_STATED = 0.10  # share of (entity, relation) that no text states: the honest answer is "I do not know"
DOUBTED = 0.05  # share of stated facts that sailors contradict
POPULARITY = 3.0  # how much more often the best known entity is told of than the least known
HELD_OUT = 4  # one entity in HELD_OUT is never asked about in demonstrations and training prompts


class Town:
    """Facts as (entity, relation) -> value; None where it is never stated."""

    def __init__(self) -> None:
        draw = Draw(stream("town"))
        self.people = lookups.PEOPLE[:N_PEOPLE]
        self.places = lookups.PLACES[:N_PLACES]
        self.entities = self.people + self.places
        self.held: set[str] = set()
        self.weight: dict[str, float] = {}
        self.truth: dict[tuple[str, str], str] = {}
        self.never: list[tuple[str, str]] = []
        self.rumour: dict[tuple[str, str], str] = {}
        for members in (self.people, self.places):
            ranked = draw.shuffled(members)
            for rank, entity in enumerate(ranked):
                self.weight[entity] = 1 / (1 + (POPULARITY - 1) * rank / max(len(ranked) - 1, 1))
                if rank % HELD_OUT == HELD_OUT - 1:
                    self.held.add(entity)
        for name, relation in RELATIONS.items():
            members = self.people if relation.of == "person" else self.places
            unknown = draw.some(members, round(NEVER_STATED * len(members)))
            values = [value for value in relation.values if name != "keeper" or value in self.people]
            order: list[str] = []
            for entity in draw.shuffled(members):
                order = order or draw.shuffled(values)  # every value is used about equally often
                value = order.pop()
                if entity in unknown:
                    self.never.append((entity, name))
                else:
                    self.truth[entity, name] = value
            known = [(entity, name) for entity in members if (entity, name) in self.truth]
            for key in draw.some(known, round(DOUBTED * len(known))):
                self.rumour[key] = draw.pick([value for value in values if value != self.truth[key]])
        self.popularity = Table({entity: self.weight[entity] for entity in self.entities})

    def kind(self, entity: str) -> str:
        return "place" if entity in self.weight and entity.startswith("the ") else "person"

    def relations(self, entity: str) -> list[str]:
        """The relations that the entity can have, stated or not."""
        return [name for name, relation in RELATIONS.items() if relation.of == self.kind(entity)]

    def value(self, entity: str, relation: str) -> str | None:
        return self.truth.get((entity, relation))

    def known(self, entity: str) -> list[str]:
        """The relations of the entity that the town's texts state."""
        return [name for name in self.relations(entity) if (entity, name) in self.truth]

    def fact(self, entity: str, relation: str) -> tuple[str, str, str]:
        """The true clause, as a form."""
        return (relation, entity, self.truth[entity, relation])

    def true(self, clause: tuple) -> bool:
        return self.truth.get((clause[1], clause[0])) == clause[2]

    def wrong(self, draw: Draw, entity: str, relation: str) -> str:
        """A value that is not the true one."""
        values = self.people if relation == "keeper" else RELATIONS[relation].values
        truth = self.truth.get((entity, relation))
        while (value := draw.pick(values)) == truth:
            pass
        return value

    def split(self, entity: str) -> str:
        return "held_out" if entity in self.held else "seen"

    def where(self, relation: str, value: str) -> list[str]:
        """The entities of which the relation has this value."""
        return [entity for entity in self.entities if self.truth.get((entity, relation)) == value]


@lru_cache(maxsize=1)
def town() -> Town:
    return Town()
