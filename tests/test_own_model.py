"""A user's own model: what the probe finds, and that the rest is what one process computes."""

from __future__ import annotations

import json
import random
import re
import sys
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import test_cli
import torch
from cases import (
    CONTEXT,
    ROWS,
    STRATEGIES,
    TASKS,
    VOCAB,
    Case,
    NextToken,
    assert_all_equal,
    plan_of,
    train,
    trainer,
)
from omegaconf import OmegaConf
from own_models import MODELS, OwnModel

from dtrain.cost.model_size import model_size
from dtrain.cost.recorder import record_footprint
from dtrain.model.adapt import adapt
from dtrain.model.initialize import build, build_with_values, cast
from dtrain.model.layout import refuse_batch_norm
from dtrain.parallel.checks.probe import probe
from dtrain.parallel.plan import Plan
from dtrain.parallel.precision import Precision

call = test_cli.call  # a fixture
ROOT = Path(__file__).parent.parent
FP64 = 1e-12


def tried(
    model: str,
    strategy: str = "single",
    *,
    micro_batches: int = 1,
    rows: int = ROWS,
    **settings: Any,
) -> str:
    """What the probe says of a model under a plan of two ranks."""
    makers = STRATEGIES[strategy]
    plan = Plan.of(
        [make() for make in makers], 2 if makers else 1, precision=Precision("fp64"), **settings
    )
    task = OwnModel(MODELS[model], rows)
    try:
        plan.check_task(task)
        return "; ".join(probe(task, plan, micro_batches=micro_batches, seed=3))
    except ValueError as error:
        return f"refused: {error}"


