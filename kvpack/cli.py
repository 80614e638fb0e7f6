"""The ``kvpack`` command."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

app = typer.Typer(
    name="kvpack",
    help="Packs scattered KV cache blocks on the GPU and moves them between inference workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_EXIT_DIFFERENT = 1
_EXIT_FAILED = 3


@app.callback()
def _commands() -> None:
    """Keep subcommands subcommands, however few there are."""


@app.command()
def version() -> None:
    """Print the versions that a bug report needs."""
    typer.echo(f"kvpack {importlib.metadata.version('kvpack')}")
    typer.echo(f"python {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "triton", "nixl", "nixl-cu12", "nixl-cu13", "numpy", "transformers"):
        typer.echo(f"{package} {_installed(package)}")


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


@app.command()
def demo(
    prefill_tp: Annotated[int, typer.Option(help="Prefill processes; they share the heads.")] = 2,
    decode_tp: Annotated[int, typer.Option(help="Decode processes; they share the heads.")] = 1,
    prefill_layout: Annotated[str, typer.Option(help="nhd, hnd, vllm, sglang or trtllm.")] = "hnd",
    decode_layout: Annotated[str, typer.Option(help="nhd, hnd, vllm, sglang or trtllm.")] = "nhd",
    prefill_block: Annotated[int, typer.Option(help="Tokens of a prefill block.")] = 16,
    decode_block: Annotated[int, typer.Option(help="Tokens of a decode block.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 1000,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 32,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 4,
    kv_heads: Annotated[int, typer.Option(help="KV heads of the model.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Elements of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto: cuda if there is any.")] = "auto",
    corrupt: Annotated[
        str,
        typer.Option(
            help="Damage the received cache, to see the checks notice: [b]order[/] swaps two "
            "blocks, [b]keys[/] swaps their keys alone, [b]bytes[/] overwrites a block."
        ),
    ] = "none",
    staging_mib: Annotated[int, typer.Option(help="Staging memory of each process.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of weights, prompt and block lists.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds that the run may take.")] = 240.0,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else to stdout.")
    ] = False,
) -> None:
    """Move a real model's KV cache between processes, and prove that it arrived.

    A small Qwen3 of random weights is prefilled in one set of processes; its paged cache travels
    over NIXL to another set with other blocks, another row order and other shards, where
    every byte is compared and decoding goes on from what was received alone.

    Exits with 0 if nothing differs, 1 if anything does, 3 if a process failed.
    """
    if importlib.util.find_spec("transformers") is None:
        typer.echo("the demo needs transformers: pip install 'kvpack[demo]'", err=True)
        raise typer.Exit(_EXIT_FAILED)
    # Torch takes seconds to import; help and usage errors should not wait for it.
    from kvpack.demo.config import DemoConfig, Side
    from kvpack.errors import OptionsError

    try:
        config = DemoConfig(
            prefill=Side("prefill", prefill_tp, prefill_layout, prefill_block),
            decode=Side("decode", decode_tp, decode_layout, decode_block),
            tokens=tokens,
            new_tokens=new_tokens,
            layers=layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            corrupt=corrupt,
            staging_mib=staging_mib,
            seed=seed,
            timeout_s=timeout,
        )
    except OptionsError as error:
        raise typer.BadParameter(str(error)) from None

    from rich.console import Console

    from kvpack.demo.display import Display
    from kvpack.demo.processes import WorkerFailedError
    from kvpack.demo.report import print_report
    from kvpack.demo.run import run

    signal.signal(signal.SIGTERM, _exit_on_signal)
    console = Console(stderr=json_output, highlight=False)
    if not console.is_terminal:
        # A log has no width of its own, and the table of phases has a column for every process.
        console.width = max(console.width, 18 + 14 * (prefill_tp + decode_tp))
    try:
        with Display(config, console) as display:
            report = run(config, display.begin)
    except WorkerFailedError as error:
        typer.echo(f"kvpack demo: {error}", err=True)
        raise typer.Exit(_EXIT_FAILED) from None
    if json_output:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        print_report(report, console)
    if not report.ok:
        raise typer.Exit(_EXIT_DIFFERENT)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Unwind, so that the workers are ended, where the default would leave them behind."""
    sys.exit(128 + number)


def main() -> None:
    """Run the command line."""
    app()
