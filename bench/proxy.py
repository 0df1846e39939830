"""The model proxy under load: added latency, throughput at 64-way, and memory with 1,000 streams at once.

The engine answers at once, so that what is timed is the proxy. The load comes from `wrk`, not from Python: every
request is a dialogue of about 2,000 tokens. LiteLLM's proxy (set ALE_LITELLM to its `litellm` binary, in an environment
of its own) forwards the same requests to a dummy upstream in the same run; so does our own mode *deploy*.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import orjson

from bench.harness import ROOT, benchmark

WORDS = ["oak", "elm", "fir", "ash", "yew", "fox", "owl", "bee", "ant", "cat"]
TURNS, EPISODES = 10, 64
SMALL = "--small" in sys.argv[1:]  # whether it works at all: its figures mean little, and go to a file of their own
SECONDS, PAIRS, STREAMS = (1, 1, 100) if SMALL else (4, 3, 1000)
_READY_S = 120.0

_SERVER = """
import asyncio, json, sys
import numpy as np
from ale.messages import Turn
from ale.models.nano import train_tokenizer
from ale.proxy.episode import Limits
from ale.proxy.server import open_proxy, train_mode
from ale.proxy.upstream import Upstream, open_deploy
from ale.wire import Array

mode, url, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
tokenizer = train_tokenizer(["oak elm fir ash yew fox owl bee ant cat"] * 4, 384)
ids = [*tokenizer("fox owl", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
zeros = Array.of([0.0] * len(ids), "float32")
TURN = Turn(tokens_A=Array.of(ids, "int32"), logp_A=zeros, logp_sampled_A=zeros,
            version_A=Array.of([0] * len(ids), "int32"), finish="stop")

class Dummy:
    version = 0
    async def generate(self, request):
        if pause:
            await asyncio.sleep(pause)
        return TURN
    async def end_session(self, session): ...
    async def load_weights(self, version, slot): ...

LIMITS = Limits(max_requests=10**9, max_tokens=10**12, time_s=1e6)

async def serve(mode):
    async with open_proxy(mode, port=0) as proxy:
        from contextlib import AsyncExitStack
        async with AsyncExitStack() as stack:
            count = int(sys.argv[4])
            opened = [await stack.enter_async_context(proxy.episode(f"e{i}", limits=LIMITS)) for i in range(count)]
            print(json.dumps({"url": proxy.url, "keys": [e.key for e in opened]}), flush=True)
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

async def main():
    if mode == "train":
        await serve(train_mode(Dummy(), tokenizer, places=4096))
    else:
        async with open_deploy(Upstream(openai=url + "/v1", key=sys.argv[5])) as deploy:
            await serve(deploy)

import uvloop
uvloop.run(main())
"""

_LUA = """
local file = io.open(os.getenv("BENCH_REQUESTS"), "r")
local requests = {}
for line in file:lines() do
  local key, body = line:match("^(%S+) (.*)$")
  table.insert(requests, wrk.format("POST", os.getenv("BENCH_PATH"),
    {["Content-Type"] = "application/json", ["Authorization"] = "Bearer " .. key}, body))
end
local i = math.random(#requests)
request = function()
  i = i % #requests + 1
  return requests[i]
end
done = function(summary, latency, requests)
  print(string.format("RESULT %d %d %d %d", summary.requests, summary.duration,
    latency:percentile(50), summary.errors.status + summary.errors.read + summary.errors.connect))
end
"""


def body(stream: bool = False) -> dict[str, object]:
    """Ten turns of an agent that reads files: about 2,000 tokens for the nano tokenizer."""
    messages: list[dict[str, str]] = [{"role": "user", "content": "Go."}]
    for turn in range(TURNS):
        said = " ".join(WORDS[(turn + i) % 10] for i in range(30))
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": said + said}]
    return {"model": "policy", "messages": messages, "stream": stream, "max_tokens": 16}


@contextmanager
def server(
    mode: str, url: str = "-", *, pause_s: float = 0.0, episodes: int = EPISODES, key: str = ""
) -> Iterator[dict]:
    """Our proxy in a process of its own: its URL, keys and process id."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, mode, url, str(pause_s), str(episodes), key],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the proxy did not start; its error stands above")
        yield {**json.loads(line), "pid": process.pid}
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=30)


def wrk(
    url: str, keys: list[str], connections: int, *, stream: bool = False, seconds: int = SECONDS
) -> dict[str, float]:
    """Requests a second, the median latency in ms, and how many failed."""
    with tempfile.TemporaryDirectory() as folder:
        lua, requests = Path(folder) / "load.lua", Path(folder) / "requests"
        lua.write_text(_LUA)
        text = orjson.dumps(body(stream)).decode()
        requests.write_text("\n".join(f"{key} {text}" for key in keys) + "\n")
        done = subprocess.run(
            ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "60s", "-s", str(lua), url],
            capture_output=True,
            text=True,
            check=True,
            timeout=seconds + 120,
            env=os.environ | {"BENCH_REQUESTS": str(requests), "BENCH_PATH": "/v1/chat/completions"},
        )
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"wrk printed no result: {done.stdout} {done.stderr}")
    count, duration_us, p50_us, failed = map(int, found.groups())
    return {"rate": count / (duration_us / 1e6), "p50_ms": p50_us / 1e3, "failed": failed, "count": count}