ALL = ["single", "allreduce", "fsdp", "1f1b", "tensor", "tensor_sequence", "ring", "ulysses"]
REFUSED = {
    ("Scaled", "1f1b"): "in 2 stages computes something else than whole: outputs differ by ",
    ("DroppedThere", "1f1b"): "in 2 stages computes something else",
    ("Glu", "tensor"): "split over tp=2 computes something else",
    ("Gated", "tensor"): "split over tp=2 computes something else",
    ("NormBetween", "tensor"): "Good does not run split over tp=2 .RuntimeError: ",
    (
        "Residual",
        "tensor",
    ): "blocks.0.mlp of Good holds `column` layers, and gives its input to something else",
    (
        "NormWithin",
        "tensor",
    ): r"blocks.0.mlp.norm.\w+ of Good acts within the module that holds `column` layers, before",
    ("Convolved", "ring"): "in slices of its sequences",
    ("Convolved", "ulysses"): "in slices of its sequences",
    ("Counting", "ring"): "in slices of its sequences",
    ("Windowed", "ring"): "as a ring attends",
    ("Alibi", "ulysses"): "head by head",
    ("BatchNormed", "allreduce"): "rows of a batch are not computed apart",
    ("BatchNormed", "tensor"): "names no `column`",
    (
        "Averaging",
        "allreduce",
    ): "mean of Averaging changes with each forward pass, and would change by a part of the rows",
    ("InstanceNormed", "allreduce"): "instance norm with running statistics",
    ("Branching", "allreduce"): "rows of a batch are not computed apart",
    ("Outside", "single"): "the model cannot be trained: .*IndexError",
    ("Shared", "1f1b"): "in 2 stages computes something else",
    ("NormedThere", "1f1b"): "in 2 stages computes something else",
    (
        "Reads",
        "fsdp",
    ): "with each block's weights in its own call alone .*a block may use no weight of another one",
    ("Reads", "1f1b"): "one of them uses blocks.0.mlp.up.weight, which another has",
    ("TiedInAList", "1f1b"): "one of them uses first.token.weight, which another has",
    (
        "Complex",
        "zero1",
    ): "turn of Complex is complex, and zero1 joins weights in one format: use strategy=ddp",
    ("Complex", "fsdp"): "turn of Complex is complex, and fsdp",
    ("Nothing", "fsdp"): "none of Nothing has no numbers, and fsdp divides by rows",
    **{
        ("Hooked", strategy): "first.token.weight of Hooked has a hook on its gradient"
        for strategy in ("fsdp", "ddp", "tensor")
    },
    (
        "Scalar",
        "fsdp",
    ): r"scale of Scalar is a single number, and fsdp divides by rows: give it the shape \(1,\)",
    (
        "Normed",
        "tensor",
    ): r"blocks.0.mlp.up of Normed computes its weight from others .nn.utils.parametrize",
    ("Listed", "tensor"): r"layout.column of Listed is 'blocks.\*.mlp.up': write names in a tuple",
    (
        "Misspelt",
        "1f1b",
    ): "layout.blocks of Misspelt names 'layers', and there is no such module: it has first",
    ("Renormed", "ddp"): r"first.token.weight of Renormed is changed by its forward pass",
    ("Clamped", "fsdp"): r"last.out.weight of Clamped is changed by its forward pass",
    ("Bounded", "fsdp"): r"last.out.weight of Bounded is changed by its forward pass",
    (
        "Sparse",
        "single",
    ): (
        "graph of Sparse is sparse_coo, and checkpoints have plain tensors alone: make it a "
        "dense one"
    ),
    (
        "Extra",
        "ddp",
    ): (
        r"first.scale of Extra keeps an extra state \(get_extra_state\), and checkpoints have "
        r"weights and"
    ),
    (
        "Unblocked",
        "1f1b",
    ): "layout.blocks of Unblocked names 'first.token', which is a Embedding: name a ModuleList",
    **{
        (
            "InPlace",
            strategy,
        ): "the model cannot be trained: .*RuntimeError: one of the variables needed for gradient"
        for strategy in ("single", "ddp")
    },
    (
        "Unattended",
        "ring",
    ): "layout.attention of Unattended names 'core', and no block has such a module",
    **{
        (
            "Failing",
            strategy,
        ): r"AttributeError: 'Failing' object has no attribute 'blcks' \(own_models.py, line \d+\)"
        for strategy in ("single", "tensor")
    },
    (
        "CentredInEvaluation",
        "allreduce",
    ): "rows of a batch are not computed apart in CentredInEvaluation",
    ("CountsInEvaluation", "ddp"): "rows of CountsInEvaluation changes with each forward pass",
    ("ScaledInEvaluation", "1f1b"): "in 2 stages computes something else",
    ("Detached", "1f1b"): "in 2 stages has other gradients than whole",
    ("Clipped", "ddp"): "the gradients of a batch are not those of its rows in Clipped",
    ("MadeLate", "ddp"): "extra of MadeLate is made by its first forward pass",
    ("ByRank", "ddp"): "ByRank computes something else where RANK or LOCAL_RANK is another",
    ("NormedOfOld", "1f1b"): "NormedOfOld cannot be copied",
    **{
        ("GoesOn", strategy): "warm of GoesOn changes with each forward pass, its outputs with it"
        for strategy in ("single", "ddp")
    },
    (
        "OwnGenerator",
        "single",
    ): "draws of OwnGenerator changes with each forward pass, its outputs with it",
    (
        "NotSaved",
        "single",
    ): "mean of NotSaved changes with each forward pass, and no checkpoint holds it",
    ("Lazy", "single"): r"extra.weight of Lazy has no shape before the first call \(nn.LazyLinear",
    ("ADict", "1f1b"): "the layout of ADict is a dict: write Layout",
}
ACCEPTED = [("Good", s) for s in ALL] + [
    ("Windowed", "ulysses"),
    ("Counting", "tensor"),
    ("BatchNormed", "single"),
    ("Counted", "allreduce"),
    ("Rotating", "fsdp"),
    ("Asleep", "allreduce"),
    ("AsleepWithin", "1f1b"),
    ("ByNumpy", "allreduce"),
    ("Scaled", "tensor"),
    *(("Names", strategy) for strategy in ("single", "fsdp", "allreduce")),
    ("Complex", "ddp"),
    ("Hooked", "single"),
    ("Nothing", "ddp"),
    ("Normed", "fsdp"),
    *(("SpectrallyNormed", strategy) for strategy in ("single", "fsdp", "ddp")),
    *(("Keyed", strategy) for strategy in ("tensor", "fsdp", "1f1b")),
    *(("Computing", strategy) for strategy in ("tensor", "fsdp")),
    ("Shared", "fsdp"),
    ("TiedInAList", "allreduce"),
    ("TiedInAList", "fsdp"),
    ("Reads", "allreduce"),
    *(
        (each, "single")
        for each in ("Renormed", "CentredInEvaluation", "Clipped", "ByRank", "NormedOfOld")
    ),
    ("Detached", "fsdp"),
    ("ScaledInEvaluation", "tensor"),
    ("NormedOfOld", "ddp"),
    *(("Cached", strategy) for strategy in ("single", "ddp")),
]


