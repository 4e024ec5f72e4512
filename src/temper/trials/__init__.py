"""Experiments: arms that differ in one thing, trained on several seeds from one run's stages, and their figures as a table. Floor 8."""
