"""Incremental detokenizing against whole-text decoding, stop strings against brute force, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from nmoe.errors import CheckpointError, RequestError
from nmoe.frontend.prompt import _beginnings
from nmoe.frontend.special_tokens import added_bos, added_tokens, read_tokenizer_config
from nmoe.frontend.stops import StopFinder
from nmoe.frontend.tokenizer import Tokenizer
from tests.scripted import BOS, TOKENIZER, ids_of

SPECIALS = ["<s>", "</s>"]
MERGED = ["Ġhello", "worl", "ðŁ", "Äł", "éĻĪ"]  # words, and parts of characters
PIECES = ["▁", "▁hello", "world", "▁▁", "é", "中", "�", "a", "!"]
properties = settings(derandomize=True, deadline=None, max_examples=150)


def byte_level():
    """Byte-level BPE with tokens of several bytes, and added tokens in and outside of the byte alphabet."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *MERGED]
    tokenizer = Library(models.BPE(vocab={token: i for i, token in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("中文 é"), AddedToken("naïve")])
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def byte_fallback():
    """As SentencePiece BPE is converted: words begin with ▁, bytes are tokens such as <0xE4>."""
    tokens = ["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Library(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken(" x ")])
    tokenizer.add_special_tokens(["<unk>", *SPECIALS])
    return tokenizer


def failing():
    """Whose decoder panics on ▁ alone: there is one space, and it strips one on either side."""
    tokenizer = byte_fallback()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 1)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def metaspace():
    """SentencePiece unigram as T5 has it."""
    tokenizer = Library(models.Unigram([("<unk>", 0.0), *((piece, -1.0) for piece in PIECES)], unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def save(library, folder):
    library.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module", params=[byte_level, byte_fallback, metaspace])
def pair(request, tmp_path_factory):
    """The library's tokenizer, and ours of the same file."""
    library = request.param()
    return library, Tokenizer(save(library, tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    """One token per byte."""
    return Tokenizer(save(TOKENIZER, tmp_path_factory.mktemp("tokenizer")))


@properties
@given(data=st.data())
def test_bytes_of_single_tokens_make_the_whole_text(pair, data):
    """But for what a decoder strips at the start of a text; special tokens show their names."""
    library, tokenizer = pair
    size = library.get_vocab_size(with_added_tokens=True)
    ids = data.draw(st.lists(st.integers(0, size - 1) | st.integers(max(0, size - 14), size - 1), max_size=12))
    raw = b"".join(map(tokenizer.token_bytes, ids))
    if "\ufffd" not in (text := tokenizer.decode(ids)):
        assert raw.decode().lstrip(" ") == text.lstrip(" ")
    assert tokenizer.token_bytes(size + 5) == b""
    assert tokenizer.token_bytes(library.token_to_id("</s>")) == b"</s>"


@properties
@given(data=st.data())
def test_pieces_make_the_whole_text(pair, data):
    library, tokenizer = pair
    size = library.get_vocab_size(with_added_tokens=True)
    # Words and added tokens are at the vocabulary's end; a model's own vocabulary may go on behind it.
    tokens = data.draw(st.lists(st.integers(0, size - 1) | st.integers(max(0, size - 16), size + 2), max_size=24))
    detokenizer = tokenizer.detokenizer()
    pieces = [*map(detokenizer.feed, tokens), detokenizer.flush()]
    assert "".join(pieces) == library.decode(tokens, skip_special_tokens=True)


@properties
@given(text=st.text(max_size=12))
def test_a_character_comes_with_its_last_byte(byte_tokenizer, text):
    detokenizer = byte_tokenizer.detokenizer()
    for character in text.encode("utf-8", "replace").decode():
        tokens = ids_of(character)
        assert [*map(detokenizer.feed, tokens)] == [""] * (len(character.encode()) - 1) + [character]
    assert detokenizer.flush() == ""


def test_text_is_not_held_back_when_it_is_certain(pair):
    library, tokenizer = pair
    detokenizer = tokenizer.detokenizer()
    words = library.encode("world").ids if library.token_to_id("world") is None else [library.token_to_id("world")]
    assert all(detokenizer.feed(token) for token in words)


def test_a_broken_character_at_the_end_is_shown_as_one(byte_tokenizer):
    detokenizer = byte_tokenizer.detokenizer()
    assert [*map(detokenizer.feed, ids_of("中")[:2]), detokenizer.flush()] == ["", "", "�"]


def test_eos_is_never_shown(byte_tokenizer, tmp_path):
    """Not even where tokenizer.json does not mark it as special."""
    (exclamation,) = ids_of("!")
    assert byte_tokenizer.detokenizer().feed(exclamation) == "!"
    assert Tokenizer(save(TOKENIZER, tmp_path), eos_ids=(exclamation,)).detokenizer().feed(exclamation) == ""


def test_a_token_begins_where_the_one_before_ended(tmp_path):
    """Whatever of a text the tokenizer's own offsets leave out."""
    library = byte_level()
    template = processors.TemplateProcessing("<s> $A </s>", special_tokens=[(token, 0) for token in SPECIALS])
    library.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    encoding = Tokenizer(save(library, tmp_path)).encode("a  b</s>é", add_special_tokens=True)
    assert _beginnings(encoding) == [0, 0, 1, 2, 3, 4, 8, 8, 9]


def test_special_tokens_are_added_when_asked_for(byte_tokenizer):
    assert byte_tokenizer.encode("hi", add_special_tokens=True).ids == [BOS, *ids_of("hi")]
    assert byte_tokenizer.encode("<eos>hi", add_special_tokens=False).ids == [1, *ids_of("hi")]


@pytest.mark.parametrize("own", ["none", "offsets", "bos", "eos"])
def test_a_bos_of_ones_own_begins_a_text_once(tmp_path, own):
    library = byte_level()
    bos, eos = map(library.token_to_id, SPECIALS)
    names = [("<s>", bos), ("</s>", eos)]
    library.post_processor = {
        "none": None,
        "offsets": processors.ByteLevel(trim_offsets=False),
        "bos": processors.TemplateProcessing("<s> $A", special_tokens=names),
        "eos": processors.TemplateProcessing("$A </s>", special_tokens=names),
    }[own]
    tokenizer = Tokenizer(save(library, tmp_path), bos="<s>")
    bare = tokenizer.encode("hi é", add_special_tokens=False)
    encoding = tokenizer.encode("hi é", add_special_tokens=True)
    assert encoding.ids == [bos, *bare.ids] and _beginnings(encoding) == [0, *_beginnings(bare)]
    assert tokenizer.encode("", add_special_tokens=True).ids == [bos]


def test_a_bos_that_is_no_token_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no token '<b>', .*add_bos_token"):
        Tokenizer(save(byte_level(), tmp_path), bos="<b>")


@pytest.mark.parametrize(
    ("settings", "bos"),
    [
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, "<s>"),  # as DeepSeek-V3's
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, "<s>"),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "bos_token": None}, None),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, None),
        ({"tokenizer_class": "LlamaTokenizerFast"}, None),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}, None),
        ({"add_bos_token": True}, None),
    ],
)
def test_where_tokenizer_config_json_adds_bos(tmp_path, settings, bos):
    assert added_bos(tmp_path, read_tokenizer_config(tmp_path)) is None
    named = {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | settings))
    assert added_bos(tmp_path, read_tokenizer_config(tmp_path)) == bos