@pytest.mark.parametrize("model, strategy", REFUSED)
def test_what_would_be_something_else_when_divided_is_refused(model: str, strategy: str) -> None:
    said = tried(model, strategy)
    assert said.startswith("refused: ") and re.search(REFUSED[model, strategy], said), said


@pytest.mark.parametrize("model, strategy", ACCEPTED)
def test_what_is_the_same_is_not_refused(model: str, strategy: str) -> None:
    assert tried(model, strategy).startswith("probe: the model was tried on 4 rows in ")


@pytest.mark.parametrize(
    ("strategy", "rows", "settings"),
    [
        ("allreduce", 2, {}),
        ("allreduce", 3, {}),
        ("1f1b", 1, {}),
        ("single", 1, {"recompute": True}),
    ],
)
def test_a_batch_of_fewer_rows_is_enough(
    strategy: str, rows: int, settings: dict[str, Any]
) -> None:
    assert tried("Good", strategy, rows=rows, **settings).startswith(
        f"probe: the model was tried on {rows} row"
    )
    if rows > 1:
        assert "rows of a batch are not computed apart" in tried("BatchNormed", strategy, rows=rows)


@pytest.mark.parametrize(
    "model, said",
    [
        ("BatchNormed", "rows of a batch are not computed apart"),
        ("Averaging", "mean of Averaging changes with each"),
        (
            "Counted",
            "calls of Counted changes with each forward pass, and would change twice in a step",
        ),
        ("Plain", "probe: the model was tried"),
        ("Hooked", "first.token.weight of Hooked has a hook on its gradient"),
    ],
)
def test_micro_batches_are_parts_too(model: str, said: str) -> None:
    assert said in tried(model, micro_batches=2)


def test_what_cannot_be_compared_is_said() -> None:
    assert "draws numbers of its own in training, so it was tried in evaluation alone" in tried(
        "Noisy", "allreduce"
    )


def test_the_probe_leaves_the_random_numbers_of_the_process_alone() -> None:
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    expected = torch.rand(1).item(), random.random(), numpy.random.rand()
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    for model, failed in (("ByNumpy", False), ("Outside", True)):
        with pytest.raises(ValueError) if failed else nullcontext():
            probe(OwnModel(MODELS[model]), Plan.of([], 1), micro_batches=1, seed=3)
    assert (torch.rand(1).item(), random.random(), numpy.random.rand()) == expected


def test_models_of_dtrain_are_not_tried() -> None:
    task = NextToken()
    with mock.patch("dtrain.parallel.checks.probe.build_with_values", side_effect=AssertionError):
        assert probe(task, Plan.of([], 1), micro_batches=1, seed=0) == ()


def in_a_world(model: str, strategy: str, size: int, **settings: Any) -> Any:
    torch.set_num_threads(1)
    with mock.patch.dict(TASKS, own=OwnModel):
        return train(
            Case("own", strategy, steps=3, model=(("make", MODELS[model]),), **settings), size
        )


