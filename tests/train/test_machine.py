"""How a process uses the machine."""

import ctypes

import pytest
import torch

from temper.train import machine


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", [1, 2])
def test_threads(n):
    machine.use(n)
    assert torch.get_num_threads() == n


def test_where_there_is_no_glibc_the_memory_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    machine.use(1)
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.delattr(ctypes, "CDLL")
    machine.use(1)


def test_computing_gives_the_same_bits_before_and_after():
    def compute():
        torch.manual_seed(0)
        a = torch.randn(300, 300)
        return (a @ a).softmax(-1).sum(0)

    torch.set_num_threads(1)
    before = compute()
    machine.use(1)
    assert torch.equal(compute(), before)
