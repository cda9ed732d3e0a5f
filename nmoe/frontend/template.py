"""The checkpoint's chat template: messages to the text that the model was trained on.

Templates are Hugging Face's: Jinja with `trim_blocks`, `lstrip_blocks`, loop controls, a `tojson` that leaves HTML
alone, `raise_exception` and `strftime_now` (transformers, utils/chat_template_utils.py). They run sandboxed.
"""

import datetime
import json
import pathlib
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from nmoe.architecture import read_json
from nmoe.errors import CheckpointError, RequestError
from nmoe.frontend.openai import ChatMessage


class ChatTemplate:
    """A compiled template and the special tokens that it may name. `render` may be called from several threads."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens

    def render(self, messages: list[ChatMessage]) -> str:
        """The prompt that asks for the assistant's next message. Raises RequestError when the template refuses."""
        # Templates know the role by its older name, and most drop the ones they do not know without a word.
        roles = {"developer": "system"}
        plain = [{"role": roles.get(message.role, message.role), "content": message.text} for message in messages]
        try:
            return self._template.render(
                messages=plain, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except jinja2.TemplateError as error:
            raise RequestError(f"messages: the chat template refuses them: {error}", param="messages") from error


def load_template(folder: pathlib.Path) -> ChatTemplate | None:
    """The template of a checkpoint: chat_template.jinja, or the one in tokenizer_config.json; None when it has neither.

    Raises CheckpointError when it has one that cannot be used.
    """
    config_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = read_json(config_file) if config_file.exists() else {}
    source = template_file.read_text(encoding="utf-8") if template_file.exists() else config.get("chat_template")
    if isinstance(source, list):  # several, named
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is None:
        return None
    where = template_file if template_file.exists() else config_file
    try:
        return ChatTemplate(source, _special_tokens(config))
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"{where}: the chat template is not valid: line {error.lineno}: {error}") from error


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token and the like, written as a string or as an added token's fields."""
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        if value is not None:
            tokens[name] = value["content"] if isinstance(value, dict) else value
    return tokens


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