@pytest.mark.parametrize("model", ["Good", "Rotating", "ByNumpy"])
def test_ranks_train_what_one_process_does(model: str, world) -> None:
    """Norms of queries and keys, a parameter between the layers; complex buffers; weights by
    numpy.
    """
    expected = world(2).run(in_a_world, model, "single", 1)[0]
    for strategy in (
        ("tensor", "tensor_sequence", "1f1b") if model == "Good" else ("allreduce", "fsdp")
    ):
        assert_all_equal(world(2).run(in_a_world, model, strategy, 2), expected, FP64)


def refused_in_a_world(model: str) -> str:
    try:
        in_a_world(model, "allreduce", 2)
    except ValueError as error:
        return str(error)
    return ""


def test_weights_that_no_seed_decides_are_refused_on_every_rank(world) -> None:
    said = world(2).run(refused_in_a_world, "ByChance")
    assert said[0] == said[1] and said[0].startswith(
        "last.out.weight of ByChance begins with other values on rank 1 than on rank 0"
    )


def test_what_no_checkpoint_holds_and_no_output_follows_is_said() -> None:
    said = "probe: calls of CallsCounted changes with each forward pass, and no checkpoint holds it"
    assert said in tried("CallsCounted")
    assert not any(
        "no checkpoint" in tried(model) for model in ("Plain", "Cached", "Asleep", "Rotating")
    )


def test_weights_that_stand_in_another_order_are_refused_on_every_rank(world) -> None:
    for said in world(2).run(refused_in_a_world, "BySet"):
        assert said.startswith("one of BySet stands at another place on rank 1 than on rank 0"), (
            said
        )


def test_tensors_that_no_seed_decides_are_refused_too(world) -> None:
    said = world(2).run(refused_in_a_world, "Attribute")
    assert said[0] == said[1] and said[0].startswith(
        "angles of Attribute begins with other values on rank 1"
    )


def test_what_draws_by_python_and_numpy_draws_the_same_when_computed_again(one_rank) -> None:
    """And when a run goes on: a step draws by the seed and its number alone."""
    found = []
    for recompute, first in ((False, 0), (True, 0), (False, 1)):
        case = Case(
            "own",
            "single",
            "fp64",
            steps=3,
            recompute=recompute,
            model=(("make", MODELS["ByChanceOfOthers"]),),
        )
        with mock.patch.dict(TASKS, own=OwnModel):
            made = trainer(case, 1)
        random.seed(first), numpy.random.seed(first)
        steps = list(made.steps())
        found.append([(step.loss, step.grad_norm) for step in steps])
    assert (
        found[1] == found[0] and found[2] == found[0] and len({loss for loss, _ in found[0]}) == 3
    )


def test_weights_by_numpy_are_those_of_the_seed() -> None:
    numpy.random.seed(1)
    first = build(MODELS["ByNumpy"], 3).last.out.weight
    numpy.random.seed(2)
    assert torch.equal(first, build(MODELS["ByNumpy"], 3).last.out.weight)
    assert not torch.equal(first, build(MODELS["ByNumpy"], 4).last.out.weight)


def test_looking_at_the_loss_changes_no_training(one_rank) -> None:
    """What an author keeps in evaluation does not wake up; the rest goes on in training."""
    curves = []
    for looks in (False, True):
        with mock.patch.dict(TASKS, own=OwnModel):
            made = trainer(
                Case("own", "single", "fp64", steps=3, model=(("make", MODELS["Asleep"]),)), 1
            )
        curve = []
        for step in made.steps():
            curve.append(step.loss)
            assert looks is False or made.evaluate()
        curves.append(curve)
        model = made.models["model"]
        assert (model.training, model.drop.training, model.first.training) == (True, False, True)
    assert curves[0] == curves[1]


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_only_what_the_precision_means_is_cast(dtype: str) -> None:
    weights = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[dtype]
    model, host = MODELS["Rotating"](), torch.device("cpu")
    turn, cosine = model.turn.clone(), model.cosine.clone()
    model.register_buffer("ids", torch.tensor([1 << 40]))
    model.register_buffer("mask", torch.tensor([True]))
    cast(model, weights, host, host)
    assert all(p.dtype == weights for p in model.parameters())
    assert model.turn.dtype == (torch.complex128 if dtype == "fp64" else torch.complex64)
    assert model.cosine.dtype == (torch.float64 if dtype == "fp64" else torch.float32)
    assert torch.equal(model.turn.to(turn), turn) and torch.equal(model.cosine.to(cosine), cosine)
    assert (model.ids.dtype, model.ids.item(), model.mask.dtype) == (
        torch.int64,
        1 << 40,
        torch.bool,
    )


