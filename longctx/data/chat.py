"""Conversations as tokens, of which the assistant's turns are trained on and the rest is read only.

The chat template is the tokenizer's own, rendered by transformers, so ids are those of its `apply_chat_template`. Of
these the tokens are trained on that have a character of an assistant's turn: of what the template has between
`{% generation %}` and `{% endgeneration %}`, or, of a template without, of what each turn adds to the text before it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longctx.errors import DataError

# files of a template, as transformers calls them: the one there is, or the default of several, and the others by name
CHAT_TEMPLATE, OTHER_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TOKENIZER_CONFIG = "tokenizer_config.json"
SWITCHES = re.compile("/no_think|/think|/system_override")  # which templates take out of what is said
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
            from tokenizers.processors import ByteLevel
            from transformers import PreTrainedTokenizerFast
        except ImportError:
            raise DataError(
                "the input holds conversations, which transformers renders, and that is not installed: pip install "
                "transformers"
            ) from None

        folder = tokenizer_file.parent
        is_whole = tokenizer_file.name == "tokenizer.json" and (folder / TOKENIZER_CONFIG).exists()
        if is_whole:
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        else:
            self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))
        # adds no tokens, as templates write their own, and leaves white space in the tokens' places in the text
        self.tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
        if template_file is not None:
            self.tokenizer.chat_template = template_file.read_text(encoding="utf-8")
        elif not self.tokenizer.chat_template and (folder / CHAT_TEMPLATE).is_file():
            self.tokenizer.chat_template = (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{tokenizer_file}: has no chat template beside it (chat_template.jinja, or in tokenizer_config.json), "
                "and the input holds conversations; give one with --chat-template FILE"
            )
        found = self.tokenizer.chat_template
        self.templates: dict[str, str] = found if isinstance(found, dict) else {"default": found}
        if "default" not in self.templates:
            raise DataError(
                f"{tokenizer_file}: its chat templates are {', '.join(sorted(self.templates))}, and none is the "
                "default; give one with --chat-template FILE"
            )
        written = set(re.findall(r"\b(?:bos|eos)_token\b", "".join(self.templates.values())))
        missing = written - set(self.tokenizer.special_tokens_map)
        if missing and not is_whole:  # jinja would write nothing in their place
            raise DataError(
                f"{tokenizer_file}: the chat template writes {' and '.join(sorted(missing))}, which "
                "tokenizer_config.json names: put it and the template beside a file of the name tokenizer.json"
            )
        self.added: set[int] = set(self.tokenizer.added_tokens_decoder)

    def encode(self, chat: Chat) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int64) of a conversation, and which of them are trained on. Raises `ChatError`."""
        text = self.render(chat.messages, chat.tools)
        _refuse_what_is_lost(chat, text)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = np.array(encoding["input_ids"], dtype=np.int64), np.array(encoding["offset_mapping"])
        is_trained = np.zeros(len(ids), dtype=bool)
        template = self.tokenizer.get_chat_template(tools=chat.tools)
        answers = self._marked_answers(chat, template) if _marks_answers(template) else self._answers(chat, text)
        for begin, end in answers:
            is_trained |= (offsets[:, 0] < end) & (offsets[:, 1] > begin)
        return ids, is_trained

    def ends_of_answers(self, ids: np.ndarray, is_trained: np.ndarray) -> Counter[int]:
        """Added tokens (end of turn) that the answers of a conversation end with, but for white space; -1: none."""
        found: Counter[int] = Counter()
        for last in np.flatnonzero(np.diff(is_trained.astype(np.int8), append=0) == -1):
            end = next(i for i in range(int(last), -1, -1) if ids[i] in self.added or i == 0 or not is_trained[i - 1])
            is_end = ids[end] in self.added and not str(self.tokenizer.decode(ids[end + 1 : last + 1])).strip()
            found[int(ids[end]) if is_end else -1] += 1
        return found

    def save(self, folder: Path) -> None:
        """Writes what conversations were written with, so that transformers writes them alike in `folder`."""
        for name, template in self.templates.items():
            file = folder / (CHAT_TEMPLATE if name == "default" else f"{OTHER_TEMPLATES}/{name}.jinja")
            file.parent.mkdir(exist_ok=True)
            file.write_text(template, encoding="utf-8")
        tokens = {name: token for name, token in self.tokenizer.special_tokens_map.items() if isinstance(token, str)}
        fields = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
        (folder / TOKENIZER_CONFIG).write_text(
            json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, is_asked: bool = False) -> str:
        """The text of messages; `is_asked`: with what the assistant's next turn begins with."""
        with _refusals_named():
            found: Any = self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=is_asked, tokenize=False
            )
        return found

    def prompt(self) -> tuple[str, str]:
        """What stands before and after a question that opens a conversation. Raises `ChatError`."""
        question = "a question"
        text = self.render([{"role": "user", "content": question}], None, is_asked=True)
        before, found, after = text.partition(question)
        if not found:
            raise ChatError("the chat template does not show what a user writes")
        return before, after

    def _marked_answers(self, chat: Chat, template: str) -> list[tuple[int, int]]:
        """Where what the template marks begins and ends in the whole text, but for what it marks of the prompt."""
        from transformers.utils.chat_template_utils import render_jinja_template

        tokens: dict[str, Any] = self.tokenizer.special_tokens_map
        how = {"chat_template": template, "return_assistant_tokens_mask": True, **tokens}
        with _refusals_named():
            found: Any = render_jinja_template([chat.messages], chat.tools, **how)
        (text,), (marked,) = found
        prompt = self.render(chat.messages[: chat.given], chat.tools) if chat.given else ""
        # alone the prompt may end otherwise than where more follows
        shared = next((n for n, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(prompt))
        return [(begin, end) for begin, end in marked if begin >= shared]

    def _answers(self, chat: Chat, whole: str) -> list[tuple[int, int]]:
        """Where the assistant's turns begin and end in the whole text: what each adds to the text before it."""
        found = []
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


@contextmanager
def _refusals_named() -> Iterator[None]:
    """Raises `ChatError` for whatever a template raises."""
    try:
        yield
    except Exception as error:
        raise ChatError(f"the chat template does not take it ({type(error).__name__}: {error})") from None


@cache
def _marks_answers(template: str) -> bool:
    """Asked of the same few templates for each conversation."""
    return bool(GENERATION.search(template))


def _refuse_what_is_lost(chat: Chat, text: str) -> None:
    """Raises `ChatError` if the text of a conversation lacks what was said, called or offered in it.

    Reasoning is looked for in the last answer alone: templates of models that think drop that of earlier turns.
    """
    last = max((n for n, message in enumerate(chat.messages) if message["role"] == "assistant"), default=-1)
    text = SWITCHES.sub("", text)
    for number, message in enumerate(chat.messages):
        role, said = message["role"], {}
        if role in ("system", "user", "assistant"):
            said["content"] = SWITCHES.sub("", message.get("content") or "").rpartition("</think>")[2]
        if number == last and isinstance(message.get("reasoning_content"), str):
            said["reasoning_content"] = message["reasoning_content"]
        said |= {f"call of {name}": name for name in map(_name_of, message.get("tool_calls") or [])}
        for what, words in said.items():
            if words.strip() not in text:
                raise ChatError(
                    f"the chat template does not write the {what} of message {number + 1} ({role}): "
                    f"{words.strip()!r:.60}; give one that does (--chat-template), or leave it out of the conversation"
                )
    for name in map(_name_of, chat.tools or []):
        if name not in text:
            raise ChatError(
                f"the chat template does not write the tool {name!r}; give one that does (--chat-template), or leave "
                "tools out of the conversation"
            )


def _name_of(call_or_tool: Any) -> str:
    """Of a function that is called, or may be; empty: not known."""
    function = call_or_tool.get("function", call_or_tool) if isinstance(call_or_tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def files_of_chats(tokenizer_file: Path, template_file: Path | None) -> list[Path]:
    """What decides how conversations are written, beside the tokenizer: of these the files that are there."""
    there = saved_files(tokenizer_file.parent)
    if template_file is None:
        return list(there.values())
    return [template_file, *(file for name, file in there.items() if name == TOKENIZER_CONFIG)]


def has_template(folder: Path) -> bool:
    """Whether the tokenizer of a folder has a chat template, in a file of its own or in its configuration."""
    config = folder / TOKENIZER_CONFIG
    is_inside = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8", errors="replace")
    return is_inside or (folder / CHAT_TEMPLATE).is_file()


def saved_files(folder: Path) -> dict[str, Path]:
    """What `ChatTokenizer.save`, or transformers, has written into a folder for conversations, by name there."""
    files = [folder / CHAT_TEMPLATE, folder / TOKENIZER_CONFIG, *sorted((folder / OTHER_TEMPLATES).glob("*.jinja"))]
    return {str(file.relative_to(folder)): file for file in files if file.is_file()}


@cache
def chat_tokenizer(tokenizer_file: str, template_file: str | None) -> ChatTokenizer:
    """The one of a process."""
    return ChatTokenizer(Path(tokenizer_file), None if template_file is None else Path(template_file))
