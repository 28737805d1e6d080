"""Every attention mask of the package, one function each. True = may attend.

Rows are the tokens that look (T), columns the tokens that are looked at (S). A mask is bool (B or 1, T or 1, S): it
broadcasts over what does not vary, and two masks are combined with `&`. Only `causal_bias` is made of numbers.

    causal(4)        padding, last token is <pad>        decoder = both
    ■ · · ·          ■ ■ ■ ·                             ■ · · ·
    ■ ■ · ·          ■ ■ ■ ·                             ■ ■ · ·
    ■ ■ ■ ·          ■ ■ ■ ·                             ■ ■ ■ ·
    ■ ■ ■ ■          ■ ■ ■ ·                             ■ ■ ■ ·

BLIP-2's three (§3.2, Fig. 2), for two queries and three words. What is learned depends on which of them see which.

    bidirectional (ITM)      multimodal causal (ITG)      unimodal (ITC)
    ■ ■ | ■ ■ ■              ■ ■ | · · ·                  ■ ■ | · · ·
    ■ ■ | ■ ■ ■              ■ ■ | · · ·                  ■ ■ | · · ·
    ----+------              ----+------                  ----+------
    ■ ■ | ■ ■ ■              ■ ■ | ■ · ·                  · · | ■ ■ ■
    ■ ■ | ■ ■ ■              ■ ■ | ■ ■ ·                  · · | ■ ■ ■
    ■ ■ | ■ ■ ■              ■ ■ | ■ ■ ■                  · · | ■ ■ ■

Flamingo's (§2.3, Fig. 7): a token looks at one image only, the last one before it. Two images of two latents each:

    image_causal      <s>  ·  · · ·      φ = 0: a row that sees nothing
                  <image>  1  ■ ■ · ·
                    a cat  1  ■ ■ · ·
                  <image>  2  · · ■ ■
                    a dog  2  · · ■ ■

Legend: B batch, T rows, S columns, Q queries, M images, φ which image a token sees (1 … M, 0 none).
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
    return torch.ones(1, T, S, dtype=torch.bool, device=device).tril(S - T)


def causal_with_padding(attention_mask: Tensor, T: int) -> Tensor:
    """The decoder's mask for the last T of S positions: attention_mask bool (B, S) → (B, T, S)."""
    return causal(T, attention_mask.shape[1], attention_mask.device) & padding(attention_mask)


def causal_bias(attention_mask: Tensor, T: int, dtype: torch.dtype) -> Tensor:
    """The same as what is added to the scores, 0 or −∞: bool (B, S) → (B, 1, T, S), made once for all layers and heads.

    Padding may look at itself here, so that no row is blind: nothing has to be opened and erased in each layer. Nobody
    else looks at padding, so what it becomes does not matter.
    """
    mask = causal_with_padding(attention_mask, T)  # (B, T, S)
    mask.diagonal(mask.shape[2] - T, dim1=1, dim2=2).fill_(True)
    return mask.to(dtype).log()[:, None]  # log 1 = 0 and log 0 = −∞; one for all heads


def positions(attention_mask: Tensor) -> Tensor:
    """Where each token stands, counting real tokens only: bool (B, S) → int64 (B, S).

    Not `arange`: in a batch padded on the left the first real token must stand at 0, as it would alone. Padding gets 0.
    """
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


# --- the Q-Former's: queries stand first, then text; attention_mask bool (B, T) is the text's (BLIP-2 §3.2, Fig. 2) ---

def bidirectional(queries: int, attention_mask: Tensor) -> Tensor:
    """ITM: everybody looks at everybody → (B, 1, Q + T)."""
    return padding(with_queries(queries, attention_mask))


def multimodal_causal(queries: int, attention_mask: Tensor) -> Tensor:
    """ITG: text looks at the queries and back, queries at queries only → (B, Q + T, Q + T).

    What a word is to be predicted from has passed through the queries: text itself sees no image.
    """
    Q, L = queries, queries + attention_mask.shape[1]
    allowed = causal(L, device=attention_mask.device).clone()  # (1, L, L)
    allowed[:, :Q, :Q] = True
    return allowed & bidirectional(queries, attention_mask)


def unimodal(queries: int, attention_mask: Tensor) -> Tensor:
    """ITC: queries and text do not see each other, or the pair would give itself away → (B, Q + T, Q + T)."""
    Q, L = queries, queries + attention_mask.shape[1]
    is_query = torch.arange(L, device=attention_mask.device) < Q  # (L,)
    allowed = (is_query[:, None] == is_query)[None]  # (1, L, L)
    return allowed & bidirectional(queries, attention_mask)


def with_queries(queries: int, attention_mask: Tensor) -> Tensor:
    """Queries are never padding: (B, T) → (B, Q + T)."""
    return torch.cat([attention_mask.new_ones(len(attention_mask), queries), attention_mask], dim=1)


# --- Flamingo's: is_image bool (B, T), True on <image> tags (§2.3, App. A.1.3) ---

def last_image(is_image: Tensor) -> Tensor:
    """φ: which image stands last at or before each token, counting from 1; 0 before the first → int64 (B, T)."""
    return is_image.cumsum(dim=1)


def next_image(is_image: Tensor) -> Tensor:
    """φ where texts stand before their images: which image comes next behind each token, 0 after the last → int64 (B, T).

    §2.4: on half of the pages. The paper does not say what the last text then sees; here it sees nothing.
    """
    behind = is_image.cumsum(dim=1) + 1
    return behind.masked_fill(behind > is_image.sum(dim=1, keepdim=True), 0)


def image_causal(phi: Tensor, there: Tensor, latents: int, all_previous: bool = False) -> Tensor:
    """Each token looks at the latents of image φ alone: phi int64 (B, T), there bool (B, M) → (B, T, M · latents).

    there: which images exist; one that does not is seen by nobody, so a tag behind the last one sees nothing. all_previous: the images before φ, too,
    which costs 7.2 points (Table 10 ii).
    """
    number = torch.arange(1, there.shape[1] + 1, device=phi.device)  # (M,)
    seen = phi[..., None] >= number if all_previous else phi[..., None] == number  # (B, T, M)
    return (seen & there[:, None]).repeat_interleave(latents, dim=2)
