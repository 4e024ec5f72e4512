"""Rollouts: answers sampled from a model, as token ids with the log-probability of each sampled token. Floor 3."""

from temper.rollout.engine import Request, Rollout, Token, sample, stream
from temper.rollout.sampling import Sampling, generator

__all__ = ["Request", "Rollout", "Sampling", "Token", "generator", "sample", "stream"]