def test_tokens_that_only_tokenizer_config_json_has(tmp_path):
    """As transformers has them: a new one, one that was a piece of text, and one that was not special."""
    from transformers import PreTrainedTokenizerFast

    library = byte_level()
    size, letter, think = library.get_vocab_size(), library.token_to_id("Z"), library.token_to_id("<think>")
    listed = {
        str(size): {"content": "<new>", "special": True, "lstrip": False, "rstrip": True},
        str(letter): {"content": "Z", "special": False},
        str(think): {"__type": "AddedToken", "content": "<think>", "special": True, "normalized": False},
    }
    file = save(library, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer = Tokenizer(file, added=added_tokens(tmp_path, read_tokenizer_config(tmp_path)))
    ids = tokenizer.encode("a<new> b<think>cZd<neW>", add_special_tokens=True).ids
    assert ids == theirs.encode("a<new> b<think>cZd<neW>") and {size, letter, think} <= {*ids}
    detokenizer = tokenizer.detokenizer()
    shown = "".join(map(detokenizer.feed, ids)) + detokenizer.flush()
    assert shown == theirs.decode(ids, skip_special_tokens=True) and "<think>" not in shown


def test_a_token_that_has_two_ids_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"7": {"content": "<new>"}}}')
    with pytest.raises(
        CheckpointError, match=r"makes '<new>' token \d+, but added_tokens_decoder .* says 7; both files"
    ):
        Tokenizer(save(byte_level(), tmp_path), added=added_tokens(tmp_path, read_tokenizer_config(tmp_path)))


