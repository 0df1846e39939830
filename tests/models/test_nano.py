import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GraniteConfig, GraniteForCausalLM

from ale.errors import ModelError
from ale.models.load import check_model_path, load_model, load_tokenizer
from ale.models.nano import CALL_CLOSE, CALL_OPEN, END, save_nano

CORPUS = ["Copy oak.txt to fox.txt.", "cp oak.txt ./elm/fox.txt", "grep -c ant ash.log > owl.txt"] * 5
FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def contents(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in FILES}


def save(path: Path, seed: int = 3) -> dict[str, bytes]:
    save_nano(path, CORPUS, seed=seed, hidden_size=64, vocab_size=330)
    return contents(path)


def test_the_same_seed_gives_the_same_bytes_here_and_in_another_process(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = save(tmp_path / "a")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert save(tmp_path / "b") == first
    assert torch.equal(torch.get_rng_state(), state)
    code = (
        "import sys; from pathlib import Path; from ale.models.nano import save_nano; "
        f"save_nano(Path(sys.argv[1]), {CORPUS!r}, seed=3, hidden_size=64, vocab_size=330)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], check=True, capture_output=True)
    assert contents(tmp_path / "c") == first
    other = save(tmp_path / "d", seed=4)
    assert other["model.safetensors"] != first["model.safetensors"]
    assert other["tokenizer.json"] == first["tokenizer.json"]


def test_digits_stand_alone_and_a_word_is_one_token_wherever_it_stands(tmp_path: Path) -> None:
    save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.tokenize("1024") == ["1", "0", "2", "4"]
    assert tokenizer.tokenize("a1b2") == ["a", "1", "b", "2"]
    (oak,) = tokenizer.encode("oak", add_special_tokens=False)
    for text in ("oak", " oak", "Copy oak.txt", "./oak/oak.txt", "oak\n"):
        assert oak in tokenizer.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize(
    "text", ["Copy oak.txt", " two  spaces ", "tab\tand\nline\n", "naïve — 東京 🙂", "a_b$(c)|`d`", ""]
)
def test_any_text_comes_back_from_its_tokens(nano_tokenizer: Any, text: str) -> None:
    ids = nano_tokenizer.encode(text, add_special_tokens=False)
    assert nano_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_chat_template_renders_roles_and_the_opening_of_the_answer(nano_tokenizer: Any) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Copy oak.txt."}]
    text = nano_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be brief.<|end|><|user|>Copy oak.txt.<|end|><|assistant|>"
    ids = nano_tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(nano_tokenizer.eos_token_id) == 2
    assert nano_tokenizer.convert_tokens_to_ids(END) == nano_tokenizer.eos_token_id
    closed = nano_tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "ok"}], tokenize=False)
    assert closed.endswith("<|assistant|>ok<|end|>")


def test_the_marks_of_a_call_are_one_token_each(nano_tokenizer: Any) -> None:
    ids = nano_tokenizer.encode(f"{CALL_OPEN}ls{CALL_CLOSE}", add_special_tokens=False)
    opened, closed = nano_tokenizer.convert_tokens_to_ids([CALL_OPEN, CALL_CLOSE])
    assert (ids[0], ids[-1]) == (opened, closed)


def test_the_model_is_an_ordinary_moe_with_a_tied_head(nano: Any, nano_tokenizer: Any) -> None:
    assert nano.config.model_type == "qwen3_moe"
    assert nano.get_output_embeddings().weight is nano.get_input_embeddings().weight
    assert nano.config.vocab_size >= len(nano_tokenizer)
    assert nano.config.eos_token_id == nano_tokenizer.eos_token_id


def test_a_path_without_a_model_says_what_is_missing(tmp_path: Path, nano_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no directory .*nowhere"):
        check_model_path(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no config.json, no \*.safetensors \(the weights\), no tokenizer.json"):
        load_model(tmp_path)
    for name in FILES:
        (tmp_path / name).write_bytes((nano_path / name).read_bytes())
    assert check_model_path(tmp_path) == tmp_path
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        load_model(tmp_path)


def test_weights_that_are_missing_are_not_made_up(nano_path: Path, tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes((nano_path / name).read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors, model.norm.weight"):
        load_model(tmp_path)


def test_a_model_that_scales_its_logits_is_refused_rather_than_sampled_wrongly(nano_path: Path, tmp_path: Path) -> None:
    config = GraniteConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.5, logits_scaling=8.0,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((nano_path / "tokenizer.json").read_bytes())
    with pytest.raises(ModelError, match=r"GraniteForCausalLM .* scales or caps its logits"):
        load_model(tmp_path)
