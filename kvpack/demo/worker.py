"""The demo's processes: a prefill rank and a decode rank, each with one endpoint.

Tensor parallelism here is that of the cache alone: every prefill rank runs the whole model, which
is deterministic, and keeps its own heads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from kvpack.demo import messages
from kvpack.demo.config import DemoConfig, Side
from kvpack.demo.digests import ShardDigests, digest_rows
from kvpack.demo.link import Link
from kvpack.demo.model import Model
from kvpack.demo.paging import NAMES, PagedCache, shuffled_blocks
from kvpack.layout import Shard

__all__ = ["WorkerArguments", "run_worker"]

# Sender's and receiver's differ, so that poison that was sent by mistake shows. The receiver's
# reads as NaN in every floating dtype, and would end up in the tokens.
_POISON = {"prefill": 0x7B, "decode": 0xFF}

_Message = TypeVar("_Message")


@dataclass(frozen=True)
class WorkerArguments:
    """What one worker process is started with.

    Parameters
    ----------
    config : DemoConfig
        The run.
    side : Side
        The side this worker belongs to.
    rank : int
        Its tensor parallel rank there.
    control : Connection
        To the parent.
    shards : tuple of Connection
        Pipes for the received shards. The first decode rank reads from all the others, in the
        order of their ranks; each of those writes to its only one.
    """

    config: DemoConfig
    side: Side
    rank: int
    control: Connection
    shards: tuple[Connection, ...] = ()

    @property
    def name(self) -> str:
        """The worker's name."""
        return self.side.workers[self.rank]


class _Parent:
    """The pipe to the parent, with one deadline for all that is awaited from it."""

    def __init__(self, control: Connection, timeout_s: float) -> None:
        self._control = control
        self._deadline_s = time.monotonic() + timeout_s

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self._deadline_s - time.monotonic())

    def tell(self, message: object) -> None:
        self._control.send(message)

    def wait_for(self, kind: type[_Message]) -> _Message:
        if not self._control.poll(self.remaining_s):
            raise TimeoutError(f"the parent sent no {kind.__name__} in time")
        message = self._control.recv()
        if not isinstance(message, kind):
            raise TypeError(f"the parent sent {message!r} instead of {kind.__name__}")
        return message


