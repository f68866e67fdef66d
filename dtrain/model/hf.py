"""A language model or classifier of `transformers`, as a model of ours.

Without a layout it is theirs, untouched: one piece, for ddp, fsdp, DeepSpeed and Accelerate. With a
layout its parts are put into the order that tensor, pipeline and context parallelism cut along, and
compute the same:

    tokens, positions -> embedding -> blocks -> head -> logits
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.model.block import Core
from dtrain.model.layout import Layout
from dtrain.model.transformer import Head

ATTENTION = "dtrain"  # our name among transformers' attention functions
PARTS = {"token", "blocks", "norm", "head", "attention"}  # that a layout must tell
OPTIONAL = {"position", "dropout", "rotary", "column", "row", "fused"}
CODE = {
    "trust_remote_code",
    "auto_map",
    "code_revision",
    "custom_pipelines",
}  # by which a folder's code would run
WEIGHTS, PICKLES = "*.safetensors", ("*.bin", "*.pt", "*.pth", "*.ckpt")


class HuggingFace(nn.Module):
    """(tokens, positions) -> logits, each (B, T) -> (B, T, V).

    Args:
        name_or_path: a folder or a name on the hub that `from_pretrained` takes, or a configuration
            file (JSON).
        config: settings of its configuration to replace.
        pretrained: load its weights; None: if the folder has some. Otherwise they are drawn as the
            model draws them.
        layout: paths in the model, by their part: `token` and `position` embeddings, `dropout`
            after them, `rotary` (the module that gives cos and sin), `blocks`, the last `norm`,
            `head`; and in a block: `attention` (the module that calls transformers' attention
            function), linear layers to split by `column` and by `row`, and `fused` ones: how many
            layers stand side by side in one. None: the model is one piece.
        causal: does a token see only those before it, as GPT's do? False: a BERT.
        outputs: what a new head gives for each token instead of the vocabulary: classes, say.

    Raises:
        ValueError: there is no such model, or the layout is not one of it.
    """

    def __init__(
        self,
        name_or_path: str,
        *,
        config: dict[str, Any] | None = None,
        pretrained: bool | None = None,
        layout: dict[str, Any] | None = None,
        causal: bool = True,
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        if layout and (outputs or not causal):
            raise ValueError("model.layout is for causal language models: use layout=null here")
        settings = _config(
            name_or_path, (config or {}) | ({"num_labels": outputs} if outputs else {})
        )
        kind = "ForTokenClassification" if outputs else "ForCausalLM" if causal else "ForMaskedLM"
        attention = "sdpa" if layout is None else _register()
        inner, self.origin = _model(
            f"AutoModel{kind}", name_or_path, settings, pretrained, attention, causal
        )
        self.causal = causal
        self.outputs = outputs
        self.padding = getattr(settings, "pad_token_id", None)
        self.vocab_size, self.first_position = settings.vocab_size, _first_position(inner)
        longest: int | None = getattr(settings, "max_position_embeddings", None)
        self.context = longest - self.first_position if longest else None
        self.n_heads = getattr(settings, "num_attention_heads", 0)
        self.n_kv_heads = getattr(settings, "num_key_value_heads", None) or self.n_heads
        self.kind = type(inner).__name__
        self.inner: nn.Module | None = None
        self._whole = None if layout is None else (name_or_path, config, pretrained)
        if layout is None:
            self.inner = inner
        else:
            self._arrange(inner, layout)

    def original(self) -> HuggingFace | None:
        """The same as one piece, if this one is in parts: weights are loaded, or drawn by
        torch's generator, again.
        """
        if self._whole is None:
            return None
        name_or_path, config, pretrained = self._whole
        return HuggingFace(name_or_path, config=config, pretrained=pretrained)

    def _arrange(self, inner: nn.Module, layout: dict[str, Any]) -> None:
        if wrong := (PARTS - layout.keys()) | (layout.keys() - PARTS - OPTIONAL):
            raise ValueError(
                f"model.layout: {', '.join(sorted(wrong))}: it takes "
                f"{', '.join(sorted(PARTS))} and "
                f"perhaps {', '.join(sorted(OPTIONAL))}"
            )

        def find(name: str) -> Any:
            return _find(inner, layout[name], f"model.layout.{name}") if layout.get(name) else None

        self.embedding = Embedding(find("token"), find("position"), find("dropout"))
        self.rotary = find("rotary")
        self.blocks = nn.ModuleDict(
            {str(index): block for index, block in enumerate(find("blocks").children())}
        )
        self.head = Head(find("norm"), nn.Identity(), find("head"))
        fused: dict[str, int] = layout.get("fused") or {}
        for block in self.blocks.values():
            for path in (*layout.get("column", ()), *layout.get("row", ())):
                block.set_submodule(
                    path, _linear(_find(block, path, "model.layout"), fused.get(path, 1))
                )
            attention = _find(block, layout["attention"], "model.layout.attention")
            attention.core = Core(causal=True, dropout=_dropout(attention))
        self.layout = Layout(
            first="embedding",
            blocks="blocks",
            last="head",
            attention=f"{layout['attention']}.core",
            column=tuple(
                f"blocks.*.{path}{'.*' if path in fused else ''}"
                for path in layout.get("column", ())
            ),
            row=tuple(f"blocks.*.{path}" for path in layout.get("row", ())),
            vocabulary=("embedding.token", "head.output"),
            sizes=("n_heads", "n_kv_heads"),
        )

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        if self.inner is not None:
            seen = None if self.causal or self.padding is None else (tokens != self.padding).long()
            cache = {"use_cache": False} if self.causal else {}
            return self.inner(
                input_ids=tokens,
                position_ids=positions + self.first_position,
                attention_mask=seen,
                **cache,
            ).logits
        x = self.embedding(tokens, positions)
        named = {} if self.rotary is None else {"position_embeddings": self.rotary(x, positions)}
        for block in self.blocks.values():
            x = block(x, **named)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


class Embedding(nn.Module):
    """Of tokens, and of their positions where the model learns some."""

    def __init__(
        self, token: nn.Module, position: nn.Module | None, dropout: nn.Module | None
    ) -> None:
        super().__init__()
        self.token, self.position, self.dropout = token, position, dropout

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.token(tokens)
        x = x if self.position is None else x + self.position(positions)
        return x if self.dropout is None else self.dropout(x)


class Fused(nn.ModuleList):
    """Linear layers that stood side by side in one, so that each can be split by its own
    outputs.
    """

    def forward(self, x: Tensor) -> Apart:
        return Apart(layer(x) for layer in self)


class Apart(tuple):
    """What a fused layer gives, split already."""

    def split(self, *_: Any, **__: Any) -> Apart:
        return self


def _config(name_or_path: str, settings: dict[str, Any]) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ValueError(
            "model=hf needs the package transformers: pip install 'dtrain[hf]'"
        ) from None
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if code := sorted(CODE & settings.keys()):
        raise ValueError(
            f"model.config.{code[0]}={settings[code[0]]}: code that comes with a model's files is "
            f"not run "
            f"here: choose a model that transformers has itself"
        )
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **settings)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.name_or_path={name_or_path}: {str(error).strip().splitlines()[0]}"
        ) from None


def _model(
    kind: str, name_or_path: str, config: Any, pretrained: bool | None, attention: str, causal: bool
) -> tuple[nn.Module, str]:
    """The model, and where its weights are from."""
    import transformers

    folder = Path(name_or_path)
    there = folder.is_dir() and any(folder.glob(WEIGHTS))
    pickles = (
        []
        if there or pretrained is False
        else [each.name for kind in PICKLES for each in folder.glob(kind)]
    )
    if pickles:
        raise ValueError(
            f"model.name_or_path={name_or_path}: its weights ({min(pickles)}) are pickles, which "
            f"can run "
            f"code, and are not read: set model.pretrained=false to draw new ones, or save them as "
            f"{WEIGHTS} if you trust them (save_pretrained)"
        )
    if pretrained and not there and folder.exists():
        raise ValueError(f"model.pretrained=true: {name_or_path} has no weights ({WEIGHTS})")
    load = there if pretrained is None else pretrained
    if not causal and type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        raise ValueError(
            f"model.name_or_path={name_or_path} sees one side only: set model.causal=true"
        )
    try:
        if load and torch.get_default_device().type != "meta":
            model, told = getattr(transformers, kind).from_pretrained(
                name_or_path,
                config=config,
                dtype=torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes="TokenClassification" in kind,
                trust_remote_code=False,
                use_safetensors=True,
                weights_only=True,  # of what an index of theirs may name besides
            )
            new = sorted(
                {*told["missing_keys"], *(str(each[0]) for each in told["mismatched_keys"])}
            )
            taken = len(model.state_dict()) - len(new)
            return (
                model.train(),
                f"weights of {name_or_path}: {taken} tensors; new: {', '.join(new) or 'none'}",
            )
        model = getattr(transformers, kind).from_config(
            config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
        )
        return model.train(), f"weights drawn for {name_or_path}"
    except (OSError, ValueError) as error:
        # Gemma 2 knows none
        if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
            return _model(kind, name_or_path, config, pretrained, "eager", causal)
        raise ValueError(
            f"model.name_or_path={name_or_path}: {str(error).strip().splitlines()[0]}"
        ) from None


def _first_position(model: nn.Module) -> int:
    """Where positions begin: RoBERTa's after that of the padding."""
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            return module.padding_idx + 1
    return 0


