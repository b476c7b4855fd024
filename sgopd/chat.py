"""Conversations as token ids, through the tokenizer's chat template.

A template is a program that comes with a model. It runs in transformers' sandbox, and here against the clock.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from sgopd.config import Config, UserError
from sgopd.rows import texts_of

Message = dict[str, Any]
TEMPLATE_SECONDS = 5.0  # for one conversation: templates take a few milliseconds
ROLES = ("system", "user", "assistant")  # templates write these into their headers without naming them


TWICE = "have a system message of their own behind system_prompt"
LOST = "lose something in the chat template that system or user say"


def encode_conversation(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, config: Config, said: list[str]
) -> list[int]:
    """Token ids of `messages` and of the header of the assistant's turn; `said` gets what is to be said of them.

    Some templates take a message's content as text, others as parts {type: text, text: …}: what the data have is tried
    first, then the other.

    Raises:
        UserError: the tokenizer has no template, or it does not take the conversation.
    """
    if config.system_prompt is not None:
        if messages[0]["role"] == "system":
            said.append(TWICE)
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    if tokenizer.chat_template is None:
        raise UserError(
            "a conversation, but the tokenizer has no chat template. Save one with the tokenizer "
            "(chat_template.jinja), or give the prompts as plain text"
        )
    for role in (message["role"] for message in messages):
        if role not in ROLES and not re.search(f"""['"]{re.escape(role)}['"]""", str(tokenizer.chat_template)):
            raise UserError(f"the role {role!r} is unknown to the chat template. Expected {', '.join(ROLES)}")
    options = {**config.chat_template_kwargs, "add_generation_prompt": True}
    form, whole = taken_form(messages, tokenizer, options)
    encoded: Any = tokenizer.apply_chat_template(form, tokenize=True, return_dict=True, **options)
    if not whole:
        said.append(LOST)
    return list(encoded["input_ids"])


def taken_form(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> tuple[list[Message], bool]:
    """`messages` with the contents that the template takes, and whether all that is said is in what it writes."""
    options = {name: value for name, value in options.items() if name != "sanitize_control_tokens"}  # of token ids
    forms: list[tuple[int, list[Message]]] = []  # those that it takes, with the number of messages that it loses
    problems: list[Exception] = []
    for form in (messages, as_parts(messages), as_texts(messages)):
        try:
            with time_limit(TEMPLATE_SECONDS):
                text = tokenizer.apply_chat_template(form, tokenize=False, **options)
            lost = [message["role"] for message in form if not says(text, message)]
            parts = [content for message in form if not isinstance(content := message["content"], str)]
            if any(str(content) in text for content in parts) or (parts and {*lost} - {"system"}):
                raise TypeError("a content in parts is not in what it writes")
        except Exception as error:  # whatever a template may do
            problems.append(error)
            if isinstance(error, TimeoutError):
                break
        else:
            forms.append((len(lost), form))
            if not lost:
                break
    if not forms:
        several = any(len(texts_of(message["content"])) > 1 for message in messages)
        if several and not isinstance(problems[-1], TimeoutError):
            raise UserError(
                "a message has several parts, and the chat template takes one text. Join them in the data"
            ) from problems[0]
        raise UserError(explained(problems[0])) from problems[0]
    least, form = min(forms, key=lambda one: one[0])
    return form, not least


def as_parts(messages: list[Message]) -> list[Message]:
    """Every content as parts."""
    return [
        {**message, "content": [{"type": "text", "text": text} for text in texts_of(message["content"])]}
        for message in messages
    ]


def as_texts(messages: list[Message]) -> list[Message]:
    """Every content of a single part as text. What stands between several, nobody knows."""
    return [
        {**message, "content": content[0] if len(content := texts_of(message["content"])) == 1 else message["content"]}
        for message in messages
    ]


def says(text: str, message: Message) -> bool:
    """Whether a message's content is in `text`, whitespace aside; of answers templates may drop the thoughts."""
    squeezed = "".join(text.split())
    return message["role"] == "assistant" or all(
        "".join(one.split()) in squeezed for one in texts_of(message["content"])
    )


def explained(error: Exception) -> str:
    """What went wrong in a template, and the remedy."""
    change = "Change the conversation, system_prompt or chat_template_kwargs"
    repair = "Put right the template that is saved with the tokenizer (chat_template.jinja)"
    if isinstance(error, TimeoutError):
        return f"the chat template did not end in {TEMPLATE_SECONDS:g} s. {repair}"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"the chat template is not valid Jinja: {error.message} In its line {error.lineno}. {repair}"
    if isinstance(error, jinja2.sandbox.SecurityError):
        return f"the sandbox stopped the chat template: {error}. {repair}"
    if type(error) is jinja2.TemplateError:  # its own raise_exception
        return f"the chat template refuses the conversation: {error}. {change}"
    return f"the chat template fails ({type(error).__name__}: {error}). {change}, or the template"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after `seconds`; in the main thread only, where Python handles signals."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, stop)
    # Again every second: an exception in a finalizer is printed and forgotten.
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
