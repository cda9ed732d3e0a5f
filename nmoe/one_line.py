"""JSON that stays on one line even for clients that split lines like Python's `str.splitlines`."""

_LINE_ENDS = tuple((chr(code).encode(), rb"\u%04x" % code) for code in (0x85, 0x2028, 0x2029))


def on_one_line(data: bytes) -> bytes:
    """Escape non-ASCII line separators in UTF-8 JSON that has no line feeds; the document's meaning is unchanged."""
    if not data.isascii():
        for character, escaped in _LINE_ENDS:
            data = data.replace(character, escaped)
    return data
