"""Named streams: the same everywhere, different by name and index."""

from temper.world.streams import Draw, Table, stream


def test_streams_are_fixed_and_distinct():
    assert stream("a").random() == stream("a").random()
    first = [stream(name, index).random() for name, index in (("a", 0), ("a", 1), ("b", 0))]
    assert len(set(first)) == 3


def test_draws_follow_their_weights():
    draw = Draw(stream("weights"))
    table = Table({"x": 3.0, "y": 1.0, "never": 0.0})
    drawn = [draw.weighted(table) for _ in range(8000)]
    assert abs(drawn.count("x") / 8000 - 0.75) < 0.02
    assert "never" not in drawn
    assert sorted(draw.some(range(5), 9)) == [0, 1, 2, 3, 4]
    assert {draw.between(2, 4) for _ in range(100)} == {2, 3, 4}
    assert max(draw.geometric(0.5, 3) for _ in range(200)) == 3
