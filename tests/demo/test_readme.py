"""The README's Python runs as it stands, and its commands are those of the Makefile."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_python_of_the_readme_runs():
    blocks = python_blocks()
    assert len(blocks) == 2
    done = run("\n".join(blocks))
    assert done.returncode == 0, done.stderr
    assert "{'prefill': b'first token'}" in done.stdout
    assert "Proof(nbytes=" in done.stdout


def test_the_readme_checks_what_it_moves():
    broken = "\n".join(python_blocks()).replace("[7, 2], first", "[2, 7], first")
    done = run(broken)
    assert done.returncode != 0
    assert "AssertionError" in done.stderr


def test_the_example_has_about_twenty_lines():
    lines = [line for line in python_blocks()[0].splitlines() if line.strip()]
    assert len(lines) <= 20


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    phony = makefile.split(".PHONY:", 1)[1].splitlines()[0].split()
    commands = re.findall(r"^\$ make ([a-z -]+)", README, re.MULTILINE)
    named = {target for command in commands for target in command.split()}
    assert {"demo", "test", "test-gpu", "lint", "types"} <= named
    assert named <= set(phony)
