"""A language model or classifier of `transformers`, as a model of dtrain.

Without a layout it stays as it is: one piece, for ddp, fsdp, DeepSpeed and Accelerate. With one its
parts are put into the order that tensor, pipeline and context parallelism need, and compute the
same:

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
REQUIRED = {"token", "blocks", "norm", "head", "attention"}  # parts that a layout must name
OPTIONAL = {"position", "dropout", "rotary", "column", "row", "fused"}
# settings by which a folder's code would run
CODE = {"trust_remote_code", "auto_map", "code_revision", "custom_pipelines"}
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
            after them, `rotary` (the module that returns cos and sin), `blocks`, the last `norm`,
            `head`; and in a block: `attention` (the module that calls transformers' attention
            function), linear layers to split by `column` and by `row`, and `fused`: for layers that
            hold several side by side, their number. None: the model is one piece.
        causal: a token sees only the tokens before it, as in GPT; False: a BERT.
        outputs: size of a new head's output for each token, such as a number of classes, instead of
            the vocabulary.

    Raises:
        ValueError: there is no such model, or the layout does not fit it.
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
        load = _loads_weights(name_or_path, pretrained)
        if not causal:
            _check_masked(name_or_path, settings)
        inner, self.origin = _model(f"AutoModel{kind}", name_or_path, settings, load, attention)
        self.causal, self.outputs = causal, outputs
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
        """Return the model as one piece, if this one is in parts.

        Its weights are loaded, or drawn by torch's generator, again.
        """
        if self._whole is None:
            return None
        name_or_path, config, pretrained = self._whole
        return HuggingFace(name_or_path, config=config, pretrained=pretrained)

    def _arrange(self, inner: nn.Module, layout: dict[str, Any]) -> None:
        if wrong := (REQUIRED - layout.keys()) | (layout.keys() - REQUIRED - OPTIONAL):
            raise ValueError(
                f"model.layout: {', '.join(sorted(wrong))}: it takes "
                f"{', '.join(sorted(REQUIRED))} and perhaps {', '.join(sorted(OPTIONAL))}"
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
        column, row = layout.get("column", ()), layout.get("row", ())
        for block in self.blocks.values():
            for path in (*column, *row):
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
            column=tuple(f"blocks.*.{path}{'.*' if path in fused else ''}" for path in column),
            row=tuple(f"blocks.*.{path}" for path in row),
            vocabulary=("embedding.token", "head.output"),
            sizes=("n_heads", "n_kv_heads"),
        )

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        if self.inner is not None:
            seen = None if self.causal or self.padding is None else (tokens != self.padding).long()
            cache = {"use_cache": False} if self.causal else {}
            logits: Tensor = self.inner(
                input_ids=tokens,
                position_ids=positions + self.first_position,
                attention_mask=seen,
                **cache,
            ).logits
            return logits
        x: Tensor = self.embedding(tokens, positions)
        named = {} if self.rotary is None else {"position_embeddings": self.rotary(x, positions)}
        for block in self.blocks.values():
            x = block(x, **named)
            x = x[0] if isinstance(x, tuple) else x
        x = self.head(x)
        return x


class Embedding(nn.Module):
    """Token embeddings, and position embeddings where the model has some."""

    def __init__(
        self, token: nn.Module, position: nn.Module | None, dropout: nn.Module | None
    ) -> None:
        super().__init__()
        self.token, self.position, self.dropout = token, position, dropout

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = self.token(tokens)
        x = x if self.position is None else x + self.position(positions)
        x = x if self.dropout is None else self.dropout(x)
        return x


class Unfused(nn.ModuleList):
    """The linear layers of a fused one, apart, so that each can be split by its own outputs."""

    def forward(self, x: Tensor) -> SplitOutputs:
        return SplitOutputs(layer(x) for layer in self)


class SplitOutputs(tuple[Tensor, ...]):
    """Outputs of a fused layer, which are split already."""

    def split(self, *_: Any, **__: Any) -> SplitOutputs:
        return self


def _config(name_or_path: str, settings: dict[str, Any]) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ValueError(
            "model=hf needs the package transformers: pip install 'dtrain[hf]'"
        ) from None
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if code := sorted(CODE & settings.keys()):
        raise ValueError(
            f"model.config.{code[0]}={settings[code[0]]}: code that comes with a model's files is "
            f"not run here: choose a model that transformers has itself"
        )
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **settings)
    except (OSError, ValueError) as error:
        raise _first_line(error, name_or_path) from None


def _first_line(error: Exception, name_or_path: str) -> ValueError:
    return ValueError(f"model.name_or_path={name_or_path}: {str(error).strip().splitlines()[0]}")


def _loads_weights(name_or_path: str, pretrained: bool | None) -> bool:
    """Return whether weights are to be loaded.

    Raises:
        ValueError: they are pickles, or there are none.
    """
    folder = Path(name_or_path)
    has_weights = folder.is_dir() and any(folder.glob(WEIGHTS))
    pickles = [file.name for pattern in PICKLES for file in folder.glob(pattern)]
    if pickles and not has_weights and pretrained is not False:
        raise ValueError(
            f"model.name_or_path={name_or_path}: its weights ({min(pickles)}) are pickles, which "
            f"can run code, and are not read: set model.pretrained=false to draw new ones, or save "
            f"them as {WEIGHTS} if you trust them (save_pretrained)"
        )
    if pretrained and not has_weights and folder.exists():
        raise ValueError(f"model.pretrained=true: {name_or_path} has no weights ({WEIGHTS})")
    return has_weights if pretrained is None else pretrained


def _check_masked(name_or_path: str, config: Any) -> None:
    """Raise ValueError for a model that cannot be a masked language model."""
    import transformers

    if type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        raise ValueError(
            f"model.name_or_path={name_or_path} sees one side only: set model.causal=true"
        )


def _model(
    kind: str, name_or_path: str, config: Any, load: bool, attention: str
) -> tuple[nn.Module, str]:
    """Return the model of `transformers`, and in words where its weights are from."""
    import transformers

    factory = getattr(transformers, kind)
    settings = {"dtype": torch.float32, "attn_implementation": attention}
    settings |= {"trust_remote_code": False}
    try:
        if load and torch.get_default_device().type != "meta":
            return _load(factory, name_or_path, config, settings)
        model = factory.from_config(config, **settings)
        return model.train(), f"weights drawn for {name_or_path}"
    except (OSError, ValueError) as error:
        # Gemma 2 has no sdpa
        if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
            return _model(kind, name_or_path, config, load, "eager")
        raise _first_line(error, name_or_path) from None


def _load(
    factory: Any, name_or_path: str, config: Any, settings: dict[str, Any]
) -> tuple[nn.Module, str]:
    """Load the weights; a head of another size is drawn anew."""
    model, info = factory.from_pretrained(
        name_or_path,
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes="TokenClassification" in factory.__name__,
        use_safetensors=True,
        weights_only=True,  # for files of other kinds that an index may name
        **settings,
    )
    mismatched = (str(each[0]) for each in info["mismatched_keys"])
    new = sorted({*info["missing_keys"], *mismatched})
    loaded = len(model.state_dict()) - len(new)
    origin = f"weights of {name_or_path}: {loaded} tensors; new: {', '.join(new) or 'none'}"
    return model.train(), origin


def _first_position(model: nn.Module) -> int:
    """Return where positions begin: in RoBERTa after the padding's."""
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
    """Return the layer as `nn.Linear`, or apart, where it is `fused` layers side by side."""
    # GPT-2 keeps its weights transposed
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    assert isinstance(weight, Tensor)
    layers = []
    for index in range(fused):
        rows = slice(index * len(weight) // fused, (index + 1) * len(weight) // fused)
        linear = nn.Linear(
            weight.shape[1], rows.stop - rows.start, bias=layer.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(
            weight.detach()[rows].clone(memory_format=torch.contiguous_format)
        )
        if isinstance(layer.bias, Tensor):
            linear.bias = nn.Parameter(layer.bias.detach()[rows].clone())
        layers.append(linear)
    return Unfused(layers) if fused > 1 else layers[0]


def _dropout(attention: nn.Module) -> float:
    """Return the dropout of attention weights, under the names that transformers' models use."""
    dropout = getattr(attention, "attn_dropout", getattr(attention, "attention_dropout", 0.0))
    return float(dropout.p if isinstance(dropout, nn.Dropout) else dropout)


def _register() -> str:
    """Let transformers' attention call the core that a strategy may replace, without masks."""
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
