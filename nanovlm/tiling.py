"""Tiling: a picture larger than the vision encoder looks at is cut into tiles, and their tokens are put together again.

    "Improved Baselines with Visual Instruction Tuning" (2310.03744) §3.4, App. A.1: LLaVA-1.5-HD
    LLaVA-NeXT (1.6), released code: the same idea with other choices

    picture (h, w)                            views: 1 + rows · columns, each S × S              tokens
        │
        ├─► the whole, made S × S ───────────► ┌───┐ ─► encoder, projector ─► g² tokens ───────────────────┐
        │                                      └───┘                                                       │
        └─► choose a grid, fit, pad, cut ────► ┌───┬───┬───┐                  each tile g² tokens,         │
                                               │   │   │   │ ─► encoder, ─► laid out as one map ─► rows of │
                                               ├───┼───┼───┤    projector     padding cut off      padding  ▼
                                               │   │   │   │                  ▓▓▓▓▓▓▓▓▓¶          only go  concat
                                               └───┴───┴───┘                  ▓▓▓▓▓▓▓▓▓¶  ◄── row-end token

    The encoder still sees S × S pixels at a time, so its weights fit; what grows is the number of tokens. The whole
    picture comes along because no tile can see what lies across its edge (whole="none" leaves it out: §4.2).

                      grids                         the whole is     tiles are padded with     order
    LLaVA-1.5-HD      all of up to 6 tiles (14)     padded           the mean colour           tiles, then the whole
    LLaVA-NeXT        5, of 2 to 4 tiles            squashed         black                     the whole, then tiles

Here sizes are (height, width) and grids (rows, columns), as tensors are; Pillow and the original code have it the other
way round, and mixing the two up was a real bug in transformers (#31327, #33261).

Legend: S side of a view, g tokens along it, R × C the grid, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor, nn

from nanovlm.errors import UserError

Size = tuple[int, int]  # height, width

SIX_TILES = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7) if rows * columns <= 6)
NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@dataclass(frozen=True)
class Tiling:
    side: int  # S, what the vision encoder looks at
    grids: tuple[Size, ...] = SIX_TILES
    whole: str = "pad"  # "pad" | "stretch": how the whole picture becomes a square; "none": it is left out (§4.2)
    fill: str = "mean"  # "mean" | "black": the colour around what is fitted into the tiles
    whole_first: bool = False

    def grid(self, size: Size) -> Size:
        """The grid that keeps most of the picture's pixels; of those, the one that wastes least (§A.1).

        Scaled to fit inside of the grid, in whole pixels, rounded down. What is beyond the picture's own number of pixels does not
        count, so a small picture gets a small grid; wasted are the grid's other pixels. Of equals the first.
        """
        def merit(grid: Size) -> tuple[int, int]:
            height, width = grid[0] * self.side, grid[1] * self.side
            # the released rule, in its float arithmetic: scale to fit inside, then cut to whole pixels
            scale = min(width / size[1], height / size[0])
            kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
            return kept, -(height * width - kept)

        return max(self.grids, key=merit)

    def views(self, size: Size) -> int:
        rows, columns = self.grid(size)
        return self.wholes + rows * columns

    @property
    def wholes(self) -> int:
        """How many of the views show the whole: one, or none."""
        return int(self.whole != "none")

    def fitted(self, size: Size) -> Size:
        """The picture's size inside of its grid: one side fills it, the other keeps the proportions, rounded up.

        differs: the released code rounds up in floats, which one size in a thousand gives a pixel more.
        """
        height, width = (n * self.side for n in self.grid(size))
        if width / size[1] < height / size[0]:
            return min(-(-size[0] * width // size[1]), height), width
        return height, min(-(-size[1] * height // size[0]), width)

    def kept(self, size: Size, g: int) -> tuple[slice, slice]:
        """Which rows and columns of the map of all tiles' tokens, (R·g, C·g), show the picture and not only padding.

        The picture takes so many rows (or columns) of tokens, rounded down; half of the others goes on either side. Symmetric, so
        that of an odd number one more is kept. A UserError where nothing would be left. differs: LLaVA's code divides in floats and cuts off, which
        loses a row at 205 × 656 (55 · 48/176 is 14.999…); whole numbers do not (transformers rounds to 7 digits first).
        """
        rows, columns = (n * g for n in self.grid(size))
        above = left = 0
        if size[1] * rows > columns * size[0]:  # wider than its map: padding above and below
            above = (rows - size[0] * columns // size[1]) // 2
        else:
            left = (columns - size[1] * rows // size[0]) // 2
        if 2 * above == rows or 2 * left == columns:
            raise UserError(f"A picture {size[1]} pixels wide and {size[0]} high is thinner than one of {max(rows, columns)} "
                            "tokens when it is fitted into its tiles. Crop it, or cut it into several pictures.")
        return slice(above, rows - above), slice(left, columns - left)

    def tokens(self, size: Size, g: int) -> int:
        """How many places of the sequence one <image> of this size takes."""
        rows, columns = self.kept(size, g)
        return self.wholes * g * g + (rows.stop - rows.start) * (columns.stop - columns.start + 1)


def hd_tiling(side: int) -> Tiling:
    """LLaVA-1.5-HD (§3.4): at 224, up to 448 × 672 pixels."""
    return Tiling(side)


def llava_next_tiling(side: int, grids: tuple[Size, ...] = NEXT_GRIDS) -> Tiling:
    """LLaVA-NeXT's released code. differs from the paper in all four choices; squashing the whole is called a likely bug there."""
    return Tiling(side, grids, whole="stretch", fill="black", whole_first=True)


class Tiles(nn.Module):
    """The tokens of all pictures' views (Σ views, g², D), of each the whole first → a list of (`Tiling.tokens`, D)."""

    def __init__(self, tiling: Tiling, width: int):
        super().__init__()
        self.tiling = tiling
        self.row_end = nn.Parameter(torch.randn(width) * width ** -0.5)  # as in the released code

    def forward(self, views: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
        counts = [self.tiling.views(size) for size in sizes]
        if sum(counts) != len(views):
            raise ValueError(f"pictures of {list(sizes)} have {sum(counts)} views, but there are {len(views)}")
        if not sizes:  # an empty sequence, through which all parts have a gradient of zero
            return [views.flatten(0, 1) + 0 * self.row_end]
        return [self.join(own, size) for own, size in zip(views.split(counts), sizes)]

    def join(self, views: Tensor, size: Size) -> Tensor:
        """One picture's: (1 + R·C, g², D), or (R·C, g², D) without the whole → (N, D)."""
        whole, tiles = views[:self.tiling.wholes].flatten(0, 1), views[self.tiling.wholes:]
        (R, C), g, D = self.tiling.grid(size), isqrt(views.shape[1]), views.shape[-1]
        # a tile's rows stand below each other: (R, C, g, g, D) → (R, g, C, g, D)
        plane = tiles.view(R, C, g, g, D).transpose(1, 2).reshape(R * g, C * g, D)
        plane = plane[self.tiling.kept(size, g)]  # (r, c, D)
        ends = self.row_end.to(plane.dtype).expand(len(plane), 1, D)
        tiles = torch.cat([plane, ends], dim=1).flatten(0, 1)  # (r·(c + 1), D)
        return torch.cat([whole, tiles] if self.tiling.whole_first else [tiles, whole])
