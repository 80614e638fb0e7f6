"""The main job with real processes: every variant arrives whole, every kind of damage is seen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("transformers")

TIMEOUT_S = 150
COMMAND = [sys.executable, "-c", "from kvpack.cli import main\nif __name__ == '__main__': main()"]
# The checkout's own folder would shadow what is installed.
ELSEWHERE = Path(__file__).parent


def demo(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the demo on the CPU; return its exit code and its JSON object."""
    result = subprocess.run(
        [*COMMAND, "demo", "--json", "--device", "cpu", "--timeout", "120", *arguments],
        cwd=ELSEWHERE,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode in (0, 1), result.stderr[-4000:]
    assert "Traceback" not in result.stderr, result.stderr[:4000]
    return result.returncode, json.loads(result.stdout)


@contextmanager
def running_demo(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start the demo in a process group of its own, which does not outlive the block."""
    process = subprocess.Popen(
        [*COMMAND, "demo", "--device", "cpu", "--timeout", "120", *arguments],
        cwd=ELSEWHERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


def workers_once_connecting(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Wait until the demo's workers have built their pools; return those processes."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[2/"):
            break
    return psutil.Process(process.pid).children(recursive=True)


def worker(processes: list[psutil.Process], index: int) -> psutil.Process:
    """Return a worker by the order in which workers are started."""
    spawned = [process for process in processes if "spawn_main" in " ".join(process.cmdline())]
    return sorted(spawned, key=lambda process: process.pid)[index]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--prefill-tp", "4", "--decode-tp", "2"),
        ("--prefill-tp", "1", "--decode-tp", "4"),
        ("--prefill-tp", "1", "--prefill-block", "16", "--decode-block", "64"),
        ("--prefill-tp", "1", "--prefill-block", "32", "--decode-block", "48"),
        ("--prefill-tp", "3", "--decode-tp", "2", "--dtype", "bfloat16", "--staging-mib", "1"),
    ],
    ids=" ".join,
)
def test_bytes_and_tokens_equal_those_of_the_undisturbed_run(arguments: tuple[str, ...]) -> None:
    code, report = demo(*arguments)
    assert code == 0
    assert report["ok"]
    assert report["bytes_equal"]
    assert report["untouched"]
    assert report["tokens_equal"]
    assert len(report["decoded_tokens"]) == 32
    received = [record for record in report["records"].values() if record["side"] == "receive"]
    assert sum(record["nbytes"] for record in received) == report["request_bytes"]
    assert report["writes"] < report["fragments"]


@pytest.mark.parametrize(
    ("prefill", "decode", "model"),
    [
        ("vllm", "sglang", "qwen3"),
        ("sglang", "vllm", "llama"),
        ("trtllm", "sglang", "qwen3"),
        ("vllm", "trtllm", "llama"),
    ],
)
def test_engines_layouts_convert_into_each_other(prefill: str, decode: str, model: str) -> None:
    code, report = demo(
        "--prefill-tp", "1", "--tokens", "500", "--new-tokens", "8", "--model", model,
        "--prefill-layout", prefill, "--decode-layout", decode,
    )  # fmt: skip
    assert code == 0
    assert report["ok"]
    assert report["bytes_equal"]
    assert report["tokens_equal"]
    blocks = {"vllm": 16, "sglang": 1, "trtllm": 32}
    for side, layout in (("prefill", prefill), ("decode", decode)):
        assert report["config"][side]["block_tokens"] == blocks[layout]


@pytest.mark.parametrize(
    ("corruption", "tokens_equal"), [("order", True), ("keys", False), ("bytes", False)]
)
def test_damage_fails_exactly_the_checks_that_can_see_it(
    corruption: str, tokens_equal: bool
) -> None:
    code, report = demo("--prefill-tp", "1", "--corrupt", corruption)
    assert code == 1
    assert not report["ok"]
    assert not report["bytes_equal"]
    assert report["mismatch"]["rows"] > 0
    assert report["tokens_equal"] is tokens_equal
    assert report["untouched"]


def test_the_table_of_phases_is_printed() -> None:
    with running_demo("--prefill-tp", "1", "--tokens", "100", "--new-tokens", "4") as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors[-4000:]
    for word in ("queue", "credit", "prepare", "gather", "post", "wire", "scatter", "complete"):
        assert word in output
    assert "bytes equal" in output
    assert "tokens equal" in output


def test_a_killed_worker_is_named_and_takes_the_others_down() -> None:
    with running_demo("--prefill-tp", "1") as process:
        workers = workers_once_connecting(process)
        worker(workers, 0).kill()
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 3
        assert "prefill-0 died with exit code -9" in errors
        assert psutil.wait_procs(workers, timeout=10)[1] == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_an_interrupted_demo_leaves_no_process_behind(number: signal.Signals, code: int) -> None:
    with running_demo("--prefill-tp", "1") as process:
        workers = workers_once_connecting(process)
        # One worker stands still, so that the run cannot end before it is interrupted.
        still = worker(workers, 0)
        still.suspend()
        os.kill(process.pid, number)
        process.wait(timeout=30)
        assert process.returncode == code
        if number == signal.SIGKILL:
            still.resume()
        assert psutil.wait_procs(workers, timeout=10)[1] == []


def test_a_run_out_of_time_says_who_is_missing() -> None:
    with running_demo("--timeout", "0.5") as process:
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 3
    assert "did not say Prefilled within the run's" in errors
