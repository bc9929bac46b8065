"""The live display of a run on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cpm_cluster.cli.progress_line import progress_line
from cpm_cluster.runs.run import Run
from cpm_cluster.runs.state import State


class LiveView:
    """Phase, a bar over the steps, loss, tokens/s and time left; rich follows NO_COLOR."""

    def __init__(self, run: Run) -> None:
        self._console = Console()
        self._console.print(f"[bold]{run.id}[/bold]\n  {run.files.root}", highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None, numbers="")

    def show(self, state: State) -> None:
        """Bring the line up to date."""
        self._progress.start()
        numbers = state.progress or {}
        self._progress.update(
            self._task,
            description=state.phase or state.name,
            total=numbers.get("steps"),
            completed=numbers.get("step", 0),
            numbers=progress_line(numbers) if numbers.get("step") else "",
        )

    def pause(self) -> None:
        """Take the display down; the next `show` brings it back."""
        self._progress.stop()
