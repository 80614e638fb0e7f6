"""The ``kvpack`` command."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from kvpack.errors import KvpackError, LayoutError, OptionsError
from kvpack.shapes import ENGINE_LAYOUTS, MODELS

app = typer.Typer(
    name="kvpack",
    help="Packs scattered KV cache blocks on the GPU and moves them between inference workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_LAYOUTS = ", ".join(ENGINE_LAYOUTS)
_LOG_WIDTH = 120

_EXIT_DIFFERENT = 1
_EXIT_IMPOSSIBLE = 1
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
    model: Annotated[str, typer.Option(help="qwen3 or llama.")] = "qwen3",
    prefill_tp: Annotated[int, typer.Option(help="Prefill processes; they share the heads.")] = 2,
    decode_tp: Annotated[int, typer.Option(help="Decode processes; they share the heads.")] = 1,
    prefill_layout: Annotated[str, typer.Option(help=f"One of {_LAYOUTS}.")] = "hnd",
    decode_layout: Annotated[str, typer.Option(help=f"One of {_LAYOUTS}.")] = "nhd",
    prefill_block: Annotated[
        int | None, typer.Option(help="Tokens of a prefill block; the engine's own, or 16.")
    ] = None,
    decode_block: Annotated[
        int | None, typer.Option(help="Tokens of a decode block; the engine's own, or 32.")
    ] = None,
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

    A small Qwen3 or Llama of random weights is prefilled in one set of processes; its paged cache
    travels over NIXL to another set with other blocks, another row order and other shards, where
    every byte is compared and decoding goes on from what was received alone.

    Exits with 0 if nothing differs, 1 if anything does, 3 if a process failed.
    """
    if importlib.util.find_spec("transformers") is None:
        typer.echo("the demo needs transformers: pip install 'kvpack[demo]'", err=True)
        raise typer.Exit(_EXIT_FAILED)
    # Torch takes seconds to import; help and usage errors should not wait for it.
    from kvpack.demo.config import DemoConfig, Side

    try:
        config = DemoConfig(
            prefill=Side.of("prefill", prefill_tp, prefill_layout, prefill_block),
            decode=Side.of("decode", decode_tp, decode_layout, decode_block),
            model=model,
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


@app.command()
def explain(
    file: Annotated[
        Path | None,
        typer.Argument(help="TOML file of both declarations, instead of the options below."),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help=f"What the model caches: {', '.join(MODELS)}.")
    ] = None,
    prefill: Annotated[
        str | None, typer.Option(help="Parallelism of the prefill side.", metavar="tp=4,pp=2")
    ] = None,
    decode: Annotated[
        str | None,
        typer.Option(help="Parallelism of the decode side.", metavar="tp=16,attention_dp"),
    ] = None,
    prefill_layout: Annotated[
        str | None, typer.Option(help=f"{_LAYOUTS}, or a dims string; hnd unless given.")
    ] = None,
    decode_layout: Annotated[str | None, typer.Option(help="The same of the decode side.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp8, bf16, fp16 or fp32; bf16 unless given.")
    ] = None,
    block: Annotated[
        int | None, typer.Option(help="Tokens of a block; the layout's own unless given.")
    ] = None,
    prefill_block: Annotated[int | None, typer.Option(help="Only of prefill blocks.")] = None,
    decode_block: Annotated[int | None, typer.Option(help="Only of decode blocks.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the prompt; 8192 unless given.")
    ] = None,
    first: Annotated[
        int | None, typer.Option(help="Positions below it are on the decode side already.")
    ] = None,
    stream_layers: Annotated[
        bool | None,
        typer.Option("--stream-layers", help="Each layer leaves when it is computed."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the random block lists.")] = None,
    every_pair: Annotated[
        bool, typer.Option("--all", help="A row for each pair of ranks, however many.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else to stdout.")
    ] = False,
) -> None:
    """Say who sends what to whom for one request, before anything runs.

    Needs no GPU, no model and no cache: what each rank holds follows from
    the model's shape and from the parallelism and the cache layout of each
    side. A parallelism is any of tp, pp, cp, dp, dcp, attention_dp, layers
    (of each pipeline stage, 50+44), interleave and numbering (trtllm, vllm
    or sglang), joined by commas. kvpack.declaration says what a file holds.

    [b]kvpack explain --shape qwen3-235b --prefill tp=4
    --decode tp=16,attention_dp --dtype fp8 --block 32[/]

    Exits with 0, with 1 if the decode side wants what the prefill side does
    not have, with 2 if a declaration is wrong.
    """
    from kvpack.declaration import load_topology, read_parallelism, read_topology
    from kvpack.explanation import explain_topology

    request = {
        "shape": shape,
        "dtype": dtype,
        "block": block,
        "tokens": tokens,
        "first": first,
        "stream_layers": stream_layers,
        "seed": seed,
    }
    sides = {
        "prefill": (prefill, {"layout": prefill_layout, "block": prefill_block}),
        "decode": (decode, {"layout": decode_layout, "block": decode_block}),
    }
    try:
        table = _given(request)
        for side, (parallelism, options) in sides.items():
            given = _given(options)
            if parallelism is not None:
                given.update(read_parallelism(parallelism))
            if given:
                table[side] = given
        if file is None and shape is None:
            raise OptionsError(f"give a file, or --shape: one of {', '.join(MODELS)}")
        if file is not None and table:
            raise OptionsError(
                f"{file} declares everything; leave out the option for {next(iter(table))}, or "
                "write it into the file"
            )
        topology = read_topology(table, strict=False) if file is None else load_topology(file)
        explanation = explain_topology(topology)
    except (OptionsError, LayoutError) as error:
        raise typer.BadParameter(str(error)) from None
    except KvpackError as error:
        typer.echo(f"kvpack explain: {error}", err=True)
        raise typer.Exit(_EXIT_IMPOSSIBLE) from None
    if json_output:
        typer.echo(json.dumps(explanation.to_dict(), indent=2))
        return
    from rich.console import Console

    from kvpack.routes import print_explanation

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _LOG_WIDTH)
    print_explanation(explanation, console, every_pair=every_pair)


def _given(options: Mapping[str, object]) -> dict[str, object]:
    """Options that are not left out."""
    return {key: value for key, value in options.items() if value is not None}


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Unwind, so that the workers are ended, where the default would leave them behind."""
    sys.exit(128 + number)


def main() -> None:
    """Run the command line."""
    app()
