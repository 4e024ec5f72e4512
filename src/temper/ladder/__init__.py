"""Stages: one by hand, or a recipe of them as an artefact graph. Floor 7."""
