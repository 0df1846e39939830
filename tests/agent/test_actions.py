import pytest
from hypothesis import given
from hypothesis import strategies as st

from ale.agent.actions import Answer, Call, Malformed, parse, render

NOT_OPENED = "error: a call starts with ```bash on a line of its own"
NOT_CLOSED = "error: the call is not closed with ``` on a line of its own"
MANY = "error: one call in a turn, not more"
EMPTY = "error: the call is empty"
FOLLOWED = "error: nothing may follow the call"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("```", NOT_OPENED),
        ("```\nls\n```", NOT_OPENED),
        ("```sh\nls\n```", NOT_OPENED),
        ("```bash ls\n```", NOT_OPENED),
        ("I run ```bash\nls\n```", NOT_OPENED),
        ("```bash\nls", NOT_CLOSED),
        ("```bash\nls```", NOT_CLOSED),
        ("```\nls\n```bash\n", NOT_OPENED),
        ("```bash\nls\n```\n```bash\nls\n```", MANY),
        ("```bash\nls\n```\n```", MANY),
        ("```bash\n```", EMPTY),
        ("```bash\n\n```", EMPTY),
        ("```bash\n \t\n```", EMPTY),
        ("```bash\nls\n```\nand then", FOLLOWED),
        ("```bash\nls\n````", FOLLOWED),
        ("```bash\nl\0s\n```", "error: the call holds a NUL byte"),
    ],
)
def test_each_malformed_form_has_its_exact_reason(text: str, reason: str) -> None:
    assert parse(text) == Malformed(reason)


def test_reasoning_may_stand_before_a_call_and_blanks_after_it() -> None:
    assert parse("I look.\n```bash\nls -l\npwd\n```\n") == Call("ls -l\npwd")


@pytest.mark.parametrize(("text", "answer"), [("done", "done"), ("", ""), ("  it is `ls`\n", "it is `ls`")])
def test_text_without_a_fence_is_the_answer(text: str, answer: str) -> None:
    assert parse(text) == Answer(answer)


commands = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])) | st.text("`a\n $'\\")


@given(commands.filter(lambda c: "```" not in c and c.strip()))
def test_a_rendered_command_parses_to_itself(command: str) -> None:
    assert parse(render(command)) == Call(command)


@given(st.text("`bash\n \0x", max_size=40))
def test_whatever_is_said_is_one_of_the_three(text: str) -> None:
    action = parse(text)
    assert isinstance(action, Answer) == ("```" not in text)
    if isinstance(action, Call):
        assert render(action.command) in text


@given(st.text(max_size=40))
def test_a_turn_of_text_is_the_action_whatever_it_holds(text: str) -> None:
    assert parse(text, "text") == Call(text)
    assert parse(render(text, "text"), "text") == Call(text)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("So:\n```py\nx = 1\n```\nThat is it.", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nBetter:\n```python\ny = 2\n```", "y = 2\n"),
        ("```python\nx = 1\n", "x = 1\n"),
        ("    return 1\n", "    return 1\n"),
    ],
)
def test_a_program_is_the_last_fence_or_the_whole_turn(text: str, code: str) -> None:
    assert parse(text, "python") == Call(code)


def test_a_rendered_program_parses_to_itself() -> None:
    assert parse(render("def f():\n    return '`'\n", "python"), "python") == Call("def f():\n    return '`'\n")
