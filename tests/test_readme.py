import re
from pathlib import Path

import pytest

from ale.config_file import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_ci_runs_the_test_command_of_the_readme_and_nothing_after_it() -> None:
    last = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert last.endswith("just test")
    assert f"{last}\n" in blocks("sh")


def test_the_two_commands_differ_in_what_they_ask_for_alone() -> None:
    train, test = blocks("sh")[:2]
    assert test == train.replace("just train", "just test")


def test_the_embedding_example_is_short_and_is_python() -> None:
    (example,) = blocks("python")
    compile(example, "README.md", "exec")  # tests/test_embedding.py runs it
    assert len([line for line in example.splitlines() if line]) <= 15


@pytest.mark.parametrize("path", sorted(set(re.findall(r"examples/[\w./-]+\.toml", README))))
def test_a_configuration_that_the_readme_names_loads(path: str) -> None:
    load(ROOT / path)


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_within_the_repository_lead_somewhere(document: str) -> None:
    path = ROOT / document
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []
