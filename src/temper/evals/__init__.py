"""Evaluations: what a model does on held-out prompts, with intervals. Floor 5."""
