"""The vision transformer: a picture is cut into patches, and the patches are read like words.

    "An Image is Worth 16x16 Words" §3.1, Eq. 1–4; the CLIP form: "Learning Transferable Visual Models" §2.4

    image (B, 3, h, w)
      │ convolution with stride = kernel = patch: one linear map of each patch        Eq. 1
      ▼
    (B, N, D) ─► prepend the class token ─► + learned positions ─► [norm, CLIP only]
      ▼
    blocks × L:   x = x + Attention(norm₁(x))                                         Eq. 2
                  x = x + FeedForward(norm₂(x))                                       Eq. 3
      ▼
    tokens (B, 1 + N, D), row-major: the class token, then the picture line by line

Which tokens a paper reads differs: LLaVA takes CLIP's penultimate block without the final norm (its Table 8: +0.96
points over the last), BLIP-2 does the same with EVA-CLIP, BLIP takes the last block with the final norm on every token.
So `forward` returns tokens after any number of blocks, without the final norm: the caller applies it.

Legend: B batch, N patches, D width.
Differs from the paper in: nothing; dropout is 0 in all of the published encoders.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovlm.attention import Attention
from nanovlm.feedforward import FeedForward


@dataclass(frozen=True)
class ViTConfig:
    """What differs between the published encoders."""

    image_size: int
    patch: int
    width: int
    layers: int
    heads: int
    ffn: int
    activation: str = "quick_gelu"
    pre_norm: bool = True  # CLIP: a norm between the embeddings and the first block
    final_norm: bool = True  # BLIP-2 leaves it out and puts a fresh, trained one in its place
    patch_bias: bool = False
    bias: str = "qkvo"  # EVA-CLIP: "qvo", the key has none
    eps: float = 1e-5
    align_corners: bool = False  # how the position grid is stretched to other resolutions

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch


def clip_vit(image_size: int, patch: int, width: int, layers: int, heads: int) -> ViTConfig:
    """CLIP's encoder: QuickGELU, a norm before the first block, no patch bias."""
    return ViTConfig(image_size, patch, width, layers, heads, 4 * width)


def imagenet_vit(image_size: int, patch: int, width: int, layers: int, heads: int) -> ViTConfig:
    """The ViT of BLIP (DeiT / timm): exact GELU, patch bias, eps 1e-6."""
    return ViTConfig(image_size, patch, width, layers, heads, 4 * width, activation="gelu", pre_norm=False,
                     patch_bias=True, eps=1e-6)


CLIP_L_14 = clip_vit(224, 14, 1024, 24, 16)
CLIP_L_14_336 = clip_vit(336, 14, 1024, 24, 16)
VIT_B_16 = imagenet_vit(224, 16, 768, 12, 12)
VIT_L_16 = imagenet_vit(224, 16, 1024, 24, 16)
EVA_CLIP_G_14 = ViTConfig(224, 14, 1408, 40, 16, 6144, activation="gelu", pre_norm=False, patch_bias=True, bias="qvo",
                          eps=1e-6)  # BLIP-2 uses 39 of the 40 blocks: dataclasses.replace(…, layers=39)


class Block(nn.Module):
    """One pre-norm transformer block, Eq. 2 and 3."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.attention = Attention(config.width, config.heads, bias=config.bias)
        self.norm2 = nn.LayerNorm(config.width, eps=config.eps)
        self.feedforward = FeedForward(config.width, config.ffn, config.activation)

    def forward(self, x: Tensor, maps: list | None = None) -> Tensor:
        """x (B, 1 + N, D) → the same shape. maps receives the attention weights (B, H, 1 + N, 1 + N)."""
        x = x + self.attention(self.norm1(x), maps=maps)  # Eq. 2
        return x + self.feedforward(self.norm2(x))  # Eq. 3


class ViT(nn.Module):
    """images float (B, 3, h, w), normalised → tokens (B, 1 + N, D)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        D = config.width
        self.patch_embedding = nn.Conv2d(3, D, config.patch, stride=config.patch, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(D))
        self.positions = nn.Parameter(torch.zeros(1 + config.grid ** 2, D))
        self.pre_norm = nn.LayerNorm(D, eps=config.eps) if config.pre_norm else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(D, eps=config.eps) if config.final_norm else None
        initialise(self)

    def forward(self, images: Tensor, depth: int | None = None, maps: list | None = None) -> Tensor:
        """Tokens after `depth` blocks (all unless told), without the final norm. maps receives each block's weights.

        Pictures may come in another precision than the weights, and in another size than the encoder was made for.
        """
        patches = self.patch_embedding(images.to(self.patch_embedding.weight.dtype))  # (B, D, h / patch, w / patch)
        B, D, rows, columns = patches.shape
        tokens = patches.flatten(2).transpose(1, 2)  # (B, N, D), row-major
        tokens = torch.cat([self.class_token.expand(B, 1, D), tokens], dim=1)  # (B, 1 + N, D)
        x = tokens + interpolate_positions(self.positions, rows, columns, self.config.align_corners)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        for block in self.blocks[:depth]:
            x = block(x, maps)
        return x


def interpolate_positions(positions: Tensor, rows: int, columns: int, align_corners: bool = False) -> Tensor:
    """Stretch learned positions (1 + n·n, D) to another grid → (1 + rows·columns, D).

    The class token's position is kept, the others are resized as a picture of D channels, bicubic, in fp32. On its own
    grid everything stays as it is. Each encoder has its
    own way: CLIP in BLIP-2's code (LAVIS) with align_corners, EVA-CLIP there and the ImageNet ViT without.
    """
    side = round((len(positions) - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return positions
    grid = positions[1:].T.reshape(1, -1, side, side)  # (1, D, n, n)
    grid = F.interpolate(grid.float(), size=(rows, columns), mode="bicubic", align_corners=align_corners)
    return torch.cat([positions[:1], grid.flatten(2)[0].T.to(positions.dtype)])  # (1 + rows·columns, D)


def initialise(vit: ViT) -> None:
    """The width sets the scale, so that what enters a map with variance 1 leaves with it.

    The maps that write into the residual stream start smaller by √(2L), so that L blocks together add about 1. Positions
    start about as large as the patches they are added to. At CLIP's own width**-0.5 they drown, and a caption
    and its mirror image ("top left" for "top right") are long told apart no better than by a coin.
    """
    for name, parameter in vit.named_parameters():
        if name in ("class_token", "positions"):
            nn.init.normal_(parameter, std=0.8)
        elif parameter.ndim >= 2:
            writes = name.endswith(("attention.out.weight", "feedforward.down.weight"))
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=(fan_in * (2 * vit.config.layers if writes else 1)) ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
