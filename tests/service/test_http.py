"""The service as any program sees it: plain HTTP and JSON, right, wrong and hostile."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ale.errors import ConfigError
from ale.sandbox import SandboxEngine
from ale.sandbox.rocklet.trees import pack_tree
from ale.service.server import open_service
from ale.service.tenant import ServiceLimits


def stdout(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["completed"]["stdout"]).decode()


def test_a_sandbox_is_started_used_and_stopped_with_plain_json(alice: httpx.Client) -> None:
    started = alice.put("/v1/sandboxes/box", json={"env": {"A": "1"}, "label": "run-1"})
    assert started.status_code == 200
    assert started.json()["id"].startswith("run-1-")
    assert stdout(alice.post("/v1/sandboxes/box/exec", json={"shell": "echo $A; pwd"})) == "1\n/app\n"
    alice.put("/v1/sandboxes/box/file", params={"path": "a/b"}, content=b"\x00\xff")
    assert alice.get("/v1/sandboxes/box/file", params={"path": "a/b"}).content == b"\x00\xff"
    listed = alice.get("/v1/sandboxes/box/list", params={"path": "a"}).json()["files"]
    assert [(file["name"], file["size"]) for file in listed] == [("b", 2)]
    for line in ("cd a; x=kept", "echo $x; ls"):
        said = alice.post("/v1/sandboxes/box/exec", params={"session": "main"}, json={"shell": line})
    assert stdout(said) == "kept\nb\n"
    assert alice.get("/v1/sandboxes").json()["sandboxes"][0]["seen"]["statistics"]["commands"] == 3
    log = alice.get("/v1/sandboxes/box/log").json()
    assert [entry["line"] for entry in log["commands"]] == ["echo $A; pwd", "cd a; x=kept", "echo $x; ls"]
    assert alice.delete("/v1/sandboxes/box").status_code == 200
    assert alice.delete("/v1/sandboxes/box").status_code == 200
    assert alice.post("/v1/sandboxes/box/exec", json={"shell": "true"}).status_code == 404


def test_a_key_asked_twice_is_done_once(alice: httpx.Client) -> None:
    alice.put("/v1/sandboxes/box", json={})
    append = {"shell": "echo x >> log; wc -l < log"}
    asked = [
        alice.post("/v1/sandboxes/box/exec", json=append, headers={"idempotency-key": "the-one-key"}) for _ in range(3)
    ]
    assert {stdout(answer).strip() for answer in asked} == {"1"}
    patient = alice.post(
        "/v1/sandboxes/box/exec", json=append, headers={"idempotency-key": "the-one-key"}, params={"wait_s": 1}
    )
    assert stdout(patient).strip() == "1"  # how long an answer is waited for makes no other request
    assert stdout(alice.get("/v1/requests/the-one-key")).strip() == "1"
    other = alice.post("/v1/sandboxes/box/exec", json={"shell": "rm log"}, headers={"idempotency-key": "the-one-key"})
    assert other.status_code == 409
    assert stdout(alice.post("/v1/sandboxes/box/exec", json=append)).strip() == "2"


def test_a_long_command_is_asked_about_until_it_ends(alice: httpx.Client) -> None:
    alice.put("/v1/sandboxes/box", json={})
    alice.post("/v1/sandboxes/box/exec", json={"shell": "mkfifo go"})
    begun = alice.post(
        "/v1/sandboxes/box/exec",
        json={"shell": "read line < go; echo done"},
        headers={"idempotency-key": "a-long-one"},
        params={"wait_s": 0},
    )
    assert (begun.status_code, begun.json()) == (202, {"running": "a-long-one"})
    assert alice.get("/v1/sandboxes/box").json()["busy"] == 1
    assert alice.get("/v1/requests/a-long-one", params={"wait_s": 0.01}).status_code == 202
    alice.post("/v1/sandboxes/box/exec", json={"shell": "echo > go"})
    assert stdout(alice.get("/v1/requests/a-long-one")) == "done\n"


def test_a_request_that_is_cancelled_before_it_arrives_never_begins(alice: httpx.Client) -> None:
    alice.put("/v1/sandboxes/box", json={})
    assert alice.delete("/v1/requests/came-too-late").status_code == 200
    late = alice.post(
        "/v1/sandboxes/box/exec", json={"shell": "touch began"}, headers={"idempotency-key": "came-too-late"}
    )
    assert late.status_code == 409
    assert stdout(alice.post("/v1/sandboxes/box/exec", json={"shell": "ls"})) == ""


def test_a_cancelled_command_is_killed(alice: httpx.Client) -> None:
    alice.put("/v1/sandboxes/box", json={})
    alice.post(
        "/v1/sandboxes/box/exec",
        json={"shell": "exec flock -x lock sh -c 'touch locked; exec sleep 1000'", "timeout_s": 1000},
        headers={"idempotency-key": "to-be-killed"},
        params={"wait_s": 0},
    )
    alice.post("/v1/sandboxes/box/exec", json={"shell": "until [ -e locked ]; do :; done"})
    assert alice.delete("/v1/requests/to-be-killed").status_code == 200
    freed = alice.post("/v1/sandboxes/box/exec", json={"shell": "flock -n lock true"})
    assert freed.json()["completed"]["exit_code"] == 0


def test_another_token_sees_and_reaches_nothing(service: Any, alice: httpx.Client) -> None:
    alice.put("/v1/sandboxes/box", json={})
    alice.post("/v1/sandboxes/box/exec", json={"shell": "true"}, headers={"idempotency-key": "alices-own"})
    snapshot = alice.post("/v1/sandboxes/box/snapshot").json()["snapshot"]
    with httpx.Client(base_url=service.url, headers={"authorization": f"Bearer {service.bob}"}, trust_env=False) as bob:
        assert bob.get("/v1/sandboxes").json() == {"sandboxes": []}
        assert bob.get("/v1/sandboxes/box").status_code == 404
        assert bob.post("/v1/sandboxes/box/exec", json={"shell": "true"}).status_code == 404
        assert bob.get("/v1/requests/alices-own").status_code == 404
        assert bob.put("/v1/sandboxes/mine", json={"snapshot": snapshot}).status_code == 404
        assert bob.delete("/v1/sandboxes/box").status_code == 200  # as if there were none
        assert bob.delete(f"/v1/snapshots/{snapshot}").status_code == 200
    assert alice.get("/v1/sandboxes/box").status_code == 200
    assert alice.put("/v1/sandboxes/forked", json={"snapshot": snapshot}).status_code == 200
    assert alice.delete(f"/v1/snapshots/{snapshot}").status_code == 200


@pytest.mark.parametrize(
    "sent", [None, "", "Bearer", "Bearer wrong", "Basic alice-has-this-token", "alice-has-this-token", "Bearer \xff"]
)
def test_without_a_known_token_nothing_is_told(service: Any, sent: str | None) -> None:
    headers = {} if sent is None else {"authorization": sent.encode("latin-1")}
    with httpx.Client(base_url=service.url, headers=headers, trust_env=False) as nobody:
        for method, path in (("GET", "/openapi.json"), ("GET", "/v1/service"), ("PUT", "/v1/sandboxes/x"),
                             ("PUT", "/v1/trees/x"), ("POST", "/v1/run")):  # fmt: skip
            answer = nobody.request(method, path, content=b"{" if method != "GET" else None)
            assert answer.status_code == 401
            assert answer.json()["error"]["kind"] == "Unauthorized"


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("PUT", "/v1/sandboxes/x", b"{", 400),
        ("PUT", "/v1/sandboxes/x", b"[]", 400),
        ("PUT", "/v1/sandboxes/x", b'{"limits": {"memory_bm": 1}}', 400),
        ("PUT", "/v1/sandboxes/x", b'{"limits": {"memory_mb": 0}}', 400),
        ("PUT", "/v1/sandboxes/x", b'{"network": {"mode": "everything"}}', 400),
        ("PUT", "/v1/sandboxes/x", b'{"workdir": "/usr/../etc"}', 400),
        ("PUT", "/v1/sandboxes/x", b'{"trees": ["../../etc"]}', 404),
        ("PUT", "/v1/sandboxes/x", b'{"template": "no-such"}', 400),
        ("PUT", "/v1/sandboxes/x", b'{"template": "greets", "snapshot": "y"}', 400),
        ("PUT", "/v1/sandboxes/x", b'{"image": "debian"}', 400),
        ("PUT", "/v1/sandboxes/x", b'{"idle_s": -1}', 400),
        ("PUT", "/v1/sandboxes/..%2Fx", b"{}", 404),
        ("PUT", "/v1/sandboxes/-x", b"{}", 400),
        ("PUT", "/v1/sandboxes/x", b'{"label": "\\ud800"}', 400),
        ("PUT", "/v1/sandboxes/x", b"[" * 100_000, 400),
        ("PUT", "/v1/sandboxes/x", b'{"label": "' + b"x" * (1 << 20) + b'"}', 413),
        ("POST", "/v1/sandboxes/here/exec", b"", 400),
        ("POST", "/v1/sandboxes/here/exec", b'{"shell": "a", "argv": ["b"]}', 400),
        ("POST", "/v1/sandboxes/here/exec", b'{"shell": "a\\u0000b"}', 400),
        ("POST", "/v1/sandboxes/here/exec", b'{"shell": "a", "timeout_s": 1e999}', 400),
        ("POST", "/v1/sandboxes/here/exec", b'{"shell": "a", "stdin": "not base64!"}', 400),
        ("POST", "/v1/sandboxes/here/exec", b'{"shell": "a", "cwd": 3}', 400),
        ("POST", "/v1/sandboxes/here/exec?since=-1", b'{"shell": "true"}', 400),
        ("POST", "/v1/sandboxes/here/exec?wait_s=nan", b'{"shell": "true"}', 400),
        ("POST", "/v1/sandboxes/here/fork", b'{"names": []}', 400),
        ("POST", "/v1/sandboxes/here/fork", b'{"names": ["a", "a"]}', 409),
        ("POST", "/v1/sandboxes/here/fork", b'{"names": ["a", "b", "c", "d", "e", "f", "g", "h"]}', 429),
        ("POST", "/v1/sandboxes/here/terminals", b'{"command": {"shell": "sh"}, "rows": 0}', 400),
        ("POST", "/v1/sandboxes/here/terminals/none/read", b"{}", 404),
        ("GET", "/v1/sandboxes/here/file", b"", 400),
        ("GET", "/v1/sandboxes/here/file?path=gone", b"", 422),
        ("GET", "/v1/sandboxes/here/file?path=%00", b"", 400),
        ("GET", "/v1/sandboxes/here/file?path=x&max_bytes=99999999999", b"", 400),
        ("GET", "/v1/sandboxes/here/list?path=%ff", b"", 422),
        ("PUT", "/v1/sandboxes/here/tree?path=x", b"no tree", 400),
        ("PUT", "/v1/trees/zz", b"", 400),
        ("PUT", "/v1/trees/" + 64 * "0", b"", 400),
        ("PUT", "/v1/trees/" + 64 * "0" + "?size=99999999999", b"", 400),
        ("PUT", "/v1/envs/x", b'{"env": "task:/etc"}', 400),
        ("PUT", "/v1/envs/x", b'{"env": "game:Chess"}', 400),
        ("PUT", "/v1/envs/x", b'{"env": "task:copy/1", "agents": []}', 400),
        ("PUT", "/v1/envs/x", b'{"env": "task:copy/1", "limits": {"max_turns": 0}}', 400),
        ("POST", "/v1/envs/x/step", b'{"action": "ls"}', 404),
        ("GET", "/v1/nothing", b"", 404),
        ("POST", "/v1/sandboxes", b"", 405),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_is_wrong_is_answered_with_its_status_and_a_reason(
    alice: httpx.Client, method: str, path: str, content: bytes, status: int
) -> None:
    alice.put("/v1/sandboxes/here", json={})
    answer = alice.request(method, path, content=content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["kind"]
    assert error["message"]
    assert alice.get("/v1/sandboxes/here/ping").status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["template", "snapshot", "trees", "workdir", "env", "limits", "mounts", "network", "alarms", "sessions", "label",
     "idle_s", "shell", "argv", "stdin", "cwd", "timeout_s", "names", "command", "rows", "keys", "deadline_s", "env",
     "task", "agents", "action", "spec", "size", "columns"]
)  # fmt: skip
PATHS = st.sampled_from(
    [("PUT", "/v1/sandboxes/here"), ("POST", "/v1/run"), ("POST", "/v1/sandboxes/here/fork"),
     ("PUT", "/v1/sandboxes/here/label"), ("POST", "/v1/sandboxes/here/terminals"), ("PUT", "/v1/envs/x"),
     ("POST", "/v1/envs/x/step"), ("POST", "/v1/envs/x/reset"), ("POST", "/v1/sandboxes/here/commit")]
)  # fmt: skip


@pytest.mark.parametrize("examples", [30, pytest.param(400, marks=pytest.mark.full)])
def test_no_body_makes_the_service_fail(alice: httpx.Client, examples: int) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(where=PATHS, body=st.binary(max_size=40) | st.dictionaries(FIELDS, JSON, max_size=3).map(json.dumps))
    def ask(where: tuple[str, str], body: bytes | str) -> None:
        answer = alice.request(*where, content=body)
        assert answer.status_code in (200, 400, 404, 409, 413, 422, 429, 502), (where, body, answer.text)

    ask()


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=60) as one:
        yield one


def test_a_body_that_breaks_off_harms_nobody(service: Any, alice: httpx.Client) -> None:
    alice.put("/v1/sandboxes/box", json={})
    for path in ("/v1/sandboxes/x", "/v1/sandboxes/box/tree?path=t", f"/v1/trees/{'0' * 64}?size=100"):
        with connected(service.url) as one:
            head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.alice}\r\nContent-Length: 100\r\n"
            one.sendall(f"{head}\r\n{{".encode())
    assert stdout(alice.post("/v1/sandboxes/box/exec", json={"shell": "ls"})) == ""


def test_a_tree_that_is_a_link_into_the_host_is_refused(service: Any, alice: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    tree = b"".join(pack_tree(os.fsencode(tmp_path / "link"), strict=True))
    sha256 = hashlib.sha256(tree).hexdigest()
    answer = alice.put(f"/v1/trees/{sha256}", params={"size": len(tree)}, content=tree)
    assert (answer.status_code, "symbolic link" in answer.text) == (400, True)
    assert alice.put("/v1/sandboxes/box", json={"trees": [sha256]}).status_code == 404
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to("/etc/shadow")
    tree = b"".join(pack_tree(os.fsencode(tmp_path / "tree"), strict=True))
    sha256 = hashlib.sha256(tree).hexdigest()
    assert alice.put(f"/v1/trees/{sha256}", params={"size": len(tree)}, content=tree).status_code == 200
    mounts = [{"tree": sha256, "target": "/data"}]
    alice.put("/v1/sandboxes/box", json={"trees": [sha256], "mounts": mounts})
    said = alice.post("/v1/sandboxes/box/exec", json={"shell": "cat link /data/link; readlink link /data/link"})
    assert stdout(said) == "/etc/shadow\n/etc/shadow\n"  # links of the sandbox's own world, where there is none


def test_uploaded_trees_are_counted_by_all_that_they_take(serve: Any, tmp_path: Path) -> None:
    def packed(name: str) -> tuple[str, bytes]:
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        tree = b"".join(pack_tree(os.fsencode(tmp_path / name), strict=True))
        return f"/v1/trees/{hashlib.sha256(tree).hexdigest()}", tree

    headers = {"authorization": "Bearer a-token-of-some-length"}
    with (
        serve({"me": "a-token-of-some-length"}, limits=ServiceLimits(trees=2)) as url,
        httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=60) as me,
    ):
        path, tree = packed("empty")
        assert me.put(path, params={"size": 0}, content=tree).status_code == 413
        assert me.get(path).status_code == 404
        assert [me.put(path, params={"size": len(tree)}, content=tree).status_code for _ in range(2)] == [200, 200]
        answers = [me.put(path, params={"size": len(tree)}, content=tree) for path, tree in map(packed, "ab")]
        assert [answer.status_code for answer in answers] == [200, 429]


def test_the_openapi_document_describes_every_operation(alice: httpx.Client) -> None:
    document = alice.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    refs = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            refs.update([node["$ref"]] if "$ref" in node else [])
            for inner in node.values():
                walk(inner)
        for inner in node if isinstance(node, list) else ():
            walk(inner)

    walk(document)
    assert {ref.rpartition("/")[2] for ref in refs} <= set(document["components"]["schemas"])
    exec_ = document["paths"]["/v1/sandboxes/{name}/exec"]["post"]
    assert exec_["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/Command")
    assert {"202", "200", "default"} <= set(exec_["responses"])
    for path, methods in document["paths"].items():
        for one in methods.values():
            named = {field["name"] for field in one["parameters"] if field["in"] == "path"}
            assert all(f"{{{name}}}" in path for name in named)


def test_a_template_of_the_hub_is_started_and_a_workspace_is_committed_to_it(alice: httpx.Client, hub: Any) -> None:
    alice.put("/v1/sandboxes/box", json={"template": "greets"})
    alice.post("/v1/sandboxes/box/exec", params={"session": "main"}, json={"shell": "x=carried; echo more > more"})
    assert stdout(alice.post("/v1/sandboxes/box/exec", json={"shell": "pwd; cat *; echo $WHO"})) == (
        "/work\nfrom the hub\nmore\ntemplate\n"
    )
    committed = alice.post("/v1/sandboxes/box/commit", json={"template": "grown"})
    assert committed.json()["sha256"] == hub.entry("grown").sha256
    assert alice.post("/v1/sandboxes/box/commit", json={"template": "grown"}).status_code == 400  # it is not replaced
    alice.put("/v1/sandboxes/next", json={"template": "grown"})
    said = alice.post("/v1/sandboxes/next/exec", params={"session": "main"}, json={"shell": "cat more; echo $x"})
    assert stdout(said) == "more\ncarried\n"
    hub.remove("grown")


def test_forks_and_limits_of_a_token(alice: httpx.Client) -> None:
    alice.put("/v1/sandboxes/box", json={})
    alice.post("/v1/sandboxes/box/exec", json={"shell": "echo base > file"})
    names = [f"f{number}" for number in range(7)]
    assert alice.post("/v1/sandboxes/box/fork", json={"names": names}).status_code == 200
    full = alice.put("/v1/sandboxes/ninth", json={})
    assert full.status_code == 429
    assert "at most 8" in full.json()["error"]["message"]
    taken = alice.put("/v1/sandboxes/f0", json={})
    assert taken.status_code == 409
    for name in names[1:]:
        alice.delete(f"/v1/sandboxes/{name}")
    assert stdout(alice.post("/v1/sandboxes/f0/exec", json={"shell": "cat file"})) == "base\n"
    opened = [
        alice.post("/v1/sandboxes/f0/terminals", json={"command": {"shell": "cat"}}).status_code for _ in range(3)
    ]
    assert opened == [200, 200, 429]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_a_host_beyond_loopback_has_to_be_asked_for(sandboxes: SandboxEngine, loop: Any, host: str) -> None:
    async def attempt() -> None:
        with pytest.raises(ConfigError, match="--beyond-loopback"):
            async with open_service(sandboxes, {"me": "a-token-of-some-length"}, host=host):
                pass

    loop.run(attempt())


@pytest.mark.parametrize("tokens", [{}, {"me": "short"}, {"a": "x" * 20, "b": "x" * 20}, {"../x": "x" * 20}])
def test_tokens_that_protect_nothing_are_refused(sandboxes: SandboxEngine, loop: Any, tokens: dict[str, str]) -> None:
    async def attempt() -> None:
        with pytest.raises(ConfigError):
            async with open_service(sandboxes, tokens):
                pass

    loop.run(attempt())


def test_what_is_idle_for_too_long_is_closed_and_what_is_busy_is_not(serve: Any) -> None:
    with serve({"me": "a-token-of-some-length"}, limits=ServiceLimits(idle_s=0.2)) as url:
        headers = {"authorization": "Bearer a-token-of-some-length"}
        with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=60) as me:
            me.put("/v1/sandboxes/idle", json={})
            me.put("/v1/sandboxes/busy", json={})
            busy = me.post("/v1/sandboxes/busy/exec", json={"shell": "sleep 0.8; echo done"})
            assert stdout(busy) == "done\n"
            assert [one["name"] for one in me.get("/v1/sandboxes").json()["sandboxes"]] == ["busy"]


def test_leaving_the_service_ends_what_is_running_at_once(serve: Any) -> None:
    headers = {"authorization": "Bearer a-token-of-some-length"}
    with (
        serve({"me": "a-token-of-some-length"}) as url,
        httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=60) as me,
    ):
        me.put("/v1/sandboxes/box", json={})
        begun = me.post("/v1/sandboxes/box/exec", json={"shell": "sleep 1000", "timeout_s": 1000}, params={"wait_s": 0})
        assert begun.status_code == 202  # that nothing is left, `serve` asserts


def test_a_service_leaves_an_engine_that_goes_on_as_it_found_it(sandboxes: SandboxEngine, loop: Any, tree: Any) -> None:
    packed = b"".join(pack_tree(os.fsencode(tree), strict=True))
    path = f"/v1/trees/{hashlib.sha256(packed).hexdigest()}"

    async def scenario() -> None:
        async with (
            open_service(sandboxes, {"me": "a-token-of-some-length"}) as one,
            open_service(sandboxes, {"me": "a-token-of-some-length"}) as two,
        ):
            for service in (one, two):
                headers = {"authorization": "Bearer a-token-of-some-length"}
                async with httpx.AsyncClient(base_url=service.url, headers=headers, trust_env=False, timeout=60) as me:
                    assert (await me.put(path, params={"size": len(packed)}, content=packed)).status_code == 200
                    assert (await me.put("/v1/sandboxes/box", json={})).status_code == 200
            assert sandboxes.statistics().alive == 2

    loop.run(scenario())  # that nothing is left, the fixture asserts
