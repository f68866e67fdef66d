"""Every task under every strategy: as one process trains it, or refused with a reason; and what
each task makes of its data.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import warm
from cases import (
    AXES,
    ROWS,
    STRATEGIES,
    TASKS,
    Case,
    Outcome,
    adamw,
    assert_equal,
    refusal,
    train,
    trainer,
)
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import sqrtm
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from dtrain.config.groups import CONFIGS
from dtrain.config.schema import register, validated
from dtrain.data.augment import Crop, Cutout, Flip, Mixup, SpanMask, TextCrop, TokenDrop
from dtrain.data.images import Folder, HubImages, Ring, Samples, to_tensor
from dtrain.data.rows import Rows
from dtrain.data.seeded import generator
from dtrain.data.sources import Files, HuggingFace, Source, Squad
from dtrain.data.stdlib_rows import Docstrings, Functions, Questions
from dtrain.data.text import Text
from dtrain.data.tokenizer import MARK_IDS, Bytes, FromFile
from dtrain.model.images import MLP, ConvGenerator, ConvNet, SpectralLinear
from dtrain.model.transformer import Transformer
from dtrain.parallel.plan import Plan
from dtrain.run.assemble import task_of
from dtrain.run.checkpoint import Checkpoints, load
from dtrain.task.base import Sizes, Task
from dtrain.task.causal_lm import IGNORE, CausalLM
from dtrain.task.classification import Classification
from dtrain.task.classifier import confusion, scores
from dtrain.task.gan import GAN, move_towards
from dtrain.task.image_classification import ImageClassification
from dtrain.task.masked_lm import MaskedLM
from dtrain.task.sample_quality import frechet_distance, precision_recall
from dtrain.task.span_qa import SpanQA
from dtrain.task.token_classification import TokenClassification
from dtrain.train import Settings, Trainer

ROOT = Path(__file__).parent.parent
LENGTH = 24
SIZES = Sizes(seed=3, global_batch_size=ROWS, seq_len=LENGTH, eval_batches=2)
# Rounding alone, over five steps in fp64.
TOLERANCE = 1e-12
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


class Made(Source):
    """Rows that are made up, from a seed."""

    def describe(self) -> dict[str, Any]:
        return {"kind": "made up"}

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        chance = np.random.default_rng(0)
        for number in range(60):
            words = [str(word) for word in chance.choice(WORDS, 6)]
            text = " ".join(words)
            yield (
                f"row {number}",
                {
                    "text": text,
                    "label": words[0][0],
                    "words": words,
                    "tags": [word[0] for word in words],
                    "context": text,
                    "question": "who?",
                    "answer": words[2],
                    "start": len(words[0]) + len(words[1]) + 2,
                },
            )


class Squares(Samples):
    """Images with a bright square on one side or the other."""

    name = "squares"

    def read(self, progress: Any) -> tuple[Tensor, Tensor]:
        self.classes = ["left", "right"]
        labels = torch.arange(80) % 2
        pixels = torch.rand(80, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1
        for image, label in zip(pixels, labels.tolist(), strict=True):
            image[:, 2:6, 4 * label : 4 * label + 4] += 1
        return pixels, labels


def prepared(data: Any) -> Any:
    data.prepare(lambda what, done: None)
    return data


def transformer(**more: Any) -> dict[str, Any]:
    sizes = {"d_model": 24, "n_layers": 2, "n_heads": 12, "bias": False, "causal": False} | more
    return {"model": partial(Transformer, 256, LENGTH, **sizes)}


def text_of_rows() -> Text:
    import tempfile

    return prepared(Text("made", Made(), Bytes(), tempfile.mkdtemp(), 0.3))


def rows_of_made() -> Rows:
    return prepared(Rows("made", Made(), Bytes()))


def gan(
    loss: str, *, conv: bool = False, classes: int = 0, spectral: bool = False, **more: Any
) -> GAN:
    if conv:
        models: dict[str, Any] = {
            "generator": partial(ConvGenerator, 6, 1, 8, width=16, classes=classes),
            "discriminator": partial(ConvNet, 1, 8, width=16, classes=classes, spectral=spectral),
        }
    else:
        models = {
            "generator": partial(MLP, 4, 2, 12, classes=classes),
            "discriminator": partial(MLP, 2, 1, 12, classes=classes, spectral=spectral),
        }
    return GAN(
        models,
        prepared(Squares() if conv else Ring(points=200)),
        SIZES,
        loss=loss,
        samples=24,
        **more,
    )


REAL: dict[str, Any] = {
    "causal_lm": lambda: CausalLM(
        transformer(causal=True), text_of_rows(), SIZES, augment={"mask": SpanMask()}
    ),
    "masked_lm": lambda: MaskedLM(
        transformer(segments=2), text_of_rows(), SIZES, pairs="sentence_order", whole_words=True
    ),
    "classification": lambda: Classification(
        transformer(outputs=6), rows_of_made(), SIZES, augment={"drop": TokenDrop()}
    ),
    "classification_causal": lambda: Classification(
        transformer(outputs=6, causal=True), rows_of_made(), SIZES
    ),
    "token_classification": lambda: TokenClassification(
        transformer(outputs=6), rows_of_made(), SIZES
    ),
    "span_qa": lambda: SpanQA(transformer(outputs=2), rows_of_made(), SIZES),
    "image_classification": lambda: ImageClassification(
        {"model": partial(ConvNet, 1, 8, 2, width=16, normalise=True)},
        prepared(Squares()),
        SIZES,
        augment={"mixup": Mixup()},
    ),
    "gan": lambda: gan("non_saturating", discriminator_steps=2),
    "gan_hinge": lambda: gan("hinge", conv=True, classes=2, conditional=True, spectral=True),
    "gan_penalty": lambda: gan("wgan_gp"),
    "gan_images_penalty": lambda: gan("wgan_gp", conv=True, average=0.0),
}


def real(name: str) -> Task:
    return REAL[name]()


def trained(case: Case, size: int) -> Outcome:
    with mock.patch.dict(TASKS, real=real):
        return train(case, size)


def case_of(task: str, strategy: str, **more: Any) -> Case:
    return Case("real", strategy, steps=3, model=(("name", task),), **more)


FEW = ("zero1", "fsdp", "tensor", "1f1b", "ring", "expert")
IN_FULL = ("masked_lm", "span_qa", "gan", "gan_penalty")
REASONS = (
    "no pipeline split",
    "no experts",
    "names no",
    "not one value a token",
    "loss_parallel=false",
    "positions",
    "more blocks",
)


def turns() -> Iterator[Any]:
    """Each task under each strategy; quick ones are two strategies a task, every strategy with
    two tasks or more.
    """
    for number, task in enumerate(REAL):
        own = list(AXES) if task in IN_FULL else list(FEW)
        quick = {list(AXES)[(number * 2 + more) % len(AXES)] for more in (0, 5)} | {
            "zero1" if number % 2 else "fsdp"
        }
        yield pytest.param(task, tuple(name for name in AXES if name in quick), id=task)
        yield pytest.param(task, tuple(own), id=f"{task}-all", marks=pytest.mark.deep)


@pytest.mark.parametrize(("task", "strategies"), list(turns()))
def test_every_strategy_trains_it_as_one_process_does_or_is_refused(
    task: str, strategies: tuple[str, ...], world
) -> None:
    expected = world(2).run(trained, case_of(task, "single"), 1)[0]
    equal, refused = [], {}
    for strategy in strategies:
        with mock.patch.dict(TASKS, real=real):
            reason = refusal(case_of(task, strategy), 2)
        if reason:
            assert "\n" not in reason and any(known in reason for known in REASONS), reason
            refused[strategy] = reason
            continue
        for found in world(2).run(trained, case_of(task, strategy), 2):
            assert_like(found, expected, task)
        equal.append(strategy)
    assert {"zero1", "fsdp"} & set(strategies) <= set(equal), refused
    either = {"tensor", "1f1b", "ring"} & set(strategies)
    assert task.startswith(("gan", "image", "span")) or either <= set(equal), refused


def test_an_epoch_is_as_many_rows_as_there_are() -> None:
    """Of windows all that fit, but one that the epoch's offset may take; of a GAN's each step
    reads two batches.
    """
    tokens = len(text_of_rows().windows("train", seq_len=LENGTH, seed=0).tokens)
    # a row's marks are no text
    windows, pairs = (tokens - 1) // LENGTH - 1, (tokens - 1) // (LENGTH - 3) - 1
    rows = len(rows_of_made().split["train"])
    images, points = (
        len(prepared(made).split["train"][0]) for made in (Squares(), Ring(points=200))
    )
    for name, epoch in {
        "causal_lm": windows,
        "masked_lm": pairs,
        "classification": rows,
        "token_classification": rows,
        "span_qa": rows,
        "image_classification": images,
        "gan": points / 2,
        "gan_hinge": images,
    }.items():
        assert real(name).epoch == epoch, name


@pytest.mark.parametrize(
    ("name", "marks"), [("classification", 1), ("token_classification", 1), ("span_qa", 2)]
)
def test_what_a_row_leaves_out_of_its_texts_is_told(name: str, marks: int) -> None:
    """By the tokens that stand in no batch; nothing is said where all of them fit."""
    task = real(name)
    sums = [
        (
            sum(len(task.data.tokenizer.encode(t)) for t in task.texts(row)),
            task.encode("x", row, None)["tokens"],
        )
        for _, row in task._train
    ]
    taken = [int((tokens > 8).sum()) for _, tokens in sums]  # ids of marks are below
    cut = sum(length > LENGTH - marks for length, _ in sums)
    lost = 1 - sum(taken) / sum(length for length, _ in sums)
    assert (
        cut > 0
        and f"; {cut} of the {len(sums)} looked at are longer than seq_len={LENGTH} and cut: "
        in task.summary
    )
    # whole words go
    assert (
        f" {lost:.1%} of the tokens are left out" in task.summary or name == "token_classification"
    )
    long = replace(SIZES, seq_len=200)
    outputs = 2 if name == "span_qa" else 6
    model = {
        "model": partial(
            Transformer, 256, 200, d_model=24, n_layers=1, n_heads=2, causal=False, outputs=outputs
        )
    }
    assert (
        "cut"
        not in {
            "classification": Classification,
            "token_classification": TokenClassification,
            "span_qa": SpanQA,
        }[name](model, rows_of_made(), long).summary
    )


def assert_like(found: Outcome, expected: Outcome, task: str, tolerance: float = TOLERANCE) -> None:
    """Metrics more loosely: a Fréchet distance takes roots of nearly nothing."""
    assert found.metrics == pytest.approx(expected.metrics, rel=max(1e-6, 10 * tolerance)), task
    found.metrics = expected.metrics
    # softmax over tokens takes this bias out: its gradient is rounding
    for kind in (found.gradients, found.weights):
        for name in [name for name in kind if task == "span_qa" and "head.output.bias" in name]:
            del kind[name]
    assert_equal(found, expected, tolerance)


@pytest.mark.parametrize("task", ["classification", "gan"])
@pytest.mark.deep
def test_micro_batches_change_nothing(task: str, world) -> None:
    expected = world(2).run(trained, case_of(task, "single"), 1)[0]
    for strategy in ("ddp", "fsdp"):
        for found in world(2).run(trained, case_of(task, strategy, micro_batch_size=2), 2):
            assert_like(found, expected, task)


def test_spectral_norms_do_not_count_micro_batches(world) -> None:
    expected = world(2).run(trained, case_of("gan_hinge", "single"), 1)[0]
    for found in world(2).run(trained, case_of("gan_hinge", "fsdp", micro_batch_size=3), 2):
        assert_like(found, expected, "gan_hinge")


def penalised_without_the_last_step(case: Case, size: int) -> Outcome:
    with mock.patch("dtrain.strategy.replicate.FSDPModule.reshard", lambda self: None):
        return trained(case, size)


def test_weights_that_stay_gathered_after_a_penalty_train_wrong(world) -> None:
    """Why `kept_gathered` frees them: without that fsdp differs from one process, so this test
    has teeth.
    """
    expected = world(2).run(trained, case_of("gan_penalty", "single"), 1)[0]
    found = world(2).run(penalised_without_the_last_step, case_of("gan_penalty", "fsdp"), 2)[0]
    assert found.losses != pytest.approx(expected.losses, rel=1e-6)


def by_engines(case: Case, size: int) -> Outcome:
    from test_accelerate import KNOWN as ACCELERATED
    from test_deepspeed import KNOWN as DEEPSPED

    with mock.patch.dict(STRATEGIES, {**DEEPSPED, **ACCELERATED}):
        return trained(case, size)


@pytest.mark.deep
@pytest.mark.parametrize(("task", "strategies"), {
    "masked_lm": ("deepspeed zero2", "accelerate_zero3"), "span_qa": ("deepspeed zero3",),
    "classification": ("deepspeed zero0", "accelerate_ddp"),
    "gan": ("deepspeed zero1", "accelerate_ddp"),
}.items())  # fmt: skip
def test_engines_train_it_too(task: str, strategies: tuple[str, ...], world) -> None:
    expected = world(2).run(trained, case_of(task, "single", dtype="fp32"), 1)[0]
    for strategy in strategies:
        for found in world(2).run(by_engines, case_of(task, strategy, dtype="fp32"), 2):
            found.gradients = expected.gradients  # engines let go of them
            assert_like(found, expected, task, 2e-5)


def test_a_checkpoint_of_a_gan_goes_on_under_another_strategy(world, tmp_path: Path) -> None:
    first, other = (replace(case_of("gan", name), steps=5) for name in ("zero1", "fsdp"))
    expected = world(2).run(saved_and_resumed, first, None, str(tmp_path), 2)[0]
    found = world(2).run(saved_and_resumed, other, 3, str(tmp_path), 2)[0]
    assert found == pytest.approx(expected[3:], rel=TOLERANCE)


def saved_and_resumed(case: Case, at: int | None, folder: str, size: int) -> list[float]:
    """The losses of a run that saves after three steps, or of one that goes on from there."""
    with mock.patch.dict(TASKS, real=real):
        made, losses = trainer(case, size), []
        if at is not None:
            made.load(partial(load, Path(folder) / "step-00000003"))
            made.next_step = at
        else:
            checkpoints = Checkpoints(Path(folder), keep_last=2)
        for step in made.steps():
            losses.append(step.loss)
            if at is None and step.step == 3:
                checkpoints.save(3, made.state(), {"tokens": 0})
    return losses


# What tasks make of their data.


@pytest.mark.parametrize("whole_words", [False, True])
def test_tokens_are_hidden_as_bert_hides_them(whole_words: bool) -> None:
    """80 % hidden, 10 % replaced, 10 % kept, of about 15 %; anew at each step, and the same for
    the same step.
    """
    data, sizes = text_of_rows(), Sizes(0, 400, LENGTH, 1)
    task = MaskedLM(transformer(), data, sizes, whole_words=whole_words)
    batch, again = task.batch(0), task.batch(0)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    other = task.batch(task._windows["train"].per_epoch)
    assert not torch.equal(batch["targets"], other["targets"])
    asked = batch["targets"] != IGNORE
    assert asked.float().mean().item() == pytest.approx(0.15, abs=0.02) and not asked[:, 0].any()
    hidden = (batch["tokens"] == data.tokenizer.marks.hidden)[asked].float().mean().item()
    kept = (batch["tokens"] == batch["targets"])[asked].float().mean().item()
    assert hidden == pytest.approx(0.8, abs=0.03) and kept == pytest.approx(0.1, abs=0.03)
    assert torch.equal(batch["tokens"][~asked], torch.where(asked, IGNORE, batch["tokens"])[~asked])
    whole = torch.where(asked, batch["targets"], batch["tokens"])
    if whole_words:  # letters of one word are asked together
        letter = (whole >= ord("a")) & (whole <= ord("z"))
        together = letter[:, 1:] & letter[:, :-1]
        assert torch.equal(asked[:, 1:][together], asked[:, :-1][together])


@pytest.mark.parametrize("pairs", ["next_sentence", "sentence_order"])
def test_pairs_are_as_their_answer_says(pairs: str) -> None:
    data = text_of_rows()
    task = MaskedLM(
        transformer(segments=2), data, Sizes(0, 200, LENGTH, 1), pairs=pairs, probability=0.01
    )
    batch, marks = task.batch(0), data.tokenizer.marks
    text = task._windows["train"].batch(0, 200)
    one, other = text.tensor_split(2, dim=1)
    rows = torch.where(batch["targets"] != IGNORE, batch["targets"], batch["tokens"])
    answers = set()
    for row, segments, first, second, answer in zip(
        rows, batch["segments"], one, other, batch["targets"][:, 0], strict=True
    ):
        at = row.tolist().index(marks.between)
        assert segments.tolist() == [0] * (at + 1) + [1] * (LENGTH - at - 1)
        parts = (row[1:at].tolist(), row[at + 1 :].tolist())
        together = parts == (first.tolist(), second.tolist())
        assert answer == (marks.yes if together else marks.no) or parts[0] == parts[1]
        if not together and pairs == "sentence_order":
            assert parts == (second.tolist(), first.tolist())
        answers.add(int(answer))
    assert answers == {marks.yes, marks.no}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_scores_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    truth, said = zip(*pairs, strict=True)
    logits = torch.nn.functional.one_hot(torch.tensor(said), 5).float()
    found = scores(confusion(logits, torch.tensor(truth)))
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, said))
    assert found["macro_f1"] == pytest.approx(
        f1_score(truth, said, average="macro", zero_division=0)
    )


def test_embedded_rows_are_real_and_split_by_file() -> None:
    data = prepared(Rows("functions", Functions(), Bytes(), group="file"))
    sides = {side: {row["file"] for _, row in rows} for side, rows in data.split.items()}
    assert not sides["train"] & sides["validation"]
    assert (
        sum(map(len, data.split.values())) > 3000
        and len({row["label"] for _, row in data.all()}) == 9
    )
    tags = {tag for _, row in Docstrings().rows() for tag in row["tags"]}
    assert tags == {"other", "class", "function", "parameter"}
    for _, row in Questions().rows():
        assert row["context"][row["start"] :].startswith(row["answer"])


@settings(max_examples=60, deadline=None)
@given(
    st.text("ab c", max_size=60),
    st.text("xyz", min_size=1, max_size=40),
    st.text("ab c", max_size=60),
    st.integers(8, 40),
)
def test_an_answer_stands_where_its_targets_say(
    before: str, answer: str, after: str, length: int
) -> None:
    row = {
        "context": before + answer + after,
        "question": "who or what?",
        "answer": answer,
        "start": len(before),
    }
    task = SpanQA.__new__(SpanQA)
    task.length, task.data = length, Rows("one", Made(), Bytes())
    made = task.encode("here", row, None)
    first, last = made["targets"].tolist()
    assert len(made["tokens"]) == length
    found = bytes(made["tokens"][first : last + 1].tolist()).decode()
    assert answer.startswith(found) and (found == answer or last == length - 1)


def learned(task: Task, size: int) -> tuple[list[float], dict[str, float]]:
    """By one process."""
    made = Trainer(
        task, Plan.of([], size), adamw, Settings(400, global_batch_size=16, warmup_steps=20)
    )
    return [step.loss for step in made.steps()], made.evaluate()


@pytest.mark.deep
def test_squad_files_are_read_and_learned_by_heart(tmp_path: Path, world) -> None:
    """A model of 30 k parameters answers forty questions after it has seen them often enough."""
    chance, articles = np.random.default_rng(1), []
    for number in range(8):
        words = [str(word) for word in chance.permutation(WORDS)[:5]]
        context = " ".join(words)
        qas = [
            {
                "id": f"{number}-{i}",
                "question": f"{i}th?",
                "answers": [{"text": w, "answer_start": context.index(w)}],
            }
            for i, w in enumerate(words)
        ]
        articles.append(
            {"title": f"article {number}", "paragraphs": [{"context": context, "qas": qas}]}
        )
    (tmp_path / "train.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    data = prepared(Rows("squad", Squad(str(tmp_path)), Bytes(), group="file"))
    assert sum(map(len, data.split.values())) == 40
    models = {"model": partial(Transformer, 256, 48, 48, 2, 4, causal=False, outputs=2)}
    task = SpanQA(models, data, Sizes(0, 16, 48, 8))
    data.split["validation"] = data.split["train"]
    losses, metrics = world(2).run(learned, task, 1)[0]
    assert metrics["exact"] > 0.97 and losses[-1] < 0.5


def test_bad_rows_take_one_line(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text,label\na,x\nb,x\nc,x\nd,x\ne,x\nf,x\n")
    (tmp_path / "ragged.csv").write_text("text,label\na,x\nb\n")
    lists = [{"words": [letter], "tags": ["x", "y"]} for letter in "abcdefgh"]
    (tmp_path / "lists.jsonl").write_text("\n".join(map(json.dumps, lists)))
    (tmp_path / "bad.json").write_text(
        '{"data": [{"paragraphs": [{"context": "abc", "qas": [{"question": "?", "answers": '
        '[{"text": "z", "answer_start": 0}]}]}]}]}'
    )
    nulls = [
        {"text": letter, "label": float("nan"), "words": ["a", "b"], "tags": ["x", None]}
        for letter in "abcdefgh"
    ]
    (tmp_path / "nulls.jsonl").write_text("\n".join(map(json.dumps, nulls)))
    rows = lambda name: prepared(Rows("r", Files(str(tmp_path / name)), Bytes(), 0.5))  # noqa: E731
    wrong = {
        "every label is 'x'": lambda: Classification(
            transformer(outputs=2), rows("one.csv"), SIZES
        ),
        "has no 'kind', only text, label: set task.label": lambda: Classification(
            transformer(outputs=2), rows("one.csv"), SIZES, label="kind"
        ),
        "has no field 'body', only text, label: set task.text": lambda: Classification(
            transformer(outputs=2), rows("one.csv"), SIZES, text="body"
        ),
        "field 'label' is empty or null: leave such rows out, or set task.label": lambda: (
            Classification(transformer(outputs=2), rows("nulls.jsonl"), SIZES)
        ),
        "number 1 of 'tags' is null: leave such rows out": lambda: TokenClassification(
            transformer(outputs=2), rows("nulls.jsonl"), SIZES
        ),
        "not 2 columns": lambda: rows("ragged.csv"),
        "1 words and 2 tags": lambda: TokenClassification(
            transformer(outputs=2), rows("lists.jsonl"), SIZES
        ),
        "field 'words' is no list": lambda: TokenClassification(
            transformer(outputs=2), rows("one.csv"), SIZES
        ),
        "the answer 'z' does not stand at character 0": lambda: prepared(
            Rows("q", Squad(str(tmp_path / "bad.json")), Bytes())
        ),
        "model.outputs=null: the task needs 6": lambda: Classification(
            transformer(), rows_of_made(), SIZES
        ),
        "model.outputs=6: the task needs null": lambda: MaskedLM(
            transformer(outputs=6), text_of_rows(), SIZES
        ),
        "set model.causal=false": lambda: MaskedLM(transformer(causal=True), text_of_rows(), SIZES),
        "set model.causal=true": lambda: CausalLM(transformer(), text_of_rows(), SIZES),
        "task.pairs=x is unknown": lambda: MaskedLM(
            transformer(), text_of_rows(), SIZES, pairs="x"
        ),
    }
    for message, make in wrong.items():
        with pytest.raises(ValueError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


# Images and GANs.


def test_folders_of_images_name_their_classes_and_what_cannot_be_read(tmp_path: Path) -> None:
    for kind, colour in (("dark", 10), ("light", 240)):
        (tmp_path / kind).mkdir()
        for number in range(6):
            Image.new("RGB", (20 + number, 30), (colour,) * 3).save(
                tmp_path / kind / f"{number}.png"
            )
    (tmp_path / "dark" / "broken.png").write_bytes(b"no image")
    with pytest.raises(
        ValueError,
        match=r"1 of 13 files .* \(broken.png\): remove them, or set data.unreadable=skip",
    ):
        prepared(Folder(str(tmp_path), size=16))
    data = prepared(Folder(str(tmp_path), size=16, grey=True, unreadable="skip"))
    assert (
        data.classes == ["dark", "light"]
        and data.shape == (1, 16, 16)
        and data.describe()["skipped"] == ["broken.png"]
    )
    for values, labels in data.split.values():
        assert torch.equal((values.mean((1, 2, 3)) > 0).long(), labels)


def test_images_of_datasets_are_as_a_folder_has_them(tmp_path: Path) -> None:
    import datasets

    images = [Image.new("L", (8, 8), shade) for shade in (0, 60, 120, 180, 240, 250, 30, 90)]
    rows = datasets.Dataset.from_dict(
        {"image": images, "label": ["a", "b"] * 4},
        datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")}),
    )
    rows.save_to_disk(str(tmp_path / "saved"))
    data = prepared(
        HubImages(HuggingFace(str(tmp_path / "saved")), size=8, grey=True, validation_fraction=0.4)
    )
    assert data.classes == ["a", "b"] and data.shape == (1, 8, 8)
    datasets.Dataset.from_dict({"image": images, "label": [1.0, float("nan")] * 4}).cast_column(
        "image", datasets.Image()
    ).save_to_disk(str(tmp_path / "nan"))
    with pytest.raises(
        ValueError, match="row 1 has no 'label': leave such rows out, or set data.label=null"
    ):
        prepared(HubImages(HuggingFace(str(tmp_path / "nan")), size=8, grey=True))
    with pytest.raises(ValueError, match="has no field 'kind', only image, label: set data.label"):
        prepared(HubImages(HuggingFace(str(tmp_path / "saved")), label="kind"))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n(x) run\n"


def _png(change: Callable[[bytearray], Any]) -> bytes:
    stream = BytesIO()
    Image.effect_noise((32, 32), 50).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    change(data)
    return bytes(data)


BROKEN = {
    "a program for a printer": EPS,
    "nothing": b"",
    "a name alone": b"\x89PNG\r\n\x1a\n",
    "cut short": _png(lambda data: data.__delitem__(slice(len(data) // 2, None))),
    "flipped": _png(lambda data: data.__setitem__(slice(60, 200), bytes(140))),
    "no sizes": _png(lambda data: data.__setitem__(slice(12, 16), b"JUNK")),
    "huge": _png(lambda data: data.__setitem__(slice(16, 24), b"\x7f\xff\xff\xff" * 2)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_a_decoder_meets_its_file_is_named_and_no_program_starts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program is started"))
    (tmp_path / "a.png").write_bytes(BROKEN[kind])
    for number in range(3):
        Image.new("L", (8, 8), 9 * number).save(tmp_path / f"b{number}.png")
    with pytest.raises(ValueError, match=r"1 of 4 files .* \(a.png\)") as found:
        prepared(Folder(str(tmp_path), size=8))
    assert "\n" not in str(found.value)
    files = [
        {"bytes": (tmp_path / name).read_bytes(), "path": None} for name in ("b0.png", "a.png")
    ]
    rows = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    rows.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"saved, row 1: 'image' is no readable image: ") as found:
        prepared(HubImages(HuggingFace(str(tmp_path / "saved")), label=None, size=8))
    assert "\n" not in str(found.value)


def test_frechet_distance_is_that_of_normal_distributions() -> None:
    """Against scipy's matrix root; nothing between a set and itself."""
    chance = torch.Generator().manual_seed(0)
    one = torch.randn(400, 6, generator=chance, dtype=torch.float64)
    other = one @ torch.randn(6, 6, generator=chance, dtype=torch.float64) + 1
    (m, s), (n, t) = ((x.mean(0), np.cov(x.numpy().T)) for x in (one, other))
    expected = float((m - n).square().sum()) + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-8)
    assert precision_recall(one, one) == (1.0, 1.0) and precision_recall(one, one + 100) == (
        0.0,
        0.0,
    )
    few = one[:1].repeat(50, 1) + 1e-3 * torch.randn(50, 6, generator=chance, dtype=torch.float64)
    precision, recall = precision_recall(one, few)
    assert precision == 1.0 and recall < 0.1  # good, but all alike


