"""Losses and estimators as pure functions of tensors: unreduced, one number per item. Floor 1: torch only.

A loss never averages: the method sums, the loop divides by weights counted over the whole optimiser step. `logp[t]` is always the
log-probability *of* token t. Families of interchangeable losses are registered by name (`preference.RULES`).
"""
