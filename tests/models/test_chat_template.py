"""A model whose chat template cannot say what the agent is told is refused when the run opens, not in its episodes."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from ale.config import AgentConfig, RunConfig
from ale.errors import ModelError
from ale.models.load import load_tokenizer
from ale.run import Run


def test_a_system_prompt_that_the_template_refuses_is_refused_at_once(nano_path: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(nano_path, model)
    tokenizer = load_tokenizer(model)
    refuse = (
        "{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}"
    )
    tokenizer.chat_template = refuse + str(tokenizer.chat_template)
    tokenizer.save_pretrained(model)

    async def opened(prompt: str) -> None:
        async with Run.open(RunConfig(agent=AgentConfig(system_prompt=prompt)), model):
            pass

    with pytest.raises(ModelError, match=r"System role not supported.*leave agent\.system_prompt empty"):
        asyncio.run(opened("Be brief."))
    asyncio.run(opened(""))
