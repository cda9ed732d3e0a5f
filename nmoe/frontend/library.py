"""The tokenizers library's calls that run a checkpoint's own steps, which may panic on what a client sends.

A panic of Rust's arrives as a BaseException that is no Exception, so no guard of one request would hold it: here it
becomes an error of the request that it belongs to.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tokenizers

from nmoe.errors import RequestError

T = TypeVar("T")


def load(text: str) -> tokenizers.Tokenizer:
    """The tokenizer that a tokenizer.json's text describes. Raises Exception where it describes none."""
    return _call("tokenizer.json", tokenizers.Tokenizer.from_str, text)


def encode(tokenizer: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> tokenizers.Encoding:
    """Raises RequestError (500) when the library cannot."""
    return _call("this text", tokenizer.encode, text, add_special_tokens=add_special_tokens)


def decode(tokenizer: tokenizers.Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens included. Raises RequestError (500) when the library cannot."""
    return _call("these tokens", tokenizer.decode, ids, skip_special_tokens=False)


def _call(what: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    try:
        return function(*args, **kwargs)
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":  # which cannot be imported: panics have it to themselves
            raise
        raise RequestError(f"the model's tokenizer fails on {what}: {error}", status=500) from error
