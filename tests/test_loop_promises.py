"""What the loop promises where two of its runs side by side show nothing: a fault for each test."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CONTEXT, GAN, ROWS, VOCAB, Case, NextToken, plan_of
from test_plain_loop import MadeUp, adamw, convnet, shades, sizes, transformer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtrain.config.schema import Config
from dtrain.data.augment import Crop, ImageChange, Mixup, SpanMask, TextChange, TokenDrop
from dtrain.data.images import Ring
from dtrain.data.rows import Rows
from dtrain.data.sources import Source
from dtrain.data.tokenizer import Bytes
from dtrain.launch.world import World
from dtrain.model.images import MLP
from dtrain.model.initialize import materialize
from dtrain.model.transformer import Transformer
from dtrain.parallel.optimizer import lr_factor
from dtrain.parallel.strategy import local_part
from dtrain.report.base import All
from dtrain.run.assemble import Parts, optimizer_of
from dtrain.run.checkpoint import Checkpoints
from dtrain.run.resume import Resume, begin_from, manifest_fields, starting_point
from dtrain.task.base import Task
from dtrain.task.batch import Batch
from dtrain.task.causal_lm import CausalLM
from dtrain.task.classification import Classification
from dtrain.task.gan import GAN as RealGAN
from dtrain.task.image_classification import ImageClassification
from dtrain.task.masked_lm import MaskedLM
from dtrain.train import NonFinite, Settings, Step, Trainer

# Rounding alone, of some ten sums in fp64.
TOLERANCE = 1e-12
# Of the cosine between two drawn matrices of some hundred numbers: it is 0.1 wide.
ALIKE = 0.5
STEPS, WARMUP = 6, 3
SAVED_AT = 3
STAYS = 0.9  # of the averaged generator, at a step


def trainer(task: Task, strategy: str = "single", size: int = 1, *, seed: int = 0) -> Trainer:
    settings = Settings(
        STEPS,
        seed,
        global_batch_size=ROWS,
        micro_batch_size=ROWS // size // 2,
        warmup_steps=WARMUP,
        min_lr_ratio=0.1,
    )
    return Trainer(task, plan_of(Case("", strategy), size).connect(), adamw, settings)


def copied(made: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in made.state().items()}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


# Dropout.


def test_an_evaluation_changes_nothing_of_training(alone) -> None:
    """Models train on with the same dropout, bit for bit; without dropout they differ."""
    figures, states = [], []
    for dropout, evaluates in ((0.2, False), (0.2, True), (0.0, True)):
        made = trainer(NextToken(dropout=dropout))
        figures.append([])
        for step in made.steps():
            figures[-1].append((step.loss, step.grad_norm))
            if evaluates:
                made.evaluate()
        states.append(copied(made))
    assert figures[0] == figures[1]
    assert_same_bits(states[0], states[1])
    assert figures[0] != figures[2]


def test_an_evaluation_drops_nothing(alone) -> None:
    """Twice gives the same figures, of every row."""
    made = trainer(NextToken(dropout=0.5))
    assert made.evaluate() == made.evaluate()


def gathered(strategy: str) -> list[str]:
    made = trainer(NextToken(), strategy, 2)
    assert made.evaluate()
    return [
        name
        for name, weight in made.models["model"].named_parameters()
        if not isinstance(weight, DTensor)
    ]


@pytest.mark.parametrize("strategy", ["zero2", "replicate"])
def test_an_evaluation_leaves_no_gathered_weights_behind(strategy: str, world) -> None:
    """Where they are kept from forward to backward, which no evaluation has: a whole model
    would stay on each rank.
    """
    assert world(2).run(gathered, strategy) == [[], []]


class Twins(NextToken):
    """The second half of the rows is the first once more: two data-parallel ranks get the same."""

    def batch(self, step: int) -> Batch:
        return {name: torch.cat((t[: ROWS // 2],) * 2) for name, t in super().batch(0).items()}


def dropped(strategy: str, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The tokens of each forward pass on this rank, and what its first dropout has left out."""
    made, seen = trainer(Twins(dropout=0.5), strategy, size, seed=seed), []
    embedding = made.plan.unwrap(made.models["model"]).embedding

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen.append((inputs[0].clone(), local_part(output) == 0))

    embedding.register_forward_hook(note)
    steps = made.steps()
    next(steps), next(steps)
    return seen


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_that_read_the_same_rows_drop_other_units(strategy: str, world) -> None:
    """Each part of the batch has its own masks; those of micro-batches and steps differ too."""
    first, second = world(2).run(dropped, strategy, 2, 0)
    assert len(first) == len(second) == 4
    for (tokens, _), (others, _) in zip(first, second, strict=True):
        assert torch.equal(tokens, others)
    masks = [mask for _, mask in first + second]
    for index, mask in enumerate(masks):
        assert 0.4 < mask.float().mean() < 0.6
        assert not any(torch.equal(mask, other) for other in masks[index + 1 :])