def test_spectral_layers_have_norm_one_and_torch_s_own_gradient() -> None:
    torch.manual_seed(0)
    layer = SpectralLinear(7, 5)
    theirs = torch.nn.utils.parametrizations.spectral_norm(
        torch.nn.Linear(7, 5), n_power_iterations=100
    )
    with torch.no_grad():
        theirs.parametrizations.weight.original.copy_(layer.weight)
        theirs.bias.copy_(layer.bias)
        theirs.parametrizations.weight[0]._power_method(layer.weight, 500)
    for _ in range(500):
        layer.before_step(torch.ones(()))
        layer.divided()
    assert torch.linalg.matrix_norm(layer.divided(), 2).item() == pytest.approx(1, abs=1e-5)
    x = torch.randn(3, 7)
    for module in (layer, theirs):
        module(x).square().sum().backward()
    torch.testing.assert_close(
        layer.weight.grad, theirs.parametrizations.weight.original.grad, rtol=1e-4, atol=1e-5
    )


def test_a_gan_is_measured_by_the_modes_it_finds() -> None:
    task = gan("hinge")
    centres, half = task.data.centres, len(task.data.centres) // 2
    assert task.describe({"samples": centres.repeat(10, 1).double()}) == {"modes": 8.0, "good": 1.0}
    assert task.describe({"samples": torch.cat((centres[:half], centres[:half] + 9)).double()}) == {
        "modes": 4.0,
        "good": 0.5,
    }