def _find(module: nn.Module, path: str, where: str) -> Any:
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{where}: {type(module).__name__} has no module {path}") from None


def _linear(layer: nn.Module, fused: int) -> nn.Module:
    """The layer as `nn.Linear`, though GPT-2 keeps its weights transposed; or each of the
    layers that are in it.
    """
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    assert isinstance(weight, Tensor)
    made = []
    for index in range(fused):
        rows = slice(index * len(weight) // fused, (index + 1) * len(weight) // fused)
        each = nn.Linear(
            weight.shape[1], rows.stop - rows.start, bias=layer.bias is not None, device="meta"
        )
        each.weight = nn.Parameter(
            weight.detach()[rows].clone(memory_format=torch.contiguous_format)
        )
        if isinstance(layer.bias, Tensor):
            each.bias = nn.Parameter(layer.bias.detach()[rows].clone())
        made.append(each)
    return Fused(made) if fused > 1 else made[0]


def _dropout(attention: nn.Module) -> float:
    """Of attention weights, by the names that transformers' models have for it."""
    found = getattr(attention, "attn_dropout", getattr(attention, "attention_dropout", 0.0))
    return float(found.p if isinstance(found, nn.Dropout) else found)


def _register() -> str:
    """Make transformers' attention call the core that a strategy may replace; their masks are
    left out with it.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    return ATTENTION


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if mask is not None or (scaling or query.shape[-1] ** -0.5) != query.shape[-1] ** -0.5:
        raise ValueError(
            f"{type(module).__name__} masks or scales its attention in its own way: use it "
            f"without layout"
        )
    return module.core(query, key, value).transpose(1, 2), None
