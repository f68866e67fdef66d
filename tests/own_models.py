"""Models as users write them, with what goes wrong in them: each (tokens, positions) -> logits
(B, T, V).
"""

from __future__ import annotations

import os
import random
import warnings
from functools import partial
from typing import Any

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import CONTEXT, ROWS, VOCAB, NextToken
from torch import Tensor, nn

from dtrain.model.layout import Layout

WIDTH, HEAD = 16, 4


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.token(tokens) + self.position(positions)


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


class Core(nn.Module):
    causal, dropout = True, 0.0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # positional, as some write it
        return F.scaled_dot_product_attention(q, k, v, None, 0.0, True)


class Window(Core):
    """A token sees the eight before it: as plain attention does where a row has no more."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        far = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(far >= 0) & (far < 8))


class Sloped(Core):
    """Each head falls off in its own way (ALiBi)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        far = (torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])).to(q)
        slopes = torch.arange(1, q.shape[1] + 1).to(q)[:, None, None]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=(-far * slopes).masked_fill(far < 0, -torch.inf)
        )


class Attention(nn.Module):
    """With a norm of queries and keys, between `column` and `row` layers."""

    core_class: type[Core] = Core

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm, self.core = nn.RMSNorm(HEAD), self.core_class()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        return self.o(self.core(self.norm(q), self.norm(k), v).transpose(1, 2).flatten(2))


class Windowed(Attention):
    core_class = Window


class Alibi(Attention):
    core_class = Sloped


class Mlp(nn.Module):
    """With a parameter between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Glu(Mlp):
    """Two layers in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class NormBetween(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.layer_norm(self.up(x), (self.up.out_features,)))


class Residual(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class NormWithin(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Gated(Mlp):
    """Closed at first, as zero-initialised branches are: what is wrong in it does not show yet."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.up(x))
        return self.down(y * y.flip(-1))


class Block(nn.Module):
    def __init__(self, attention: type[nn.Module], mlp: type[nn.Module]) -> None:
        super().__init__()
        self.n1 = nn.LayerNorm(WIDTH)
        self.n2 = nn.LayerNorm(WIDTH)
        self.attention = attention()
        self.mlp = mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.mlp(self.n2(x))


class Good(nn.Module):
    layout = Layout(
        first="first",
        blocks="blocks",
        last="last",
        attention="attention.core",
        column=tuple(
            f"blocks.*.{n}" for n in ("attention.q", "attention.k", "attention.v", "mlp.up")
        ),
        row=("blocks.*.attention.o", "blocks.*.mlp.down"),
        vocabulary=("first.token", "last.out"),
    )
    n_heads, context = WIDTH // HEAD, CONTEXT

    def __init__(self, attention: type[nn.Module] = Attention, mlp: type[nn.Module] = Mlp) -> None:
        super().__init__()
        self.first, self.last = First(), Last()
        self.blocks = nn.ModuleList(Block(attention, mlp) for _ in range(2))

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.last(self.body(self.first(tokens, positions)))


class Scaled(Good):
    """Something stands between the Layout's modules: a factor."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.last(self.body(self.first(tokens, positions) * 3.0))


class NormedThere(Good):
    """Likewise, as in nanoGPT: weights of its own before the blocks and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.norm = nn.Embedding(CONTEXT, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.last(
            self.norm(self.body(self.first(tokens, positions) + self.places(positions)))
        )


class DroppedThere(Good):
    """Likewise, only in training: each stage would drop."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.last(self.body(F.dropout(self.first(tokens, positions), 0.1, self.training)))


class Convolved(Good):
    """Tokens are mixed outside attention, causally."""

    def __init__(self) -> None:
        super().__init__()
        self.first.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)
        self.first.forward = self._mixed

    def _mixed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.first.token(tokens) + self.first.position(positions)
        return x + self.first.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class Counting(Good):
    """Positions are its own: it is not told any."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = super().forward(
            idx, torch.arange(idx.shape[1], device=idx.device).expand(len(idx), -1)
        )
        return logits, None if targets is None else F.cross_entropy(
            logits.flatten(0, 1), targets.flatten()
        )


class Plain(nn.Module):
    """One piece."""

    context = CONTEXT

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = First(), Last()

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.last(self.first(tokens, positions))


class BatchNormed(Plain):
    """By hand: no class of torch's."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.first(tokens, positions)
        return (
            self.last((x - x.mean((0, 1))) / (x.std((0, 1)) + 1e-5))
            if self.training
            else self.last(x)
        )


class Averaging(Plain):
    """A running mean of what it has seen, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.first(tokens, positions)
        if self.training:
            self.mean.lerp_(x.detach().mean((0, 1)).to(self.mean), 0.1)
        return self.last(x)


class Counted(Plain):
    """How often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.first(tokens, positions))