@contextmanager
def litellm(binary: str, upstream: str, key: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(
            "model_list:\n  - model_name: policy\n    litellm_params:\n      model: openai/policy\n"
            f"      api_base: {upstream}/v1\n      api_key: {key}\n"
        )
        process = subprocess.Popen(
            [binary, "--config", str(config), "--port", "18499", "--num_workers", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
        )
        try:
            wait_for("http://127.0.0.1:18499/health/liveliness", process)
            yield "http://127.0.0.1:18499"
        finally:
            process.terminate()
            process.wait(timeout=30)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    import httpx

    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise RuntimeError(f"{url} did not come up within {_READY_S:g} s")


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def answers_well(url: str, key: str) -> bool:
    import openai

    async def ask() -> bool:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as client:
            whole = await client.chat.completions.create(**body())  # type: ignore[call-overload]
            streamed = [c async for c in await client.chat.completions.create(**body(True))]  # type: ignore[call-overload]
            text = "".join(c.choices[0].delta.content or "" for c in streamed if c.choices)
            enough = 1500 < whole.usage.prompt_tokens < 3000
            return whole.choices[0].message.content == text == "fox owl" and enough

    return asyncio.run(ask())


def main() -> None:
    if shutil.which("wrk") is None:
        raise SystemExit("bench.proxy needs `wrk` (apt-get install wrk): its load does not come from Python.")
    binary = os.environ.get("ALE_LITELLM")
    with (
        benchmark("proxy_small" if SMALL else "proxy", pairs=PAIRS) as bench,
        server("train") as ours,
        server("train") as dummy,
    ):
        bench.check("the official client gets the engine's words", lambda: answers_well(ours["url"], ours["keys"][0]))
        failed = []

        def rate(url: str, keys: list[str]) -> float:
            seen = wrk(url, keys, 64)
            failed.append(seen["failed"])
            return seen["rate"]

        def p50(url: str, keys: list[str]) -> float:
            seen = wrk(url, keys, 1)
            failed.append(seen["failed"])
            return seen["p50_ms"]

        # The dummy upstream behind LiteLLM and behind our own mode *deploy* is a proxy of the mode *train*.
        with ExitStack() as stack:
            deploy = stack.enter_context(server("deploy", dummy["url"], key=dummy["keys"][0]))
            theirs = None
            if binary is None:
                print("LiteLLM is not measured: ALE_LITELLM names no `litellm` binary.", file=sys.stderr)
            else:
                theirs = stack.enter_context(litellm(binary, dummy["url"], dummy["keys"][0]))
            against = None if theirs is None else "LiteLLM"
            for name, where in (("train", ours), ("deploy", deploy)):
                bench.latency(
                    f"{name}_p50_one_at_a_time",
                    ours=partial(p50, where["url"], where["keys"]),
                    baseline=None if theirs is None else partial(p50, theirs, ["any"]),
                    against=against,
                    unit="ms",
                )
                bench.rate(
                    f"{name}_64_way",
                    ours=partial(rate, where["url"], where["keys"]),
                    baseline=None if theirs is None else partial(rate, theirs, ["any"]),
                    against=against,
                    unit="requests/s",
                )

        # A thousand episodes stream at once from an engine that takes a second for each turn.
        with server("train", pause_s=1.0, episodes=STREAMS) as many:
            before = resident_mb(many["pid"])

            def streams() -> float:
                seen = wrk(many["url"], many["keys"], STREAMS, stream=True, seconds=6)
                failed.append(seen["failed"])
                return resident_mb(many["pid"]) - before

            bench.latency(f"memory_of_{STREAMS}_streams", ours=streams, baseline=None, against=None, unit="MB more")
        if any(failed):
            raise SystemExit(f"{sum(failed):g} requests failed: the figures mean nothing, and are not written")


if __name__ == "__main__":
    main()
