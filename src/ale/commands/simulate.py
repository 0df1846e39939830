"""`ale simulate`: what a configuration would do on a node, before it is run there."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from ale.errors import UserError

if TYPE_CHECKING:
    from ale.simulation import Node, Prediction, Sampler

_MOST = 64  # combinations of a sweep


def simulate(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A TOML file, such as examples/nano.toml, or the folder of a run.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Overrides a field; repeatable.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="SECTION.FIELD=A,B,C", help="A line for each value; repeatable: for each combination."),
    ] = None,
    recorded: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="Draw episodes, and take the times of updates, from this run."),
    ] = None,
    median_s: Annotated[float, typer.Option(help="Seconds that an episode spends in its environment, the median.")] = 4,
    tail: Annotated[float, typer.Option(help="Its 99th percentile over its median (lognormal).")] = 20,
    crashes: Annotated[float, typer.Option(help="Share of episodes whose sandbox fails.")] = 0.02,
    solved: Annotated[float, typer.Option(help="Share of the others that get a reward.")] = 0.5,
    tokens: Annotated[int, typer.Option(help="Tokens that an episode samples.")] = 64,
    turns: Annotated[int, typer.Option(help="Turns in which it samples them.")] = 3,
    token_s: Annotated[float, typer.Option(help="Seconds for one more token of every running sequence.")] = 0.002,
    row_s: Annotated[float, typer.Option(help="Seconds that each running sequence adds to that.")] = 0.0002,
    step_s: Annotated[float | None, typer.Option(help="Seconds of an update; default 5, or the run's median.")] = None,
    sync_s: Annotated[
        float | None, typer.Option(help="Seconds that new weights take; default 0.1, or the run's median.")
    ] = None,
    updates: Annotated[int, typer.Option(min=1, help="Updates to simulate.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Predict throughput, lag and idle shares: the real loop on a virtual clock, around episodes that only take time.

    Nothing is computed, so it takes seconds, and the figures are as good as the times that it is given.
    """
    from ale.config_file import load
    from ale.simulation import Lognormal, Node, Recorded, simulate

    sampler: Sampler
    if recorded is not None:
        sampler = Recorded(recorded)
        node = _node_of(recorded, step_s, sync_s)
    else:
        try:
            sampler = Lognormal(
                median_s=median_s, tail=tail, crashes=crashes, solved=solved, tokens=tokens, turns=turns
            )
        except ValueError as error:
            raise UserError(f"ale simulate: {error}.") from error
        node = Node(
            token_s=token_s,
            row_s=row_s,
            step_s=5.0 if step_s is None else step_s,
            sync_s=0.1 if sync_s is None else sync_s,
        )
    lines = list[tuple[str, "Prediction"]]()
    for point in _points(sweep or []):
        run = load(config, [*(overrides or []), *point])
        lines.append((", ".join(point) or run.name, simulate(run, node, sampler, updates=updates)))
    if as_json:
        print(msgspec.json.encode([{"settings": name, **msgspec.to_builtins(p)} for name, p in lines]).decode())
    else:
        _show(lines)


def _points(sweep: list[str]) -> Iterator[tuple[str, ...]]:
    """The combinations of all values of all fields."""
    axes = []
    for text in sweep:
        field, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--sweep {text!r} is not of the form section.field=a,b,c.")
        axes.append([f"{field}={value}" for value in values.split(",")])
    points = list(itertools.product(*axes))
    if len(points) > _MOST:
        raise UserError(f"--sweep: {len(points)} combinations are more than {_MOST}; leave some out.")
    yield from points


def _node_of(run: Path, step_s: float | None, sync_s: float | None) -> Node:
    """Recorded episodes include what the engine took; updates are as long as the run's, at their median."""
    from ale.data.run_log import RunLog
    from ale.simulation import Node

    made = RunLog.open(run).updates
    if not made and (step_s is None or sync_s is None):
        raise UserError(f"{run} has made no update yet: say how long one takes, with --step-s and --sync-s.")
    return Node(
        step_s=statistics.median(float(u["step_s"]) for u in made) if step_s is None else step_s,
        sync_s=statistics.median(float(u["sync_s"]) for u in made) if sync_s is None else sync_s,
    )


def _show(lines: list[tuple[str, Prediction]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"predicted over {lines[0][1].updates} updates")
    table.add_column("settings", overflow="fold")
    for name in ("episodes/h", "updates/h", "lag", "most", "trainer idle", "places idle", "engine idle"):
        table.add_column(name, justify="right")
    dropped = Table(title="dropped, share of all episodes (mean tokens)")
    dropped.add_column("settings", overflow="fold")
    reasons = sorted({reason for _, p in lines for reason in p.dropped})
    for reason in reasons:
        dropped.add_column(reason.replace("_", " "), justify="right")
    for name, p in lines:
        shares = (f"{p.dropped[r]:.1%} ({p.dropped_tokens[r]:.0f})" if r in p.dropped else "" for r in reasons)
        dropped.add_row(name, *shares)
        table.add_row(
            name,
            f"{p.episodes_per_hour:,.0f}",
            f"{p.updates_per_hour:,.0f}",
            f"{p.lag_mean:.2f}",
            str(p.lag_max),
            f"{p.trainer_bubble:.0%}",
            f"{p.places_bubble:.0%}",
            f"{p.engine_bubble:.0%}",
        )
    Console().print(table)
    if reasons:
        Console().print(dropped)
