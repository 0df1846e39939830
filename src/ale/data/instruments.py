"""What the numbers of a run are called by OpenTelemetry's conventions, and a page of them for Prometheus.

`metrics.jsonl` and TensorBoard keep ale's short names; `INSTRUMENTS` gives each a name after the semantic conventions
(`process.*`, `gen_ai.*`) where these have one, and after their form where they have none (`ale.*`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from ale.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client import Metric

_MB = 2.0**20


class Instrument(msgspec.Struct, frozen=True):
    """`Instrument("process.memory.usage", "By", {"ale.component": "engine"}, 1048576.0)`: the value times `scale`."""

    name: str
    unit: str
    attributes: dict[str, str] = {}
    scale: float = 1.0


INSTRUMENTS: dict[str, Instrument] = {
    "update": Instrument("ale.update", "{update}"),
    "success": Instrument("ale.rollout.success", "1"),
    "batch_reward": Instrument("ale.batch.reward", "1"),
    "episodes": Instrument("ale.rollout.count", "{rollout}"),
    "loss": Instrument("ale.learner.loss", "1"),
    "grad_norm": Instrument("ale.learner.gradient.norm", "1"),
    "lag": Instrument("ale.policy.lag", "{version}"),
    "action_tokens": Instrument("gen_ai.client.token.usage", "{token}", {"gen_ai.token.type": "output"}),
    "wait_s": Instrument("ale.trainer.wait.duration", "s"),
    "step_s": Instrument("ale.learner.step.duration", "s"),
    "sync_s": Instrument("ale.policy.sync.duration", "s"),
    "loop_lag_p99_ms": Instrument("ale.event_loop.lag", "s", {"ale.quantile": "0.99"}, 1e-3),
    "sandboxes_alive": Instrument("ale.sandbox.count", "{sandbox}"),
    "trainer_bubble": Instrument("ale.component.bubble", "1", {"ale.component": "trainer"}),
}


def instrument(value: str) -> Instrument:
    """What the number `value` of metrics.jsonl is called."""
    found = INSTRUMENTS.get(value)
    if found is not None:
        return found
    for ending, name, unit, scale in (
        ("_busy", "ale.component.utilization", "1", 1.0),
        ("_bubble", "ale.component.bubble", "1", 1.0),
        ("_memory_mb", "process.memory.usage", "By", _MB),
        ("_descriptors", "process.open_file_descriptor.count", "{file_descriptor}", 1.0),
        ("_cpu_s", "process.cpu.time", "s", 1.0),
        ("_restarts", "ale.component.restarts", "{restart}", 1.0),
    ):
        if value.endswith(ending):
            return Instrument(name, unit, {"ale.component": value.removesuffix(ending)}, scale)
    return Instrument(f"ale.{value}", "1")


class Page:
    """The last numbers, as a collector of `prometheus_client`."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._values: dict[str, float] = {}

    def show(self, values: Mapping[str, float]) -> None:
        self._values = {**self._values, **values}

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        families: dict[str, GaugeMetricFamily] = {}
        for value, number in self._values.items():
            i = instrument(value)
            labels = {"ale_run": self._run} | {key.replace(".", "_"): said for key, said in i.attributes.items()}
            name = i.name.replace(".", "_").replace("/", "_") + {"By": "_bytes", "s": "_seconds"}.get(i.unit, "")
            if name not in families:
                families[name] = GaugeMetricFamily(name, f"{i.name} [{i.unit}]", labels=list(labels))
            families[name].add_metric(list(labels.values()), number * i.scale)
        yield from families.values()


@contextmanager
def prometheus(page: Page, port: int) -> Iterator[int]:
    """Serves `page` on loopback; yields the port, which for 0 is any free one. Raises `ConfigError`."""
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise ConfigError("metrics.prometheus_port needs prometheus_client: pip install 'ale[prometheus]'.") from error
    registry = CollectorRegistry()
    registry.register(page)
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise ConfigError(f"metrics.prometheus_port: 127.0.0.1:{port} cannot be listened on: {error}.") from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10.0)