def test_ranks_along_tp_drop_the_same_units(world) -> None:
    """They compute the same activations: other masks would let them drift apart."""
    first, second = world(2).run(dropped, "tensor", 2, 0)
    masks, others = [mask for _, mask in first], [mask for _, mask in second]
    assert all(map(torch.equal, masks, others))
    assert not any(torch.equal(masks[i], masks[j]) for i in range(4) for j in range(i))


def test_masks_are_a_function_of_seed_and_step(alone) -> None:
    """Whatever was drawn before."""
    torch.manual_seed(1)
    first = [mask for _, mask in dropped("single", 1, 0)]
    torch.manual_seed(2)
    again, other = ([mask for _, mask in dropped("single", 1, seed)] for seed in (0, 1))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other)) and not any(map(torch.equal, first, first[2:]))


# What is not a number.


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("task", "poisoned"), [(NextToken, "model"), (GAN, "generator")])
def test_a_gradient_that_is_not_finite_stops_before_the_update(
    task: type[Task], poisoned: str, bad: float, alone
) -> None:
    """Though the loss is finite; weights and optimizer states stay those of the step before."""
    made = trainer(task())
    steps = made.steps()
    next(steps), next(steps)
    before = copied(made)
    next(made.models[poisoned].parameters()).register_hook(lambda g: torch.full_like(g, bad))
    said = rf"step 3: loss [\d.]+, gradient norm {bad} of '{poisoned}' \(on no rank's loss alone"
    with pytest.raises(NonFinite, match=said):
        next(steps)
    assert made.next_step == 2
    of = {name for name in before if f"{poisoned}." in name}
    assert_same_bits({n: t for n, t in copied(made).items() if n in of}, {n: before[n] for n in of})


# First values.


def test_no_two_parameters_begin_alike() -> None:
    """Of one shape, whatever their scale: each has a stream of its own."""
    with torch.device("meta"):
        model = Transformer(32, 16, 16, 3, 4, d_ff=16, tied=False)
    host = torch.device("cpu")
    materialize(model, 0, host, host, torch.float64)
    drawn = {name: p.flatten() for name, p in model.named_parameters() if p.ndim == 2}
    matrices = [p for p in drawn.values() if len(p) == 256]
    assert len(matrices) == 19 and all(p.std() > 0 for p in matrices)
    for name, one in drawn.items():
        for other_name, other in drawn.items():
            if name < other_name and len(one) == len(other):
                likeness = torch.cosine_similarity(one, other, dim=0).abs()
                assert likeness < ALIKE, f"{name} and {other_name} are alike: {likeness:.2f}"


