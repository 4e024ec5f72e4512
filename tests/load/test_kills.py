"""kill -9 at 20 random moments per method, other moments every time."""

import random

import pytest
from methods.test_resume import TRAINED, killed_until, uninterrupted

pytestmark = pytest.mark.load


@pytest.mark.parametrize("method", TRAINED)
def test_killed_at_twenty_random_moments(toy, tmp_path, method):
    seed = random.SystemRandom().randrange(2**32)
    print(f"{method}: moments by seed {seed}")  # shown where the test fails
    expected, seconds = uninterrupted(method, toy, tmp_path)
    assert killed_until(method, toy, tmp_path, expected, seconds, 20, random.Random(seed)) == 20
