"""``kvpack explain``: one line of options or a file in, a table or JSON out, quickly."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpack.cli import app

README = Path(__file__).resolve().parents[2] / "README.md"
QWEN = [
    "--shape", "qwen3-235b", "--prefill", "tp=4", "--decode", "tp=16,attention_dp",
    "--dtype", "fp8", "--block", "32", "--tokens", "8192",
]  # fmt: skip


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["explain", *arguments], env={"COLUMNS": "120"})
    return result.exit_code, result.output


def words(text: str) -> str:
    """Undo the box and the line breaks that an error is printed with."""
    return re.sub(r"[│\s]+", " ", text)


def test_json_has_a_sender_for_every_pair_of_ranks() -> None:
    code, output = run(*QWEN, "--json")
    assert code == 0
    senders = json.loads(output)["senders"]
    assert {(s["source"], s["destination"]) for s in senders} == {
        (f"prefill-{i}", f"decode-{j}") for i in range(4) for j in range(16)
    }
    for sender in senders:
        assert (sender["fragments"], sender["fragment_bytes"]) == (48_128, 4096)
        assert sender["bytes"] == 197_132_288
        assert 48_000 < sender["descriptors"] <= sender["fragments"]


def test_the_table_groups_pairs_of_equal_traffic() -> None:
    code, output = run(*QWEN)
    assert code == 0
    (row,) = [line for line in output.splitlines() if "48,128 │" in line and "4,096" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:6] == ["0-3", "0-15", "64", "48,128", "4,096", "188.0"]
    assert "tp=16,attention_dp, 16 ranks, 16 data parallel groups of 1" in output
    assert "one request is 192,512 descriptors" in output
    assert "posts 12 writes of at most 64 MiB" in output
    assert "k, v of layers 0-93, heads 0: blocks of 32 tokens to blocks of 32" in output


def test_all_shows_every_pair() -> None:
    code, output = run(*QWEN, "--all")
    assert code == 0
    assert sum(line.count("4,096") for line in output.splitlines() if "prefill-" in line) >= 64
    assert "prefill-3" in output
    assert "decode-15" in output


def test_ranks_paired_one_to_one_share_a_row() -> None:
    code, output = run("--shape", "llama-3.1-8b", "--prefill", "tp=8", "--decode", "tp=8")
    assert code == 0
    assert "8 of 64" in output


def test_copies_and_kinds_of_pair_are_put_into_words() -> None:
    code, output = run("--shape", "deepseek-v3.2", "--prefill", "tp=4", "--decode", "tp=2")
    assert code == 0
    assert "Several senders hold the same bytes; one is elected for each request" in output
    uneven = ["--prefill", "pp=5,layers=40+20+14+12+8", "--decode", "tp=2"]
    code, output = run("--shape", "qwen3-235b", *uneven)
    assert code == 0
    assert "Pairs of 2 other kinds are planned likewise." in output


def test_every_layout_goes_to_every_other() -> None:
    for layout in ("nhd", "vllm", "sglang", "trtllm", "block kv head token dim"):
        code, output = run(
            "--shape", "llama-3.1-8b", "--tokens", "200", "--prefill-layout", layout,
            "--decode-layout", "hnd", "--stream-layers",
        )  # fmt: skip
        assert code == 0, output
        assert f"layout {layout}" in output
        assert "layer by layer" in output


def test_a_file_declares_both_sides(tmp_path: Path) -> None:
    file = tmp_path / "topology.toml"
    file.write_text(
        'shape = "deepseek-r1"\ndtype = "fp8"\n'
        '[prefill]\ntp = 4\nattention_dp = true\nlayout = "trtllm"\n'
        '[decode]\ntp = 8\nattention_dp = true\nlayout = "trtllm"\n',
        encoding="utf-8",
    )
    code, output = run(str(file), "--json")
    assert code == 0
    for sender in json.loads(output)["senders"]:
        assert (sender["fragments"], sender["fragment_bytes"]) == (256, 1_124_352)
    code, output = run(str(file), "--tokens", "9")
    assert code == 2
    assert "declares everything; leave out the option for tokens" in words(output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a file, or --shape: one of llama-3.1-8b, llama-3.3-70b"),
        (["--shape", "gpt-2"], "shape='gpt-2' is not one of llama-3.1-8b"),
        (["--shape", "qwen3-32b", "--prefill", "tp4"], "'tp4' in parallelism 'tp4' is not one of"),
        (["--shape", "qwen3-32b", "--decode", "tp=x"], "[decode]: Expected `int`, got `str`"),
        (["--shape", "qwen3-32b", "--decode", "pp=65"], "pp=65 stages cannot share 64 layers"),
        (["--shape", "qwen3-32b", "--dtype", "int4"], "dtype='int4' is not one of fp8, bf16"),
        (["--shape", "qwen3-32b", "--block", "0"], "prefill block of 0 tokens must hold one"),
        (["--shape", "qwen3-32b", "--decode-layout", "a b"], "cannot be given a size"),
        (["--shape", "qwen3-32b", "--first", "9000"], "first=9000 is outside [0, 8192)"),
        (["no-such.toml"], "cannot read no-such.toml: No such file or directory"),
    ],
)
def test_wrong_declarations_exit_with_2_and_say_why(arguments: list[str], message: str) -> None:
    code, output = run(*arguments)
    assert code == 2, output
    assert message in words(output)


def test_sides_that_cannot_be_paired_exit_with_1() -> None:
    prime = ["--prefill", "cp=61,interleave=7", "--decode", "cp=59,interleave=11"]
    code, output = run("--shape", "qwen3-32b", *prime)
    assert code == 1
    assert "kvpack explain: context parallelism of" in output
    assert "choose smaller interleaves" in words(output)


def test_help_names_shapes_layouts_and_exit_codes() -> None:
    code, output = run("--help")
    assert code == 0
    for word in ("qwen3-235b", "deepseek-r1", "nhd, hnd, vllm, sglang, trtllm", "attention_dp"):
        assert word in words(output)
    assert "Exits with 0, with 1 if" in words(output)


def test_the_command_needs_no_torch_and_little_time(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'triton', 'nixl', 'zmq', 'transformers'): sys.modules[name] = None\n"
        f"sys.argv = ['kvpack', 'explain', *{QWEN!r}]\n"
        "from kvpack.cli import main\n"
        "main()\n"
    )
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "48,128" in result.stdout
    # About a second here; far more would be a plan a rank instead of a plan a kind of pair.
    assert time.monotonic() - started < 20


def test_the_readme_shows_what_is_printed() -> None:
    block = re.search(
        r"^```console\n\$ kvpack explain (.*?)\n(?=┏|qwen)(.*?)^```",
        README.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    assert block is not None
    arguments = block[1].replace("\\\n", " ").split()
    code, output = run(*arguments)
    assert code == 0
    shown = [line.rstrip() for line in block[2].splitlines()]
    assert shown == [line.rstrip() for line in output.splitlines()][: len(shown)]
    assert any("48,128" in line for line in shown)
