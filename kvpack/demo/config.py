"""What one run of the demo is asked to do, checked before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kvpack.errors import OptionsError
from kvpack.parallel import Parallelism
from kvpack.shapes import ENGINE_LAYOUTS, EngineLayout, ModelShape, TensorKind

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DEFAULT_BLOCK_TOKENS = {"prefill": 16, "decode": 32}
_CHOICES = {
    "model": ("qwen3", "llama"),
    "dtype": tuple(_DTYPE_BYTES),
    "device": ("auto", "cpu", "cuda"),
    "corrupt": ("none", "order", "keys", "bytes"),
}


@dataclass(frozen=True)
class Side:
    """One side of the transfer: its ranks and how each lays out its cache.

    Parameters
    ----------
    name : {"prefill", "decode"}
        What its workers are called, and what they do.
    tp : int
        Worker processes; they share the KV heads.
    layout : str
        A name in `kvpack.shapes.ENGINE_LAYOUTS`.
    block_tokens : int
        Tokens of a block.
    """

    name: Literal["prefill", "decode"]
    tp: int
    layout: str
    block_tokens: int

    @staticmethod
    def of(
        name: Literal["prefill", "decode"], tp: int, layout: str, block_tokens: int | None
    ) -> Side:
        """Make a side; its blocks are its engine's unless given, or 16 and 32 where no engine's."""
        if block_tokens is None:
            engine = ENGINE_LAYOUTS.get(layout)
            own = engine.block_tokens if engine is not None else None
            block_tokens = own or _DEFAULT_BLOCK_TOKENS[name]
        return Side(name, tp, layout, block_tokens)

    @property
    def engine_layout(self) -> EngineLayout:
        """The layout that this side's cache is declared by."""
        return ENGINE_LAYOUTS[self.layout]

    @property
    def parallelism(self) -> Parallelism:
        """How this side's ranks share the heads."""
        return Parallelism(tp=self.tp)

    @property
    def workers(self) -> tuple[str, ...]:
        """Names of this side's workers, which are their endpoints' names too."""
        return tuple(f"{self.name}-{rank}" for rank in range(self.tp))


@dataclass(frozen=True)
class DemoConfig:
    """One run of the demo.

    Parameters
    ----------
    prefill, decode : Side
        The two sides.
    model : {"qwen3", "llama"}
        Architecture; Qwen3 normalises its keys before they are cached, Llama does not.
    tokens : int
        Tokens of the prompt.
    new_tokens : int
        Tokens to decode, the first of which comes out of prefill.
    layers, kv_heads, head_dim : int
        Shape of the model's cache.
    dtype : {"float32", "bfloat16", "float16"}
        Of weights and cache. In half precision the order in which attention adds up blocks can
        decide a near tie, so that ``corrupt="order"`` may change tokens as well.
    device : {"auto", "cpu", "cuda"}
        Where model and caches are; ``"auto"`` is CUDA where there is any.
    corrupt : {"none", "order", "keys", "bytes"}
        What to damage in the received cache, to see that the checks notice: swap two blocks, swap
        the keys alone of two blocks, overwrite a block.
    staging_mib : int
        Staging memory of each worker, in MiB; less than the request is fine.
    seed : int
        Seed of weights, prompt and block lists.
    timeout_s : float
        Seconds the whole run may take.

    Raises
    ------
    OptionsError
        If a value is outside its bounds or two of them do not fit together.
    """

    prefill: Side
    decode: Side
    model: str = "qwen3"
    tokens: int = 1000
    new_tokens: int = 32
    layers: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "auto"
    corrupt: str = "none"
    staging_mib: int = 64
    seed: int = 0
    timeout_s: float = 240.0

    def __post_init__(self) -> None:
        for what in ("tokens", "layers", "kv_heads", "staging_mib"):
            if getattr(self, what) < 1:
                raise OptionsError(f"{what}={getattr(self, what)} must be at least 1")
        if self.new_tokens < 2:
            raise OptionsError(
                f"new_tokens={self.new_tokens} must be at least 2: the first comes out of prefill, "
                "and only the second is decoded from the received cache"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise OptionsError(
                f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs"
            )
        for what, allowed in _CHOICES.items():
            if getattr(self, what) not in allowed:
                raise OptionsError(
                    f"{what}={getattr(self, what)!r} is not one of {', '.join(allowed)}"
                )
        if not 0 < self.timeout_s < math.inf:
            raise OptionsError(f"timeout_s={self.timeout_s} must be positive and finite")
        if self.seed < 0:
            raise OptionsError(f"seed={self.seed} must be at least 0")
        for side in (self.prefill, self.decode):
            self._check_side(side)
        if self.corrupt != "none" and self.tokens < 2 * self.decode.block_tokens:
            raise OptionsError(
                f"corrupt={self.corrupt!r} needs two full decode blocks, but {self.tokens} tokens "
                f"fill {self.tokens // self.decode.block_tokens} of {self.decode.block_tokens}; "
                "raise tokens or lower the decode block"
            )

    def _check_side(self, side: Side) -> None:
        if side.layout not in ENGINE_LAYOUTS:
            raise OptionsError(
                f"{side.name} layout {side.layout!r} is not one of {', '.join(ENGINE_LAYOUTS)}"
            )
        if side.block_tokens < 1:
            raise OptionsError(f"{side.name} block of {side.block_tokens} tokens must hold one")
        if not 1 <= side.tp <= self.kv_heads:
            raise OptionsError(
                f"{side.name} tp={side.tp} is outside 1 to {self.kv_heads}, the model's KV heads; "
                "the demo gives each rank heads of its own (raise kv_heads, or lower tp)"
            )

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element of the cache."""
        return _DTYPE_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one head of K or of V."""
        return self.head_dim * self.dtype_bytes

    @property
    def shape(self) -> ModelShape:
        """The model's cache as a shape."""
        kind = TensorKind(("k", "v"), range(self.layers), self.kv_heads, self.head_dim)
        return ModelShape(self.model, (kind,))

    @property
    def request_bytes(self) -> int:
        """Bytes of the request's whole cache."""
        return self.shape.request_bytes(self.tokens, self.dtype_bytes)
