"""Raters that are programs: reward models and the embedded world's annotators. Floor 4."""
