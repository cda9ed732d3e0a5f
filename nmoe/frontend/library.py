"""Wraps the tokenizers library's calls that run a checkpoint's own steps, which may panic on client input.

A Rust panic arrives as a BaseException that is not an Exception, so a per-request handler would not catch it. Here it
becomes an error of the request that caused it.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tokenizers

from nmoe.errors import RequestError

T = TypeVar("T")


def load(text: str) -> tokenizers.Tokenizer:
    """The tokenizer described by the text of a tokenizer.json. Raises Exception if it describes none."""
    return _call("tokenizer.json", tokenizers.Tokenizer.from_str, text)


def encode(tokenizer: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> tokenizers.Encoding:
    """Encode `text`. Raises RequestError (500) if the library fails."""
    return _call("this text", tokenizer.encode, text, add_special_tokens=add_special_tokens)


def decode(tokenizer: tokenizers.Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens included. Raises RequestError (500) if the library fails."""
    return _call("these tokens", tokenizer.decode, ids, skip_special_tokens=False)


def _call(what: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    try:
        return function(*args, **kwargs)
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":  # cannot be imported, but only panics come from it
            raise
        raise RequestError(f"the model's tokenizer fails on {what}: {error}", status=500) from error
