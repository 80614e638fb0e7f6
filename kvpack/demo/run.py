"""One run of the demo: the parent's part, from starting the workers to the report."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvpack.demo import messages
from kvpack.demo.config import DemoConfig
from kvpack.demo.digests import compare
from kvpack.demo.processes import Workers
from kvpack.demo.report import DemoReport

__all__ = ["STAGES", "run"]

STAGES = ("prefill", "connect", "warm up", "ship", "compare", "decode", "stop")
"""The stages of a run, in order."""


def run(config: DemoConfig, on_stage: Callable[[str], None]) -> DemoReport:
    """Run the demo.

    Parameters
    ----------
    config : DemoConfig
        What to do.
    on_stage : callable
        Called with each of `STAGES` as it begins.

    Returns
    -------
    DemoReport
        Also where something differs.

    Raises
    ------
    WorkerFailedError
        If a worker failed, died, or the run took longer than `config.timeout_s`.
    """
    prefill, decode = config.prefill.workers, config.decode.workers
    stages = _Stages(on_stage)
    stages.begin("prefill")
    with Workers(config) as workers:
        prefilled = workers.expect(messages.Prefilled, prefill)
        listening = workers.expect(messages.Listening, decode)

        stages.begin("connect")
        addresses = tuple(message.address for message in listening.values())
        workers.tell_all(prefill, messages.Connect(addresses))
        workers.expect(messages.Connected, prefill)

        stages.begin("warm up")
        workers.tell_all(prefill + decode, messages.WarmUp())
        workers.expect(messages.Warmed, prefill + decode)

        stages.begin("ship")
        workers.tell_all(decode + prefill, messages.Ship())
        sent = workers.expect(messages.Sent, prefill)
        received = workers.expect(messages.Received, decode)

        stages.begin("compare")
        mismatch = compare(
            [message.digests for message in prefilled.values()],
            [message.digests for message in received.values()],
        )

        stages.begin("decode")
        reference = workers.expect(messages.Reference, prefill[:1])
        decoded = workers.expect(messages.Decoded, decode[:1])

        stages.begin("stop")
    stages.end()
    return DemoReport(
        config=config,
        device=prefilled[prefill[0]].device,
        mismatch=mismatch,
        untouched=all(message.untouched for message in received.values()),
        reference_tokens=reference[prefill[0]].tokens,
        decoded_tokens=decoded[decode[0]].tokens,
        records={
            name: message.record
            for outcomes in (sent, received)
            for name, message in outcomes.items()
        },
        stages_s=stages.seconds,
    )


class _Stages:
    """Which stage runs, and how long each took."""

    def __init__(self, on_stage: Callable[[str], None]) -> None:
        self._on_stage = on_stage
        self._current: tuple[str, float] | None = None
        self.seconds: dict[str, float] = {}

    def begin(self, stage: str) -> None:
        self.end()
        self._current = (stage, time.monotonic())
        self._on_stage(stage)

    def end(self) -> None:
        if self._current is not None:
            stage, began_s = self._current
            self.seconds[stage] = time.monotonic() - began_s
            self._current = None