def run_worker(arguments: WorkerArguments) -> None:
    """Run one worker to its end; whatever goes wrong reaches the parent as a traceback."""
    # Stdout is the parent's, which may owe it a single JSON object.
    os.dup2(2, 1)
    # Ctrl-C reaches the whole process group; the parent ends its workers in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    parent = _Parent(arguments.control, arguments.config.timeout_s)
    try:
        if arguments.side.name == "prefill":
            _prefill(arguments, parent)
        else:
            _decode(arguments, parent)
    except BaseException:
        try:
            parent.tell(messages.Failed(traceback.format_exc()))
        except OSError:
            # The parent is gone, and with it everyone who could read this elsewhere.
            traceback.print_exc()
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    """End this process when its parent is gone, were it killed, whatever runs here meanwhile."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _prefill(arguments: WorkerArguments, parent: _Parent) -> None:
    config, side = arguments.config, arguments.side
    device = _device(arguments)
    heads = side.parallelism.rank(arguments.rank).heads(config.kv_heads)
    model = _model(config, device)
    prompt = model.prompt(config.tokens)
    prefilled = model.prefill(prompt)
    cache, blocks = _pools(arguments, heads, device)
    rows = {
        (layer, name): tensor[:, heads.start : heads.stop]
        for name, tensors in zip(NAMES, (prefilled.keys, prefilled.values), strict=True)
        for layer, tensor in enumerate(tensors)
    }
    for (layer, name), values in rows.items():
        cache.write(layer, name, values, blocks)
    digests = _digests(rows, config.layers, heads)
    with Link(arguments.name, cache, heads, config.staging_mib << 20, parent.remaining_s) as link:
        parent.tell(messages.Prefilled(str(device), digests))
        link.connect(parent.wait_for(messages.Connect).addresses)
        parent.tell(messages.Connected())
        parent.wait_for(messages.WarmUp)
        link.warmup(config.decode.workers)
        parent.tell(messages.Warmed())
        parent.wait_for(messages.Ship)
        record = link.send(blocks, config.tokens, prefilled.first_token.to_bytes(4, "little"))
        parent.tell(messages.Sent(record))
        if arguments.rank == 0:
            parent.tell(messages.Reference(model.generate(prompt, config.new_tokens)))
        parent.wait_for(messages.Stop)


def _decode(arguments: WorkerArguments, parent: _Parent) -> None:
    config, side = arguments.config, arguments.side
    device = _device(arguments)
    heads = side.parallelism.rank(arguments.rank).heads(config.kv_heads)
    leader = arguments.rank == 0
    model = _model(config, device) if leader else None
    cache, blocks = _pools(arguments, heads, device)
    with Link(arguments.name, cache, heads, config.staging_mib << 20, parent.remaining_s) as link:
        parent.tell(messages.Listening(link.listen()))
        parent.wait_for(messages.WarmUp)
        link.warmup(config.prefill.workers)
        parent.tell(messages.Warmed())
        parent.wait_for(messages.Ship)
        record, aux = link.receive(
            blocks, config.tokens, config.prefill.workers, config.decode.workers
        )
        untouched = cache.untouched(blocks, config.tokens)
        _corrupt(config, cache, blocks)
        rows = {
            (layer, name): cache.read(layer, name, blocks, config.tokens)
            for layer in range(config.layers)
            for name in NAMES
        }
        digests = _digests(rows, config.layers, heads)
        parent.tell(messages.Received(record, digests, untouched))
        if model is not None:
            keys, values = (
                [
                    _join(rows[layer, name], arguments.shards, parent)
                    for layer in range(config.layers)
                ]
                for name in NAMES
            )
            first_token = int.from_bytes(aux, "little")
            parent.tell(
                messages.Decoded(model.decode(first_token, keys, values, config.new_tokens))
            )
        else:
            for name in NAMES:
                for layer in range(config.layers):
                    arguments.shards[0].send_bytes(
                        rows[layer, name].cpu().view(torch.uint8).numpy().tobytes()
                    )
        parent.wait_for(messages.Stop)


def _device(arguments: WorkerArguments) -> torch.device:
    """Pick this worker's device; on CUDA, workers are dealt out over the devices there are."""
    config = arguments.config
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("device='cuda', but torch finds no CUDA device; use device='cpu'")
    workers = config.prefill.workers + config.decode.workers
    device = torch.device("cuda", workers.index(arguments.name) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _model(config: DemoConfig, device: torch.device) -> Model:
    return Model(
        config.model,
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_tokens=config.tokens + config.new_tokens,
        dtype=getattr(torch, config.dtype),
        device=device,
        seed=config.seed,
    )


def _pools(
    arguments: WorkerArguments, heads: Shard, device: torch.device
) -> tuple[PagedCache, npt.NDArray[np.int32]]:
    """Poisoned pools with a quarter more blocks than the request needs, and its block list."""
    config, side = arguments.config, arguments.side
    count = -(-config.tokens // side.block_tokens)
    num_blocks = count + count // 4 + 4
    workers = config.prefill.workers + config.decode.workers
    rng = np.random.default_rng((config.seed, workers.index(arguments.name)))
    cache = PagedCache(
        side.engine_layout.dims,
        layers=config.layers,
        num_blocks=num_blocks,
        block_tokens=side.block_tokens,
        heads=heads.count,
        head_dim=config.head_dim,
        dtype=getattr(torch, config.dtype),
        device=device,
        poison=_POISON[side.name],
    )
    return cache, shuffled_blocks(num_blocks, count, rng)


def _digests(rows: dict[tuple[int, str], torch.Tensor], layers: int, heads: Shard) -> ShardDigests:
    return ShardDigests(
        heads.start,
        np.stack(
            [
                np.stack([digest_rows(rows[layer, name]) for name in NAMES])
                for layer in range(layers)
            ]
        ),
    )


def _corrupt(config: DemoConfig, cache: PagedCache, blocks: npt.NDArray[np.int32]) -> None:
    """Damage the received cache as asked, in its first and last full blocks."""
    first = int(blocks[0])
    last = int(blocks[config.tokens // cache.block_tokens - 1])
    if config.corrupt == "order":
        cache.swap_blocks(first, last)
    elif config.corrupt == "keys":
        cache.swap_blocks(first, last, names=("k",))
    elif config.corrupt == "bytes":
        cache.overwrite_block(last)


def _join(mine: torch.Tensor, others: Sequence[Connection], parent: _Parent) -> torch.Tensor:
    """Join one tensor's heads with those that the other decode ranks received."""
    tokens, _, dim = mine.shape
    parts = [mine]
    for connection in others:
        if not connection.poll(parent.remaining_s):
            raise TimeoutError("a decode rank sent no shard in time")
        data = torch.frombuffer(bytearray(connection.recv_bytes()), dtype=mine.dtype)
        parts.append(data.view(tokens, -1, dim).to(mine.device))
    return torch.cat(parts, dim=1)
