"""The outcome of a run of the demo: what was compared, what was measured, and how it is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from kvpack.demo.config import DemoConfig
from kvpack.demo.digests import Mismatch
from kvpack.profiling.phases import Phase
from kvpack.profiling.records import TransferRecord

__all__ = ["DemoReport", "print_report"]

_MIB = 1 << 20


@dataclass(frozen=True)
class DemoReport:
    """One finished run.

    Parameters
    ----------
    config : DemoConfig
        What was asked for.
    device : str
        Where the first prefill worker ran.
    mismatch : Mismatch or None
        Where received rows differ from the sender's; None where none does.
    untouched : bool
        Whether every byte outside the request's positions still was poison.
    reference_tokens, decoded_tokens : tuple of int
        Of the undisturbed run, and from the received cache alone.
    records : mapping of str to TransferRecord
        By worker.
    stages_s : mapping of str to float
        Seconds of each stage of the run, as the parent saw them.
    """

    config: DemoConfig
    device: str
    mismatch: Mismatch | None
    untouched: bool
    reference_tokens: tuple[int, ...]
    decoded_tokens: tuple[int, ...]
    records: Mapping[str, TransferRecord]
    stages_s: Mapping[str, float]

    @property
    def bytes_equal(self) -> bool:
        """Whether every received byte of K and V equals the sender's."""
        return self.mismatch is None

    @property
    def tokens_equal(self) -> bool:
        """Whether decoding from the received cache gave the undisturbed run's tokens."""
        return self.reference_tokens == self.decoded_tokens

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return self.bytes_equal and self.tokens_equal and self.untouched

    @property
    def fragments(self) -> int:
        """Pieces that all receivers would have taken unpacked."""
        return sum(self.records[name].fragments for name in self.config.decode.workers)

    @property
    def writes(self) -> int:
        """Writes that all senders posted."""
        return sum(self.records[name].writes for name in self.config.prefill.workers)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON's own types."""
        return {
            "ok": self.ok,
            "bytes_equal": self.bytes_equal,
            "tokens_equal": self.tokens_equal,
            "untouched": self.untouched,
            "mismatch": None if self.mismatch is None else dataclasses.asdict(self.mismatch),
            "device": self.device,
            "request_bytes": self.config.request_bytes,
            "fragments": self.fragments,
            "writes": self.writes,
            "reference_tokens": list(self.reference_tokens),
            "decoded_tokens": list(self.decoded_tokens),
            "records": {name: record.to_dict() for name, record in self.records.items()},
            "stages_s": dict(self.stages_s),
            "config": dataclasses.asdict(self.config),
        }


def print_report(report: DemoReport, console: Console) -> None:
    """Print the table of phases and the verdict."""
    config = report.config
    console.print(_phases(report))
    console.print(
        f"{config.request_bytes / _MIB:.1f} MiB in {report.fragments:,} fragments travelled in "
        f"{report.writes:,} writes."
    )
    rows = config.request_bytes // config.row_bytes
    _verdict(
        console,
        report.bytes_equal,
        f"bytes equal: all {rows:,} rows of K and V, in sequence order",
        f"bytes differ: {report.mismatch}",
    )
    _verdict(
        console,
        report.untouched,
        "nothing else written: every byte outside the request still holds its poison",
        "poison overwritten: bytes outside the request changed",
    )
    _verdict(
        console,
        report.tokens_equal,
        f"tokens equal: {config.new_tokens} decoded as in the undisturbed run",
        f"tokens differ: {_first_difference(report)}",
    )
    if config.corrupt != "none":
        console.print(f"The received cache was damaged on purpose (corrupt={config.corrupt}).")


def _phases(report: DemoReport) -> Table:
    table = Table(title=f"one request of {report.config.tokens:,} tokens on {report.device}")
    table.add_column("milliseconds")
    for name in report.records:
        table.add_column(name, justify="right")
    records = report.records.values()
    for phase in Phase:
        table.add_row(phase.label, *(f"{record.phase_ms(phase):.3f}" for record in records))
    table.add_row("task", *(f"{record.task_ms:.3f}" for record in records), end_section=True)
    table.add_row("MiB", *(f"{record.nbytes / _MIB:.2f}" for record in records))
    table.add_row("fragments", *(f"{record.fragments:,}" for record in records))
    table.add_row("chunks", *(f"{record.chunks:,}" for record in records))
    table.add_row("writes", *(f"{record.writes:,}" for record in records))
    table.add_row("GiB/s", *(f"{record.throughput_gib_s:.2f}" for record in records))
    return table


def _verdict(console: Console, good: bool, yes: str, no: str) -> None:
    mark, text = ("[green]✓[/]", yes) if good else ("[red]✗[/]", no)
    console.print(f"{mark} {text}", soft_wrap=True)


def _first_difference(report: DemoReport) -> str:
    for place, (expected, decoded) in enumerate(
        zip(report.reference_tokens, report.decoded_tokens, strict=True)
    ):
        if expected != decoded:
            return f"new token {place} is {decoded} instead of {expected}"
    return "none"
