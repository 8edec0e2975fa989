"""Circuits: what they are, how they are found, named and judged."""
