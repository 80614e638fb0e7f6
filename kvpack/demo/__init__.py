"""The demo: a real model's KV cache from prefill processes to decode processes."""
