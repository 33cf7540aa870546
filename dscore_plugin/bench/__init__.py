"""The benchmark of criteria: one protocol, cells that anyone can run again, tables and plots from their numbers."""
