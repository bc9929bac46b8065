"""The live display of a run on a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from cpm_cluster.cli.progress_line import measures, step_of
from cpm_cluster.runs.run import Run
from cpm_cluster.runs.state import State


class LiveView:
    """Phase, a bar over the steps, and below it loss, tokens/s and time left; rich follows NO_COLOR."""

    def __init__(self, run: Run) -> None:
        self._console = Console()
        self._console.print(f"[bold]{run.id}[/bold]\n  {run.files.root}", highlight=False, soft_wrap=True)
        self._display = _Display(self._console)

    def show(self, state: State) -> None:
        """Bring the lines up to date."""
        self._display.show(state)

    def pause(self) -> None:
        """Take the display down; the next `show` brings it back."""
        self._display.stop()


class _Display(Progress):
    """A bar, and a line of numbers that has the terminal's width for itself."""

    def __init__(self, console: Console) -> None:
        self._numbers = ""
        super().__init__(
            SpinnerColumn(),
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[step]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._bar = self.add_task("starting", total=None, step="")

    def show(self, state: State) -> None:
        """The bar moves without an end until the first step is done."""
        progress = state.progress or {}
        step = progress.get("step", 0)
        self._numbers = " · ".join(measures(progress)) if step else ""
        self.update(
            self._bar,
            description=state.phase or state.name,
            total=progress.get("steps") if step else None,
            completed=step,
            step=step_of(progress) if step else "",
        )
        self.start()

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws: the bar, and the numbers where there are some."""
        yield self.make_tasks_table(self.tasks)
        if self._numbers:
            yield Text(f"  {self._numbers}", no_wrap=True, overflow="ellipsis")
