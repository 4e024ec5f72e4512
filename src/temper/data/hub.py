"""Rows of a data set of the Hugging Face hub, named `owner/name?config=main&split=train` or `hub:name`. Floor 2."""

from __future__ import annotations

import functools
import re
import socket
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from temper.config import UserError
from temper.data.files import PACKED, SUFFIXES, Row, need, without_none

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_name(spec: str) -> bool:
    """Does this name a data set of the hub, not a file? A path that is there, or that ends like a file, does not."""
    name = spec.partition("?")[0]
    a_file = Path(spec).exists() or Path(name).suffix in (*SUFFIXES, *PACKED)
    return spec.startswith("hub:") or (bool(_NAME.fullmatch(name)) and not a_file)


@functools.cache
def _reachable(endpoint: str) -> bool:
    place = urlsplit(endpoint)
    try:
        socket.create_connection((place.hostname, place.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def _load(spec: str) -> Any:
    """The data set, through the `datasets` library, which keeps what it fetched. The split is `train` unless named.

    Raises UserError where there is no such data set, configuration or split, or no way to the hub.
    """
    name, _, query = spec.removeprefix("hub:").partition("?")
    options = dict(parse_qsl(query))
    if unknown := options.keys() - {"config", "split", "revision"}:
        raise UserError(f"{spec}: no option {min(unknown)!r}; there are config, split and revision, as in {name}?split=test")
    datasets = need("datasets", f"{spec}: the hub")
    datasets.disable_progress_bars()
    if not _reachable(datasets.config.HF_ENDPOINT):  # else it asks six times, with pauses, before it looks at what it has
        for module in (datasets.config, import_module("huggingface_hub.constants")):
            vars(module).update(HF_HUB_OFFLINE=True)
    try:
        return datasets.load_dataset(name, options.get("config"), split=options.get("split", "train"), revision=options.get("revision"))
    except (OSError, ValueError, RuntimeError) as error:  # ConnectionError and DatasetNotFoundError are OSErrors
        why = " ".join(str(error).split())
        if isinstance(error, ConnectionError) or "offline" in why.lower():
            raise UserError(f"{spec}: no such file, and the hub cannot be reached for a data set of that name; give a file") from None
        raise UserError(f"{spec}: the hub's data set cannot be read ({why[:300]}); name it as {name}?config=...&split=...") from None


def rows(spec: str) -> Iterator[Row]:
    """Every row, numbered from 1. Raises UserError as `_load` does."""
    for number, value in enumerate(_load(spec), 1):
        yield Row(number, without_none(value))


def content(spec: str) -> str:
    """What tells one state of the data set from another: the fingerprint that `datasets` gives it."""
    return _load(spec)._fingerprint
