"""Models: loading and saving, the forest attention, the log-prob and scalar heads, tokenizers. Floor 2."""
