"""The demo's model: a small Qwen3 or Llama of random weights, its prefill and greedy decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = ["Model", "Prefill"]

_VOCABULARY = 2048
_HIDDEN = 128
_QUERY_HEADS_PER_KV_HEAD = 2
# Wide enough that a wrong cache changes tokens: at transformers' default of 0.02 a random Qwen3
# emits two distinct tokens in 64, whatever it attends to.
_INITIALIZER_RANGE = 0.3


@dataclass(frozen=True)
class Prefill:
    """What prefill leaves behind.

    Parameters
    ----------
    first_token : int
        The token that follows the prompt.
    keys, values : tuple of torch.Tensor
        One a layer, shaped (token, head, dim), all heads, in sequence order.
    """

    first_token: int
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]


class Model:
    """A model with random weights; equal arguments give equal weights in every process.

    Parameters
    ----------
    architecture : {"qwen3", "llama"}
        Which model.
    layers, kv_heads, head_dim : int
        Shape of its cache.
    max_tokens : int
        Longest sequence it must hold.
    dtype : torch.dtype
        Of weights and cache.
    device : torch.device
        Where it runs.
    seed : int
        Seed of the weights and of prompts.
    """

    def __init__(
        self,
        architecture: str,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        # Costs seconds to import, and only the processes that run the model need it.
        from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

        architectures: dict[str, tuple[Callable[..., Any], Callable[..., torch.nn.Module]]] = {
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
            "llama": (LlamaConfig, LlamaForCausalLM),
        }
        make_config, make_model = architectures[architecture]
        config = make_config(
            vocab_size=_VOCABULARY,
            hidden_size=_HIDDEN,
            intermediate_size=2 * _HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=_QUERY_HEADS_PER_KV_HEAD * kv_heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_tokens,
            initializer_range=_INITIALIZER_RANGE,
            tie_word_embeddings=False,
        )
        # Weights are drawn on the CPU, so that they do not depend on the device.
        torch.manual_seed(seed)
        model = make_model(config)
        self._model = model.eval().to(device=device, dtype=dtype)
        self._device = device
        self._seed = seed

    def prompt(self, tokens: int) -> torch.Tensor:
        """Make a prompt of random token ids, int64 on the CPU, shaped (tokens,)."""
        generator = torch.Generator().manual_seed(self._seed)
        return torch.randint(0, _VOCABULARY, (tokens,), generator=generator)

    @torch.inference_mode()
    def prefill(self, prompt: torch.Tensor) -> Prefill:
        """Run the prompt once and return its cache and the token that follows."""
        cache, first_token = self._prefill(prompt)
        layers: Sequence[Any] = cache.layers
        return Prefill(
            first_token=first_token,
            keys=tuple(layer.keys[0].transpose(0, 1) for layer in layers),
            values=tuple(layer.values[0].transpose(0, 1) for layer in layers),
        )

    @torch.inference_mode()
    def generate(self, prompt: torch.Tensor, new_tokens: int) -> tuple[int, ...]:
        """Prefill and decode greedily in one go: the undisturbed run, whose cache never moves."""
        cache, first_token = self._prefill(prompt)
        return self._greedy(first_token, cache, new_tokens)

    @torch.inference_mode()
    def decode(
        self,
        first_token: int,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        new_tokens: int,
    ) -> tuple[int, ...]:
        """Decode greedily on from a cache; the prompt itself is never seen.

        Parameters
        ----------
        first_token : int
            The token that followed the prompt.
        keys, values : sequence of torch.Tensor
            One a layer, shaped (token, head, dim), all heads, in sequence order. They are copied.
        new_tokens : int
            Tokens to return, `first_token` included.

        Returns
        -------
        tuple of int
            The tokens that follow the prompt.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(
                key.transpose(0, 1).unsqueeze(0).contiguous(),
                value.transpose(0, 1).unsqueeze(0).contiguous(),
                layer,
            )
        return self._greedy(first_token, cache, new_tokens)

    def _prefill(self, prompt: torch.Tensor) -> tuple[DynamicCache, int]:
        from transformers import DynamicCache

        cache = DynamicCache()
        output = self._model(
            input_ids=prompt.unsqueeze(0).to(self._device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cache, int(output.logits[0, -1].argmax())

    def _greedy(self, first_token: int, cache: DynamicCache, new_tokens: int) -> tuple[int, ...]:
        tokens = [first_token]
        while len(tokens) < new_tokens:
            output = self._model(
                input_ids=torch.tensor([tokens[-1:]], device=self._device),
                past_key_values=cache,
                use_cache=True,
            )
            tokens.append(int(output.logits[0, -1].argmax()))
        return tuple(tokens)
