"""Small models of images and of points: generators, discriminators and classifiers.

Norms are over groups of channels, not over batches: so samples stay independent, on any number of
ranks. Conditioned by class, a generator gets the class with its noise, and a discriminator adds a
score for the class (projection: Miyato & Koyama 2018, 1802.05637).

N samples, Z noise, K classes, D hidden units; an image is (C, H, W).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.model.layout import Layout, StepAware

GROUPS = 8  # of channels that are normalised together


class Spectral(StepAware, nn.Module):
    """A layer whose weights, as a matrix, are divided by their largest singular value.

    Power iteration advances once a step, however many forward passes the step has: so micro-batches
    change nothing. Source: Miyato et al. 2018 (1802.05957).
    """

    weight: Tensor
    direction: Tensor

    def __init__(self, inputs: int, outputs: int, *sizes: int, **settings: int) -> None:
        super().__init__(inputs, outputs, *sizes, **settings)  # the other base's
        self.register_buffer("direction", F.normalize(torch.randn(outputs), dim=0))
        self.due = False

    def before_step(self, scale: Tensor) -> None:
        self.due = True

    def after_step(self, total: Callable[[Tensor], Tensor]) -> None:
        """Do nothing."""

    def divided(self) -> Tensor:
        """Return the weights divided by their norm."""
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            left = self.direction.to(matrix.dtype)
            if self.due and self.training:
                left = F.normalize(matrix @ F.normalize(matrix.T @ left, dim=0), dim=0)
                self.direction.copy_(left)
                self.due = False
            right = F.normalize(matrix.T @ left, dim=0)
        return self.weight / (left @ (matrix @ right))


class SpectralLinear(Spectral, nn.Linear):
    """nn.Linear with divided weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.divided(), self.bias)


