"""The reference vectors (float64, cross-checked against independent implementations) and how closely they must be met."""

import json
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "vectors.json").read_text())
FIXED_POINTS = json.loads((HERE / "fixedpoints.json").read_text())


def t(*x: float, grad: bool = False) -> Tensor:
    return torch.tensor(x, dtype=torch.float64, requires_grad=grad)


def close(got: Tensor | float, want: Tensor | float | list, atol: float = 1e-9) -> None:
    got = torch.as_tensor(got, dtype=torch.float64).detach()
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=torch.float64), rtol=0, atol=atol)
