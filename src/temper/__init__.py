"""Temper: a language model from base to assistant."""
