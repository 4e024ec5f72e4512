"""What the checks found, in a few lines. Floor 6."""

from __future__ import annotations

from collections.abc import Sequence

from temper.checks.registry import Finding


def counted(findings: Sequence[Finding]) -> str:
    """'2 errors, 1 warning'."""
    n = {s: sum(f.severity == s for f in findings) for s in ("error", "warning")}
    return ", ".join(f"{k} {name}{'s' if k != 1 else ''}" for name, k in n.items() if k) or "nothing wrong"


def headline(findings: Sequence[Finding]) -> list[str]:
    """A line of counts, one per error and warning, and the plan: what training says at its start."""
    worse = [f for f in findings if f.severity != "note"]
    return [counted(findings), *(f"  {f.lines()[0]}" for f in worse), *(f"  {line}" for line in plan(findings))]


def plan(findings: Sequence[Finding]) -> list[str]:
    """The batch arithmetic and the memory."""
    return [f"{f.check}: {f.what}" for f in findings if f.severity == "note" and f.check in ("batch", "memory")]
