"""What a run of the demo says: verdicts, the table of phases, and one JSON object."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from kvpack.demo.config import DemoConfig, Side
from kvpack.demo.digests import Mismatch
from kvpack.demo.display import Display
from kvpack.demo.report import DemoReport, print_report
from kvpack.demo.run import STAGES
from kvpack.profiling.phases import Phase
from kvpack.profiling.records import RecordBuilder, Side as RecordSide, TransferRecord

CONFIG = DemoConfig(Side("prefill", 2, "hnd", 16), Side("decode", 1, "nhd", 32), new_tokens=3)


def record(side: RecordSide, nbytes: int, fragments: int, writes: int) -> TransferRecord:
    builder = RecordBuilder("demo", side, "cpu", start_s=1.0)
    builder.nbytes, builder.fragments, builder.writes = nbytes, fragments, writes
    builder.clock.add(Phase.WIRE, 1.0, 1.25)
    return builder.finish(1.5, "done")


def make_report(
    mismatch: Mismatch | None = None,
    untouched: bool = True,
    decoded_tokens: tuple[int, ...] = (7, 8, 9),
) -> DemoReport:
    half = CONFIG.request_bytes // 2
    return DemoReport(
        config=CONFIG,
        device="cpu",
        mismatch=mismatch,
        untouched=untouched,
        reference_tokens=(7, 8, 9),
        decoded_tokens=decoded_tokens,
        records={
            "prefill-0": record("send", half, 16_000, 1),
            "prefill-1": record("send", half, 16_000, 1),
            "decode-0": record("receive", 2 * half, 32_000, 2),
        },
        stages_s={"ship": 0.1},
    )


def printed(report: DemoReport) -> str:
    file = io.StringIO()
    print_report(report, Console(file=file, width=100))
    return file.getvalue()


def test_an_undisturbed_run_is_ok_and_its_table_has_every_phase_and_worker() -> None:
    report = make_report()
    text = printed(report)
    assert report.ok
    for word in ("prefill-0", "prefill-1", "decode-0", *(phase.label for phase in Phase)):
        assert word in text
    assert "250.000" in text
    assert "500.000" in text
    assert "7.8 MiB in 32,000 fragments travelled in 2 writes." in text
    assert text.count("✓") == 3
    assert "✗" not in text


MISMATCH = Mismatch(rows=2, total_rows=9, layer=1, name="v", head=3, position=17)


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (make_report(mismatch=MISMATCH), "bytes differ: 2 of 9 rows differ, the first in layer 1"),
        (make_report(untouched=False), "poison overwritten"),
        (make_report(decoded_tokens=(7, 8, 1)), "tokens differ: new token 2 is 1 instead of 9"),
    ],
)
def test_each_difference_alone_fails_the_run(report: DemoReport, message: str) -> None:
    assert not report.ok
    text = printed(report)
    assert message in text
    assert (text.count("✗"), text.count("✓")) == (1, 2)


def test_the_report_is_json() -> None:
    found = json.loads(json.dumps(make_report(mismatch=MISMATCH).to_dict()))
    assert (found["ok"], found["bytes_equal"], found["tokens_equal"]) == (False, False, True)
    assert found["mismatch"]["position"] == 17
    assert (found["fragments"], found["writes"]) == (32_000, 2)
    assert found["records"]["decode-0"]["phases_ms"]["wire"] == pytest.approx(250)
    assert found["config"]["decode"]["layout"] == "nhd"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_a_line_a_stage_elsewhere(terminal: bool) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120)
    with Display(CONFIG, console) as display:
        for stage in STAGES:
            display.begin(stage)
    lines = file.getvalue().splitlines()
    if terminal:
        assert "\x1b[" in file.getvalue()
    else:
        assert len(lines) == len(STAGES)
        assert "ship 7.8 MiB from hnd blocks of 16 to nhd blocks of 32" in lines[3]
