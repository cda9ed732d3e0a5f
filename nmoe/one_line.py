"""JSON as one line also for clients that split lines as Python's `str.splitlines` does."""

_LINE_ENDS = tuple((chr(code).encode(), rb"\u%04x" % code) for code in (0x85, 0x2028, 0x2029))


def on_one_line(data: bytes) -> bytes:
    """JSON in UTF-8 without line feeds, whose other characters that may end a line are escaped: the same document."""
    if not data.isascii():
        for character, escaped in _LINE_ENDS:
            data = data.replace(character, escaped)
    return data