def test_a_model_may_give_a_tuple_and_take_targets() -> None:
    torch.manual_seed(0)
    model, tokens = adapt(MODELS["Counting"]()), torch.randint(VOCAB, (2, CONTEXT))
    positions = torch.arange(CONTEXT).expand(2, -1)
    assert model(tokens, positions).shape == (2, CONTEXT, VOCAB)
    told = lambda self, idx, targets=None: torch.full((1, 1), float(targets is None))  # noqa: E731
    asked = adapt(type("Asked", (torch.nn.Module,), {"forward": told})())
    assert asked(tokens, positions).item() == 1.0  # positions are not its targets
    named = adapt(
        type(
            "Named",
            (torch.nn.Module,),
            {"forward": lambda self, x, positions: {"logits": x.float()}},
        )()
    )
    assert torch.equal(named(tokens, positions), tokens.float())


def test_what_gives_no_logits_or_needs_targets_is_refused() -> None:
    lost = adapt(type("Lost", (torch.nn.Module,), {"forward": lambda self, x: "nothing"})())
    with pytest.raises(
        ValueError, match=r"Lost gives a str: it must give logits, a tensor \(B, T, V\)"
    ):
        lost(torch.zeros(1))
    needs = type("Needs", (torch.nn.Module,), {"forward": lambda self, idx, targets: idx})
    with pytest.raises(
        ValueError, match=r"Needs.forward\(idx, targets\) wants 'targets' in every call"
    ):
        adapt(needs())


def test_a_prediction_takes_attention_as_it_is_called() -> None:
    """Five arguments by their places."""
    task = OwnModel(MODELS["Good"])
    assert record_footprint(task, Plan.of([], 1), global_batch_size=12).pieces[0].calls


def test_what_does_not_run_on_meta_tensors_is_not_predicted() -> None:
    with pytest.raises(ValueError, match="a model does not run on meta tensors: "):
        record_footprint(OwnModel(MODELS["Branching"]), Plan.of([], 1), global_batch_size=12)


def test_whole_takes_the_seed() -> None:
    assert (
        build_with_values(MODELS["Good"], 0, torch.float64).first.token.weight.dtype
        == torch.float64
    )