class Named(nn.Module):
    """Parameters of one shape by these names, in this order."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.empty(4, 3)))

    def initial(self, name: str, values: Tensor, generator: torch.Generator) -> None:
        values.normal_(generator=generator)


def first_values(*names: str, seed: int = 0) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = Named(*names)
    host = torch.device("cpu")
    materialize(model, seed, host, host, torch.float64)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_first_values_are_a_function_of_seed_and_name() -> None:
    """Whatever other parameters there are, and in whatever order."""
    three, two = first_values("one", "two", "three"), first_values("three", "one")
    assert_same_bits(two, {name: three[name] for name in two})
    assert not torch.equal(first_values("one", seed=1)["one"], three["one"])


# Data.


class Lines(Source):
    """Texts of two kinds."""

    def describe(self) -> dict[str, Any]:
        return {"kind": "made up"}

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number in range(60):
            text = f"{number * 7919 % 100_000} is a number"
            yield f"row {number}", {"text": text, "label": str(number % 2)}


def lines() -> Rows:
    data = Rows("lines", Lines(), Bytes())
    data.prepare(lambda what, done: None)
    return data


def averaging(seed: int = 3) -> RealGAN:
    data = Ring(points=60)
    data.prepare(lambda what, done: None)
    models: Any = {"generator": lambda: MLP(4, 2, 8), "discriminator": lambda: MLP(2, 1, 8)}
    return RealGAN(models, data, sizes(seed), average=STAYS, samples=ROWS)


def language(seed: int, **augment: TextChange) -> CausalLM:
    return CausalLM(transformer(), MadeUp(), sizes(seed), augment=augment)


def masked(seed: int) -> MaskedLM:
    return MaskedLM(transformer(causal=False), MadeUp(), sizes(seed))


def classification(seed: int, **augment: TextChange) -> Classification:
    return Classification(transformer(outputs=2), lines(), sizes(seed), augment=augment)


def images(seed: int, **augment: ImageChange | Mixup) -> ImageClassification:
    return ImageClassification(convnet(), shades(), sizes(seed), augment=augment)


REAL: dict[str, Callable[[int], Task]] = {
    "language": language,
    "masked": masked,
    "classification": classification,
    "images": images,
    "gan": averaging,
    "language, augmented": partial(language, hide=SpanMask(0.5, 1.0)),
    "classification, augmented": partial(classification, drop=TokenDrop(0.5)),
    "images, augmented": partial(images, crop=Crop(2), mixup=Mixup()),
}
DRAWN = ("tokens", "pixels", "noise", "noise0", "mix0", "real0")  # of a batch, at random
ORDER = (0, 1, 9)  # of the steps; the last is of another epoch


def digests(task: str, seed: int, order: tuple[int, ...]) -> dict[int, dict[str, str]]:
    """Of each tensor in the batches of these steps."""
    made = REAL[task](seed)
    batches = {step: made.batch(step) for step in order}
    return {
        step: {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in batch.items()}
        for step, batch in batches.items()
    }


@pytest.mark.parametrize("task", REAL)
def test_a_batch_is_a_function_of_seed_and_step(task: str, world) -> None:
    """Also on two ranks, and whatever batches were read before."""
    ours, others = digests(task, 3, ORDER), digests(task, 4, ORDER)
    for name in set(DRAWN) & ours[0].keys():
        seen = {found[step][name] for found in (ours, others) for step in ORDER}
        assert len(seen) == 2 * len(ORDER), name
    assert world(2).run(digests, task, 3, ORDER[::-1]) == [ours, ours]


def part_of(size: int) -> Batch:
    return plan_of(Case("", "ddp"), size).connect().shard(NextToken().batch(0))


def test_together_the_ranks_read_the_batch(world) -> None:
    """Each row once, in order."""
    parts = world(2).run(part_of, 2)
    for name, expected in NextToken().batch(0).items():
        assert torch.equal(torch.cat([part[name] for part in parts]), expected)


def one_row(task: str) -> Task:
    """The task, whose batch is one sample again and again."""
    made: Any = REAL[f"{task}, augmented"](3)
    if task == "language":
        row = made._train.batch(0, 1)
        made._train.batch = lambda step, rows: row.expand(rows, -1)
    elif task == "images":
        values, labels = made._train
        made._train = values[:1].expand(2 * ROWS, -1, -1, -1), labels[:1].expand(2 * ROWS)
        made.mixup = None
    else:
        made._train = made._train[:1] * (2 * ROWS)
    return made


@pytest.mark.parametrize("task", ["language", "classification", "images"])
def test_augmentation_changes_the_same_sample_each_time_otherwise(task: str) -> None:
    """At another place of the batch, and in another step."""
    made = one_row(task)
    batches = [made.batch(step)["pixels" if task == "images" else "tokens"] for step in (0, 1)]
    kinds = [{row.numpy().tobytes() for row in batch} for batch in batches]
    assert all(len(kind) > ROWS / 2 for kind in kinds) and kinds[0] != kinds[1]


# The averaged generator.


def test_the_average_is_the_sum_of_all_generators_by_age(alone) -> None:
    """w_0 stays by 0.9^k, and each later w_i came in by a tenth, of which 0.9^(k-i) stays."""
    made = trainer(averaging())
    generator = made.models["generator"]
    history = [[p.detach().clone() for p in generator.parameters()]]
    for _ in made.steps():
        history.append([p.detach().clone() for p in generator.parameters()])
    weights = [STAYS**STEPS, *((1 - STAYS) * STAYS ** (STEPS - i) for i in range(1, STEPS + 1))]
    averages = list(made.models["average"].parameters())
    for average, values in zip(averages, zip(*history, strict=True), strict=True):
        expected = sum(w * value for w, value in zip(weights, values, strict=True))
        assert (average - expected).norm() <= TOLERANCE * expected.norm()
        assert not torch.equal(average, values[-1])


# Rates and optimizers.


@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1, 1.0])
def test_rates_rise_in_steps_to_the_whole_and_fall_to_their_share(min_lr_ratio: float) -> None:
    """Exactly, at the warm-up's first and last steps and at the end."""
    factors = [
        lr_factor(step, 30, warmup_steps=10, min_lr_ratio=min_lr_ratio) for step in range(32)
    ]
    assert factors[:10] == [(step + 1) / 10 for step in range(10)]
    assert factors[10] == 1.0
    assert factors[20] == pytest.approx((1 + min_lr_ratio) / 2, rel=TOLERANCE)
    assert factors[30:] == [min_lr_ratio] * 2
    assert lr_factor(0, 30, warmup_steps=0, min_lr_ratio=min_lr_ratio) == 1.0
    falls = [later < earlier for earlier, later in zip(factors[10:30], factors[11:31], strict=True)]
    assert falls == [min_lr_ratio < 1] * 20