def test_gans_refuse_what_does_not_fit() -> None:
    wrong = {
        "model.generator.classes=0: the task needs 8": lambda: gan("hinge", conditional=True),
        "task.loss=best is unknown: use non_saturating, hinge, wgan_gp": lambda: gan("best"),
        "has generator and discriminator|trains generator and discriminator": lambda: GAN(
            transformer(), Ring(), SIZES
        ),
        "makes \\(1, 4, 4\\), the samples of squares are \\(1, 8, 8\\)": lambda: GAN(
            {
                "generator": partial(ConvGenerator, 6, 1, 4, width=16),
                "discriminator": partial(ConvNet, 1, 8, width=16),
            },
            prepared(Squares()),
            SIZES,
        ),
        "width=20 of a model must be a multiple of 8": lambda: ConvNet(1, 8, width=20),
        "stages=2: 10 pixels cannot be halved": lambda: ConvNet(1, 10, stages=2),
    }
    for message, make in wrong.items():
        with pytest.raises(ValueError, match=message):
            make()


# Augmentation.


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(MARK_IDS, 255), min_size=1, max_size=50),
    st.integers(1, 40),
    st.integers(0, 9),
)
def test_changes_of_texts_keep_what_they_should(ids: list[int], room: int, seed: int) -> None:
    text, hidden = torch.tensor(ids), 1
    for change in (TokenDrop(0.3), SpanMask(0.4), TextCrop()):
        made, again = (change(text, room, hidden, generator(seed, 1)) for _ in range(2))
        assert torch.equal(made, again) and len(made) >= 1
        if isinstance(change, SpanMask):
            changed = made != text
            assert len(made) == len(text) and bool((made[changed] == hidden).all())
            assert changed.sum() <= 0.4 * min(len(text), room)
        elif isinstance(change, TextCrop):
            assert any(torch.equal(text[i : i + len(made)], made) for i in range(len(text)))
            assert len(made) == min(room, len(text))
        else:
            left = iter(text.tolist())
            assert all(token in left for token in made.tolist())  # the same order


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 9), st.integers(3, 9), st.integers(0, 9))
def test_changes_of_images_keep_their_shape_and_range(height: int, width: int, seed: int) -> None:
    pixels = torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    for change in (Crop(1), Flip(1.0 - 1e-9), Cutout(2)):
        made, again = (change(pixels, generator(seed, 2)) for _ in range(2))
        assert torch.equal(made, again) and made.shape == pixels.shape and made.abs().max() <= 1
    assert torch.equal(Flip(1.0 - 1e-9)(pixels, generator(0)), pixels.flip(-1))
    images, targets = pixels[:, None], torch.eye(2)
    mixed, shares = Mixup(1.0).mix(images, targets, generator(seed, 3))
    assert mixed.shape == images.shape and torch.allclose(shares.sum(1), torch.ones(2))
    assert mixed.min() >= images.min() - 1e-6 and mixed.max() <= images.max() + 1e-6


