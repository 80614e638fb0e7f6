"""Runs the test suites, each in its own pytest process within its budget of minutes.

    python tests/run_suites.py                 # all that need no GPU
    python tests/run_suites.py unit loopback   # some
    python tests/run_suites.py unit -- -k plan # what follows goes to pytest

A suite over its budget is stopped and fails. The last line counts the tests of all suites.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Suite:
    """Folders of `tests` that run together, and how long they may take on two cores."""

    name: str
    folders: tuple[str, ...]
    budget_minutes: float
    environment: tuple[tuple[str, str], ...] = ()


# Interpreted and compiled kernels cannot share a process: an interpreted function has no cache
# key. Interpreter tests are therefore a folder and a suite of their own.
APART = {
    "interpreter": Suite("interpreter", ("interpreter",), 10, (("TRITON_INTERPRET", "1"),)),
    "loopback": Suite("loopback", ("transport", "endpoint", "demo"), 20),
    "gpu": Suite("gpu", ("gpu",), 10),
}
NOT_A_SUITE = {"support"}
DEFAULT = ("unit", "interpreter", "loopback")


@dataclass(frozen=True)
class Outcome:
    """How one suite ended."""

    suite: str
    passed: int
    failed: int
    skipped: int
    minutes: float
    budget_minutes: float
    verdict: str

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"


def suites() -> dict[str, Suite]:
    """Return all suites by name; what is in no other suite is a unit test."""
    claimed = NOT_A_SUITE.union(*(suite.folders for suite in APART.values()))
    folders = sorted(
        folder.name
        for folder in TESTS.iterdir()
        if folder.is_dir() and folder.name not in claimed and any(folder.glob("test_*.py"))
    )
    return {"unit": Suite("unit", tuple(folders), 8), **APART}


def run(suite: Suite, pytest_arguments: list[str]) -> Outcome:
    """Run one suite to its end or its budget's."""
    folders = [str(TESTS / f) for f in suite.folders if any((TESTS / f).glob("test_*.py"))]
    started = time.monotonic()
    if not folders:
        return Outcome(suite.name, 0, 0, 0, 0.0, suite.budget_minutes, "no tests")
    print(f"\n=== {suite.name}: at most {suite.budget_minutes:g} min", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable]
        if sys.version_info >= (3, 11):
            command.append("-P")  # test what is installed, not what lies in this folder
        command += ["-m", "pytest", "-q", "--durations=5", f"--junitxml={report}"]
        process = subprocess.Popen(
            [*command, *folders, *pytest_arguments],
            cwd=TESTS.parent,
            env={**os.environ, **dict(suite.environment)},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=suite.budget_minutes * 60)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
        minutes = (time.monotonic() - started) / 60
        passed, failed, skipped = _counts(report)
    if code is None:
        verdict = "over budget"
    elif code == 0 or (code == 5 and pytest_arguments):
        verdict = "ok"
    else:
        verdict = f"pytest exit {code}"
    return Outcome(suite.name, passed, failed, skipped, minutes, suite.budget_minutes, verdict)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the suite's process and whatever its tests left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _counts(report: Path) -> tuple[int, int, int]:
    """Return passed, failed and skipped tests; all zero where pytest wrote no report."""
    if not report.exists():
        return 0, 0, 0
    total = failed = skipped = 0
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        total += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return total - failed - skipped, failed, skipped


def main(arguments: list[str]) -> int:
    """Run the named suites, print the closing table, return the exit status."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    names, pytest_arguments = arguments[:at], arguments[at + 1 :]
    known = suites()
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"unknown suite {unknown[0]!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    outcomes = [run(known[name], pytest_arguments) for name in names or DEFAULT]
    print(f"\n{'suite':<12} {'passed':>7} {'failed':>7} {'skipped':>8} {'min':>6} {'budget':>7}")
    for o in outcomes:
        print(
            f"{o.suite:<12} {o.passed:>7} {o.failed:>7} {o.skipped:>8} "
            f"{o.minutes:>6.1f} {o.budget_minutes:>7g}  {o.verdict}"
        )
    passed = sum(o.passed for o in outcomes)
    # A suite that was stopped or crashed counts as a failure of its own.
    failed = sum(o.failed or (0 if o.ok else 1) for o in outcomes)
    print(f"{passed} passed, {failed} failed, {sum(o.skipped for o in outcomes)} skipped")
    return 0 if all(o.ok for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
