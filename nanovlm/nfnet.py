"""NFNet: a deep residual network of convolutions that needs no normalisation. It is Flamingo's encoder.

    "High-Performance Large-Scale Image Recognition Without Normalization" (2102.06171) §3–4; Flamingo (2204.14198) §2.1

Without batch norm, the variance of the signal has to be kept by design. Every convolution standardises its weights, every
activation is rescaled to variance 1, and every block knows the variance that reaches it (it grows by α² a block).

    image (B, 3, h, w)
      │ stem: a few 3 × 3 convolutions
      ▼
    blocks:   h = act(x) · β                                      β = 1 / the standard deviation expected of x
              x = shortcut + α · gain · residual(h)               gain starts at 0: at first only the shortcut counts
              residual:  1×1 ─► 3×3 in groups ─► 3×3 in groups ─► 1×1 ─► squeeze-excite
              shortcut:  x itself; where the size changes, a 1×1 convolution of the (pooled) h
      ▼
    grid (B, D, rows, columns) ─► tokens (B, N, D), row-major         what Flamingo reads, no class token
      └─► [final 1×1 ─► act] ─► mean over the grid (B, P) ─► [dropout ─► classifier]     contrastive training, classes

The paper does not tell which map Flamingo reads: that of the last stage (1,536 channels in F6) or that of the final 1×1
convolution (3,072). We take the first, as the resampler is 1,536 wide and §2.1 speaks of the "final stage".

Legend: B batch, N places of the grid, D width of the last stage, P width of what is pooled, C channels.
Differs from the released code in: nothing.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovlm.feedforward import gelu_tanh

# name: (function, γ), where γ makes the variance of γ · f(x) 1 for normal x
ACTIVATIONS = {
    "relu": (F.relu, 1.7139588594436646),
    "gelu": (F.gelu, 1.7015043497085571),  # exact: what timm runs the published weights with
    "gelu_tanh": (gelu_tanh, 1.7015043497085571),  # jax.nn.gelu: what they were trained with
}


@dataclass(frozen=True)
class NFNetConfig:
    """The F series, but for its depths, is the default."""

    image_size: int  # it was made for; any other works too
    depths: tuple[int, ...]  # blocks of each stage
    widths: tuple[int, ...] = (256, 512, 1536, 1536)
    strides: tuple[int, ...] = (1, 2, 2, 2)  # of each stage's first block
    stem: tuple[tuple[int, int], ...] = ((16, 2), (32, 1), (64, 1), (128, 2))  # channels and stride of each convolution
    group_width: int = 128
    bottleneck: float = 0.5  # channels inside a residual, of those it puts out
    squeeze: float = 0.5  # channels inside a squeeze-excite, likewise
    final: int = 3072  # channels of the last 1 × 1 convolution; 0: there is none
    classes: int = 0  # 0: no classifier
    activation: str = "gelu_tanh"
    alpha: float = 0.2
    dropout: float = 0.0  # before the classifier
    drop_path: float = 0.0  # stochastic depth: how often the last block's residual is left out; the first's never is

    @property
    def width(self) -> int:
        """Of a token."""
        return self.widths[-1]

    @property
    def pooled_width(self) -> int:
        return self.final or self.width

    @property
    def grid(self) -> int:
        """Tokens along one side. SAME padding rounds up: 500 pixels at stride 32 are 16 tokens."""
        return math.ceil(self.image_size / math.prod(stride for stride in (*self.strides, *(s for _, s in self.stem))))


def nfnet_f(n: int, image_size: int = 0, classes: int = 0) -> NFNetConfig:
    """F0, …, F6 (Table 1): one depth factor n + 1; larger ones see larger pictures and drop more."""
    sizes, dropout = (192, 224, 256, 320, 384, 416, 448), (0.2, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5)
    return NFNetConfig(image_size or sizes[n], tuple((n + 1) * depth for depth in (1, 2, 6, 3)), classes=classes,
                       dropout=dropout[n], drop_path=0.25)


def expected_betas(depths: tuple[int, ...], alpha: float) -> list[float]:
    """β of every block: 1 / the standard deviation of what reaches it.

    The shortcut of a stage's first block is a convolution of h, whose variance is 1: the count starts anew behind it.
    """
    betas, variance = [], 1.0
    for depth in depths:
        for i in range(depth):
            betas.append(variance ** -0.5)
            variance = (1.0 if i == 0 else variance) + alpha ** 2
    return betas


class Activation(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.function, self.gamma = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) * self.gamma


class Conv(nn.Module):
    """A convolution whose weights are standardised each time (scaled weight standardisation, Eq. 1), padded as in TensorFlow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.kernel, self.stride, self.groups = kernel, stride, groups
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, kernel, kernel))
        self.gain = nn.Parameter(torch.ones(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)

    def standardised(self) -> Tensor:
        """Mean 0 and variance gain² / fan-in for each output channel, whatever the weights."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)  # (outputs, 1, 1, 1)
        fan_in = self.weight[0].numel()
        return (self.weight - mean) * (fan_in * variance).clamp(min=1e-4).rsqrt() * self.gain.view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        padding = self.kernel // 2
        if self.stride > 1:  # SAME: where the padding is odd the larger half goes behind, so an even picture gets (0, 1)
            (top, bottom), (left, right) = (self.same(size) for size in x.shape[2:])
            x, padding = F.pad(x, (left, right, top, bottom)), 0
        return F.conv2d(x, self.standardised(), self.bias, self.stride, padding, groups=self.groups)

    def same(self, size: int) -> tuple[int, int]:
        """Padding before and behind, so that ceil(size / stride) places come out."""
        total = max(0, (math.ceil(size / self.stride) - 1) * self.stride + self.kernel - size)
        return total // 2, total - total // 2


class SqueezeExcite(nn.Module):
    """Each channel is made stronger or weaker by what the whole picture holds: (B, C, h, w) → (B, C, h, w)."""

    def __init__(self, C: int, hidden: int):
        super().__init__()
        self.down, self.up = nn.Linear(C, hidden), nn.Linear(hidden, C)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=linear.in_features ** -0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        strength = self.up(F.relu(self.down(x.mean(dim=(2, 3))))).sigmoid()  # (B, C); a plain ReLU, without γ
        return x * (2 * strength)[:, :, None, None]  # the sigmoid is ½ on average, 2 makes up for it


class Block(nn.Module):
    """(B, inputs, h, w) → (B, outputs, h / stride, w / stride)."""

    def __init__(self, config: NFNetConfig, inputs: int, outputs: int, stride: int, beta: float, drop: float):
        super().__init__()
        inner = round(config.bottleneck * outputs)
        groups = inner // config.group_width
        self.alpha, self.beta, self.drop, self.stride = config.alpha, beta, drop, stride
        self.activation = Activation(config.activation)
        self.shortcut = Conv(inputs, outputs, 1) if inputs != outputs or stride > 1 else None
        self.residual = nn.Sequential(
            Conv(inputs, inner, 1),
            self.activation, Conv(inner, inner, 3, stride, groups),
            self.activation, Conv(inner, inner, 3, 1, groups),
            self.activation, Conv(inner, outputs, 1),
            SqueezeExcite(outputs, round(config.squeeze * outputs)))
        self.skip_gain = nn.Parameter(torch.zeros(()))  # SkipInit (2002.10444)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(x) * self.beta
        residual = self.residual(h)
        if self.training and self.drop:  # stochastic depth, for each picture; as released, what is kept is not scaled up
            residual = residual * (torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop)
        return self.bypass(x, h) + self.alpha * self.skip_gain * residual

    def bypass(self, x: Tensor, h: Tensor) -> Tensor:
        if self.shortcut is None:
            return x
        if self.stride > 1:  # a window that hangs over the edge is the mean of what is there
            h = F.avg_pool2d(h, 2, self.stride, ceil_mode=True, count_include_pad=False)
        return self.shortcut(h)


class NFNet(nn.Module):
    """images float (B, 3, h, w), normalised → tokens (B, N, D)."""

    def __init__(self, config: NFNetConfig):
        super().__init__()
        self.config = config
        self.activation = Activation(config.activation)
        stem, C = [], 3
        for channels, stride in config.stem:
            stem += [Conv(C, channels, 3, stride), self.activation]
            C = channels
        self.stem = nn.Sequential(*stem[:-1])  # no activation after the last: the first block has its own
        betas, self.blocks = expected_betas(config.depths, config.alpha), nn.ModuleList()
        for depth, width, stride in zip(config.depths, config.widths, config.strides, strict=True):
            for i in range(depth):
                number = len(self.blocks)
                self.blocks.append(Block(config, C, width, stride if i == 0 else 1, betas[number],
                                         config.drop_path * number / len(betas)))
                C = width
        self.final_conv = Conv(C, config.final, 1) if config.final else None
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.pooled_width, config.classes) if config.classes else None
        if config.classes:
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)

    def features(self, images: Tensor) -> Tensor:
        """images (B, 3, h, w) → the last stage's grid (B, D, rows, columns)."""
        x = self.stem(images.to(self.stem[0].weight.dtype))
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images).flatten(2).transpose(1, 2)  # (B, N, D), row-major

    def pooled(self, images: Tensor) -> Tensor:
        """images (B, 3, h, w) → one vector each (B, P)."""
        x = self.features(images)
        if self.final_conv is not None:
            x = self.activation(self.final_conv(x))  # (B, P, rows, columns)
        return x.mean(dim=(2, 3))  # (B, P)

    def logits(self, images: Tensor) -> Tensor:
        """images (B, 3, h, w) → scores (B, classes)."""
        return self.classifier(self.dropout(self.pooled(images)))