def test_changes_are_of_the_seed_the_step_and_the_sample() -> None:
    task = Classification(
        transformer(outputs=6), rows_of_made(), SIZES, augment={"drop": TokenDrop(0.5)}
    )
    again = Classification(
        transformer(outputs=6), rows_of_made(), SIZES, augment={"drop": TokenDrop(0.5)}
    )
    assert torch.equal(task.batch(4)["tokens"], again.batch(4)["tokens"])
    plain = Classification(transformer(outputs=6), rows_of_made(), SIZES)
    assert not torch.equal(task.batch(4)["tokens"], plain.batch(4)["tokens"])
    held_out = [list(each.validation())[0]["tokens"] for each in (task, plain)]
    assert torch.equal(*held_out)  # never in evaluation


def test_hidden_tokens_are_no_targets_of_a_language_model() -> None:
    task = CausalLM(
        transformer(causal=True),
        text_of_rows(),
        SIZES,
        augment={"mask": SpanMask(0.5), "drop": TokenDrop(0.3)},
    )
    batch, marks = task.batch(0), Bytes().marks
    assert (batch["tokens"] == marks.hidden).any() and not (batch["targets"] == marks.hidden).any()
    assert (batch["targets"] == IGNORE).any() and batch["tokens"].min() >= 0


def test_a_task_of_one_s_own_stands_in_one_file(tmp_path: Path) -> None:
    """As docs/tasks.md says to type it; it learns, and two ranks learn the same."""
    losses = {}
    for strategy, ranks in (("single", 1), ("fsdp", 2)):
        command = [
            sys.executable,
            "scripts/train.py",
            "task._target_=reverse.Reverse",
            "model=tiny",
            f"strategy={strategy}",
            "steps=12",
            f"launch.nproc={ranks}",
            f"hydra.run.dir={tmp_path / strategy}",
        ]
        ended = warm.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "examples"})
        assert ended.returncode == 0, ended.stderr
        lines = map(json.loads, (tmp_path / strategy / "metrics.jsonl").read_text().splitlines())
        losses[strategy] = [line["loss"] for line in lines]
    assert (
        losses["fsdp"] == pytest.approx(losses["single"], rel=1e-5)
        and losses["single"][-1] < losses["single"][0] - 0.5
    )