class InstanceNormed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(WIDTH, track_running_stats=True)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.last(self.norm(self.first(tokens, positions).transpose(1, 2)).transpose(1, 2))


class Branching(Plain):
    """The rows of a batch decide together."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.first(tokens, positions)
        return self.last(x if int(tokens.sum()) % 2 else 2 * x)


class Noisy(Plain):
    """Noise of its own in training."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.first(tokens, positions)
        return self.last(x + torch.rand_like(x) if self.training else x)


class Asleep(Plain):
    """A part of it is kept in evaluation by its author."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5).eval()

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.last(self.drop(self.first(tokens, positions)))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x) if self.training else x


class AsleepWithin(Good):
    """A part of a block is: woken, it would draw."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].mlp = nn.Sequential(self.blocks[0].mlp, Noise().eval())


class Rotating(Plain):
    """Tables of angles, complex and in fp32."""

    def __init__(self) -> None:
        super().__init__()
        angle = torch.outer(
            torch.arange(CONTEXT).float(), 0.1 ** (torch.arange(0, WIDTH, 2) / WIDTH)
        )
        self.register_buffer("turn", torch.polar(torch.ones_like(angle), angle))
        self.register_buffer("cosine", angle.cos(), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.first(tokens, positions).unflatten(-1, (-1, 2))
        turned = torch.complex(x[..., 0], x[..., 1]) * self.turn[positions]
        return self.last(
            torch.stack((turned.real * self.cosine[positions], turned.imag), -1)
            .flatten(-2)
            .to(x.dtype)
        )


class ByNumpy(Plain):
    """Weights by numpy's global generator."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.last.out.weight.copy_(torch.from_numpy(numpy.random.randn(VOCAB, WIDTH)))


class ByChance(Plain):
    """Weights that nobody's seed decides."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.last.out.weight.fill_(int.from_bytes(os.urandom(4), "little") / 2**32)


class Outside(Plain):
    """Fewer tokens than the text has."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return super().forward(tokens + VOCAB, positions)


class Remembering(Mlp):
    """Blocks share an object in which the first leaves what it was given."""

    kept: dict[str, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if self.number == 0:
            self.kept["x"] = x
        y = super().forward(x)
        return y + 0.3 * self.kept["x"] if self.number and "x" in self.kept else y


class Shared(Good):
    def __init__(self) -> None:
        super().__init__(mlp=Remembering)
        kept: dict[str, Tensor] = {}
        for number, block in enumerate(self.blocks):
            block.mlp.number, block.mlp.kept = number, kept


class TiedInAList(Good):
    """The last module has the embedding, and nobody sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.last.held = [self.first]
        self.last.forward = lambda x: F.linear(self.last.norm(x), self.last.held[0].token.weight)


class Reads(Good):
    """A block uses a weight of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].mlp.held = [self.blocks[0].mlp]
        self.blocks[1].mlp.forward = partial(_reads, self.blocks[1].mlp)


def _reads(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down(mlp.act(F.linear(x, mlp.held[0].up.weight)))


class ByChanceOfOthers(Mlp):
    """Draws by numpy and by Python in training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * (1 + 0.5 * numpy.random.rand()) * random.choice((0.8, 1.2))
        return super().forward(x)


class Attribute(Good):
    """A tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.angles = torch.from_numpy(numpy.random.default_rng().normal(size=WIDTH))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return super().forward(tokens, positions) * (1 + self.angles.mean())


class Names(Good):
    """What we call our own is what the author calls something else."""

    def __init__(self) -> None:
        super().__init__()
        self.initial = nn.Parameter(torch.ones(WIDTH))
        self.original = nn.Linear(WIDTH, WIDTH)
        self.context = nn.Identity()

    def before_step(self) -> None:
        raise AssertionError

    def after_step(self) -> None:
        raise AssertionError


class Scalar(Good):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Hooked(Good):
    """Clips one weight's gradient by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first.token.weight.register_hook(lambda gradient: gradient / (gradient.norm() + 1e-3))


class Nothing(Good):
    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(0, WIDTH))


