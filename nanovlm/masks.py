"""Every attention mask of the package, one function each. True = may attend.

Rows are the tokens that look (T), columns the tokens that are looked at (S). A mask is bool (B or 1, T or 1, S): it
broadcasts over what does not vary, and two masks are combined with `&`.

    causal(4)        padding, last token is <pad>        decoder = both
    ■ · · ·          ■ ■ ■ ·                             ■ · · ·
    ■ ■ · ·          ■ ■ ■ ·                             ■ ■ · ·
    ■ ■ ■ ·          ■ ■ ■ ·                             ■ ■ ■ ·
    ■ ■ ■ ■          ■ ■ ■ ·                             ■ ■ ■ ·

Legend: B batch, T rows, S columns.
"""

import torch
from torch import Tensor


def padding(attention_mask: Tensor) -> Tensor:
    """Nobody looks at padding: attention_mask bool (B, S) → (B, 1, S)."""
    return attention_mask[:, None, :]


def causal(T: int, S: int | None = None, device: torch.device | str | None = None) -> Tensor:
    """A token looks at itself and at what stands before it → (1, T, S).

    The T rows are the last T of the S positions: with a cache there are more columns than rows.
    """
    S = T if S is None else S
    rows = torch.arange(S - T, S, device=device)[:, None]
    columns = torch.arange(S, device=device)[None, :]
    return (columns <= rows)[None]


def causal_with_padding(attention_mask: Tensor, T: int) -> Tensor:
    """The decoder's mask for the last T of S positions: attention_mask bool (B, S) → (B, T, S)."""
    return causal(T, attention_mask.shape[1], attention_mask.device) & padding(attention_mask)


def positions(attention_mask: Tensor) -> Tensor:
    """Where each token stands, counting real tokens only: bool (B, S) → int64 (B, S).

    Not `arange`: in a batch padded on the left the first real token must stand at 0, as it would alone. Padding gets 0.
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