def test_fine_tuning_begins_with_what_fits(tmp_path: Path) -> None:
    """Under another strategy, and says what is new; a checkpoint of which nothing fits is
    refused in one line.
    """

    def run(*settings: str) -> warm.Ended:
        return warm.run(
            [sys.executable, "scripts/train.py", "steps=4", "eval.every=0", *settings], cwd=ROOT
        )

    before = tmp_path / "before"
    made = run(
        "task=masked_lm",
        "model=tiny",
        "strategy=fsdp",
        "launch.nproc=2",
        "checkpoint.every=4",
        f"hydra.run.dir={before}",
    )
    assert made.returncode == 0, made.stderr
    tune = (
        "task=classification",
        "model=tiny",
        f"init_from={before}",
        f"hydra.run.dir={tmp_path / 'after'}",
        "overwrite=true",
    )
    first = {}
    for chosen in (
        ("strategy=zero1", "launch.nproc=2"),
        ("strategy=single",),
        ("strategy=single", "init_from=null"),
    ):
        tuned = run(*tune, *chosen)
        assert tuned.returncode == 0, tuned.stderr
        assert ("new: model.head.output.bias, model.head.output.weight" in tuned.stdout) == (
            "init_from=null" not in chosen
        )
        first[chosen] = json.loads(
            (tmp_path / "after" / "metrics.jsonl").read_text().splitlines()[0]
        )["loss"]
    one, other, nothing = first.values()
    assert one == pytest.approx(other, rel=1e-5) and one != pytest.approx(nothing, rel=1e-5)
    wrong = run(*tune, "task=image_classification", "data=digits", "model=convnet")
    assert wrong.returncode == 2 and "nothing in" in wrong.stderr and wrong.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "task=gan data=stdlib",
            "task GAN takes Samples, and data=stdlib are Text: choose other data",
        ),
        ("task=masked_lm data=functions", "task MaskedLM takes Text, and data=functions are Rows"),
        (
            "task=classification +task/augment=[flip]",
            "task.augment.flip: Flip is no change of texts",
        ),
        ("task=image_classification +task/augment=[span_mask]", "SpanMask is no change of images"),
        (
            "task=image_classification model.outputs=3",
            "model.outputs=3: the images have 10 classes",
        ),
        (
            "task=image_classification model.channels=3",
            r"the model does not take images of \(1, 8, 8\)",
        ),
        (
            "task=gan task.conditional=true",
            r"model.generator.classes=0: the task needs 8 \(task.conditional=true\)",
        ),
        ("task=gan data=digits", r"the models do not take samples of \(1, 8, 8\)"),
        ("task=span_qa data=functions", "has no field 'context', only text, label, file"),
    ],
)
def test_what_does_not_go_together_is_said_in_a_line(
    overrides: str, message: str, tmp_path: Path
) -> None:
    register()
    with (
        mock.patch.dict(os.environ, DTRAIN_CACHE=str(tmp_path)),
        initialize_config_dir(str(CONFIGS), version_base="1.3"),
        pytest.raises(ValueError, match=message) as caught,
    ):
        task_of(validated(compose("train", overrides.split())), shown=False)
    assert "\n" not in str(caught.value)


