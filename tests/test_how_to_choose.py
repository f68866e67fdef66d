"""The formulas of docs/how-to-choose.md are what `fold` counts, and its figures are theirs."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from math import prod
from pathlib import Path

import pytest
import torch
from cases import NextToken, adamw

from dtrain.cost.predict import fold
from dtrain.cost.recorder import record_footprint
from dtrain.data.tokenizer import Bytes
from dtrain.model.transformer import Transformer
from dtrain.parallel.plan import Plan
from dtrain.parallel.strategy import Strategy
from dtrain.strategy.ddp import DDP
from dtrain.strategy.fsdp import FSDP
from dtrain.strategy.local_sgd import LocalSGD
from dtrain.strategy.pipeline.strategy import PipelineParallel
from dtrain.strategy.tensor.strategy import TensorParallel
from dtrain.strategy.zero1 import Zero1
from dtrain.task.batch import Batch

PAGE = Path(__file__).parent.parent / "docs" / "how-to-choose.md"
# what `dtrain compare` trains: model=toy_3m
B, T, C, L, V = 16, 128, 256, 4, Bytes().vocab_size
FP32 = 4
A = B * T * C * FP32
PADDING = 1e-3  # of what is divided: rows that ranks do not divide
EVERY = 4  # of local_sgd, on the page
STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "ddp": DDP,
    "zero1": Zero1,
    "zero2": partial(FSDP, reshard_after_forward=False),
    "fsdp": FSDP,
    "tensor": TensorParallel,
    "pipeline": PipelineParallel,
    "local_sgd": partial(LocalSGD, sync_every=1),
}


class Mini(NextToken):
    def __init__(self) -> None:
        super().__init__()
        self.models = {"model": partial(Transformer, V, T, d_model=C, n_layers=L, n_heads=4)}

    def batch(self, step: int) -> Batch:
        tokens = torch.zeros(B, T, dtype=torch.long)
        return {"tokens": tokens, "positions": torch.arange(T).expand(B, -1), "targets": tokens}


@cache
def weights() -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Mini().models["model"]().parameters()) * FP32


def rows() -> dict[str, tuple[str, str]]:
    """The page's strategies: formula, figure."""
    found = re.findall(r"^\| `(\w+)` \| (.+?) \| ([\d.]+ MiB) \|$", PAGE.read_text(), re.M)
    return {name: (formula, figure) for name, formula, figure in found}


def value(formula: str, n: int) -> float:
    """Of what a formula says before its words: 2 (n-1)/n N is 2*(n-1)/n*N."""
    terms = re.match(r"[-+\d nNALH()/·]+", formula)
    assert terms
    product = re.sub(r"(?<=[\w)])\s+(?=[\w(])", "*", terms[0].replace("·", " ").strip())
    return float(eval(product, {"n": n, "N": weights(), "A": A, "L": L, "H": EVERY}))


def sent(name: str, n: int, rank: int = 0) -> float:
    plan = Plan.of([STRATEGIES[name]()], n)
    cost = fold(
        record_footprint(Mini(), plan, adamw, global_batch_size=B, micro_batch_size=None),
        plan,
        rank,
    )
    return sum(message.wire_bytes(n) for message in cost.messages)


def test_the_page_has_these_strategies() -> None:
    assert rows().keys() == STRATEGIES.keys()


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_formula_is_what_the_fold_counts(name: str, n: int) -> None:
    told = value(rows()[name][0], n)
    share = 2 * (n - 1) / n
    told *= EVERY if name == "local_sgd" else 1  # here it averages in every step
    # what it says in words
    told += {"tensor": share * 3 * B * T * FP32, "pipeline": prod((V, C)) * FP32}.get(name, 0)
    assert sent(name, n) == pytest.approx(told, rel=PADDING)
    if name == "pipeline" and n > 2:
        assert sent(name, n, rank=1) == 2 * A  # in the middle: two neighbours, and no tied matrix


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_figure_is_that_of_two_ranks(name: str) -> None:
    found = sent(name, 2) / (EVERY if name == "local_sgd" else 1)
    assert f"{found / 2**20:.1f} MiB" == rows()[name][1]
