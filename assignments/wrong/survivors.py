"""Mutants that live, each with the reason: (task, what was changed, without the line's number, why). All others must die."""

SURVIVORS = [
]
