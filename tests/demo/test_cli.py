"""The command line: help without torch, versions, and bad arguments refused at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpack.cli import app


def words(text: str) -> str:
    """Undo the box and the line breaks that an error is printed with."""
    return re.sub(r"[│\s]+", " ", text)


def test_help_names_every_option_and_what_the_exit_codes_mean() -> None:
    result = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    for option in (
        "--model", "--prefill-tp", "--decode-tp", "--prefill-layout", "--decode-layout",
        "--prefill-block", "--decode-block", "--tokens", "--new-tokens", "--device", "--corrupt",
        "--seed", "--timeout", "--json",
    ):  # fmt: skip
        assert option in result.output
    assert "Exits with 0 if nothing differs, 1 if anything does" in words(result.output)


def test_version_names_what_a_bug_report_needs() -> None:
    result = CliRunner().invoke(app, ["version"])
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.output.splitlines()]
    assert names[:2] == ["kvpack", "python"]
    assert {"torch", "triton", "nixl"} <= set(names)


def test_help_version_and_usage_errors_import_neither_torch_nor_nixl(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'triton', 'nixl', 'zmq', 'transformers'): sys.modules[name] = None\n"
        "from kvpack.cli import app\n"
        "for arguments in (['--help'], ['version'], ['demo', '--help'], ['explain', '--help']):\n"
        "    app(arguments, standalone_mode=False)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "prefill-tp" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefill-tp", "5"], "prefill tp=5 is outside 1 to 4, the model's KV heads"),
        (["--decode-tp", "0"], "decode tp=0 is outside 1 to 4"),
        (["--model", "gpt2"], "model='gpt2' is not one of qwen3, llama"),
        (["--device", "tpu"], "device='tpu' is not one of auto, cpu, cuda"),
        (["--corrupt", "everything"], "corrupt='everything' is not one of none, order, keys"),
        (["--decode-layout", "lmcache"], "decode layout 'lmcache' is not one of nhd, hnd, vllm"),
        (["--tokens", "40", "--corrupt", "order"], "needs two full decode blocks, but 40 tokens"),
        (["--decode-block", "two"], "Invalid value for '--decode-block'"),
    ],
)
def test_bad_arguments_exit_with_2_and_say_why(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 2
    assert message in words(result.output)
