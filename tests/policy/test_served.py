"""A policy over vLLM servers: routing, versions, deadlines and what becomes of turns whose server dies, over real HTTP
with servers that have a script in place of a model."""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ale.config import PolicyConfig, RunConfig
from ale.errors import ConfigError, DeadlineExceeded, PolicyError, WorkerDied
from ale.messages import Generate, Turn
from ale.policy.open import Learning, _scratch, open_policy
from ale.policy.replica import Replica, Weights
from ale.policy.served import ServedPolicy
from ale.policy.vllm_client import VllmClient
from ale.policy.vllm_launch import PARENT
from ale.testing.scripted_vllm import ScriptedVllm, logp_at, token_at, write_weights
from ale.waiting import register

Ask = Callable[..., Generate]
DEADLINE_S = 30.0


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario

    asyncio.run(bounded())


@asynccontextmanager
async def policy_of(
    model: Path, *servers: ScriptedVllm, turn_deadline_s: float = 20.0, restarts: int = 3
) -> AsyncIterator[ServedPolicy]:
    """Over servers of others, with weights that `model` numbers: version 4 is the number 4."""
    write_weights(model, 0)

    async def save(path: Path) -> None:
        write_weights(path, int(path.name.removeprefix("version-")))

    config = RunConfig(
        policy=PolicyConfig(
            kind="server",
            urls=[s.url for s in servers],
            weights_dir=str(model.parent / "weights"),
            turn_deadline_s=turn_deadline_s,
            restarts=restarts,
        )
    )
    async with open_policy(config, model, Learning(-1, 0, save)) as policy:
        assert isinstance(policy, ServedPolicy)
        yield policy


def check(turn: Turn, prompt: int, count: int, versions: set[int]) -> None:
    """It is what one server without an accident would have said, each token under the weights it is labelled with."""
    positions = range(prompt, prompt + count)
    version_A = turn.version_A.numpy().tolist()
    assert turn.tokens_A.numpy().tolist() == [token_at(p) for p in positions]
    assert turn.logp_A.numpy().tolist() == [logp_at(v, p) for v, p in zip(version_A, positions, strict=True)]
    assert set(version_A) == versions


