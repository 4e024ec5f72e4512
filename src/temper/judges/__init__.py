"""Raters that are programs: reward models, verifiable rewards, the embedded world's annotators. Floor 4."""
