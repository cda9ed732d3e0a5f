"""The checkpoint's chat template: turns messages into the text format that the model was trained on.

Templates are Hugging Face's: Jinja with `trim_blocks`, `lstrip_blocks`, loop controls, `generation` blocks, a `tojson`
that leaves HTML alone, `raise_exception` and `strftime_now` (transformers, utils/chat_template_utils.py). They run
sandboxed.
"""

import datetime
import json
import pathlib
import secrets
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

from nmoe.config_json import is_there
from nmoe.errors import CheckpointError, RequestError
from nmoe.frontend.schema import ChatMessage, Conversation
from nmoe.frontend.special_tokens import CONFIG, special_tokens


class _Named(msgspec.Struct):
    """One of several templates."""

    name: str
    template: str


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks for training what the assistant says; a prompt has what is inside as if unmarked."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block's body, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class ChatTemplate:
    """A compiled template and its special tokens. `render` may be called from several threads."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlocks]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens

    def render(self, conversation: Conversation) -> str:
        """The prompt that asks for the assistant's next message, or for the rest of the last one.

        Raises RequestError when the template refuses.
        """
        plain = [_plain(message) for message in conversation.messages]
        final, mark = plain[-1]["content"], f"[{secrets.token_hex(8)}]"  # which no client can have written
        if conversation.continue_final_message:
            plain[-1]["content"] = f"{final}{mark} "
        try:
            names = self._special_tokens | conversation.template_kwargs  # in a dict any name may be there
            names |= {"messages": plain, "tools": None, "documents": None}
            text = self._template.render(names | {"add_generation_prompt": conversation.add_generation_prompt})
        except Exception as error:  # a template is a program that runs on client input
            raise RequestError(f"messages: the chat template refuses them: {error}", param="messages") from error
        return _cut_at(text, mark, final) if conversation.continue_final_message else text


def _plain(message: ChatMessage) -> dict[str, Any]:
    # Templates know the role by its older name, and most silently drop roles they do not know.
    roles = {"developer": "system"}
    plain: dict[str, Any] = {"role": roles.get(message.role, message.role), "content": message.text}
    if message.tool_calls:
        plain["tool_calls"] = msgspec.to_builtins(message.tool_calls)
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _cut_at(text: str, mark: str, final: str) -> str:
    """The prompt up to the mark placed after the last message's content, so that the model continues that message.

    A template that strips contents takes the space behind the mark too, and would have taken the content's own
    (transformers, `apply_chat_template`, `continue_final_message`).
    """
    kept, found, rest = text.rpartition(mark)
    if not rest.startswith(" "):
        kept = kept.rstrip()
    if not found or not kept.rstrip().endswith(final.strip()):
        message = "continue_final_message: the chat template does not show the last message as it is"
        raise RequestError(message, param="continue_final_message")
    return kept


def load_template(folder: pathlib.Path, config: dict[str, Any]) -> ChatTemplate | None:
    """The template of a checkpoint: chat_template.jinja, or the one in `config`, its tokenizer_config.json; None if it
    has neither.

    Raises CheckpointError if it has one that cannot be used.
    """
    template_file = folder / "chat_template.jinja"
    where = template_file if is_there(template_file) else folder / CONFIG
    try:
        source = where.read_text(encoding="utf-8") if where == template_file else _default(where, config)
        if source is None:
            return None
        return ChatTemplate(source, special_tokens(folder, config))
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"{where}: the chat template is not valid: line {error.lineno}: {error}; copy it again from the original"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read: {error.strerror}; check the file's permissions") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: is not UTF-8 ({error}); copy it again from the original") from None


def _default(where: pathlib.Path, config: dict[str, Any]) -> str | None:
    """The default template of a tokenizer_config.json, which may hold several."""
    try:
        source: str | list[_Named] | None = msgspec.convert(config.get("chat_template"), str | list[_Named] | None)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{where}: chat_template is neither a text nor a list of named ones ({error}); copy it again from the"
            " original"
        ) from None
    if isinstance(source, list):
        return {entry.name: entry.template for entry in source}.get("default")
    return source


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
