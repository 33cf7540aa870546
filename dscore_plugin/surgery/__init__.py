"""Removals that DepGraph does not know."""
