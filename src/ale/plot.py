"""`ale plot`: how runs went, as one PNG: success, gradient norm, lag, throughput, where the time goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ale.data.run_log import RunLog
from ale.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Parts of an update, in order; what is left of `step_s` is sending samples and publishing weights.
PHASES = {"wait_s": "wait for a batch", "pi_old_s": "pi_old", "update_s": "forward, backward", "sync_s": "weight sync"}


def curve(log: RunLog, value: str) -> tuple[list[int], list[float]]:
    """Update numbers and a value of each; NaN where it was not finite or is missing."""
    return [u["update"] for u in log.updates], [_number(u.get(value)) for u in log.updates]


def seconds(log: RunLog) -> list[float]:
    """How long each update took, from the wait for its batch to the live weights; evaluations in between left out."""
    return [sum(_number(u.get(part)) for part in ("wait_s", "step_s", "sync_s")) for u in log.updates]


def throughput(log: RunLog) -> tuple[list[float], list[float]]:
    """Episodes finished per hour, and action tokens trained on per second, of each update."""
    ended = [u["ledger"]["started"] - u["ledger"]["running"] for u in log.updates]
    took = seconds(log)
    episodes = [(b - a) / s * 3600 for a, b, s in zip([0, *ended], ended, took, strict=False)]
    tokens = [_number(u.get("action_tokens")) / s for u, s in zip(log.updates, took, strict=True)]
    return episodes, tokens


def plot(logs: Sequence[RunLog], out: Path) -> None:
    """Draws `logs` over each other into `out`. Raises `UserError` without matplotlib, or with nothing to draw."""
    for log in logs:
        if not log.updates:
            raise UserError(f"The run {log.path} has no update yet: there is nothing to plot.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed, which ale plot needs: pip install 'ale[plot]'.") from error
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 3)
    (success, norm, lag), (episodes, tokens, phases) = grid
    for number, log in enumerate(logs):
        color = f"C{number}"
        _line(success, *curve(log, "success"), log.name, color)
        _evaluations(success, log, color)
        _line(norm, *curve(log, "grad_norm"), log.name, color)
        _line(lag, *curve(log, "lag"), log.name, color, drawstyle="steps-mid")
        lag.axhline(log.setting("rollout.max_lag"), color=color, linestyle=":", linewidth=1)
        per_hour, per_second = throughput(log)
        _line(episodes, curve(log, "lag")[0], per_hour, log.name, color)
        _line(tokens, curve(log, "lag")[0], per_second, log.name, color)
    success.set(title="success: training, held-out with 95% interval", ylim=(-0.02, 1.02), xlabel="update")
    norm.set(title="gradient norm before clipping", yscale="log", xlabel="update")
    lag.set(title="lag of the oldest token; dotted: allowed", xlabel="update")
    lag.yaxis.get_major_locator().set_params(integer=True)
    episodes.set(title="episodes / hour", xlabel="update")
    tokens.set(title="trained action tokens / s", xlabel="update")
    _phases(phases, logs)
    if len(logs) > 1:
        success.legend(fontsize="small")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    figure.suptitle(", ".join(log.name for log in logs))
    try:
        figure.savefig(out, dpi=110, format="png")
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error}.") from error


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], label: str, color: str, **style: Any) -> None:
    axes.plot(x, y, label=label, color=color, linewidth=1.2, marker="." if len(x) < 10 else None, **style)


def _evaluations(axes: Axes, log: RunLog, color: str) -> None:
    """Held-out success where it was measured: before, on the way, after."""
    last = log.updates[-1]["update"]
    for line in log.evaluations:
        _, _, when = str(line["evaluation"]).partition("heldout_")
        x = {"before": 0, "after": last}.get(when, int(when) if when.isdigit() else None)
        if x is not None:
            low, high = line["ci95"]
            y = line["success"]
            axes.errorbar(x, y, yerr=[[y - low], [high - y]], color=color, marker="o", capsize=3)


def _phases(axes: Axes, logs: Sequence[RunLog]) -> None:
    """Mean seconds of an update by phase, a bar for each run."""
    left = np.zeros(len(logs))
    names = [log.name for log in logs]
    for phase, label in PHASES.items():
        mean = np.array([_mean(curve(log, phase)[1]) for log in logs])
        axes.barh(range(len(logs)), mean, left=left, label=label)
        left += mean
    rest = np.array([_mean(seconds(log)) for log in logs]) - left
    axes.barh(range(len(logs)), rest.clip(0), left=left, label="further epochs, transfer", color="lightgrey")
    axes.set(title="seconds of an update, by phase", xlabel="s", yticks=range(len(logs)), yticklabels=names)
    axes.invert_yaxis()
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else 0.0


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
