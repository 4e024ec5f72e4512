"""From any file to the exact tokens that are trained: sources, template and mask, trees, packing, split (floor 2)."""
