"""The runner's verdicts: a suite that fails, hangs or tests nothing is never green."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

RUNNER = Path(__file__).resolve().parents[1] / "run_suites.py"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_suites", RUNNER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write(folder: Path, body: str) -> tuple[str, ...]:
    (folder / "test_sample.py").write_text(body, encoding="utf-8")
    return (str(folder),)


def test_counts_are_pytest_s(runner, tmp_path):
    body = (
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): pass\n"
        "def test_c(): pytest.skip('why')\n"
        "def test_d(): assert False\n"
        "@pytest.fixture\n"
        "def broken(): raise RuntimeError\n"
        "def test_e(broken): pass\n"
    )
    outcome = runner.run(runner.Suite("sample", write(tmp_path, body), 1), [])
    assert (outcome.passed, outcome.failed, outcome.skipped) == (2, 2, 1)
    assert not outcome.ok


def test_a_suite_that_passes_is_ok_in_its_environment(runner, tmp_path):
    body = "import os\ndef test_a(): assert os.environ['SAMPLE'] == '1'\n"
    folders = write(tmp_path, body)
    assert runner.run(runner.Suite("sample", folders, 1, (("SAMPLE", "1"),)), []).ok
    assert not runner.run(runner.Suite("sample", folders, 1), []).ok


def test_a_suite_over_its_budget_is_stopped_and_fails(runner, tmp_path):
    body = "import threading\ndef test_a(): threading.Event().wait()\n"
    outcome = runner.run(runner.Suite("sample", write(tmp_path, body), 0.05), [])
    assert outcome.verdict == "over budget"
    assert not outcome.ok
    assert outcome.minutes < 1


def test_a_suite_without_tests_fails(runner, tmp_path):
    assert not runner.run(runner.Suite("sample", (str(tmp_path),), 1), []).ok


def test_an_unknown_suite_is_refused(runner, capsys):
    assert runner.main(["nothing"]) == 2
    assert "unit" in capsys.readouterr().err


def test_every_folder_of_tests_is_in_one_suite(runner):
    folders = [folder for suite in runner.suites().values() for folder in suite.folders]
    assert len(folders) == len(set(folders))
    with_tests = {file.parent.name for file in RUNNER.parent.glob("*/test_*.py")}
    assert with_tests <= set(folders)
