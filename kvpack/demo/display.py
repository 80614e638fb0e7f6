"""The demo's progress: a bar on a terminal, a line for each stage elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kvpack.demo.config import DemoConfig
from kvpack.demo.run import STAGES

__all__ = ["Display"]


class Display:
    """Shows which stage runs, from entering the context to leaving it.

    Parameters
    ----------
    config : DemoConfig
        The run.
    console : Console
        Where to show it.
    """

    def __init__(self, config: DemoConfig, console: Console) -> None:
        self._console = console
        self._texts = _texts(config)
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=len(STAGES))

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, stage: str) -> None:
        """Show that a stage begins."""
        text = self._texts[stage]
        self._progress.update(self._task, completed=STAGES.index(stage), description=text)
        if not self._console.is_terminal:
            self._console.print(f"[{STAGES.index(stage) + 1}/{len(STAGES)}] {text}", markup=False)


def _texts(config: DemoConfig) -> dict[str, str]:
    prefill, decode = config.prefill, config.decode
    return {
        "prefill": (
            f"start {prefill.tp} prefill and {decode.tp} decode processes, "
            f"prefill {config.tokens:,} tokens"
        ),
        "connect": f"connect {prefill.tp} x {decode.tp} endpoints",
        "warm up": "warm up",
        "ship": (
            f"ship {config.request_bytes / 2**20:.1f} MiB from {prefill.layout} blocks of "
            f"{prefill.block_tokens} to {decode.layout} blocks of {decode.block_tokens}"
        ),
        "compare": "compare every received row with the sender's",
        "decode": f"decode {config.new_tokens} tokens from the received cache, and undisturbed",
        "stop": "stop the processes",
    }
