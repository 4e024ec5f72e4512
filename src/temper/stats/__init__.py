"""Statistics of what was measured. Floor 1: numpy and scipy only."""
