"""/openapi.json: the API's description, generated from the very types that requests are checked against."""

import functools
from typing import Any

import msgspec

from nmoe import __version__
from nmoe.frontend.schema import DETOKENIZE, FIELDS, PATHS, REQUIRED, TOKENIZE
from nmoe.native import CONTENT_TYPE, FRAMES_CONTENT_TYPE

_REF = "#/components/schemas/{name}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_BODIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    PATHS["completions"]: ("CompletionRequest", FIELDS["completions"], [REQUIRED["completions"]]),
    PATHS["chat"]: ("ChatRequest", FIELDS["chat"], [REQUIRED["chat"]]),
    PATHS["generate"]: ("GenerateRequest", FIELDS["generate"], [REQUIRED["generate"]]),
    "/tokenize": ("TokenizeRequest", TOKENIZE, []),
    "/detokenize": ("DetokenizeRequest", DETOKENIZE, ["tokens"]),
}
_PACKED = (CONTENT_TYPE, FRAMES_CONTENT_TYPE)
_BULK = "Outputs in bulk, in msgpack; a prompt's token ids may also be the bytes of int32s (docs/generate.md)"
_READS = {
    "/v1/models": "The served model, as a list",
    "/v1/models/{model}": "The served model",
    "/health": "200 while the server serves and every process answers",
    "/metrics": "Prometheus text, for the whole server",
    "/version": "The version of nmoe",
    "/openapi.json": "This document",
}


@functools.cache
def document() -> bytes:
    """The document, as JSON."""
    components: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    for path, (name, fields, required) in _BODIES.items():
        schemas, shared = msgspec.json.schema_components(fields.values(), ref_template=_REF)
        components |= shared
        properties = {field: _or_null(schema) for field, schema in zip(fields, schemas, strict=True)}
        for field in required:
            properties[field] = properties[field]["anyOf"][0]
        components[name] = {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
        media = _PACKED if path == PATHS["generate"] else ("application/json",)
        body = {"required": True, "content": {media[0]: {"schema": {"$ref": _REF.format(name=name)}}}}
        paths[path] = {"post": {"requestBody": body, "responses": _responses(*media)}}
    for path, text in _READS.items():
        paths[path] = {"get": {"summary": text, "responses": _responses(_content_type(path))}}
    paths[PATHS["generate"]]["post"]["summary"] = _BULK
    paths["/v1/models/{model}"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    whole = {
        "openapi": "3.1.0",
        "info": {"title": "nmoe", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    return msgspec.json.encode(whole)


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """null means absent."""
    return {"anyOf": [schema, {"type": "null"}]}


def _content_type(path: str) -> str:
    return "text/plain" if path == "/metrics" else "application/json"


def _responses(*content_types: str) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}}
    return {
        "200": {"description": "The answer", "content": {kind: {} for kind in content_types}},
        "default": {"description": "What is wrong", "content": error},
    }