class Complex(Good):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.ones(WIDTH, dtype=torch.complex64))


class Normed(Good):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            nn.utils.parametrizations.weight_norm(block.mlp.up)


class SpectrallyNormed(Good):
    """Each forward pass of training moves the buffers of a weight's norm, alike on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            nn.utils.parametrizations.spectral_norm(block.mlp.up)


class Computing(Good):
    """Its constructor reads values, and so does its forward: neither runs on meta tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0.5, 1, 2)]

    def body(self, x: Tensor) -> Tensor:
        for block, rate in zip(self.blocks, self.rates, strict=True):
            x = rate * block(x)
        return x if x.sum().item() > -1e9 else -x


class Keyed(Good):
    """Its blocks have names."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"below": self.blocks[0], "above": self.blocks[1]})

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x


class Sparse(Good):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.eye(4).to_sparse())


class Extra(Good):
    """One of its modules keeps what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first.scale = Scale()


class Scale(nn.Module):
    def get_extra_state(self) -> dict[str, float]:
        return {"scale": 2.0}

    def set_extra_state(self, state: dict[str, float]) -> None:
        pass


class Unblocked(Good):
    layout = Layout(first="first", blocks="first.token", last="last")


class Unattended(Good):
    layout = Layout(first="first", blocks="blocks", last="last", attention="core")


class InPlace(Plain):
    """It changes what its backward pass needs: forward alone, it runs."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.first(tokens, positions).exp()
        y = 2 * x
        return self.last(y + x.add_(1))


class Failing(Good):
    def body(self, x: Tensor) -> Tensor:
        return self.blcks[0](x)


class Listed(Good):
    layout = Layout(
        first="first",
        blocks="blocks",
        last="last",
        column="blocks.*.mlp.up",
        row=("blocks.*.mlp.down",),
    )  # type: ignore[arg-type]


class Misspelt(Good):
    layout = Layout(first="first", blocks="layers", last="last")


class ADict(Good):
    layout = dict(first="first", blocks="blocks", last="last")  # type: ignore[assignment]


class Renormed(Plain):
    """A forward pass that changes a weight: torch's own option."""

    def __init__(self) -> None:
        super().__init__()
        self.first.token = nn.Embedding(
            self.first.token.num_embeddings, self.first.token.embedding_dim, max_norm=0.01
        )


class Clamped(Plain):
    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        with torch.no_grad():
            self.last.out.weight.clamp_(-0.01, 0.01)
        return super().forward(tokens, positions)


class Bounded(Plain):
    """It changes a weight only where training has made it large."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        with torch.no_grad():
            self.last.out.weight.clamp_(min=-5)
        return super().forward(tokens, positions)


class CentredInEvaluation(Plain):
    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = super().forward(tokens, positions)
        return x if self.training else x - x.mean(0)


class CountsInEvaluation(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if not self.training:
            self.rows += len(tokens)
        return super().forward(tokens, positions)


class ScaledInEvaluation(Good):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x if self.training else 2 * x)


class Detached(Good):
    """What its parts compute is the same, and what they learn is not."""

    def body(self, x: Tensor) -> Tensor:
        return super().body(x.detach())


class Clipped(Plain):
    """A hook that looks at the gradients of all rows."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.first(tokens, positions)
        x.register_hook(lambda gradient: gradient / gradient.norm()) if x.requires_grad else None
        return self.last(x)


