"""From messages to token ids, once for each piece of text and never again for what the policy sampled.

The model's own chat template says what stands around a message. Text that comes from outside (the task, the output of
a command) is encoded apart from it, with special tokens read as plain text: a file cannot forge the end of a turn.
"""

from __future__ import annotations

from typing import Any

from ale.errors import ModelError

_MARK = "\u241eale\u241e"  # stands for the content while the template is rendered


class Chat:
    """Renders the start of an episode and what follows each of the policy's turns, for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer names no end-of-turn token (eos_token)")
        self.end: int = tokenizer.eos_token_id
        self._before_observation, self._after_observation = self._around_observation()

    def start(self, instruction: str, system_prompt: str = "") -> list[int]:
        """The tokens of the first prompt. Raises `ModelError` when the template cannot render it."""
        messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        text = self._render([*messages, {"role": "user", "content": _MARK}], add_generation_prompt=True)
        if text.count(_MARK) != 1:
            raise ModelError("the chat template does not show the user's message exactly once; it cannot be used")
        before, _, after = text.partition(_MARK)
        return [*self._template(before), *self._outside(instruction), *self._template(after)]

    def observation(self, text: str, *, ended: bool) -> list[int]:
        """What is appended after a turn. `ended`: the policy sampled the end-of-turn token itself."""
        end = [] if ended else [self.end]
        return [*end, *self._before_observation, *self._outside(text), *self._after_observation]

    def text(self, tokens: list[int]) -> str:
        """What the policy said, without the end-of-turn token."""
        said = tokens[:-1] if tokens and tokens[-1] == self.end else tokens
        return str(self.tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def spoken(self, text: str) -> list[int]:
        """The tokens of a turn that the policy would have sampled to say `text`: for demonstrations."""
        return [*self._outside(text), self.end]

    def _around_observation(self) -> tuple[list[int], list[int]]:
        head = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
        history = self._render(head, add_generation_prompt=False)
        for role in ("tool", "user"):
            try:
                text = self._render([*head, {"role": role, "content": _MARK}], add_generation_prompt=True)
            except ModelError:  # it does not know the role
                continue
            if text.startswith(history) and text.count(_MARK) == 1:
                break
        else:
            raise ModelError("the chat template rewrites earlier turns when a tool result follows; it cannot be used")
        eos: str = self.tokenizer.eos_token
        _, found, tail = history.rpartition(eos)
        if not found:
            raise ModelError(f"the chat template does not end an assistant turn with the eos token {eos!r}")
        before, _, after = (tail + text[len(history) :]).partition(_MARK)
        return self._template(before), self._template(after)

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise whatever they like
            roles = [message["role"] for message in messages]
            cure = "; if it knows no system role, leave agent.system_prompt empty" if "system" in roles else ""
            raise ModelError(f"the chat template cannot render {', '.join(roles)}: {error}{cure}") from error
        return str(text)

    def _template(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _outside(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)
