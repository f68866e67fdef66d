"""What training may not see, and what counts: parts of a corpus, tokenizers, windows, filling."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dtrain.data.prepare import Corpus, normalize, prepare
from dtrain.data.sources import Files
from dtrain.data.tokenizer import BPE, MARK_IDS, Bytes, Tokenizer
from dtrain.data.windows import Windows
from dtrain.task import image_classification, span_qa
from dtrain.task.base import Sizes, Supervised
from dtrain.task.causal_lm import (
    IGNORE,
    CausalLM,
    count_correct,
    count_targets,
    cross_entropy,
    pad_batch,
)
from dtrain.task.classifier import token_confusion

VOCAB = 420  # ids: enough for words that stand in one document only
EPOCHS = 150  # so many that each of a few offsets is drawn
ROUNDING = 1e-12  # of sums in fp64
TEXTS = [f"{number} " + f"text{number} of words " * 30 for number in range(3)]


def prepared(folder: Path, texts: list[str], made: Tokenizer, fraction: float = 0.05) -> Corpus:
    """These documents as a corpus."""
    (folder / "texts").mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number:03}.txt").write_text(text)
    source = Files(str(folder / "texts"))
    return prepare("test", source, made, folder / "cache", validation_fraction=fraction)


def parts(corpus: Corpus) -> tuple[list[int], list[int]]:
    """The tokens of training, and those held out."""
    train, validation = (corpus.tokens(split).tolist() for split in ("train", "validation"))
    return train, validation


# Few documents


@pytest.mark.parametrize("fraction", [0.05, 0.95])
@pytest.mark.parametrize("tokenizer", [Bytes, lambda: BPE(VOCAB)], ids=["bytes", "bpe"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_documents_that_are_all_on_one_side_are_cut_in_two(
    number: int, tokenizer: Callable[[], Tokenizer], fraction: float, tmp_path: Path
) -> None:
    """Training has the beginning, validation the end: together each token once, ends included."""
    made = tokenizer()
    corpus = prepared(tmp_path, TEXTS[:number], made, fraction)
    ends = [[*made.encode(normalize(text)).tolist(), made.marks.end] for text in TEXTS[:number]]
    every = sum(ends, [])
    train, validation = parts(corpus)
    assert (corpus.train_tokens, corpus.validation_tokens) == (len(train), len(validation))
    if isinstance(made, Bytes):
        assert train + validation == every
        assert len(validation) == int(fraction * len(every)) > 0
    assert made.decode(train) + made.decode(validation) == "".join(map(normalize, TEXTS[:number]))
    assert (train + validation).count(made.marks.end) == corpus.documents == number


@pytest.mark.parametrize("text", ["a", "ab", "abc\n" * 5])
def test_the_shortest_text_leaves_a_token_for_each_part(text: str, tmp_path: Path) -> None:
    train, validation = parts(prepared(tmp_path, [text], Bytes()))
    assert bytes(train + validation) == normalize(text).encode() + b"\0" and len(validation) == 1


def test_copies_of_one_document_are_one_document(tmp_path: Path) -> None:
    """Also where they differ in what cleaning takes away: no copy is in the other part."""
    copies = [TEXTS[0], TEXTS[0] + "  \r\n", TEXTS[0].replace(" ", " \x07"), " \x07\n"]
    several = prepared(tmp_path / "several", copies, Bytes())
    one = prepared(tmp_path / "one", copies[:1], Bytes())
    assert (several.documents, several.duplicates, several.left_out["empty documents"]) == (1, 2, 1)
    assert (one.documents, one.duplicates) == (1, 0)
    assert parts(several) == parts(one) and several.digest == one.digest


# What a tokenizer learns from


def own_word(number: int) -> str:
    """Eight letters that no other number has."""
    return "".join("abcdefghijklmnop"[(number >> shift) % 16] for shift in (4, 0)) * 4


MANY = [f"{own_word(number)} " * 60 for number in range(40)]


def test_a_tokenizer_learns_from_the_training_documents_alone(tmp_path: Path) -> None:
    """Each document repeats a word of its own: those of training are learned, no other is."""
    known = prepared(tmp_path / "bytes", MANY, Bytes(), 0.3)
    sides = [bytes(part).decode().split("\0")[:-1] for part in parts(known)]
    made, alone = BPE(VOCAB), BPE(VOCAB)
    corpus = prepared(tmp_path / "bpe", MANY, made, 0.3)
    assert [made.decode(part) for part in parts(corpus)] == ["".join(side) for side in sides]

    words = [{text.split()[0] for text in side} for side in sides]
    learned = {made.decode([i]).strip() for i in range(MARK_IDS, VOCAB)}
    assert len(words[0]) > 20 and learned > words[0]
    assert len(words[1]) > 5 and not learned & words[1]
    alone.fit(iter(sides[0]), tmp_path)
    files = Path(corpus.folder) / BPE.FILE, tmp_path / BPE.FILE
    kept, expected = (json.loads(file.read_text())["model"]["vocab"] for file in files)
    assert kept.keys() == expected.keys()


# Windows


@given(st.integers(30, 400), st.integers(1, 9), st.integers(0, 3), st.integers(0, 5))
def test_an_epoch_has_no_target_twice(size: int, seq_len: int, epoch: int, seed: int) -> None:
    """And all tokens but the first are one, but for fewer than two rows' worth at its ends."""
    windows = Windows(np.arange(size, dtype=np.uint16), seq_len=seq_len, seed=seed)
    rows = windows.batch(epoch, windows.per_epoch).tolist()
    targets = [token for row in rows for token in row[1:]]
    assert len(targets) == len(set(targets)) and size - 1 - len(targets) < 2 * seq_len
    assert all(row == list(range(row[0], row[0] + seq_len + 1)) for row in rows)


