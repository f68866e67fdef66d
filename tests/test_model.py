"""The Transformer gives the logits of `transformers`' own models when it has their weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from dtrain.model.initialize import materialize
from dtrain.model.layout import blocks_of
from dtrain.model.transformer import Transformer

TOLERANCE = 1e-5  # fp32, a few layers
VOCAB, CONTEXT, WIDTH, LAYERS, HEADS = 67, 16, 48, 3, 4
BERT_NAMES = {
    "attention.self.query": "attention.query", "attention.self.key": "attention.key",
    "attention.self.value": "attention.value", "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "norm1", "intermediate.dense": "feedforward.up",
    "output.dense": "feedforward.down", "output.LayerNorm": "norm2",
}  # fmt: skip


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def copy(model: Transformer, weights: dict[str, Tensor]) -> Transformer:
    names = dict(model.named_parameters())
    assert names.keys() == weights.keys()
    with torch.no_grad():
        for name, value in weights.items():
            names[name].copy_(value)
    return model.eval()


def perturb(model: nn.Module) -> nn.Module:
    """Random values everywhere: zero biases and unit gains would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(VOCAB, (3, CONTEXT))


def test_gpt2_logits_equal_transformers() -> None:
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS
    )
    theirs = perturb(GPT2LMHeadModel(config))
    ours = Transformer(VOCAB, CONTEXT, WIDTH, LAYERS, HEADS, activation="gelu_tanh")
    weights = {
        "embedding.token.weight": theirs.transformer.wte.weight,
        "embedding.position.weight": theirs.transformer.wpe.weight,
    }
    for i, block in enumerate(theirs.transformer.h):
        to = f"blocks.{i}"
        qkv = block.attn.c_attn
        for name, weight, bias in zip(
            ("query", "key", "value"), qkv.weight.T.chunk(3), qkv.bias.chunk(3), strict=True
        ):
            weights |= {
                f"{to}.attention.{name}.weight": weight,
                f"{to}.attention.{name}.bias": bias,
            }
        linear = {
            "attention.output": block.attn.c_proj,
            "feedforward.up": block.mlp.c_fc,
            "feedforward.down": block.mlp.c_proj,
        }
        for name, layer in linear.items():
            weights |= {f"{to}.{name}.weight": layer.weight.T, f"{to}.{name}.bias": layer.bias}
        for name, norm in (("norm1", block.ln_1), ("norm2", block.ln_2)):
            weights |= {f"{to}.{name}.weight": norm.weight, f"{to}.{name}.bias": norm.bias}
    final = theirs.transformer.ln_f
    weights |= {"head.norm.weight": final.weight, "head.norm.bias": final.bias}
    x = tokens()
    torch.testing.assert_close(
        copy(ours, weights)(x), theirs(x).logits, rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_logits_equal_transformers(kv_heads: int) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        intermediate_size=80,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    theirs = perturb(LlamaForCausalLM(config))
    ours = Transformer(
        VOCAB,
        CONTEXT,
        WIDTH,
        LAYERS,
        HEADS,
        n_kv_heads=kv_heads,
        d_ff=80,
        norm="rmsnorm",
        activation="swiglu",
        position="rotary",
        tied=False,
        bias=False,
    )
    weights = llama_weights(theirs)
    for i, layer in enumerate(theirs.model.layers):
        named = {"gate": layer.mlp.gate_proj, "up": layer.mlp.up_proj, "down": layer.mlp.down_proj}
        weights |= {
            f"blocks.{i}.feedforward.{name}.weight": module.weight for name, module in named.items()
        }
    x = tokens()
    torch.testing.assert_close(
        copy(ours, weights)(x), theirs(x).logits, rtol=TOLERANCE, atol=TOLERANCE
    )


def llama_weights(theirs: nn.Module) -> dict[str, Tensor]:
    """All but the feed-forward layers'."""
    weights = {
        "embedding.token.weight": theirs.model.embed_tokens.weight,
        "head.output.weight": theirs.lm_head.weight,
        "head.norm.weight": theirs.model.norm.weight,
    }
    for i, layer in enumerate(theirs.model.layers):
        named = {
            "attention.query": layer.self_attn.q_proj, "attention.key": layer.self_attn.k_proj,
            "attention.value": layer.self_attn.v_proj, "attention.output": layer.self_attn.o_proj,
            "norm1": layer.input_layernorm, "norm2": layer.post_attention_layernorm,
        }  # fmt: skip
        weights |= {f"blocks.{i}.{name}.weight": module.weight for name, module in named.items()}
    return weights


@pytest.mark.parametrize("top_k", [2, 3])
def test_mixtral_logits_equal_transformers(top_k: int) -> None:
    config = MixtralConfig(
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=40,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        num_local_experts=5,
        num_experts_per_tok=top_k,
        tie_word_embeddings=False,
        sliding_window=None,
    )
    theirs = perturb(MixtralForCausalLM(config))
    ours = Transformer(
        VOCAB,
        CONTEXT,
        WIDTH,
        LAYERS,
        HEADS,
        n_kv_heads=2,
        d_ff=40,
        norm="rmsnorm",
        activation="swiglu",
        position="rotary",
        tied=False,
        bias=False,
        n_experts=5,
        top_k=top_k,
    )
    weights = llama_weights(theirs)
    for i, layer in enumerate(theirs.model.layers):
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
        named = {
            "router.weight": layer.mlp.gate.weight,
            "experts.gate": gate,
            "experts.up": up,
            "experts.down": layer.mlp.experts.down_proj,
        }
        weights |= {f"blocks.{i}.feedforward.{name}": weight for name, weight in named.items()}
    x = tokens()
    torch.testing.assert_close(
        copy(ours, weights)(x), theirs(x).logits, rtol=TOLERANCE, atol=TOLERANCE
    )


def bert(head: bool) -> tuple[Transformer, dict[str, Tensor], nn.Module]:
    config = BertConfig(
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=96,
        type_vocab_size=2,
    )
    theirs = perturb(
        BertForMaskedLM(config) if head else BertModel(config, add_pooling_layer=False)
    )
    trunk = theirs.bert if head else theirs
    ours = Transformer(
        VOCAB,
        CONTEXT,
        WIDTH,
        LAYERS,
        HEADS,
        d_ff=96,
        norm_eps=1e-12,
        norm_first=False,
        causal=False,
        segments=2,
        head_transform=head,
    )
    embeddings = trunk.embeddings
    weights = {
        "embedding.token.weight": embeddings.word_embeddings.weight,
        "embedding.position.weight": embeddings.position_embeddings.weight,
        "embedding.segment.weight": embeddings.token_type_embeddings.weight,
        "embedding.norm.weight": embeddings.LayerNorm.weight,
        "embedding.norm.bias": embeddings.LayerNorm.bias,
    }
    for i, layer in enumerate(trunk.encoder.layer):
        for name, ours_name in BERT_NAMES.items():
            module = layer.get_submodule(name)
            weights |= {
                f"blocks.{i}.{ours_name}.weight": module.weight,
                f"blocks.{i}.{ours_name}.bias": module.bias,
            }
    return ours, weights, theirs


def test_bert_hidden_states_equal_transformers() -> None:
    ours, weights, theirs = bert(head=False)
    ours, x, segments = copy(ours, weights), tokens(), torch.randint(2, (3, CONTEXT))
    ours.head.output = nn.Identity()
    expected = theirs(x, token_type_ids=segments).last_hidden_state
    torch.testing.assert_close(ours(x, segments=segments), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_bert_logits_equal_transformers() -> None:
    ours, weights, theirs = bert(head=True)
    head = theirs.cls.predictions
    weights |= {
        "head.transform.0.weight": head.transform.dense.weight,
        "head.transform.0.bias": head.transform.dense.bias,
        "head.transform.2.weight": head.transform.LayerNorm.weight,
        "head.transform.2.bias": head.transform.LayerNorm.bias,
        "head.output.bias": head.decoder.bias,
    }
    x = tokens()
    torch.testing.assert_close(
        copy(ours, weights)(x), theirs(x).logits, rtol=TOLERANCE, atol=TOLERANCE
    )


def test_positions_of_a_slice_give_the_slice() -> None:
    """A rank that holds the second half of a sequence embeds it as the second half, rotary or
    learned.
    """
    for position in ("learned", "rotary"):
        model = Transformer(VOCAB, CONTEXT, WIDTH, 1, HEADS, position=position)
        first = model.embedding(tokens(), torch.arange(CONTEXT).expand(3, -1), None)
        assert first.shape == (3, CONTEXT, WIDTH)
        x = tokens()
        shifted = torch.arange(4, CONTEXT + 4).expand(3, -1) % CONTEXT
        if position == "learned":
            assert not torch.equal(model(x), model(x, shifted))


def test_dropout_acts_in_training_only() -> None:
    model = Transformer(VOCAB, CONTEXT, WIDTH, 1, HEADS, dropout=0.5)
    x = tokens()
    assert not torch.equal(model(x), model(x))
    model.eval()
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)


def test_initial_weights_are_gpt2s() -> None:
    with torch.device("meta"):
        model = Transformer(256, 64, 256, 8, 4)
    materialize(model, 0, torch.device("cpu"), torch.device("cpu"), torch.float32)
    block = model.blocks["3"]
    assert block.attention.query.weight.std().item() == pytest.approx(0.02, rel=0.02)
    # sqrt(2 * 8 layers)
    assert block.feedforward.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert (block.norm1.weight == 1).all() and (block.attention.query.bias == 0).all()
    assert model.head.output.weight is model.embedding.token.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"n_heads": 5},
            "n_heads=5 does not divide d_model=48: use 1, 2, 3, 4, 6, 8, 12, 16, 24, 48",
        ),
        ({"n_kv_heads": 3}, "n_kv_heads=3 does not divide n_heads=4"),
        ({"n_kv_heads": 0}, "n_kv_heads=0 must be at least 1"),
        ({"d_ff": 0}, "d_ff=0 must be at least 1"),
        ({"segments": -1}, "segments=-1 must be at least 0"),
        ({"n_layers": 0}, "n_layers=0 must be at least 1"),
        ({"d_model": -4}, "d_model=-4 must be at least 1"),
        ({"norm": "batchnorm"}, "norm=batchnorm is unknown: use layernorm, rmsnorm"),
        ({"n_heads": 16, "position": "rotary"}, "even head width"),
        ({"n_experts": -1}, "n_experts=-1 must be at least 0"),
        ({"n_experts": 4, "top_k": 5}, "top_k=5 must be between 1 and n_experts=4"),
        ({"n_experts": 4, "top_k": 0}, "top_k=0 must be between 1 and n_experts=4"),
        (
            {"n_experts": 4, "capacity_factor": 0.0},
            "capacity_factor=0.0 must be more than 0, or null",
        ),
        ({"n_experts": 4, "balance": "luck"}, "balance=luck is unknown: use none, loss, bias"),
        ({"n_experts": 4, "balance_rate": -0.1}, "balance_rate=-0.1 must be at least 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    sizes = {
        "vocab_size": VOCAB,
        "context": CONTEXT,
        "d_model": WIDTH,
        "n_layers": 2,
        "n_heads": HEADS,
    }
    with pytest.raises(ValueError, match=message):
        Transformer(**(sizes | change))


