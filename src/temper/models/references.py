"""Values that a fixed model gave, kept by content: a run that starts again, or another on the same data, need not compute them. Floor 2."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from temper.config import UserError
from temper.forest import Tree
from temper.runs import atomic_write, code_version, fingerprint


def model_fingerprint(model: Any) -> str:
    """SHA-256 (hex) of a model's weights, adapters included, and of its configuration."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"\0{name} {x.dtype} {tuple(x.shape)}\0".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Kept:
    """Values of a model on trees, one number per segment, in a file of `folder` that is named by what they depend on: weights,
    tokens, code, threads, and `how` (how the trees are packed, say). So what is read is bit for bit what would be computed.
    """

    def __init__(self, folder: Path, model: Any, trees: Sequence[Tree], **how: Any) -> None:
        content = hashlib.sha256()
        for tree in trees:
            for s in tree:
                content.update(repr((s.parent, list(s.tokens), None if s.target is None else list(s.target))).encode())
            content.update(b"\n")
        how |= {"threads": torch.get_num_threads(), "code": code_version("temper.models.heads")}
        self.file = folder / f"{fingerprint([model_fingerprint(model), content.hexdigest(), how])}.safetensors"
        self.sizes = [len(tree) for tree in trees]

    def read(self) -> list[list[float]] | None:
        """What was kept; None where nothing was, or the file is damaged."""
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            values = load(self.file.read_bytes())["values"]
            if len(values) == sum(self.sizes):
                return [part.tolist() for part in values.split(self.sizes)]
        return None

    def write(self, values: Sequence[Sequence[float]]) -> None:
        """Keep them. A folder that cannot be written costs the next run its time, not this one its life."""
        flat = torch.tensor([x for part in values for x in part], dtype=torch.float64)
        with contextlib.suppress(OSError, UserError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.file, save({"values": flat}))
