"""Rollouts: answers sampled from a model, as token ids with the log-probability of each sampled token. Floor 3."""

from temper.rollout.engine import Rollout, Sampling, generator, sample

__all__ = ["Rollout", "Sampling", "generator", "sample"]