@settings(max_examples=20, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4]),
    per_head=st.sampled_from([2, 4, 8]),
    layers=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    tied=st.booleans(),
    bias=st.booleans(),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    activation=st.sampled_from(["gelu", "swiglu"]),
    position=st.sampled_from(["learned", "rotary"]),
)
def test_a_causal_model_never_looks_ahead(
    heads, per_head, layers, groups, tied, bias, norm, activation, position
) -> None:
    kv_heads = heads // groups if heads % groups == 0 else heads
    model = Transformer(
        VOCAB,
        CONTEXT,
        heads * per_head,
        layers,
        heads,
        n_kv_heads=max(1, kv_heads),
        norm=norm,
        tied=tied,
        bias=bias,
        activation=activation,
        position=position,
    )
    x = tokens()
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % VOCAB
    torch.testing.assert_close(model(x)[:, :9], model(changed)[:, :9], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x)[:, 9:], model(changed)[:, 9:])


@pytest.mark.parametrize("n_experts", [0, 4])
def test_every_path_of_the_layout_is_there(n_experts: int) -> None:
    model = Transformer(VOCAB, CONTEXT, WIDTH, 2, HEADS, activation="swiglu", n_experts=n_experts)
    layout = model.layout
    dense = [
        path for path in (*layout.column, *layout.row) if not (n_experts and "feedforward" in path)
    ]
    for path in (layout.first, layout.blocks, layout.last, *dense, *layout.vocabulary):
        assert isinstance(model.get_submodule(path.replace("*", "0")), nn.Module)
    assert all(
        isinstance(block.get_submodule(layout.attention), nn.Module) for block in blocks_of(model)
    )
    assert all(isinstance(getattr(model, size), int) for size in layout.sizes)
    for block in blocks_of(model) if n_experts else ():
        experts = block.get_submodule(layout.experts)
        assert {
            name: experts.get_parameter(name).shape[dim] for name, dim in layout.hidden
        } == dict.fromkeys(dict(layout.hidden), model.d_ff)