@pytest.mark.parametrize("listed", [["<new>"], {"x": {"content": "<new>"}}, {"7": "<new>"}, {"7": {}}])
def test_a_list_of_tokens_that_is_none_is_refused(tmp_path, listed):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    with pytest.raises(CheckpointError, match="added_tokens_decoder does not map ids to tokens"):
        added_tokens(tmp_path, read_tokenizer_config(tmp_path))


def test_truncation_in_the_file_is_ignored(tmp_path):
    library = Library.from_str(TOKENIZER.to_str())
    library.enable_truncation(3)
    library.enable_padding(length=50)
    assert len(Tokenizer(save(library, tmp_path)).encode("hello world", add_special_tokens=False)) == 11


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"}', "not json", '{"model": 5}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer .* save it again"):
        Tokenizer(file)


def test_a_panic_of_the_library_is_an_ordinary_error(tmp_path):
    library = failing()
    tokenizer = Tokenizer(save(library, tmp_path))
    space = library.token_to_id("▁")
    for decode in (lambda: tokenizer.decode([space]), lambda: tokenizer.detokenizer().feed(space)):
        with pytest.raises(RequestError, match=r"tokenizer fails on these tokens: .*") as caught:
            decode()
        assert caught.value.status == 500


def test_a_decoder_is_what_the_library_takes_it_for(tmp_path):
    """It takes the fields of an object also as a list."""
    library = byte_level()
    library.decoder = decoders.BPEDecoder(suffix="Ġ")
    file = save(library, tmp_path)
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"decoder": ["Ġ"]}))
    ids = library.encode("hello").ids
    assert Tokenizer(file).decode(ids) == library.decode(ids)


def test_a_decoder_that_cannot_be_streamed_is_refused(tmp_path):
    library = byte_level()
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    with pytest.raises(CheckpointError, match=r"ByteLevel \+ Strip"):
        Tokenizer(save(library, tmp_path))


# ------------------------------------------------------------------------------------------------------- stop strings


def first_stop(text, stops, early=0):
    """By brute force: the length of the text before the stop string that is complete first, not counting those complete
    within the first `early` characters; or None."""
    for end in range(early + 1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


@properties
@given(
    pieces=st.lists(st.text("ab中", max_size=4), max_size=8),
    stops=st.lists(st.text("ab中", min_size=1, max_size=4), min_size=1, max_size=4),
    num_early=st.integers(0, 4),
)
def test_stop_strings(pieces, stops, num_early):
    finder = StopFinder(tuple(stops))
    text, shown = "", ""
    early = len("".join(pieces[:num_early]))
    for place, piece in enumerate(pieces):
        text += piece
        shown += finder.feed(piece, early=place < num_early)
        cut = first_stop(text, stops, early)
        if cut is not None:
            assert finder.found and shown == text[:cut] and finder.flush() == ""
            return
        assert not finder.found and text.startswith(shown)
        # Exactly what may still become a stop string is held back.
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)
        ends = [text[i:] for i in range(len(text))]
        ends = [end for end in ends if any(stop.startswith(end) and stop != end for stop in stops)]
        assert held == (ends[0] if ends else "")
    assert shown + finder.flush() == text