class Sorted(Squares):
    """The same, one class after the other, as folders have them."""

    def read(self, progress: Any) -> tuple[Tensor, Tensor]:
        values, labels = super().read(progress)
        order = labels.argsort(stable=True)
        return values[order], labels[order]


def test_images_are_evaluated_of_every_class() -> None:
    data = prepared(Sorted(validation_fraction=0.5))
    task = ImageClassification({"model": partial(ConvNet, 1, 8, 2, width=16)}, data, SIZES)
    seen = torch.cat([batch["targets"] for batch in task.validation()]).sum(0)
    assert (
        seen.min() >= 3
        and task.summary
        == f"trains on {len(data.split['train'][0])} of {len(data.split['train'][0])} images"
    )
    with pytest.raises(ValueError, match="task.examples=0 must be at least 1"):
        ImageClassification({"model": partial(ConvNet, 1, 8, 2, width=16)}, data, SIZES, examples=0)
    with pytest.raises(ValueError, match="task.examples=-5 must be at least 1"):
        Classification(transformer(outputs=6), rows_of_made(), SIZES, examples=-5)


def test_an_averaged_generator_has_its_leader_s_buffers() -> None:
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "generator": MLP(4, 2, 8, spectral=True),
        "average": MLP(4, 2, 8, spectral=True),
    }
    for _ in range(20):
        move_towards(models, leader="generator", follower="average", stays=0.5)
    noise = torch.randn(5, 4)
    torch.testing.assert_close(
        models["average"](noise), models["generator"](noise), rtol=1e-3, atol=1e-3
    )


