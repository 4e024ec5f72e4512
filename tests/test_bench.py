"""The bench: both sides compute the same, and its arithmetic."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import rows
from bench.data import training_flops
from bench.machine import Refused, Timed, ratio
from bench.rollout import left_padded
from bench.training import agree
from temper.forest import Segment
from temper.models.adapt import Adapter, put_on
from temper.models.load import Size, new_model

ROOT = Path(__file__).parent.parent
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed (it is part of .[dev])")


@pytest.mark.slow
@needs_trl
def test_both_sides_agree_in_every_row():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--smoke"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("both sides agree") == len(rows.NAMES)


def test_ratio_is_the_median_of_the_turns_with_the_interval_of_the_sign_test():
    ours = [1.0] * 9
    peer = [5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0, 4.0, 6.0]
    of = ratio(ours, peer)
    assert of == (5.0, 2.0, 8.0, 1.0, 5.0)  # P(the median lies outside the 2nd and 8th of 9) = 2 (1 + 9) / 512 = 0.039
    assert ratio(ours[:5], peer[:5])[:3] == (5.0, 1.0, 9.0)
    assert ratio([2.0, 1.0], [4.0, 3.0])[:3] == (2.5, 2.0, 3.0)


def test_steps_that_differ_are_refused():
    assert agree([Timed(1, 2.0, 0.5)], [Timed(9, 2.0, 0.5)]) == 0
    with pytest.raises(Refused, match=r"step 2: gradient norm 0\.5 of ours, 0\.501 of the peer"):
        agree([Timed(1, 2.0, 0.5)] * 2, [Timed(1, 2.0, 0.5), Timed(1, 2.0, 0.501)])


def test_operations_are_counted_by_hand():
    """One layer, width 8: the products of two tokens, three pairs of attention, the head on one learned token; thrice."""
    model = new_model(Size(width=8, layers=1, heads=2, mlp=16, context=8), 32, seed=0)
    inner = 4 * 8 * 8 + 3 * 8 * 16
    assert training_flops(model, [[Segment([1, 2], [0.0, 1.0])]]) == 3 * (2 * inner * 2 + 4 * 8 * 3 + 2 * 8 * 32)


@pytest.mark.slow  # imports peft
def test_a_frozen_weight_needs_no_product_of_its_own():
    """LoRA of rank 1: backward through the frozen weights to their inputs alone; its own, and attention, as ever."""
    model = new_model(Size(width=8, layers=1, heads=2, mlp=16, context=8), 32, seed=0)
    lora = put_on(model, Adapter(adapter="lora", lora_rank=1), None, seed=0)
    frozen, own = 4 * 8 * 8 + 3 * 8 * 16, 4 * (8 + 8) + 3 * (8 + 16)
    expected = (4 * frozen + 6 * own) * 2 + 3 * 4 * 8 * 3 + 4 * 8 * 32
    assert training_flops(lora, [[Segment([1, 2], [0.0, 1.0])]]) == expected


def test_padding_stands_on_the_left():
    ids, mask = left_padded([[5], [6, 7]], 0, "cpu")
    assert ids.tolist() == [[0, 5], [6, 7]]
    assert mask.tolist() == [[0, 1], [1, 1]]
