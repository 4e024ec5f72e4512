"""The decoding attention as a small C kernel (`attention.c`), compiled at first use where there is a compiler. Floor 3.

For float32 on the CPU. What torch does in two batched products, a softmax and five copies it does in one pass over the cache. The same
numbers to 1e-6, not the same bits: so it is chosen (`--kernel c`), and torch is the default.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("temper")

SOURCE = Path(__file__).with_name("attention.c")
# not -ffast-math: as a shared library it would flush denormals in the whole process. These let sums run in vectors.
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]


@functools.cache
def library() -> Any:
    """The compiled kernel, or None, with a warning, where it cannot be made. Kept in the user's cache by content of source and machine."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        log.warning("--kernel c: no C compiler (cc, or what CC names); rollouts run in torch")
        return None
    try:
        what = [SOURCE.read_bytes(), " ".join(FLAGS).encode(), compiler.encode(), _processor()]
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "temper"
        file = folder / f"attention-{hashlib.sha256(b'|'.join(what)).hexdigest()[:16]}.so"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                made = Path(aside) / file.name
                subprocess.run([compiler, *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(made), "-lm"], check=True, capture_output=True)
                made.replace(file)
        attend = ctypes.CDLL(str(file)).attend
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        log.warning("--kernel c: cannot be compiled (%s); rollouts run in torch", said.decode(errors="replace").strip().splitlines()[0])
        return None
    attend.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 12 + [ctypes.c_void_p] * 2
    attend.restype = None
    return attend


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        return b"".join(
            sorted({line for line in Path("/proc/cpuinfo").read_bytes().splitlines() if line.startswith((b"flags", b"model name"))})
        )
    except OSError:
        return b""


def fits(x: Tensor) -> bool:
    """Can the kernel be used for keys like these?"""
    return x.device.type == "cpu" and x.dtype == torch.float32 and library() is not None


def attend(
    q: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    begin: Tensor,
    place: Tensor,
    *,
    n: int,
    first: int,
    own: int,
    cut: int,
) -> Tensor:
    """q [R, H, D], scaled, prompt_k [P, G, D, L], prompt_v [P, G, L, E], own_k [rows, G, room, D], own_v [rows, G, room, E] -> [R, H, E].

    Row r belongs to prompt place[r] // n, whose tokens are begin[p]:L. It sees its own tokens first:own, and of the prompt those from
    cut on. All contiguous; rows >= R.
    """
    R, H, D = q.shape
    (_, G, L, E), room, threads = prompt_v.shape, own_k.shape[2], torch.get_num_threads()
    scores, out = q.new_empty(threads, L + own), q.new_empty(R, H, E)
    given = (q, prompt_k, prompt_v, own_k, own_v, begin, place)
    assert all(x.is_contiguous() for x in given)
    library()(*(x.data_ptr() for x in given), R, H, G, D, E, L, room, n, first, own, cut, threads, scores.data_ptr(), out.data_ptr())
    return out