class SpectralConv(Spectral, nn.Conv2d):
    """nn.Conv2d with divided weights."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(x, self.divided(), self.bias)
        return y


class Residual(nn.Module):
    """x + down(act(up(x)))"""

    def __init__(self, hidden: int, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        layers = {
            "up": linear(hidden, 2 * hidden),
            "act": nn.SiLU(),
            "down": linear(2 * hidden, hidden),
        }
        self.layers = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layers(x)
        return x


class MLP(nn.Module):
    """Points in, points (or scores) out; images are flattened, and given their `shape` back.

    Args:
        inputs: numbers of a sample.
        outputs: numbers, or scores, for each sample.
        hidden: units of a layer.
        layers: residual blocks.
        classes: K; 0: not conditioned. A discriminator, which has one output, projects; others take
            the class as input.
        spectral: divide each matrix by its spectral norm.
        shape: of the outputs: (C, H, W); None: flat.
    """

    layout = Layout(blocks="blocks", column=("blocks.*.layers.up",), row=("blocks.*.layers.down",))

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: int = 64,
        layers: int = 2,
        classes: int = 0,
        spectral: bool = False,
        shape: list[int] | None = None,
    ) -> None:
        super().__init__()
        _positive(inputs=inputs, outputs=outputs, hidden=hidden, layers=layers)
        linear = SpectralLinear if spectral else nn.Linear
        self.inputs, self.outputs, self.classes, self.shape = inputs, outputs, classes, shape
        self.projects = outputs == 1 and classes > 0
        self.input = linear(inputs + (0 if self.projects else classes), hidden)
        self.blocks = nn.ModuleDict(
            {str(index): Residual(hidden, linear) for index in range(layers)}
        )
        self.output = linear(hidden, outputs)
        self.projection = nn.Linear(classes, hidden, bias=False) if self.projects else None

    # (N, ...), (N,) -> (N, outputs)
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        x = x.flatten(1).to(self.input.weight.dtype)
        shares = _shares(labels, self.classes, x)
        if shares is not None and self.projection is None:
            x = torch.cat((x, shares), dim=1)
        x = self.input(x)
        for block in self.blocks.values():
            x = block(x)
        x = F.silu(x)
        y: Tensor = self.output(x)
        if shares is not None and self.projection is not None:
            y = y + (self.projection(shares) * x).sum(1, keepdim=True)
        return torch.tanh(y).view(-1, *self.shape) if self.shape else y


class ConvGenerator(nn.Module):
    """Noise to an image: each stage doubles the sides.

    Args:
        noise: Z.
        channels: of the image.
        size: of the image.
        width: channels after the last stage; there are twice as many before each stage.
        stages: doublings; 2 ** stages divides the size.
        classes: K; 0: not conditioned.
    """

    def __init__(
        self,
        noise: int,
        channels: int,
        size: int,
        width: int = 32,
        stages: int = 1,
        classes: int = 0,
    ) -> None:
        super().__init__()
        _positive(noise=noise, channels=channels, size=size, width=width)
        _fits(size, width, stages)
        self.inputs, self.classes, self.start = noise, classes, size // 2**stages
        wide = width * 2**stages
        self.input = nn.Linear(noise + classes, wide * self.start**2)
        self.norm = nn.GroupNorm(GROUPS, wide)
        self.blocks = nn.ModuleDict(
            {
                str(index): nn.Sequential(
                    nn.Upsample(scale_factor=2),
                    nn.Conv2d(wide >> index, wide >> index + 1, 3, padding=1),
                    nn.GroupNorm(GROUPS, wide >> index + 1),
                    nn.SiLU(),
                )
                for index in range(stages)
            }
        )
        self.output = nn.Conv2d(width, channels, 3, padding=1)

    # (N, Z), (N,) -> (N, C, H, W)
    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        x = noise.to(self.input.weight.dtype)
        shares = _shares(labels, self.classes, x)
        x = self.input(x if shares is None else torch.cat((x, shares), dim=1))
        x = F.silu(self.norm(x.unflatten(1, (-1, self.start, self.start))))
        for block in self.blocks.values():
            x = block(x)
        return torch.tanh(self.output(x))


class ConvNet(nn.Module):
    """An image to a discriminator's score, or to one for each class; each stage halves the sides.

    Args:
        channels: of the image.
        size: of the image.
        outputs: scores.
        width: channels before the first stage; each stage doubles them.
        stages: halvings; 2 ** stages divides the size.
        classes: K of a conditioned discriminator; 0: not conditioned.
        normalise: group norms between the stages.
        spectral: divide each layer's weights by their spectral norm.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        outputs: int = 1,
        width: int = 32,
        stages: int = 2,
        classes: int = 0,
        normalise: bool = False,
        spectral: bool = False,
    ) -> None:
        super().__init__()
        _positive(channels=channels, size=size, outputs=outputs, width=width)
        _fits(size, width, stages)
        linear, conv = (SpectralLinear, SpectralConv) if spectral else (nn.Linear, nn.Conv2d)
        self.outputs, self.classes = outputs, classes
        self.input = conv(channels, width, 3, padding=1)
        self.blocks = nn.ModuleDict(
            {
                str(index): nn.Sequential(
                    conv(width << index, width << index + 1, 3, stride=2, padding=1),
                    nn.GroupNorm(GROUPS, width << index + 1) if normalise else nn.Identity(),
                    nn.SiLU(),
                )
                for index in range(stages)
            }
        )
        self.hidden = linear((width << stages) * (size >> stages) ** 2, 4 * width)
        self.output = linear(4 * width, outputs)
        self.projection = nn.Linear(classes, 4 * width, bias=False) if classes else None

    # (N, C, H, W), (N,) -> (N, outputs)
    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
        x = F.silu(self.input(pixels.to(self.input.weight.dtype)))
        for block in self.blocks.values():
            x = block(x)
        x = F.silu(self.hidden(x.flatten(1)))
        y: Tensor = self.output(x)
        shares = _shares(labels, self.classes, x)
        if shares is not None and self.projection is not None:
            y = y + (self.projection(shares) * x).sum(1, keepdim=True)
        return y


def _shares(labels: Tensor | None, classes: int, like: Tensor) -> Tensor | None:
    """Return the labels as ones and zeros, (N,) -> (N, K); None if the model has no classes."""
    return F.one_hot(labels, classes).to(like.dtype) if classes and labels is not None else None


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} of a model must be at least 1")


def _fits(size: int, width: int, stages: int) -> None:
    if width % GROUPS:
        raise ValueError(
            f"width={width} of a model must be a multiple of {GROUPS}: channels are normalised "
            f"in groups"
        )
    if stages < 0 or size % 2**stages:
        raise ValueError(
            f"stages={stages}: {size} pixels cannot be halved so often; use fewer stages or "
            f"another size"
        )