USERS = '''
import torch
from torch import nn

class Narrow(nn.Module):
    """A constructor with names of its own only."""
    def __init__(self, width: int = 8):
        super().__init__()
        self.embedding, self.out = nn.Embedding(256, width), nn.Linear(width, 256)
    def forward(self, idx, targets=None):
        return self.out(self.embedding(idx)), None

class Asking(Narrow):
    def __init__(self, vocab_size, block_size):
        super().__init__()

class Computing(Narrow):
    def __init__(self):
        super().__init__(width=int(torch.tensor(8.0).sum().item()))

class Reading(Narrow):
    def forward(self, idx, targets=None):
        return super().forward(idx) if int(idx.sum()) >= 0 else None

class Misspelt(Narrow):
    def __init__(self):
        super().__init__()
        self.embeding.weight.data.zero_()

class Empty(Narrow):
    def __init__(self):
        super().__init__()
        next(iter([]))

class Last(Narrow):
    def forward(self, idx, targets=None):
        return super().forward(idx)[0][:, [-1]]
'''
SMALL = ["steps=1", "eval.every=0", "global_batch_size=4", "seq_len=8"]
TYPED = [
    (["model._target_=users.Narrow"], 0, "users.Narrow is given nothing"),
    (["model._target_=users.Narrow", "+model.width=4"], 0, "users.Narrow is given width=4"),
    (["~model", "+model._target_=users.Narrow"], 0, "users.Narrow is given nothing"),
    (["~model", "+model._target_=mymodel.MyModel", "+model.context=8"], 0,
     "mymodel.MyModel is given context=8"),
    (["model._target_=mymodel.MyModel", "model.d_model=16", "model.n_layers=1"], 0,
     "mymodel.MyModel is given vocab_size=256, context=128, d_model=16, n_layers=1, n_heads=4"),
    (["model._target_=users.Narrow", "model.n_layers=3"], 2,
     "model.n_layers: users.Narrow takes width"),
    (["model._target_=users.Narrow", "+model.widht=3"], 2, "widht"),
    (["model._target_=users.Asking"], 2,
     "model: users.Asking needs block_size: set +model.block_size=…"),
    (["model._target_=users.Computing"], 0, "users.Computing is given nothing"),
    (["model._target_=users.Misspelt"], 2,
     "model: AttributeError: 'Misspelt' object has no attribute 'embeding' (users.py, line "),
    (["model._target_=users.Empty"], 2, "model: StopIteration (users.py, line "),
    (["model._target_=users.Last"], 2,
     "the model cannot be trained: called with (tokens, positions) of 4 rows"),
    (["model._target_=nopackage.Model"], 2,
     "there is no module nopackage on the path of this Python: for one of your own set PYTHONPATH"),
    (["model.dropout=2"], 2, "model.dropout=2: dropout"),
    (["~model"], 2, "task causal_lm trains one model, the configuration has none"),
]  # fmt: skip


