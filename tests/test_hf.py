"""Models of `transformers` under our strategies: their logits, one process's curve, and a
layout where one is needed.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import (
    CONTEXT,
    STRATEGIES,
    TASKS,
    VOCAB,
    Case,
    NextToken,
    Outcome,
    assert_equal,
    refusal,
    train,
    trainer,
)
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from test_accelerate import KNOWN as ACCELERATED
from test_deepspeed import KNOWN as DEEPSPED
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from dtrain.model.hf import HuggingFace

CONFIGS = Path(__file__).parent.parent / "configs" / "model"
TOLERANCE = 1e-5  # relative, in fp32
GPT2 = dict(
    vocab_size=VOCAB,
    n_positions=CONTEXT,
    n_embd=24,
    n_layer=2,
    n_head=4,
    bos_token_id=1,
    eos_token_id=1,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
LLAMA = dict(
    vocab_size=VOCAB,
    max_position_embeddings=CONTEXT,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
)
BERT = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=CONTEXT,
)
MODELS: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
}
ANY = (
    "ddp",
    "fsdp",
    "deepspeed zero0",
    "deepspeed zero1",
    "deepspeed zero2",
    "deepspeed zero3",
    "accelerate_ddp",
    "accelerate_zero2",
)
CUTTING = ("tensor", "tensor_sequence", "1f1b", "ring", "ulysses", "fsdp")


def layout_of(kind: str) -> dict[str, Any]:
    found = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"hf_{kind}.yaml").layout)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models with their weights, as `save_pretrained` leaves them."""
    made = {}
    for kind, make in MODELS.items():
        torch.manual_seed(3)
        made[kind] = str(tmp_path_factory.mktemp(kind))
        make().save_pretrained(made[kind])
    return made


class Theirs(NextToken):
    """The next token, by a model that a folder has."""

    def __init__(self, folder: str = "", kind: str = "", **_: Any) -> None:
        super().__init__()
        self.models = {
            "model": partial(HuggingFace, folder, layout=layout_of(kind) if kind else None)
        }


def trained(case: Case, size: int) -> Outcome:
    with (
        mock.patch.dict(STRATEGIES, {**DEEPSPED, **ACCELERATED}),
        mock.patch.dict(TASKS, theirs=Theirs),
    ):
        return train(case, size)


def case_of(strategy: str, folder: str, kind: str = "") -> Case:
    return Case("theirs", strategy, "fp32", steps=6, model=(("folder", folder), ("kind", kind)))


def assert_like(found: Outcome, expected: Outcome) -> None:
    """All but the biases of keys: softmax takes them out, so their gradient is rounding, of
    which Adam makes steps.
    """
    found.gradients = expected.gradients  # engines let go of them
    for name in [n for n in expected.weights if "c_attn" in n and "bias" in n]:
        found.weights[name] = expected.weights[name]
    assert_equal(found, expected, TOLERANCE)


