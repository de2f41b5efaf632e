"""Networks of transformers from tiny configurations with random weights; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.judge import Case

NUM_INPUTS = 6  # directions along which the embeddings or pixels vary
NUM_TOKENS = 6
F64 = torch.float64
# What makes a configuration small, wherever it has such an attribute.
SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "d_model": 32,
    "dim": 32,
    "n_embd": 32,
    "embedding_size": 32,
    "embed_dim": 32,
    "emb_dim": 32,
    "projection_dim": 16,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "n_inner": 48,
    "hidden_dim": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "head_dim": 8,
    "d_kv": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def of_transformers() -> Iterator[tuple[str, Callable[[], Iterator[Case]]]]:
    """Every model type that ``AutoModel`` knows, and its case where a small one can be made."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    for kind in MODEL_MAPPING_NAMES:
        yield f"transformers.{kind}", lambda kind=kind: _of_type(kind)


def _of_type(kind: str) -> Iterator[Case]:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind)
    _shrink(config)
    with torch.device("meta"):  # before memory is spent on what could not be made small
        size = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
    if size > 2e7:
        return
    model = transformers.AutoModel.from_config(config).to(F64).eval().requires_grad_(False)
    for variant, key, base in _inputs(model, config):
        network = Varied(model, key, base)
        x = torch.randn(3, NUM_INPUTS, dtype=F64)
        try:
            with torch.no_grad():
                network(x)
        except Exception:  # it needs something else, too
            continue
        yield Case(f"transformers.{kind}/{variant}", network, x, f"{key} {tuple(base.shape)}")
        return


def _shrink(config: Any) -> None:
    for name, value in SMALL.items():
        before = getattr(config, name, None)
        if type(before) is type(value) and name not in type(config).attribute_map:
            setattr(config, name, value)
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict"):
            _shrink(value)


def _inputs(model: nn.Module, config: Any) -> Iterator[tuple[str, str, Tensor]]:
    """Names and sizes of inputs to try."""
    try:
        width = model.get_input_embeddings().weight.shape[-1]
        yield "embeddings", "inputs_embeds", torch.randn(NUM_TOKENS, width, dtype=F64)
    except Exception:  # no token embeddings
        pass
    channels = getattr(config, "num_channels", 3)
    for size in (32, 64, 224):
        yield f"pixels {size}", "pixel_values", torch.randn(channels, size, size, dtype=F64)


class Varied(nn.Module):
    """The last hidden state of a model, as two random sums, along random directions of one input."""

    def __init__(self, model: nn.Module, key: str, base: Tensor) -> None:
        super().__init__()
        self.model, self.key = model, key
        self.register_buffer("base", base)
        self.register_buffer("directions", torch.randn(NUM_INPUTS, *base.shape, dtype=F64) / NUM_INPUTS**0.5)

    def forward(self, u: Tensor) -> Tensor:
        """``[N, d]`` to ``[N, 2]``."""
        varied = self.base.to(u) + torch.tensordot(u, self.directions.to(u), 1)
        extra = {}
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False) and self.key == "inputs_embeds":
            extra = {"decoder_inputs_embeds": varied}
        output = self.model(**{self.key: varied}, **extra)
        state = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        flat = state.reshape(len(u), -1)
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(flat.shape[1], 2, dtype=F64, generator=generator) / flat.shape[1] ** 0.5
        return flat @ weights.to(flat.device, flat.dtype)