class MadeLate(Plain):
    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if not hasattr(self, "extra"):
            self.extra = nn.Parameter(torch.randn(WIDTH, dtype=self.last.out.weight.dtype))
        return self.last(self.first(tokens, positions) + self.extra)


class ByRank(Plain):
    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return super().forward(tokens, positions) * (1 + int(os.environ.get("LOCAL_RANK", "0")))


class NormedOfOld(Good):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings(action="ignore"):
            nn.utils.weight_norm(self.blocks[0].mlp.up)


class GoesOn(Plain):
    """A number of Python's that grows, and moves the outputs, at the second call or later."""

    def __init__(self) -> None:
        super().__init__()
        self.warm = [0]

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.warm[0] += 1
        return super().forward(tokens, positions) * min(1.0, self.warm[0] / 100)


class CallsCounted(Plain):
    """A number that nothing follows."""

    calls = 0

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(tokens, positions)


class OwnGenerator(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.draws = torch.Generator().manual_seed(1)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.first(tokens, positions)
        return self.last(x * (1 + torch.rand(x.shape, generator=self.draws)))


class NotSaved(Plain):
    """A mean that goes on, of which a checkpoint holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.first(tokens, positions)
        if self.training:
            self.mean.lerp_(x.detach().float().mean((0, 1)), 0.1)
        return self.last(x)


class Cached(Plain):
    """Tables that the first call fills, in a buffer and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(CONTEXT), persistent=False)
        self.mask, self.seen = None, {}

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.table.copy_(torch.arange(CONTEXT))
        self.mask = self.mask if self.mask is not None else torch.ones(CONTEXT)
        self.seen["last"] = x = self.first(tokens, positions) * self.mask[None, :, None]
        return self.last(x)


class Lazy(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.LazyLinear(WIDTH)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.last(self.extra(self.first(tokens, positions)))


class BySet(Plain):
    """Weights in another order in each process, as a set gives them."""

    def __init__(self) -> None:
        super().__init__()
        names = ["one", "two"] if dist.is_initialized() and dist.get_rank() else ["two", "one"]
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.ones(WIDTH)))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.last(self.first(tokens, positions) * self.one + self.two)


class OwnModel(NextToken):
    """The task of a user's model."""

    def __init__(self, make: Any, rows: int = ROWS) -> None:
        super().__init__(rows)
        self.models = {"model": make}


MODELS: dict[str, Any] = (
    {
        kind.__name__: kind
        for kind in (
            Good,
            Scaled,
            DroppedThere,
            NormedThere,
            Convolved,
            Counting,
            Plain,
            BatchNormed,
            Averaging,
            Counted,
            InstanceNormed,
            Branching,
            Noisy,
            Asleep,
            Bounded,
            SpectrallyNormed,
            Computing,
            Keyed,
            Sparse,
            Extra,
            Unblocked,
            Unattended,
            Failing,
            InPlace,
            AsleepWithin,
            Rotating,
            ByNumpy,
            ByChance,
            Outside,
            Shared,
            Reads,
            Renormed,
            Clamped,
            CentredInEvaluation,
            CountsInEvaluation,
            ScaledInEvaluation,
            Detached,
            Clipped,
            MadeLate,
            ByRank,
            NormedOfOld,
            GoesOn,
            CallsCounted,
            OwnGenerator,
            NotSaved,
            Cached,
            Lazy,
            BySet,
            TiedInAList,
            Attribute,
            Names,
            Scalar,
            Hooked,
            Nothing,
            Complex,
            Normed,
            Listed,
            Misspelt,
            ADict,
        )
    }
    | {
        kind.__name__: partial(Good, mlp=kind)
        for kind in (Glu, NormBetween, Residual, NormWithin, Gated, ByChanceOfOthers)
    }
    | {kind.__name__: partial(Good, kind) for kind in (Windowed, Alibi)}
)