def test_a_step_tells_the_rate_that_its_update_had(alone) -> None:
    """The warm-up's first has its share, its last the whole rate; so has every group."""
    base = adamw(nn.Linear(1, 1)).param_groups[0]["lr"]
    made = trainer(NextToken())
    rates = [step.lr for step in made.steps()]
    assert rates[:WARMUP] == [base * ((step + 1) / WARMUP) for step in range(WARMUP)]
    assert rates[WARMUP] == base and rates[-1] < rates[-2] < base
    groups = made.optimizers["model"].param_groups
    assert [group["lr"] for group in groups] == [rates[-1]] * len(groups)


def test_what_is_configured_reaches_the_optimizer() -> None:
    """Each parameter once; matrices decay, gains and biases do not."""
    node = {
        "_target_": "torch.optim.AdamW",
        "lr": 0.02,
        "betas": [0.7, 0.8],
        "eps": 1e-5,
        "weight_decay": 0.3,
        "fused": True,
    }
    model = Transformer(VOCAB, CONTEXT, 8, 1, 2)
    made = optimizer_of(node, model)
    assert isinstance(made, torch.optim.AdamW)
    seen = []
    for group in made.param_groups:
        assert (group["lr"], group["eps"], group["fused"]) == (0.02, 1e-5, True)
        assert tuple(group["betas"]) == (0.7, 0.8)
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.3 if parameter.ndim == 2 else 0.0)
            seen.append(id(parameter))
    assert sorted(seen) == sorted(map(id, model.parameters()))


# Going on.


def test_tokens_are_counted_from_the_first_step(alone) -> None:
    """Of the global batch, in each step."""
    counts = [step.tokens for step in trainer(NextToken()).steps()]
    assert counts == [number * ROWS * CONTEXT for number in range(1, STEPS + 1)]


def curve(step: Step) -> tuple[float, ...]:
    return step.step, step.loss, step.grad_norm, step.lr, step.tokens


def test_a_run_that_is_taken_up_goes_on_bit_for_bit(alone, tmp_path: Path) -> None:
    """Losses, norms, rates, tokens, weights and optimizer states, with dropout."""
    world, task = World(), NextToken(dropout=0.2)
    config = Config(resume=str(tmp_path / "checkpoints" / "step-00000003"), steps=STEPS)
    whole, first, second = (trainer(task) for _ in range(3))
    job = Parts(config, shades(), task, first.plan, All(), written=asdict(config))
    expected = [curve(step) for step in whole.steps()]
    found = []
    for step in first.steps():
        found.append(curve(step))
        if step.step == SAVED_AT:
            checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=1)
            checkpoints.save(SAVED_AT, first.state(), manifest_fields(job, first, world))
            break
    torch.manual_seed(5)
    start = starting_point(job, tmp_path, world)
    assert isinstance(start, Resume)
    begin_from(second, job, start)
    found += [curve(step) for step in second.steps()]
    assert found == expected
    assert_same_bits(copied(second), copied(whole))
