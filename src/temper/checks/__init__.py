"""Checks of data, model and settings before the first step: small functions in one list, found by name. Floor 6."""

from temper.checks import rows, tokens, machine  # noqa: F401, I001 (they register in the order in which they run)
from temper.checks.examine import examine, examine_stage, foresee
from temper.checks.registry import CHECKS, Case, Finding, run_checks
from temper.checks.summary import counted, headline

__all__ = ["CHECKS", "Case", "Finding", "counted", "examine", "examine_stage", "foresee", "headline", "run_checks"]
