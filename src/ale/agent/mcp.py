"""Tools of MCP servers, through the official SDK. A server runs outside the sandbox, with what its settings give it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from ale.agent.model import ToolSpec
from ale.agent.settings import McpSettings
from ale.agent.tools.registry import Answer, Tool, ToolError
from ale.errors import ConfigError, DeadlineExceeded, first_error
from ale.waiting import waiting

if TYPE_CHECKING:
    from mcp import Client

    from ale.agent.workbench import Workbench

logger = logging.getLogger(__name__)

_EXIT_S = 30.0
_NOT_A_NAME = re.compile(r"[^A-Za-z0-9_-]")


@asynccontextmanager
async def open_mcp(name: str, settings: McpSettings) -> AsyncIterator[list[Tool]]:
    """Starts or reaches a server; its tools are called `NAME_TOOL`. Raises `ConfigError` with the cure."""
    try:
        from mcp import Client, StdioServerParameters
    except ImportError as error:
        raise ConfigError(f"agent.mcp.{name} needs the MCP SDK: pip install 'ale[mcp]'.") from error
    server: Any = settings.url
    if settings.command:
        command, *arguments = settings.command
        server = StdioServerParameters(command=command, args=arguments, env=settings.env or None)
    client = Client(server, read_timeout_seconds=settings.timeout_s)
    try:
        async with asyncio.timeout(settings.timeout_s):
            await client.__aenter__()
            tools = await _tools(client, name, settings.timeout_s)
    except Exception as error:
        cause = first_error(error) if isinstance(error, ExceptionGroup) else error
        with contextlib.suppress(Exception):  # it never came about
            async with asyncio.timeout(_EXIT_S):
                await client.__aexit__(None, None, None)
        said = f"it did not answer within {settings.timeout_s:g} s" if isinstance(cause, TimeoutError) else str(cause)
        where = settings.url or " ".join(settings.command)
        raise ConfigError(f"agent.mcp.{name}: the server {where} cannot be used: {said}.") from error
    try:
        yield tools
    finally:
        try:
            async with waiting(f"the end of the MCP server {name}", deadline_s=_EXIT_S, release="its process"):
                await client.__aexit__(None, None, None)
        except DeadlineExceeded as error:  # the SDK has told it to end, and kills what it started with this process
            logger.warning("%s", error)


async def _tools(client: Client, server: str, timeout_s: float) -> list[Tool]:
    tools: list[Tool] = []
    cursor: str | None = None
    while True:
        page = await client.list_tools(cursor=cursor)
        for found in page.tools:
            name = _NOT_A_NAME.sub("_", f"{server}_{found.name}")[:64]
            spec = ToolSpec(name, found.description or "", found.input_schema)
            tools.append(Tool(spec, _body(client, found.name, timeout_s)))
        cursor = page.next_cursor
        if not cursor:
            return tools


def _body(client: Client, tool: str, timeout_s: float) -> Any:
    async def body(bench: Workbench, arguments: bytes) -> Answer:
        try:
            async with asyncio.timeout(timeout_s):
                result = await client.call_tool(tool, msgspec.json.decode(arguments))
        except TimeoutError as error:
            raise ToolError(f"the server did not answer within {timeout_s:g} s") from error
        except Exception as error:
            raise ToolError(f"the server refused it: {error}") from error
        text = "\n".join(getattr(part, "text", None) or f"[{part.type}: not shown]" for part in result.content)
        if result.is_error:
            raise ToolError(text or "the server says that it failed")
        if not text and result.structured_content is not None:
            return msgspec.json.encode(result.structured_content).decode()
        return text or "[no output]"

    return body
