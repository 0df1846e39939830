"""OpenAI's Agents SDK with one tool, over the Responses API. It knows nothing of training."""

import os
import subprocess

from agents import Agent, Runner, function_tool


@function_tool
def bash(command: str) -> str:
    """Runs a command."""
    ran = subprocess.run(["bash", "-c", command], stdout=-1, stderr=-2, timeout=10, check=False)
    return ran.stdout.decode(errors="replace")[:160].rstrip("\n") or "ok"


Runner.run_sync(Agent(name="worker", model="policy", tools=[bash]), os.environ["ALE_INSTRUCTION"], max_turns=4)
