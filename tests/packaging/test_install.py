"""A plain install ships every module, and nothing but the package."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "kvpack": ROOT / "kvpack",
    "kvpack/kernels": ROOT / "kernels",
    "kvpack/transport": ROOT / "transport",
    "kvpack/profiling": ROOT / "profiling",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as `pip install .` lays it out, built from a copy."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS.values():
        shutil.copytree(folder, source / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run(
        [*command, "--no-build-isolation", "--target", target, source], check=True, timeout=240
    )
    return target


def test_every_module_is_shipped(installed: Path):
    sources = {
        f"{package}/{file.relative_to(folder)}"
        for package, folder in FOLDERS.items()
        for file in folder.rglob("*.py")
    }
    shipped = {str(file.relative_to(installed)) for file in (installed / "kvpack").rglob("*.py")}
    assert shipped == sources


def test_types_and_licence_are_shipped(installed: Path):
    assert (installed / "kvpack" / "py.typed").exists()
    [metadata] = installed.glob("kvpack-*.dist-info")
    licence = (metadata / "licenses" / "LICENSE").read_text(encoding="utf-8")
    assert licence == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_no_top_level_package_but_kvpack(installed: Path):
    names = {entry.name for entry in installed.iterdir() if entry.name != "bin"}
    assert {name for name in names if not name.endswith(".dist-info")} == {"kvpack"}


def test_the_installed_copy_is_the_one_that_runs(installed: Path):
    program = (
        "import kvpack, kvpack.kernels, kvpack.transport, kvpack.profiling.ranges\n"
        "for module in (kvpack, kvpack.kernels, kvpack.transport, kvpack.profiling):\n"
        "    print(module.__file__)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=installed,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    for line in result.stdout.split():
        assert Path(line).is_relative_to(installed)


def test_the_installed_metadata_names_a_command_and_a_licence():
    distribution = importlib.metadata.distribution("kvpack")
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    [command] = distribution.entry_points.select(group="console_scripts", name="kvpack")
    assert command.value.startswith("kvpack.cli:")
