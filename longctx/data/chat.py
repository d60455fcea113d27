"""Conversations as tokens, of which the assistant's turns are trained on and the rest is read only.

The chat template is the tokenizer's own, rendered by transformers, so ids and masks are those of its
`apply_chat_template(..., return_assistant_tokens_mask=True)`. A template without `{% generation %}` does not say what
the assistant's turns are: then they are what each adds to the text before it.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longctx.errors import DataError

CHAT_TEMPLATE = "chat_template.jinja"  # the file of a template, as transformers calls it
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat(NamedTuple):
    """A conversation."""

    messages: list[dict[str, Any]]  # role, content, and what else the template knows
    tools: list[Any] | None = None  # that the assistant may call
    given: int = 0  # so many messages are a prompt, whose answers are not trained on


class Completion(NamedTuple):
    """A text of which the end is trained on."""

    prompt: str
    text: str


class ChatError(Exception):
    """A conversation that the template does not take, and why."""


class ChatTokenizer:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer_file: Path, template_file: Path | None = None) -> None:
        """The template of `template_file` (jinja), or that which lies beside the tokenizer. Raises `DataError`."""
        try:
            from transformers import PreTrainedTokenizerFast
        except ImportError:
            raise DataError(
                "the input holds conversations, which transformers renders, and that is not installed: pip install "
                "transformers"
            ) from None

        folder = tokenizer_file.parent
        is_whole = tokenizer_file.name == "tokenizer.json" and (folder / "tokenizer_config.json").exists()
        if is_whole:
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        else:
            self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))
        if template_file is not None:
            self.tokenizer.chat_template = template_file.read_text(encoding="utf-8")
        elif not self.tokenizer.chat_template and (folder / CHAT_TEMPLATE).is_file():
            self.tokenizer.chat_template = (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{tokenizer_file}: has no chat template beside it (chat_template.jinja, or in tokenizer_config.json), "
                "and the input holds conversations; give one with --chat-template FILE"
            )
        self.template: str = self.tokenizer.get_chat_template()
        missing = set(re.findall(r"\b(?:bos|eos)_token\b", self.template)) - set(self.tokenizer.special_tokens_map)
        if missing and not is_whole:  # jinja would write nothing in their place
            raise DataError(
                f"{tokenizer_file}: the chat template writes {' and '.join(sorted(missing))}, which "
                "tokenizer_config.json names: put it and the template beside a file of the name tokenizer.json"
            )
        self.marks_answers = bool(GENERATION.search(self.template))

    def encode(self, chat: Chat) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int64) of a conversation, and which of them are trained on. Raises `ChatError`."""
        encoding = self._apply(
            chat.messages, chat.tools, return_dict=True, return_assistant_tokens_mask=self.marks_answers,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )  # fmt: skip
        ids, offsets = np.array(encoding["input_ids"], dtype=np.int64), np.array(encoding["offset_mapping"])
        if self.marks_answers:
            is_trained = np.array(encoding["assistant_masks"], dtype=bool)
        else:
            is_trained = np.zeros(len(ids), dtype=bool)
            for begin, end in self._answers(chat):
                is_trained |= (offsets[:, 0] < end) & (offsets[:, 1] > begin)
        if chat.given:
            is_trained &= offsets[:, 0] >= len(self.render(chat.messages[: chat.given], chat.tools))
        return ids, is_trained

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, is_asked: bool = False) -> str:
        """The text of messages; `is_asked`: with what the assistant's next turn begins with."""
        return self._apply(messages, tools, add_generation_prompt=is_asked, tokenize=False)

    def _apply(self, messages: list[dict[str, Any]], tools: list[Any] | None, **how: Any) -> Any:
        """As transformers' `apply_chat_template`. Raises `ChatError`."""
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **how)
        except Exception as error:  # a template raises what it likes
            raise ChatError(f"the chat template does not take it ({type(error).__name__}: {error})") from None

    def prompt(self) -> tuple[str, str]:
        """What stands before and after a question that opens a conversation. Raises `ChatError`."""
        question = "a question"
        text = self.render([{"role": "user", "content": question}], None, is_asked=True)
        before, found, after = text.partition(question)
        if not found:
            raise ChatError("the chat template does not show what a user writes")
        return before, after

    def _answers(self, chat: Chat) -> list[tuple[int, int]]:
        """Where the assistant's turns begin and end in the text."""
        found, whole = [], self.render(chat.messages, chat.tools)
        for number, message in enumerate(chat.messages):
            if message.get("role") != "assistant" or number < chat.given:
                continue
            if number == 0:
                raise ChatError(
                    "the conversation begins with the assistant, whose turn this template does not mark; give one with "
                    "{% generation %} around the assistant's turns (--chat-template)"
                )
            before = self.render(chat.messages[:number], chat.tools, is_asked=True)
            until = self.render(chat.messages[: number + 1], chat.tools)
            if not (whole.startswith(until) and until.startswith(before)):
                raise ChatError(
                    f"the chat template writes message {number + 1} otherwise when others follow, or before it was "
                    "asked for; give a template with {% generation %} around the assistant's turns (--chat-template)"
                )
            found.append((len(before), len(until)))
        return found


def files_of_chats(tokenizer_file: Path, template_file: Path | None) -> list[Path]:
    """What decides how conversations are written, beside the tokenizer: of these the files that are there."""
    folder = tokenizer_file.parent
    files = [template_file or folder / CHAT_TEMPLATE, folder / "tokenizer_config.json"]
    return [file for file in files if file.is_file()]


@cache
def chat_tokenizer(tokenizer_file: str, template_file: str | None) -> ChatTokenizer:
    """The one of a process."""
    return ChatTokenizer(Path(tokenizer_file), None if template_file is None else Path(template_file))
