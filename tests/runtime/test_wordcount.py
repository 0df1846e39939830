import importlib.util
from pathlib import Path

import pytest

from ale.testing.clock import run

PATH = Path(__file__).parents[2] / "examples" / "wordcount.py"


def wordcount():
    spec = importlib.util.spec_from_file_location("wordcount", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_word_count_example_counts(tmp_path):
    text = tmp_path / "hamlet.txt"
    text.write_text("To be or not to be\n" * 500 + "that is the question\n")
    top = run(wordcount().top_words([text, text], count=3))
    assert dict(top.words) == {"to": 2000, "be": 2000, "or": 1000}


def test_the_word_count_example_surfaces_a_missing_file_with_the_readers_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        run(wordcount().top_words([tmp_path / "none.txt"], count=3))
    assert caught.value.__notes__ == ["in actor 'reader'"]