def test_tokens_log_probabilities_and_the_version_of_each_come_as_they_were_sampled(ask: Ask, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with ScriptedVllm() as server, policy_of(tmp_path / "model", server) as policy:
            turn = await policy.generate(ask("s", range(5), max_tokens=7, seed=3))
            check(turn, 5, 7, {0})
            assert turn.finish == "length"
            assert turn.logp_sampled_A == turn.logp_A
            stop = token_at(5 + 2)
            turn = await policy.generate(ask("s", range(5), max_tokens=7, stop=(stop,)))
            check(turn, 5, 3, {0})
            assert turn.finish == "stop"
            sampling = server.requests[0]["sampling_params"]
            assert (sampling["ignore_eos"], sampling["logprobs"], sampling["detokenize"]) == (True, 0, False)
            assert server.requests[0]["token_ids"] == list(range(5))

    run(scenario())


def test_new_weights_come_between_two_tokens_and_no_answer_ends(ask: Ask, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with ScriptedVllm(tokens=40) as server, policy_of(tmp_path / "model", server) as policy:
            turns = [asyncio.create_task(policy.generate(ask(str(n), range(5), max_tokens=20))) for n in range(4)]
            await server.until(4)
            server.calls.clear()
            await policy.load_weights(1, 0)
            wanted = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"]
            assert [c for c in server.calls if c != "/health"] == wanted
            assert policy.version == 1
            server.allow(1000)
            for turn in await asyncio.gather(*turns):
                check(turn, 5, 20, {0, 1})
            assert len(server.requests) == 4
            kept = sorted(p.name for p in (tmp_path / "weights").glob("*/version-*"))
            await policy.load_weights(2, 0)
            await policy.load_weights(3, 0)
            assert kept == ["version-1"]
            assert sorted(p.name for p in (tmp_path / "weights").glob("*/version-*")) == ["version-2", "version-3"]
        assert list((tmp_path / "weights").iterdir()) == []

    run(scenario())


def test_a_session_stays_where_it_is_and_a_new_one_goes_where_there_is_least_to_do(ask: Ask, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            ScriptedVllm(tokens=0) as one,
            ScriptedVllm(tokens=0) as two,
            policy_of(tmp_path / "model", one, two) as policy,
        ):
            turns = [asyncio.create_task(policy.generate(ask(f"s{n}", range(5), max_tokens=2))) for n in range(6)]
            await one.until(3)
            await two.until(3)
            one.allow(1000)
            two.allow(1000)
            await asyncio.gather(*turns)
            at_one = [r["token_ids"] for r in one.requests]
            for n in range(6):
                await policy.generate(ask(f"s{n}", range(50 + n), max_tokens=2))
            assert (len(one.requests), len(two.requests)) == (6, 6)
            assert len(at_one) == 3
            homes = dict(policy._home)
            for n in range(6):
                await policy.end_session(f"s{n}")
            assert len(homes) == 6
            assert policy._home == {}

    run(scenario())


def test_a_turn_that_its_server_broke_off_goes_on_at_another_from_the_tokens_that_came(
    ask: Ask, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with (
            ScriptedVllm(tokens=6) as one,
            ScriptedVllm() as two,
            policy_of(tmp_path / "model", one, two) as policy,
        ):
            turn = asyncio.create_task(policy.generate(ask("s", range(5), max_tokens=20, seed=1)))
            await one.until(1)
            await one.stop()
            check(await turn, 5, 20, {0})
            assert len(two.requests) == 1
            taken_up = two.requests[0]
            assert taken_up["token_ids"] == [*range(5), *(token_at(p) for p in range(5, 11))]
            assert taken_up["sampling_params"]["max_tokens"] == 14
            assert taken_up["sampling_params"]["seed"] != one.requests[0]["sampling_params"]["seed"]
            assert (policy.reissued, policy.sampled_again) == (1, 0)

    run(scenario())


def test_tokens_whose_version_nobody_can_say_any_more_are_sampled_again(ask: Ask, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            ScriptedVllm(tokens=6) as one,
            ScriptedVllm() as two,
            policy_of(tmp_path / "model", one, two) as policy,
        ):
            turn = asyncio.create_task(policy.generate(ask("s", range(5), max_tokens=20)))
            await one.until(1)
            await policy.load_weights(1, 0)
            one.allow(4)
            await one.until(1)
            await one.stop()
            check(await turn, 5, 20, {1})
            assert two.requests[0]["token_ids"] == list(range(5))
            assert policy.counters()["tokens_sampled_again"] == 10

    run(scenario())


def test_a_server_of_others_that_comes_back_with_other_weights_gets_those_of_the_run(ask: Ask, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with ScriptedVllm() as server, policy_of(tmp_path / "model", server) as policy:
            await policy.load_weights(1, 0)
            port = server.port
            await server.stop()
            turn = asyncio.create_task(policy.generate(ask("s", range(5), max_tokens=4)))
            replica = policy._replicas[0]
            await replica._until(lambda: not replica.up)
            server.label, server.weights = "default", 77
            await server.listen(port=port)
            check(await turn, 5, 4, {1})
            assert policy.counters()["engine_restarts"] == 1

    run(scenario())


def test_a_turn_past_its_deadline_names_its_server_and_is_dropped_there(ask: Ask, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            ScriptedVllm(tokens=2) as server,
            policy_of(tmp_path / "model", server, turn_deadline_s=0.3) as policy,
        ):
            with pytest.raises(DeadlineExceeded, match=r"a turn of s by the vLLM server http://127.*within 0\.3 s"):
                await policy.generate(ask("s", range(5), max_tokens=9))
            while not server.dropped:
                await server._changed.wait()

    run(scenario())


def test_a_session_that_is_ended_and_a_task_that_is_cancelled_have_the_server_drop_their_answers(
    ask: Ask, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with ScriptedVllm(tokens=4) as server, policy_of(tmp_path / "model", server) as policy:
            ended = asyncio.create_task(policy.generate(ask("ended", range(5), max_tokens=9)))
            cancelled = asyncio.create_task(policy.generate(ask("cancelled", range(5), max_tokens=9)))
            await server.until(2)
            await policy.end_session("ended")
            with pytest.raises(PolicyError, match="session ended was ended"):
                await ended
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            while server.dropped < 2:
                await server._changed.wait()
            assert policy._calls == {}

    run(scenario())


def test_how_busy_the_servers_are_is_what_they_say_added_up(ask: Ask, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            ScriptedVllm(tokens=0) as one,
            ScriptedVllm(tokens=0) as two,
            policy_of(tmp_path / "model", one, two) as policy,
        ):
            turns = [asyncio.create_task(policy.generate(ask(str(n), range(5), max_tokens=2))) for n in range(3)]
            await one.until(2)
            await two.until(1)
            seen = await policy.statistics()
            assert (seen.running, seen.waiting, seen.kv_used) == (3, 0, 0.25)
            assert (seen.prefilled_tokens, seen.reused_tokens) == (40, 20)
            one.allow(10)
            two.allow(10)
            await asyncio.gather(*turns)
            assert (await policy.statistics()).busy_s > 0

    run(scenario())


def test_what_a_server_refuses_is_an_error_at_once_and_says_how_a_server_is_started(ask: Ask, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with ScriptedVllm() as server:
            server.fail["/collective_rpc"] = 404  # without VLLM_SERVER_DEV_MODE
            with pytest.raises(
                ConfigError, match=r"HTTP 404.*VLLM_SERVER_DEV_MODE=1 python -m vllm.*--enable-scale-out"
            ):
                async with policy_of(tmp_path / "model", server):
                    pass
            server.fail.clear()
            async with policy_of(tmp_path / "model", server) as policy:
                server.fail["/inference/v1/generate"] = 400
                with pytest.raises(PolicyError, match=r"HTTP 400: .*as the script says"):
                    await policy.generate(ask("s", range(5), max_tokens=9))
                assert policy.reissued == 0

    run(scenario())


def test_a_server_that_fails_every_time_is_not_asked_for_ever(ask: Ask, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with ScriptedVllm() as server, policy_of(tmp_path / "model", server) as policy:
            server.fail["/inference/v1/generate"] = 500
            with pytest.raises(PolicyError, match=r"a turn of s was broken off 8 times: .*HTTP 500"):
                await policy.generate(ask("s", range(5), max_tokens=9))

    run(scenario())


def test_weights_that_do_not_arrive_are_the_error_of_whoever_sent_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with ScriptedVllm() as server, policy_of(tmp_path / "model", server, restarts=0) as policy:
            server.fail["/update_weight_version"] = 500
            with pytest.raises(WorkerDied, match=r"the vLLM server http.* is gone for good: .*update_weight_version"):
                await policy.load_weights(1, 0)
            assert server.calls[-1] == "/resume"  # it may serve others

    run(scenario())


def test_a_server_without_labels_and_a_request_that_cannot_be_trained_on_are_refused(ask: Ask, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with ScriptedVllm(labels=False) as server, policy_of(tmp_path / "model", server) as policy:
            with pytest.raises(PolicyError, match=r"the weights of 0 tokens out of 3; ale needs 0.32"):
                await policy.generate(ask("s", range(5), max_tokens=3))
            with pytest.raises(PolicyError, match="with top_p or top_k"):
                await policy.generate(ask("s", range(5), max_tokens=3, top_p=0.9))
            with pytest.raises(PolicyError, match="prompt_T is empty"):
                await policy.generate(ask("s", [], max_tokens=3))

    run(scenario())


@asynccontextmanager
async def own_server(
    tmp_path: Path, *, restarts: int = 3, silence_s: float = 20.0
) -> AsyncIterator[tuple[Replica, ServedPolicy]]:
    """A server that is a child of ours."""
    socket = tmp_path / "s"
    replica = Replica(
        "vLLM replica 0",
        VllmClient("http://vllm", socket=socket),
        Weights(0, tmp_path / "model"),
        start_deadline_s=20.0,
        sync_deadline_s=20.0,
        silence_s=silence_s,
        restarts=restarts,
        command=[sys.executable, "-m", "ale.testing.scripted_vllm", "--uds", str(socket), "--tokens", "6"],
        env={PARENT: str(os.getpid())},
    )

    async def export(version: int) -> Weights:
        write_weights(tmp_path / str(version), version)
        return Weights(version, tmp_path / str(version))

    async with replica.kept():
        await replica.until_live(0)
        yield replica, ServedPolicy([replica], export, turn_deadline_s=20.0, sync_deadline_s=20.0)


def test_a_server_of_ours_that_is_killed_in_mid_turn_is_started_again_and_the_turn_goes_on(
    ask: Ask, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with own_server(tmp_path) as (replica, policy):
            await policy.load_weights(1, 0)
            turn = asyncio.create_task(policy.generate(ask("s", range(5), max_tokens=10)))
            async with AsyncExitStack() as stack:  # what the child has sampled shows in the labels of a short turn
                stack.callback(turn.cancel)
                await policy.generate(ask("short", range(5), max_tokens=1))
                assert replica.server is not None
                pid = replica.server.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await replica._until(lambda: replica.up and replica.restarted == 1)
                while not turn.done():  # it may have got all it is allowed before: the new one allows six more
                    await replica.client._ask("POST", "/allow?tokens=10")
                check(await turn, 5, 10, {1})
                stack.pop_all()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert replica.server.pid is None

    run(scenario())


def test_a_server_whose_engine_is_stuck_is_started_again(ask: Ask, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with own_server(tmp_path, silence_s=1.0) as (replica, policy):
            check(await policy.generate(ask("s", range(5), max_tokens=10)), 5, 10, {0})  # it gives six, then stands
            assert replica.restarted == 1

    run(scenario())


def test_servers_that_take_long_to_come_up_are_no_silence_of_the_run(tmp_path: Path) -> None:
    async def scenario() -> None:
        write_weights(tmp_path / "model", 0)
        config = RunConfig(
            policy=PolicyConfig(kind="server", urls=["http://127.0.0.1:9"], weights_dir=str(tmp_path / "weights"))
        )

        async def come_up() -> None:
            async with open_policy(config, tmp_path / "model", None):
                pass

        coming = asyncio.create_task(come_up())
        while not register().holds:
            await asyncio.sleep(0)
        assert "the vLLM servers to come up" in {waiter.what for waiter in register().named}
        coming.cancel()
        await asyncio.wait({coming})
        assert not register().holds

    run(scenario())


def test_whoever_owns_the_policy_is_told_when_no_server_is_left(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            ScriptedVllm() as one,
            ScriptedVllm() as two,
            policy_of(tmp_path / "model", one, two, restarts=0) as policy,
        ):
            watching = asyncio.create_task(policy.watch())
            await one.stop()
            policy._replicas[0].suspect()
            await policy._replicas[0].until_gone()
            assert not watching.done()
            await two.stop()
            policy._replicas[1].suspect()
            with pytest.raises(WorkerDied, match="no vLLM server is left"):
                await watching

    run(scenario())


def test_a_server_of_ours_that_cannot_start_says_its_last_words(tmp_path: Path) -> None:
    async def scenario() -> None:
        command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
        client = VllmClient("http://vllm", socket=tmp_path / "s")
        bounds = {"start_deadline_s": 20.0, "sync_deadline_s": 20.0, "silence_s": 20.0}
        weights = Weights(0, tmp_path)
        replica = Replica("vLLM replica 0", client, weights, restarts=3, command=command, env={}, **bounds)
        async with replica.kept():
            with pytest.raises(WorkerDied, match=r"(?s)exit code 1.*no such model"):
                await replica.until_live(0)
        assert replica.restarted == 0

    run(scenario())


CONTROLLER = """
import asyncio, os, sys
from ale.policy.vllm_launch import PARENT
from ale.policy.vllm_process import ServerProcess

SERVER = "from ale.policy.vllm_launch import end_with_parent; end_with_parent(); print('up', flush=True); import signal"

async def main():
    command = [sys.executable, "-c", SERVER + "; signal.pause()"]
    server = ServerProcess(command, {PARENT: str(os.getpid())}, lambda: None)
    await server.start()
    while not server._tail:
        await asyncio.sleep(0)
    print(server.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_controller_that_is_killed_takes_its_servers_along() -> None:
    with subprocess.Popen([sys.executable, "-c", CONTROLLER], stdout=subprocess.PIPE) as controller:
        assert controller.stdout is not None
        server = os.pidfd_open(int(controller.stdout.readline()))
        controller.kill()
        ended, _, _ = select.select([server], [], [], DEADLINE_S)
        os.close(server)
        assert ended


def test_what_is_missing_for_vllm_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def open_(policy: PolicyConfig) -> None:
        async with open_policy(RunConfig(policy=policy), tmp_path, None):
            pass

    monkeypatch.setattr("ale.policy.vllm_process.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs vLLM, which is not installed here: .*`just vllm`.*policy.python"):
        asyncio.run(open_(PolicyConfig(kind="vllm")))
    with pytest.raises(ConfigError, match=r"policy.python: there is no interpreter /nowhere/python"):
        asyncio.run(open_(PolicyConfig(kind="vllm", python="/nowhere/python")))
    with pytest.raises(ConfigError, match=r"policy.weights_dir: /proc/nowhere cannot be written"):
        asyncio.run(open_(PolicyConfig(kind="vllm", weights_dir="/proc/nowhere")))


def test_weights_that_a_killed_run_has_left_are_removed_by_the_next_and_those_in_use_are_not(tmp_path: Path) -> None:
    left = tmp_path / "ale-weights-left"
    write_weights(left / "version-3", 3)
    with _scratch(str(tmp_path)) as one, _scratch(str(tmp_path)) as two:
        assert not left.exists()
        assert one.is_dir()
        assert two.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_another_start_removes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, taken = fcntl.flock, list[Path]()

    def slow(fd: int, how: int) -> None:
        if not taken:
            taken.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
            taken[0].rmdir()
        flock(fd, how)

    monkeypatch.setattr("ale.policy.open.fcntl.flock", slow)
    with _scratch(str(tmp_path)) as path:
        assert path.is_dir()
        assert path != taken[0]
    assert list(tmp_path.iterdir()) == []
