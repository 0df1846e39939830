"""An agent of five lines: the bare `openai` client and a shell. It knows nothing of training."""

import json
import os
import subprocess

from openai import OpenAI

SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
BASH = {"type": "function", "function": {"name": "bash", "description": "Runs a command.", "parameters": SCHEMA}}

ask, messages = OpenAI().chat.completions.create, [{"role": "user", "content": os.environ["ALE_INSTRUCTION"]}]
while (said := ask(model="policy", messages=messages, tools=[BASH]).choices[0].message).tool_calls:
    command = json.loads(said.tool_calls[0].function.arguments)["command"]
    ran = subprocess.run(["bash", "-c", command], stdout=-1, stderr=-2, timeout=10, check=False)
    text = ran.stdout.decode(errors="replace")[:160].rstrip("\n") or "ok"
    messages += [said, {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": text}]