@pytest.mark.parametrize("kind", MODELS)
def test_its_logits_are_theirs_with_a_layout_and_without(
    kind: str, folders: dict[str, str]
) -> None:
    theirs = MODELS[kind]().from_pretrained(folders[kind]).eval()
    tokens = torch.randint(0, VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        for layout in (None, layout_of(kind)):
            ours = HuggingFace(folders[kind], layout=layout).eval()
            torch.testing.assert_close(ours(tokens), expected)
            assert sum(p.numel() for p in ours.parameters()) == sum(
                p.numel() for p in theirs.parameters()
            )
            assert (ours.vocab_size, ours.context) == (VOCAB, CONTEXT)


QUICK = {
    "gpt2": [("ddp", "deepspeed zero3"), ("tensor", "1f1b")],
    "llama": [("fsdp",), ("tensor_sequence", "ring")],
}


@pytest.mark.parametrize(("kind", "any_model", "cutting"), [
    *((kind, *QUICK[kind]) for kind in MODELS),
    *(pytest.param(kind, ANY, CUTTING, marks=pytest.mark.deep) for kind in MODELS),
], ids=lambda v: v if isinstance(v, str) else str(len(v)))  # fmt: skip
def test_every_strategy_trains_it_as_one_process_does(
    kind: str,
    any_model: tuple[str, ...],
    cutting: tuple[str, ...],
    folders: dict[str, str],
    worlds_with_engines,
) -> None:
    for names, layout in ((any_model, ""), (cutting, kind)):
        expected = worlds_with_engines(2).run(trained, case_of("single", folders[kind], layout), 1)[
            0
        ]
        for name in names:
            for found in worlds_with_engines(2).run(
                trained, case_of(name, folders[kind], layout), 2
            ):
                assert_like(found, expected)


@pytest.mark.deep
def test_four_ranks_cut_it_two_ways(folders: dict[str, str], worlds_with_engines) -> None:
    expected = worlds_with_engines(2).run(trained, case_of("single", folders["llama"], "llama"), 1)[
        0
    ]
    for name in ("fsdp_tensor", "pipeline_tensor"):
        for found in worlds_with_engines(4).run(
            trained, case_of(name, folders["llama"], "llama"), 4
        ):
            assert_like(found, expected)


def shapes_beside_zero3(case: Case, folder: str, size: int) -> set[tuple[int, ...]]:
    with mock.patch.dict(STRATEGIES, ACCELERATED), mock.patch.dict(TASKS, theirs=Theirs):
        made = trainer(case, size)
    shapes = {tuple(parameter.shape) for parameter in HuggingFace(folder).parameters()}
    del made
    return shapes


def test_a_model_made_beside_an_engine_is_whole(
    folders: dict[str, str], worlds_with_engines
) -> None:
    """Accelerate tells transformers of DeepSpeed's ZeRO 3, for the whole process."""
    for shapes in worlds_with_engines(2).run(
        shapes_beside_zero3, case_of("accelerate_zero3", folders["gpt2"]), folders["gpt2"], 2
    ):
        assert (0,) not in shapes and len(shapes) > 3


def of_a_rank(strategy: str, folders: list[str]) -> str:
    """What comes of it where each rank has a folder of its own."""
    try:
        trained(case_of(strategy, folders[dist.get_rank()]), len(folders))
    except ValueError as error:
        return str(error)
    return ""


def test_machines_whose_folders_have_other_weights_are_told_apart(
    folders: dict[str, str], tmp_path: Path, worlds_with_engines
) -> None:
    """Whose configurations are alike."""
    other = GPT2LMHeadModel.from_pretrained(folders["gpt2"])
    other.transformer.h[1].ln_2.weight.data[0] += 1
    other.save_pretrained(tmp_path)
    for said in worlds_with_engines(2).run(of_a_rank, "ddp", [folders["gpt2"], str(tmp_path)]):
        assert (
            "ln_2.weight of HuggingFace begins with other values on rank 1 than on rank 0" in said
        )


def test_random_weights_from_a_configuration_are_of_the_seed(
    folders: dict[str, str], tmp_path: Path
) -> None:
    LlamaConfig(**LLAMA).save_pretrained(tmp_path)
    drawn = []
    for place in (tmp_path, tmp_path / "config.json", tmp_path):
        torch.manual_seed(5)
        drawn.append(HuggingFace(str(place), config={"vocab_size": 64}))
    first, *others = ([p.detach() for p in model.parameters()] for model in drawn)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    assert drawn[0].vocab_size == 64


def test_without_a_layout_what_cuts_is_refused_in_one_line(folders: dict[str, str]) -> None:
    with mock.patch.dict(TASKS, theirs=Theirs):
        said = {
            name: refusal(case_of(name, folders["gpt2"]), 2) for name in ("tensor", "1f1b", "ring")
        }
    for line in said.values():
        assert "Layout" in line and "\n" not in line


def test_mistakes_take_one_line(folders: dict[str, str], tmp_path: Path) -> None:
    wrong = {
        "it takes": dict(layout={"token": "transformer.wte"}),
        "has no module transformer.g": dict(layout=layout_of("gpt2") | {"blocks": "transformer.g"}),
    }
    for message, settings in wrong.items():
        with pytest.raises(ValueError, match=message) as error:
            HuggingFace(folders["gpt2"], **settings)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="has no weights"):
        HuggingFace(str(tmp_path), pretrained=True) if LlamaConfig(**LLAMA).save_pretrained(
            tmp_path
        ) is None else None
    with pytest.raises(ValueError, match="model.name_or_path=") as error:
        HuggingFace(str(tmp_path / "nothing.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pretrained", [None, True])
def test_weights_in_pickles_are_not_read(
    pretrained: bool | None, folders: dict[str, str], tmp_path: Path
) -> None:
    """Nor is another model trained than the one in the folder: it is said what to do."""
    folder = shutil.copytree(folders["gpt2"], tmp_path / "gpt2")
    with mock.patch("torch.load", side_effect=AssertionError("a pickle is read")):
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        with pytest.raises(
            ValueError, match=r"gpt2: its weights \(pytorch_model.bin\) are pickles"
        ) as error:
            HuggingFace(str(folder), pretrained=pretrained)
        assert "\n" not in str(error.value)
        assert "drawn" in HuggingFace(str(folder), pretrained=False).origin
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        assert "weights of" in HuggingFace(str(folder), pretrained=pretrained).origin


@pytest.mark.parametrize("causal", [False, True])
def test_a_bert_or_gpt_folder_becomes_a_classifier(
    causal: bool, folders: dict[str, str], tmp_path: Path
) -> None:
    """Its body is theirs, its head is new and named so."""
    if causal:
        folder = folders["gpt2"]
    else:
        folder, config = str(tmp_path), BertConfig(**BERT)
        BertModel(config).save_pretrained(folder)
    made = HuggingFace(folder, causal=causal, outputs=5).eval()
    assert made.origin.endswith("new: classifier.bias, classifier.weight")
    tokens = torch.randint(1, VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(0))
    inner: Any = made.inner
    body = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = body(input_ids=tokens).last_hidden_state
        torch.testing.assert_close(made(tokens), inner.classifier(hidden))
    assert (made.causal, made.outputs) == (causal, 5)


class Tagged(Theirs):
    """The class of each token, by a BERT that a folder has."""

    def __init__(self, folder: str = "", **_: Any) -> None:
        super().__init__()
        self.models = {
            "model": partial(
                HuggingFace,
                folder,
                causal=False,
                outputs=VOCAB,
                config={
                    "hidden_dropout_prob": 0.0,
                    "attention_probs_dropout_prob": 0.0,
                    "classifier_dropout": 0.0,
                },
            )
        }


def tagged(case: Case, size: int) -> Outcome:
    with (
        mock.patch.dict(STRATEGIES, {**DEEPSPED, **ACCELERATED}),
        mock.patch.dict(TASKS, tagged=Tagged),
    ):
        return train(case, size)


def test_strategies_fine_tune_a_bert_as_one_process_does(
    tmp_path: Path, worlds_with_engines
) -> None:
    torch.manual_seed(4)
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    made = (("folder", str(tmp_path)),)
    expected = worlds_with_engines(2).run(
        tagged, Case("tagged", "single", "fp32", steps=4, model=made), 1
    )[0]
    for name in ("fsdp", "deepspeed zero2"):
        for found in worlds_with_engines(2).run(
            tagged, Case("tagged", name, "fp32", steps=4, model=made), 2
        ):
            found.gradients = expected.gradients
            # softmax takes it out: rounding
            for key in [key for key in expected.weights if "key.bias" in key]:
                found.weights[key] = expected.weights[key]
            assert_equal(found, expected, TOLERANCE)


def masked_models() -> dict[str, Any]:
    """Encoders of transformers, with their mark for padding."""
    shifted = RobertaConfig(**BERT | {"max_position_embeddings": CONTEXT + 2}, pad_token_id=1)
    return {"bert": BertForMaskedLM(BertConfig(**BERT)), "roberta": RobertaForMaskedLM(shifted)}


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_gives_their_logits_however_long_its_row_is(kind: str, tmp_path: Path) -> None:
    """Positions begin where theirs do, and what a text is padded with is not seen."""
    torch.manual_seed(6)
    theirs = masked_models()[kind].eval()
    theirs.save_pretrained(tmp_path)
    ours, padding = HuggingFace(str(tmp_path), causal=False).eval(), theirs.config.pad_token_id
    tokens = torch.randint(2, VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits)
        for length in (1, 5, CONTEXT - 1):
            padded = tokens.clone()
            padded[:, length:] = padding
            expected = theirs(tokens[:, :length]).logits
            torch.testing.assert_close(ours(padded)[:, :length], expected)
    assert (ours.vocab_size, ours.context) == (VOCAB, CONTEXT)


def test_code_that_comes_with_a_models_files_is_not_run(tmp_path: Path) -> None:
    """Neither asked for, nor by what the folder itself says; nobody is asked at the terminal."""
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n" + "class Evil: pass\n" * 2
    )
    (tmp_path / "config.json").write_text(
        json.dumps(
            GPT2
            | {
                "model_type": "evil",
                "architectures": ["Evil"],
                "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
            }
        )
    )
    with pytest.raises(ValueError, match=f"model.name_or_path={tmp_path}: ") as found:
        HuggingFace(str(tmp_path))
    assert "\n" not in str(found.value)
    for key in ("trust_remote_code", "auto_map"):
        with pytest.raises(
            ValueError,
            match=f"model.config.{key}=.*code that comes with a model's files is not run",
        ):
            HuggingFace(str(tmp_path), config={key: True})
    assert not (tmp_path / "ran").exists()
