"""Asks: what is drawn can be asked."""

import pytest

from temper.world import town
from temper.world.asks import KINDS
from temper.world.lookups import RELATIONS
from temper.world.streams import Draw, stream


@pytest.mark.parametrize("where", [None, "seen", "held_out"])
def test_what_is_compared_is_known_of_both(where):
    """Also in a town with an entity of which nothing is known that it could share: it is never compared."""
    alone = [e for e in town().entities if not any(RELATIONS[name].shared for name in town().known(e))]
    assert alone, "there is none in this town: the draw below would not try it"
    draw, same = Draw(stream(f"test/compare/{where}")), 0
    for _ in range(2000):
        slots = KINDS["compare"](draw, where)
        values = [town().value(slots[side], slots["relation"]) for side in "ab"]
        assert None not in values
        assert slots["a"] != slots["b"]
        assert not {slots["a"], slots["b"]} & set(alone)
        assert where is None or {town().split(slots[side]) for side in "ab"} == {where}
        same += values[0] == values[1]
    assert 0.2 < same / 2000 < 0.6  # half are meant to be; where nobody shares the value, another is drawn
