"""Captions and labels from outside: encodings, tables, several captions an image, columns."""

import codecs

import pytest

from diffusion import UserError
from diffusion.training.latents import read_prompts
from diffusion.weights.guards import decode_text, read_text_file

# --- the reader of texts -------------------------------------------------------------------------

TEXT = "a café at night\n“déjà vu”, 3 €\n東京 tower\n"
WESTERN = "a café at night\n“déjà vu”, 3 €\n"


@pytest.mark.parametrize(
    "mark, codec",
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
        (b"", "utf-16-le"),
        (b"", "utf-16-be"),
        (b"", "cp1252"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_texts_of_all_encodings_are_the_same_text(tmp_path, mark, codec, newline):
    text = WESTERN if codec == "cp1252" else TEXT
    file = tmp_path / "a.txt"
    file.write_bytes(mark + text.replace("\n", newline).encode(codec))
    found, encoding = read_text_file(file)
    assert found == text
    assert encoding.lower().startswith(codec.removesuffix("-le").removesuffix("-be"))
    assert read_prompts(file) == text.split("\n")[:-1]


def test_only_newlines_end_lines(tmp_path):
    lines = ["a\u2028b", "c\x0bd", "e\x0cf", "g\x85h", "i\x1cj"]
    (tmp_path / "a.txt").write_text("\n\n".join(lines), encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == lines


def test_what_is_no_text(tmp_path):
    for raw in (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff\xd8", b"a cat\x00 sits", b"\xff\x01\x02"):
        (tmp_path / "a.txt").write_bytes(raw)
        with pytest.raises(UserError, match="a.txt is no text"):
            read_prompts(tmp_path / "a.txt")
    with pytest.raises(UserError, match="b.txt"):
        read_text_file(tmp_path / "b.txt")


def test_a_text_that_is_cut_ends_before_the_character():
    assert decode_text("né".encode()[:-1], cut=True) == ("n", "UTF-8")
    assert decode_text(codecs.BOM_UTF16_LE + "né".encode("utf-16-le")[:-1], cut=True)[0] == "n"