@pytest.mark.parametrize(
    "typed, status, said", TYPED, ids=lambda each: " ".join(each) if isinstance(each, list) else ""
)
def test_a_models_name_is_enough(
    typed: list[str], status: int, said: str, call, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "users.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.delitem(sys.modules, "users", raising=False)
    found, out, err = call(*typed, *SMALL)
    assert (found, said in (err if status else out)) == (status, True), (out, err)
    assert status == 0 or err.count("\n") == 1


def test_the_probe_tells_its_time_and_is_off_by_an_option(
    call, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "users.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users", raising=False)
    for option, told in (([], 1), (["probe=false"], 0)):
        status, out, _ = call("model._target_=users.Narrow", *SMALL, *option)
        assert status == 0
        assert len(re.findall(r"probe: the model was tried on 4 rows in \d+\.\d+ s", out)) == told
        assert ("probe: " in out) == bool(told)


def test_a_profile_of_what_does_not_run_on_meta_tensors_predicts_nothing(
    call, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "users.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users", raising=False)
    status, out, _ = call(
        "model._target_=users.Reading", *SMALL, "steps=4", "profile=true", "hydra.run.dir=here"
    )
    assert status == 0 and "nothing is predicted: a model does not run on meta tensors: " in out
    assert (
        json.loads(Path("here/summary.json").read_text())["profile"]["ranks"][0][
            "traffic_predicted"
        ]
        is None
    )


def test_the_example_goes_with_every_strategy(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    made = partial(import_module("mymodel").MyModel, VOCAB, CONTEXT, 16, 2, 4)
    with mock.patch.dict(MODELS, mymodel=made):
        for strategy in ALL:
            assert tried("mymodel", strategy).startswith("probe: the model was tried on 4 rows in ")


LLAMA = dict(
    vocab_size=VOCAB,
    max_position_embeddings=CONTEXT,
    hidden_size=32,
    num_hidden_layers=1,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
)
HUGGING_FACE = [
    ("Llama", {}, "probe: the model was tried"),
    ("Qwen3", {"head_dim": 8}, "probe: the model was tried"),
    ("Mistral", {"sliding_window": 8},
     "MistralForCausalLM gives other logits than the original, by 0."),
    ("Granite",
     {"residual_multiplier": 0.2, "logits_scaling": 8.0, "attention_multiplier": 8**-0.5},
     "GraniteForCausalLM gives other logits than the original, by "),
    ("Gemma2", {"head_dim": 8}, "Gemma2Attention masks or scales its attention in its own way"),
    ("Gemma3Text", {"head_dim": 8}, "use model.layout=null, with a strategy on dp or fsdp"),
]  # fmt: skip


@pytest.mark.parametrize(
    "kind, settings, said", HUGGING_FACE, ids=[each[0] for each in HUGGING_FACE]
)
def test_a_layout_gives_the_originals_logits_or_is_refused(
    kind: str, settings: Any, said: str, tmp_path: Path
) -> None:
    """And as one piece each of them runs."""
    transformers = import_module("transformers")
    transformers.logging.set_verbosity_error()
    getattr(transformers, f"{kind}Config")(**LLAMA, **settings).save_pretrained(tmp_path)
    layout = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/model/hf_llama.yaml"))["layout"]
    made = partial(import_module("dtrain.model.hf").HuggingFace, str(tmp_path / "config.json"))
    with mock.patch.dict(MODELS, parts=partial(made, layout=layout), piece=made):
        assert said in tried("parts", "allreduce" if kind != "Qwen3" else "tensor")
        assert tried("piece", "fsdp").startswith("probe: the model was tried on 4 rows in ")


@pytest.mark.parametrize(
    "model, said", [("Counting", ""), ("Good", ""), ("Branching", "does not run on meta tensors")]
)
def test_info_counts_models_of_users(model: str, said: str) -> None:
    try:
        found = model_size(MODELS[model], Precision("fp32"), None)
    except ValueError as error:
        assert said and said in str(error)
    else:
        assert not said and found.flops_per_token > 0


class Buffered(torch.nn.Module):
    """A model whose buffers and weights its author has given formats of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Module(), torch.nn.Module()
        shared = torch.zeros(2)
        self.first.register_buffer("state", shared)
        self.second.register_buffer("state", shared)
        self.turn = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))


def test_what_two_modules_share_stays_one() -> None:
    model, host = Buffered(), torch.device("cpu")
    cast(model, torch.float64, host, host)
    assert model.first.state is model.second.state and model.turn.dtype == torch.complex128


def test_a_buffer_that_was_expanded_has_a_place_for_each_number() -> None:
    """Else nothing could be written into it from a checkpoint."""

    def factory() -> torch.nn.Module:
        model = torch.nn.Module()
        model.register_buffer("mask", torch.ones(1).expand(3, 4))
        return model

    made = build(factory, 0).mask
    made[1, 2] = 0
    assert made.shape == (3, 4) and made.sum() == 11


def test_batch_norm_that_its_author_keeps_still_is_not_refused() -> None:
    norm = torch.nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="batch norm"):
        Plan.of([], 1, recompute=True).check_model(torch.nn.Sequential(norm))
    refuse_batch_norm(torch.nn.Sequential(norm.eval()))


@pytest.mark.parametrize("strategy", ["1f1b", "allreduce", "fsdp"])
def test_batch_norm_in_a_model_with_a_layout_is_refused(strategy: str) -> None:
    """A pipeline's stages see micro-batches, though each of them sees every row of the batch."""
    model = MODELS["Good"]()
    model.blocks[1].norm = torch.nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="batch norm, whose statistics would be those of"):
        plan_of(Case("own", strategy), 2).check_model(model)


def test_batch_norm_takes_no_micro_batches(one_rank) -> None:
    model, plan = torch.nn.Sequential(torch.nn.BatchNorm1d(3)), Plan.of([], 1)
    plan.executor({"model": model}, {}, 1)
    with pytest.raises(ValueError, match="batch norm, whose statistics would be those of"):
        plan.executor({"model": model}, {}, 2)