def test_words_and_marks_of_another_s_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {
        t: i
        for i, t in enumerate(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "play", "##ing", "."]
        )
    }
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.save(str(tmp_path / "tokenizer.json"))
    found = FromFile(str(tmp_path), 9)
    assert (found.marks.end, found.marks.hidden, found.marks.first, found.marks.between) == (
        0,
        4,
        2,
        3,
    )
    ids = found.encode("the playing.")
    begins, ends = found.words()
    starts = [True, *(not (b and e) for b, e in zip(begins[ids[1:]], ends[ids[:-1]], strict=True))]
    assert ids.tolist() == [5, 6, 7, 8] and starts == [True, True, False, True]
    with pytest.raises(ValueError, match="no mark for no, yes, which pairs needs"):
        found.require_marks("hidden", "yes", "no", reason="pairs")
    with pytest.raises(ValueError, match=r"data.tokenizer.vocab_size=5: .* has 9 ids"):
        FromFile(str(tmp_path), 5)


def test_pictures_of_other_kinds_keep_what_they_show() -> None:
    deep = Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    assert (
        to_tensor(deep, 8, True).flatten().diff().min() >= 0
        and to_tensor(deep, 8, True).unique().numel() > 50
    )
    clear = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    assert to_tensor(clear, 8, False).max() == -1
    with pytest.raises(ValueError, match="mode F has values without a known range"):
        to_tensor(Image.new("F", (8, 8)), 8, True)


# Which text, and what of it.


@pytest.mark.parametrize("kind", [CausalLM, MaskedLM])
def test_what_is_trained_on_and_what_is_held_out_are_of_their_own_texts(kind: type[Task]) -> None:
    """Each row of a batch stands so in the documents of its side, with what it asks for put in."""
    data = text_of_rows()
    task: Any = kind(transformer(causal=kind is CausalLM), data, SIZES)
    texts = {side: bytes(data.corpus.tokens(side)) for side in ("train", "validation")}
    rows = {"train": [task.batch(step) for step in range(3)], "validation": list(task.validation())}
    for side, batches in rows.items():
        for batch in batches:
            counts = batch["targets"] != IGNORE
            if kind is CausalLM:
                found = torch.cat((batch["tokens"], batch["targets"][:, -1:]), dim=1)
            else:
                found = torch.where(counts, batch["targets"], batch["tokens"])[:, 1:]
            for row in map(bytes, found[counts.any(1)].tolist()):
                assert len(row) >= LENGTH - 1 and row in texts[side]
    assert texts["train"] != texts["validation"]