def test_what_one_epoch_cuts_off_at_the_beginning_another_reads() -> None:
    """And at the end: every offset comes, so that every token but the first is a target; rows
    come in other orders.
    """
    windows = Windows(np.arange(65, dtype=np.uint16), seq_len=8, seed=1)
    epochs = [windows.batch(epoch, windows.per_epoch) for epoch in range(EPOCHS)]
    rows = [batch[:, 0].tolist() for batch in epochs]
    assert {min(row) for row in rows} == set(range(9))
    assert {target for batch in epochs for target in batch[:, 1:].flatten().tolist()} == set(
        range(1, 65)
    )
    assert len({tuple(x - min(row) for x in row) for row in rows}) > EPOCHS / 2


def test_an_evaluation_of_all_has_every_token_of_a_whole_row_as_a_target_once() -> None:
    windows = Windows(np.arange(100, dtype=np.uint16), seq_len=8, seed=3)
    rows = torch.cat(list(windows.sweep(5, 4)))
    assert rows[:, 1:].flatten().tolist() == list(range(1, 97))


# What counts in a loss


def numbers(tokens: int) -> Any:
    """Data whose tokens are 0, 1, 2 ...: a token's target is one more."""
    made = np.arange(tokens, dtype=np.uint16)
    windows = {"train": made, "validation": made}
    return SimpleNamespace(
        name="numbers",
        tokenizer=Bytes(),
        vocab_size=tokens,
        windows=lambda split, seq_len, seed: Windows(windows[split], seq_len=seq_len, seed=seed),
    )


@pytest.fixture
def language() -> CausalLM:
    """Windows of 7 tokens in batches of 4 rows; 13 rows in all are held out."""
    return CausalLM({"model": lambda: nn.Linear(1, 1)}, numbers(92), Sizes(0, 4, 7, 9))


def test_a_target_is_the_next_token_of_its_row(language: CausalLM) -> None:
    """In training and in evaluation; positions count from the row's begin."""
    batches = [language.batch(step) for step in range(5)] + list(language.validation())
    for batch in batches:
        counts = batch["targets"] != IGNORE
        assert batch["tokens"].shape == batch["targets"].shape == (4, 7)
        assert torch.equal(batch["targets"][counts], batch["tokens"][counts] + 1)
        assert torch.equal(batch["positions"], torch.arange(7).expand(4, 7))
    held_out = torch.cat([batch["targets"][batch["targets"] != IGNORE] for batch in batches[5:]])
    assert held_out.tolist() == list(range(1, 92))


