"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

RECORDER_SOURCE = Path(__file__).parent / "profiling" / "nvtx_recorder.c"


@dataclass(frozen=True)
class NvtxRecorder:
    """A compiled stand-in for a profiler that writes NVTX calls to a file.

    Start the process to be watched with `environment(file)` over its own environment; `events`
    then reads what all processes that shared the file have written.
    """

    library: Path

    def environment(self, file: Path) -> dict[str, str]:
        return {"NVTX_INJECTION64_PATH": str(self.library), "NVTX_RECORDER_FILE": str(file)}

    def events(self, file: Path, domain: str = "kvpack") -> list[dict[str, Any]]:
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        events = [json.loads(line) for line in lines]
        return [event for event in events if event["domain"] == domain]


@pytest.fixture(scope="session")
def nvtx_recorder(tmp_path_factory: pytest.TempPathFactory) -> NvtxRecorder:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("the NVTX recorder needs a C compiler")
    library = tmp_path_factory.mktemp("nvtx") / "libnvtx_recorder.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-o", library, RECORDER_SOURCE], check=True, timeout=60)
    return NvtxRecorder(library)