@pytest.mark.parametrize("pairs", [None, "next_sentence", "sentence_order"])
def test_the_perplexity_of_knowing_nothing_is_the_vocabularys_size(pairs: str | None) -> None:
    """Of masked tokens and of next ones; where all is known it is 1."""
    data = text_of_rows()
    masked = MaskedLM(transformer(segments=2), data, SIZES, pairs=pairs)
    for task in (masked, CausalLM(transformer(causal=True), data, SIZES)):
        (update,), batch = task.updates, task.batch(0)
        logits = torch.full((*batch["targets"].shape, 256), 0.7, dtype=torch.float64)
        found = task.describe(update.measured(logits, batch))
        assert found["perplexity"] == pytest.approx(256, rel=TOLERANCE)
        assert found["loss"] == pytest.approx(8 * math.log(2), rel=TOLERANCE)
        right = 1e3 * torch.nn.functional.one_hot(batch["targets"].clamp(min=0), 256)
        known = task.describe(update.measured(logits + right, batch))
        assert known["perplexity"] == known["accuracy"] == 1


def seen_at(model: Transformer, tokens: Tensor, place: int) -> set[int]:
    """The places of the tokens on which it depends what a model says at this place."""
    kept: list[Tensor] = []
    hook = model.embedding.register_forward_hook(lambda module, given, output: kept.append(output))
    said = model(tokens[None])[0, place]
    hook.remove()
    (slope,) = torch.autograd.grad(said.square().sum(), kept[0])
    return set(slope[0].abs().sum(-1).nonzero().flatten().tolist())


@pytest.mark.parametrize("causal", [False, True])
def test_a_label_is_asked_for_where_all_of_the_text_is_seen(causal: bool) -> None:
    """At one mark; a model that sees one side only is asked at the end."""
    models = transformer(outputs=6, causal=causal)
    task, model = Classification(models, rows_of_made(), SIZES), models["model"]()
    for where, row in list(task.data.all())[:3]:
        made = task.encode(where, row, None)
        (place,) = (made["targets"] != IGNORE).nonzero().flatten().tolist()
        text = (made["tokens"] >= MARK_IDS).nonzero().flatten().tolist()
        assert bytes(made["tokens"][text].tolist()).decode() == row["text"][: LENGTH - 1]
        assert set(text) <= seen_at(model, made["tokens"], place)
        assert made["tokens"][place] == Bytes().marks.first
        assert task.classes[made["targets"][place]] == row["label"]


@pytest.mark.parametrize("causal", [False, True])
def test_a_tag_is_asked_for_where_all_of_its_word_is_seen(causal: bool) -> None:
    """Once for each word that has room, in their order."""
    models = transformer(outputs=6, causal=causal)
    task, model = TokenClassification(models, rows_of_made(), SIZES), models["model"]()
    for where, row in list(task.data.all())[:3]:
        made, end = task.encode(where, row, None), 1
        places = (made["targets"] != IGNORE).nonzero().flatten().tolist()
        assert 2 < len(places) <= len(row["words"])
        for place, word, tag in zip(places, row["words"], row["tags"], strict=False):
            begin = end + (end > 1)  # after a blank
            end = begin + len(word)
            assert bytes(made["tokens"][begin:end].tolist()).decode() == word
            assert {place} <= set(range(begin, end)) <= seen_at(model, made["tokens"], place)
            assert task.classes[made["targets"][place]] == tag


spans = st.tuples(st.integers(0, 7), st.integers(0, 7))


@cache
def questions() -> SpanQA:
    return SpanQA(transformer(outputs=2), rows_of_made(), SIZES)


@given(st.lists(st.tuples(spans, spans.map(sorted)), min_size=1, max_size=9))
def test_answers_are_scored_by_the_tokens_that_they_share(pairs: list[Any]) -> None:
    """By sets of places: 2 |both| / (|said| + |true|); one that ends before it begins has none."""
    said, true = zip(*pairs, strict=True)
    outputs = torch.nn.functional.one_hot(torch.tensor(said), 8).transpose(1, 2).float()
    task = questions()
    found = task.updates[0].measured(outputs, {"targets": torch.tensor(true)})
    f1 = 0.0
    for (begin, end), (first, last) in pairs:
        ours, theirs = set(range(begin, end + 1)), set(range(first, last + 1))
        f1 += 2 * len(ours & theirs) / (len(ours) + len(theirs))
    assert found["f1"].item() == pytest.approx(f1, rel=1e-6)
    assert found["exact"].item() == sum(tuple(one) == tuple(other) for one, other in pairs)
    assert task.describe(found)["f1"] == pytest.approx(f1 / len(pairs), rel=1e-6)


def test_each_update_of_a_discriminator_sees_samples_of_its_own() -> None:
    """In an epoch each real sample is seen once, with its own class."""
    task = gan("hinge", discriminator_steps=3)
    (values, _), batches = task.data.split["train"], [task.batch(step) for step in range(4)]
    seen = torch.cat([batch[f"real{index}"] for batch in batches for index in range(3)])
    labels = torch.cat([batch[f"labels{index}"] for batch in batches for index in range(3)])
    assert len(seen) == 4 * 3 * ROWS <= len(values)
    drawn = {tuple(point) for point in seen.tolist()}
    assert len(drawn) == len(seen) and drawn <= {tuple(point) for point in values.tolist()}
    assert torch.equal(torch.cdist(seen, task.data.centres).argmin(1), labels)
    noises = torch.cat([batch[f"noise{index}"] for batch in batches for index in range(3)])
    assert len(noises.unique(dim=0)) == len(noises)