def test_rows_that_fill_up_an_evaluation_have_no_targets(language: CausalLM) -> None:
    """Of 13 rows in fours the last batch has one: the global count is of that alone."""
    batches = list(language.validation())
    assert [int(count_targets(batch)) for batch in batches] == [28, 28, 28, 7]
    counts = batches[-1]["targets"] != IGNORE
    assert counts[0].all() and not counts[1:].any()


TOKENS, KINDS, ROWS = 6, 5, 3


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _measures(logits: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return count_correct(logits, batch) | token_confusion(logits, batch)


OF_TOKENS = Supervised("model", (), cross_entropy, count_targets, _measures)
OF_SPANS = Supervised("model", (), span_qa._criterion, span_qa._count, span_qa._measures)
SPANS = [[1, 3], [2, 2], [0, 5]]
NAMED = [[4, 0, 1, 3, IGNORE, IGNORE], [0, 1, 2, 3, 4, 0], [2, 2, 2, 1, 1, 4]]  # padding in a row


@pytest.mark.parametrize(
    ("update", "targets", "outputs", "counted"),
    [(OF_TOKENS, NAMED, KINDS, 16), (OF_SPANS, SPANS, 2, 3)],
    ids=["tokens", "spans"],
)
def test_what_does_not_count_changes_no_sum_and_gets_no_gradient(
    update: Supervised,
    targets: list[list[int]],
    outputs: int,
    counted: int,
) -> None:
    """The loss is the sum of -log p of what counts, two more rows that fill up are nothing."""
    said, batch = drawn(2, ROWS, TOKENS, outputs), {"targets": torch.tensor(targets)}
    expected = update.measured(said, batch)
    if update is OF_TOKENS:
        logs, share = said.log_softmax(2), 1.0
    else:  # begin and end of a row, half of each
        logs, share = said.log_softmax(1).transpose(1, 2), 0.5
    places = [(r, i, t) for r, row in enumerate(targets) for i, t in enumerate(row) if t >= 0]
    by_hand = -share * sum(float(logs[place]) for place in places)
    assert float(expected["loss"]) == pytest.approx(by_hand, rel=ROUNDING)
    assert expected["count"] == counted

    filled = pad_batch({name: tensor.clone() for name, tensor in batch.items()}, ROWS + 2)
    for seed in (3, 4):
        more = torch.cat((said, drawn(seed, 2, TOKENS, outputs))).requires_grad_()
        found = update.measured(more, filled)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.allclose(value.double(), expected[name].double(), ROUNDING, 0), name
        found["loss"].backward()
        assert more.grad is not None and not more.grad[ROWS:].any() and more.grad[:ROWS].any()
        if update is OF_TOKENS:
            assert not more.grad[0, 4:].any()


def test_images_that_fill_up_count_neither() -> None:
    """Their shares of all classes are zero."""
    module = image_classification
    update = Supervised("model", (), module._criterion, module._count, module._measures)
    targets = torch.eye(KINDS, dtype=torch.float64)[[1, 4, 2]]
    outputs = drawn(5, ROWS + 2, KINDS).requires_grad_()
    expected = update.measured(outputs[:ROWS].detach(), {"targets": targets})
    by_hand = -outputs[:ROWS].detach().log_softmax(1)[targets > 0].sum()
    assert float(expected["loss"]) == pytest.approx(float(by_hand), rel=ROUNDING)
    found = update.measured(outputs, {"targets": torch.cat((targets, torch.zeros(2, KINDS)))})
    for name, value in found.items():
        assert torch.allclose(value.double(), expected[name].double(), ROUNDING, 0), name
    assert found["count"] == ROWS
    found["loss"].backward()
    assert outputs.grad is not None and not outputs.grad[ROWS:].any()


def test_what_a_change_leaves_out_is_no_target() -> None:
    """A row that has lost tokens is filled up with ends, which nothing is to find."""

    def first_four(ids: Tensor, room: int, hidden: int, chance: torch.Generator) -> Tensor:
        return ids[:4]

    language = CausalLM({"model": lambda: nn.Linear(1, 1)}, numbers(92), Sizes(0, 4, 7, 9))
    language.augment = [first_four]
    batch = language.batch(0)
    assert (batch["targets"][:, :3] == batch["tokens"][:, :3] + 1).all()
    assert (batch["targets"][:, 3:] == IGNORE).all()
    assert (batch["tokens"][:, 4:] == Bytes().marks.end).all()
