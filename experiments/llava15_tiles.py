"""Do tiles see more than one small picture, after the same steps? The last rungs of the ladder at full length.

    regions         the picture of 96 × 96 shrunk to 48: 16 image tokens
    resolution      the same in tiles of 48, and shrunk beside them: 88 image tokens
    tiles alone     without the shrunk one

    python -m experiments.llava15_tiles               seeds 0, 1 and 7
    python -m experiments.llava15_tiles --table       print the stored results as Markdown

A tile is a quarter of the picture, so what is in two places ("on which side", "how many", "which is larger") is seen across a seam.
"""

from experiments import llava15_ladder, seeds

NAME = "llava15_tiles"
SEAM = ("relation", "count", "comparison")


def measure(seed: int, fraction: float) -> dict:
    return llava15_ladder.measure(seed, fraction, ("regions", "resolution", "tiles alone"))


def table(result: dict) -> str:
    return llava15_ladder.table(result, ("short", "reading", *SEAM), ())


if __name__ == "__main__":
    seeds.main(__doc__, NAME, llava15_ladder.BASE.name, measure, table, fraction=1.0)
