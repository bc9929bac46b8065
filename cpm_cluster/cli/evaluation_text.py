"""How well the planner predicts a table of measured runs, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from cpm_cluster.planner.evaluate import Evaluation, Score


def evaluation_lines(found: Evaluation) -> Iterator[str]:
    """Errors of each quantity, fit or no fit, by engine and mode, and the worst rows."""
    yield f"{len(found.predictions)} rows"
    for name, score in (("GPU memory", found.gpu), ("host memory", found.host), ("tokens/s", found.time)):
        yield _score(name, score)
    if found.in_interval is not None:
        yield f"{'':<24}{found.in_interval:.0%} of the GPU readings lie within the interval"
    fit = found.fit
    balanced = "-" if fit.balanced_accuracy is None else f"{fit.balanced_accuracy:.1%}"
    yield (
        f"{'fit or no fit':<24}{fit.rows:>4} rows  balanced accuracy {balanced}: {fit.caught} of {fit.died} that died,"
        f" {fit.said_to_fit} of {fit.fitted} that ran; false fits: {', '.join(fit.false_fits) or 'none'}"
    )
    if found.gpu_by_group:
        yield "GPU memory by engine and mode"
        yield from (_score(f"  {name}", score) for name, score in found.gpu_by_group.items())
    if found.worst:
        yield "worst: " + ", ".join(f"{row} {error:+.0%}" for row, error in found.worst)


def _score(name: str, score: Score) -> str:
    if score.mape is None or score.within_10 is None or score.within_20 is None:
        return f"{name:<24}   0 rows"
    shares = f"within 10 % {score.within_10:>4.0%}  within 20 % {score.within_20:>4.0%}"
    return f"{name:<24}{score.rows:>4} rows  mean absolute error {score.mape:>6.1%}  {shares}"
