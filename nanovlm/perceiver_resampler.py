"""The Perceiver Resampler: any number of image tokens in, always the same few out.

"Flamingo" (2204.14198) §2.1, App. A.1.1, Fig. 5; after the Perceiver (2103.03206)

    features (n, F, N, D) ─► + time embedding of each frame ─► (n, F·N, D) ──────────────────┐ keys, values
                                                                                             │
    latents (Q, D), learned ─► x (n, Q, D) ─┬─► x + Attention(query x, context [features, x]) ◄┘  × L
                                            └─► x + FeedForward(x)                             ─► norm ─► (n, Q, D)

A picture is a clip of one frame. Each latent is a question, and where a frame's grid has 100 cells and a clip has 30 frames,
Q = 64 answers come out all the same: what reads them costs the same for every clip. The latents stand among the keys, so they
can also speak with each other; Perceiver and DETR let them look at the features alone, which was slightly worse (App. A.1.1).

There are no spatial positions: the features of a convolutional encoder already tell where in the frame they stand (App. A.1.1).
One learned vector for each frame tells when it was taken. A longer clip than in training gets vectors that are interpolated
linearly between the learned ones (App. B.1.2: 8 frames in training, 30 after).

Legend: n clips or pictures, F frames, N tokens of a frame, Q latents, D width.
Differs from the paper in: norms, which its pseudo-code leaves out, stand where the reproductions have them (open_flamingo):
one on features and one on latents in each layer, one before the feed-forward, one at the end. We could not reproduce the published
194 M parameters: Table 4 gives 170 M (12·D² per layer). No test asks for them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovlm.attention import Attention
from nanovlm.feedforward import FeedForward


@dataclass(frozen=True)
class ResamplerConfig:
    width: int  # D, of the features too
    layers: int = 6
    heads: int = 16
    head_dim: int | None = None  # width / heads unless told
    latents: int = 64  # Q
    frames: int = 8  # time embeddings that are learned; 0: none, the order of frames is not known
    activation: str = "squared_relu"


class Layer(nn.Module):
    def __init__(self, config: ResamplerConfig):
        super().__init__()
        D = config.width
        self.norm_features = nn.LayerNorm(D)
        self.norm_latents = nn.LayerNorm(D)
        self.attention = Attention(D, config.heads, config.head_dim, bias="")
        self.norm = nn.LayerNorm(D)
        self.feedforward = FeedForward(D, 4 * D, config.activation, bias=False)

    def forward(self, x: Tensor, features: Tensor, maps: list | None = None) -> Tensor:
        """Latents x (n, Q, D) and features (n, S, D) → latents (n, Q, D); maps receives the weights (n, H, Q, S + Q)."""
        latents = self.norm_latents(x)
        context = torch.cat([self.norm_features(features), latents], dim=1)  # (n, S + Q, D)
        x = x + self.attention(latents, context, maps=maps)
        return x + self.feedforward(self.norm(x))


class PerceiverResampler(nn.Module):
    """features (n, F, N, D), any F and N → (n, Q, D)."""

    def __init__(self, config: ResamplerConfig):
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(torch.randn(config.latents, config.width))
        self.times = nn.Parameter(torch.randn(config.frames, config.width)) if config.frames else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        initialise(self)

    def forward(self, features: Tensor, maps: list | None = None) -> Tensor:
        """maps receives each layer's weights (n, H, Q, F·N + Q)."""
        if self.times is not None:
            features = features + stretched(self.times, features.shape[1])[:, None]  # one vector for all N of a frame
        features = features.flatten(1, 2)  # (n, F·N, D)
        x = self.latents.expand(len(features), -1, -1)  # (n, Q, D)
        for layer in self.layers:
            x = layer(x, features, maps)
        return self.norm(x)


def stretched(times: Tensor, frames: int) -> Tensor:
    """The learned time embeddings (F_trained, D) for another number of frames → (frames, D).

    Up to as many as were trained, the first ones: a picture stands at time 0. More lie between them, on straight lines, with
    the first and the last in their places; whether the corners were aligned so the paper does not say.
    """
    if frames <= len(times):
        return times[:frames]
    return F.interpolate(times.T[None], frames, mode="linear", align_corners=True)[0].T


def initialise(resampler: PerceiverResampler) -> None:
    """As in the decoder: maps keep the variance, those that write into the stream start smaller by √(2L)."""
    for name, parameter in resampler.named_parameters():
        if parameter.ndim >= 2 and name not in ("latents", "times"):
            writes = name.endswith(("attention.out.weight", "feedforward.down.weight"))
            nn.init.normal_(parameter, std=(parameter.shape[1] * (2 * len(resampler.layers) if writes else 1)) ** -0.5)
