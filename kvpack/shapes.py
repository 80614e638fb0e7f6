"""Named shapes: what models cache, and how engines lay it out.

The demo, the benchmarks and ``kvpack explain`` all take their numbers from here. Those of a model
are in the public ``config.json`` of its Hugging Face repository (``num_hidden_layers``,
``num_key_value_heads``, ``head_dim``; for latent rows ``kv_lora_rank + qk_rope_head_dim``):

=============  ================================================================
name           source
=============  ================================================================
llama-3.1-8b   meta-llama/Llama-3.1-8B
llama-3.3-70b  meta-llama/Llama-3.3-70B-Instruct
qwen3-32b      Qwen/Qwen3-32B
qwen3-235b     Qwen/Qwen3-235B-A22B
gpt-oss-120b   openai/gpt-oss-120b; its even layers slide over 128 tokens
minimax-m2     MiniMaxAI/MiniMax-M2
deepseek-r1    deepseek-ai/DeepSeek-R1; DeepSeek-V3 is alike
deepseek-v3.2  deepseek-ai/DeepSeek-V3.2-Exp; rows as vLLM's ``fp8_ds_mla`` packs them
kimi-k2        moonshotai/Kimi-K2-Instruct
qwen3-next     Qwen/Qwen3-Next-80B-A3B-Instruct; every fourth layer attends, the others keep a
               gated-delta state in float32 and three columns of each convolution in bfloat16
=============  ================================================================

Engine layouts are those of vLLM 0.33 (``LBHNC``: K and V side by side in a token's row), SGLang
0.5 (a pool of tokens, K and V apart) and TensorRT-LLM's KV cache manager V2 (a block holds every
layer). ``nhd`` and ``hnd`` are FlashInfer's names for the two row orders of a stacked cache; they
belong to no engine and have no block size of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["ENGINE_LAYOUTS", "MODELS", "EngineLayout", "ModelShape", "TensorKind"]


@dataclass(frozen=True)
class TensorKind:
    """One kind of cache tensor, the same in each of its layers.

    Parameters
    ----------
    names : tuple of str
        The tensors a layer stores, ``("k", "v")`` or ``("kv",)`` for one.
    layers : sequence of int
        Global ids of the layers that store them, ascending.
    heads : int or None
        KV heads that tensor parallel ranks share; None where rows have no head axis, so that every
        rank holds them whole.
    row_elements : int
        Elements of one token in one head.
    dtype_bytes : int or None
        Bytes of an element where the kind fixes it (opaque rows: 1); None: the cache's dtype.
    window : int or None
        Tokens kept by a sliding window; None: all of them.
    state : bool
        One row a request instead of one a token: what a recurrent layer carries on.
    only : {"prefill", "decode"} or None
        The one side that has it, as a draft model's layers; None: both.
    """

    names: tuple[str, ...]
    layers: Sequence[int]
    heads: int | None
    row_elements: int
    dtype_bytes: int | None = None
    window: int | None = None
    state: bool = False
    only: Literal["prefill", "decode"] | None = None

    def row_bytes(self, dtype_bytes: int) -> int:
        """Bytes of one token in one head of one tensor, for a cache of `dtype_bytes` an element."""
        return self.row_elements * (self.dtype_bytes or dtype_bytes)

    def tokens_kept(self, tokens: int) -> int:
        """Rows that these layers still hold of a sequence of `tokens`."""
        if self.state:
            return 1
        return tokens if self.window is None else min(tokens, self.window)


@dataclass(frozen=True)
class ModelShape:
    """What one model caches.

    Parameters
    ----------
    name : str
        The name that the command line takes.
    kinds : tuple of TensorKind
        Everything that is cached a token.
    """

    name: str
    kinds: tuple[TensorKind, ...]

    @property
    def num_layers(self) -> int:
        """Layers of the model that both sides have: one more than the highest id among them."""
        return 1 + max(layer for kind in self.kinds if kind.only is None for layer in kind.layers)

    def token_bytes(self, dtype_bytes: int) -> int:
        """Bytes that one token takes in all layers and heads while no window has closed."""
        return sum(
            len(kind.layers) * len(kind.names) * (kind.heads or 1) * kind.row_bytes(dtype_bytes)
            for kind in self.kinds
            if not kind.state and kind.only is None
        )

    def request_bytes(self, tokens: int, dtype_bytes: int) -> int:
        """Bytes of a request of `tokens` in all layers and heads of both sides, without copies."""
        return sum(
            len(kind.layers)
            * len(kind.names)
            * (kind.heads or 1)
            * kind.row_bytes(dtype_bytes)
            * kind.tokens_kept(tokens)
            for kind in self.kinds
            if kind.only is None
        )


@dataclass(frozen=True)
class EngineLayout:
    """How an engine lays out its cache, as dims strings.

    Parameters
    ----------
    name : str
        The name that the command line takes.
    dims : str
        Axes of the tensor that holds K and V, outermost first; parentheses merge axes into one.
        Without ``kv``, K and V are tensors of their own; without ``layer``, so is each layer.
    latent_dims : str
        Axes of the tensor that holds rows without heads.
    block_tokens : int or None
        Tokens of the engine's own blocks; None for an order of rows that is no engine's.
    """

    name: str
    dims: str
    latent_dims: str
    block_tokens: int | None = None

    def dims_of(self, kind: TensorKind) -> str:
        """Dims string of the tensors of a kind; states have a slot a request in every engine."""
        if kind.state:
            return "slot dim" if kind.heads is None else "slot head dim"
        return self.latent_dims if kind.heads is None else self.dims


def _grouped_query(
    name: str, layers: int, heads: int, head_elements: int, window: tuple[range, int] | None = None
) -> ModelShape:
    """K and V in every layer; `window` names the layers that slide and how far they see."""
    sliding, window_tokens = window or (range(0), 0)
    full = range(layers) if window is None else range(1, layers, 2)
    kinds = [TensorKind(("k", "v"), full, heads, head_elements)]
    if sliding:
        kinds.append(TensorKind(("k", "v"), sliding, heads, head_elements, window=window_tokens))
    return ModelShape(name, tuple(kinds))


def _latent(name: str, layers: int) -> ModelShape:
    """One latent row of 512 + 64 elements a token in every layer."""
    return ModelShape(name, (TensorKind(("kv",), range(layers), None, 576),))


def _gated_delta(
    name: str,
    *,
    layers: int,
    attending: int,
    heads: int,
    head_elements: int,
    key_heads: int,
    value_heads: int,
    state_elements: int,
    convolution_columns: int,
) -> ModelShape:
    """Attention in every `attending`-th layer, gated-delta and convolution states in the others."""
    full = range(attending - 1, layers, attending)
    others = tuple(layer for layer in range(layers) if layer not in full)
    columns = state_elements * convolution_columns
    return ModelShape(
        name,
        (
            TensorKind(("k", "v"), full, heads, head_elements),
            TensorKind(("ssm",), others, value_heads, state_elements**2, 4, state=True),
            TensorKind(("conv.q", "conv.k"), others, key_heads, columns, 2, state=True),
            TensorKind(("conv.v",), others, value_heads, columns, 2, state=True),
        ),
    )


MODELS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _grouped_query("llama-3.1-8b", layers=32, heads=8, head_elements=128),
        _grouped_query("llama-3.3-70b", layers=80, heads=8, head_elements=128),
        _grouped_query("qwen3-32b", layers=64, heads=8, head_elements=128),
        _grouped_query("qwen3-235b", layers=94, heads=4, head_elements=128),
        _grouped_query(
            "gpt-oss-120b", layers=36, heads=8, head_elements=64, window=(range(0, 36, 2), 128)
        ),
        _grouped_query("minimax-m2", layers=62, heads=8, head_elements=128),
        _latent("deepseek-r1", layers=61),
        _latent("kimi-k2", layers=61),
        _gated_delta(
            "qwen3-next",
            layers=48,
            attending=4,
            heads=2,
            head_elements=256,
            key_heads=16,
            value_heads=32,
            state_elements=128,
            convolution_columns=3,
        ),
        ModelShape(
            "deepseek-v3.2",
            (
                # 512 fp8 values, four fp32 scales, 64 rotary values of 2 bytes: opaque.
                TensorKind(("kv",), range(61), None, 656, dtype_bytes=1),
                # 128 fp8 values and one fp32 scale.
                TensorKind(("index_k",), range(61), None, 132, dtype_bytes=1),
            ),
        ),
    )
}

ENGINE_LAYOUTS: dict[str, EngineLayout] = {
    layout.name: layout
    for layout in (
        EngineLayout("nhd", "kv block token head dim", "block token dim"),
        EngineLayout("hnd", "block kv head token dim", "block token dim"),
        EngineLayout("vllm", "block head token (kv dim)", "block token dim", block_tokens=16),
        EngineLayout("sglang", "(block token) head dim", "(block token) dim", block_tokens=1),
        EngineLayout(
            "trtllm", "block layer kv head token dim", "block layer token dim", block_tokens=32
        ),
    )
}
