"""Comparing two checkpoints: what changed, where it is expressed, where it is stored, and what was spared."""
