"""Captions and labels from outside: encodings, tables, several captions an image, columns."""

import codecs
import csv
import io
import json
import unicodedata

import numpy as np
import pytest
import torch
import warm
from PIL import Image

from diffusion import UserError
from diffusion.config import Config
from diffusion.data import toy
from diffusion.data.captions import Selection
from diffusion.data.hub import HubSet
from diffusion.data.pixels import Pixels
from diffusion.data.sources import folder_set, open_data
from diffusion.data.stream import StreamBatches
from diffusion.files import text_files
from diffusion.files.text_files import decode_text, prompts_of, read_prompt_lines, read_text_file
from diffusion.training.recipe import open_recipe

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
    assert read_prompt_lines(file) == text.split("\n")[:-1]


def test_only_newlines_end_lines(tmp_path):
    lines = ["a\u2028b", "c\x0bd", "e\x0cf", "g\x85h", "i\x1cj"]
    (tmp_path / "a.txt").write_text("\n\n".join(lines), encoding="utf-8")
    assert read_prompt_lines(tmp_path / "a.txt") == lines


def test_what_is_no_text(tmp_path):
    marked = codecs.BOM_UTF8 + b"a\x00b"
    chinese = "红色的猫在屋顶上\n".encode("utf-16-le")  # its only zero is the last byte
    png = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff\xd8"
    for raw in (png, b"a cat\x00 sits", b"\xff\x01\x02", b"\0\0", b"\0" * 99, marked, chinese):
        (tmp_path / "a.txt").write_bytes(raw)
        with pytest.raises(UserError, match="a.txt: not a text"):
            read_prompt_lines(tmp_path / "a.txt")
    with pytest.raises(UserError, match="b.txt"):
        read_text_file(tmp_path / "b.txt")


def test_a_text_that_is_cut_ends_before_the_character():
    assert decode_text("né".encode()[:-1], cut=True) == ("n", "UTF-8")
    assert decode_text(codecs.BOM_UTF16_LE + "né".encode("utf-16-le")[:-1], cut=True)[0] == "n"


@pytest.mark.parametrize(
    "raw, expected",
    [
        (b"a cat\0", "a cat"),
        (b"7\0", "7"),
        (b"a cat\0\0\0", "a cat"),
        (b"a cat\0\r\n", "a cat\n"),
        ("a cat\0".encode("utf-16-le"), "a cat"),
        ("a cat\n".encode("utf-16-be"), "a cat\n"),
        ("a café\0\0".encode(), "a café"),
        (codecs.BOM_UTF8 * 2 + b"a cat\n" + codecs.BOM_UTF8 + b"a dog", "a cat\na dog"),
        (("\ufeffa cat\n" * 2).encode("utf-16-le"), "a cat\na cat\n"),
    ],
)
def test_zeros_at_the_end_and_marks_inside_are_dropped(tmp_path, raw, expected):
    pictures(tmp_path, "0.png", "1.png")
    assert decode_text(raw)[0] == expected
    (tmp_path / "a.lines").write_bytes(raw)
    assert read_prompt_lines(tmp_path / "a.lines") == [
        line for line in expected.split("\n") if line
    ]
    (tmp_path / "0.txt").write_bytes(raw)
    assert texts(tmp_path)["0.png"] == (" ".join(expected.split()),)


def test_marks_and_zeros_in_tables(tmp_path):
    pictures(tmp_path, "0.png", "1.png")
    mark = codecs.BOM_UTF8
    raw = mark * 2 + b"file_name,text\n" + mark + b'0.png,"a\n' + mark + b'cat"\n1.png,b\0\n\0\0'
    (tmp_path / "metadata.csv").write_bytes(raw)
    assert texts(tmp_path) == {"0.png": ("a cat",), "1.png": ("b",)}
    (tmp_path / "metadata.csv").unlink()
    table(tmp_path, [{"file_name": "0.png", "text": "\ufeffa \ufeffcat"}])  # escaped by JSON
    assert texts(tmp_path)["0.png"] == ("a cat",)


RUSSIAN, JAPANESE = "Кот на крыше".encode("cp1251"), "赤い猫".encode("shift-jis")


@pytest.mark.parametrize(
    "text, codec",
    [
        ("кот", "cp1251"),
        ("a photo of кот", "cp1251"),
        ("кот на крыше", "koi8-r"),
        ("γάτα", "cp1253"),
        ("红色的猫", "gbk"),
        ("ねこ", "shift-jis"),
        ("고양이", "euc-kr"),
    ],
)
def test_texts_of_other_code_pages_are_named(tmp_path, text, codec, capsys):
    pictures(tmp_path, "0.png")
    (tmp_path / "0.txt").write_bytes(text.encode(codec))
    folder_set(tmp_path)
    assert "another code page" in capsys.readouterr().out
    (tmp_path / "a.lines").write_bytes(text.encode(codec))
    read_prompt_lines(tmp_path / "a.lines")
    assert "a.lines" in (out := capsys.readouterr().out) and "another code page" in out
    rows = f'{{"file_name": "0.png", "text": "{text}"}}\n'
    (tmp_path / "metadata.jsonl").write_bytes(rows.encode(codec))
    folder_set(tmp_path)
    assert "metadata.jsonl: not UTF-8" in (out := capsys.readouterr().out)
    assert "another code page" in out


def test_texts_of_no_known_code_page_are_not_used(tmp_path, capsys):
    pictures(tmp_path, "0.png", "1.png")
    (tmp_path / "0.txt").write_bytes(JAPANESE)
    (tmp_path / "1.txt").write_text("one")
    assert texts(tmp_path) == {"0.png": ("",), "1.png": ("one",)}
    out = capsys.readouterr().out
    assert "0.txt" in out and "cp1252" in out and "save it as UTF-8" in out
    with pytest.raises(UserError, match="0.txt: neither UTF-8.*cp1252.*save it as UTF-8"):
        read_prompt_lines(tmp_path / "0.txt")
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\n0.png," + JAPANESE)
    with pytest.raises(UserError, match="metadata.csv: neither UTF-8"):
        folder_set(tmp_path)


def test_a_missing_file_of_prompts_is_named_once(tmp_path):
    with pytest.raises(UserError) as caught:
        prompts_of([f"@{tmp_path / 'nofile.txt'}"])
    assert str(caught.value).count("No such file") == 1 and "UTF-8" not in str(caught.value)


@pytest.mark.parametrize(
    "codec, word", [("utf-8", "é東"), ("utf-16-le", "a cat "), ("cp1252", "été ")]
)
def test_the_start_of_a_long_table_tells_its_encoding(tmp_path, monkeypatch, codec, word):
    """Also where it ends within a character."""
    monkeypatch.setattr(text_files, "MAX_TEXT", 63)
    (tmp_path / "a.csv").write_bytes((word * 99).encode(codec))
    file, _ = text_files.open_text(tmp_path / "a.csv")
    with file:
        assert file.read() == word * 99


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_long_table_that_changes_its_encoding_is_named(tmp_path, monkeypatch, name):
    pictures(tmp_path, "0.png")
    monkeypatch.setattr(text_files, "MAX_TEXT", 32)
    row = "0.png,a cat\n" if name.endswith("csv") else '{"file_name": "0.png", "text": "a cat"}\n'
    head = "file_name,text\n" if name.endswith("csv") else ""
    (tmp_path / name).write_bytes((head + row * 9 + row.replace("cat", "été")).encode("cp1252"))
    with pytest.raises(UserError, match=name) as caught:
        folder_set(tmp_path)
    assert "\n" not in str(caught.value)


# --- captions of folders -------------------------------------------------------------------------


def pictures(root, *names) -> None:
    for i, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i, 0, 90)).save(file)


def texts(root, **options) -> dict:
    """{name: captions} of a folder."""
    images = folder_set(root, **options)
    return dict(zip(images.names, images.texts or [None] * len(images)))


def table(root, rows, name="metadata.jsonl") -> None:
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


NOT_CAPTIONS = [7, 0, 1.5, True, False, {"a": "b"}, [["a"]], ["a", 1], [{"a": "b"}]]


@pytest.mark.parametrize(
    "value, expected",
    [
        (None, ("default",)),
        (float("nan"), ("default",)),
        ("", ("default",)),
        ("  \n", ("default",)),
        ([], ("default",)),
        ([None, ""], ("default",)),
        ("a\n cat", ("a cat",)),
        ("None", ("None",)),
        (["a cat", "a dog", None, "a cat"], ("a cat", "a dog")),
        (["alone"], ("alone",)),
    ],
    ids=str,
)
def test_what_a_caption_may_be(tmp_path, value, expected):
    pictures(tmp_path, "0.png", "1.png")
    table(tmp_path, [{"file_name": "0.png", "text": value}, {"file_name": "1.png", "text": "one"}])
    assert texts(tmp_path, default_caption="default") == {"0.png": expected, "1.png": ("one",)}


@pytest.mark.parametrize("value", NOT_CAPTIONS, ids=str)
def test_what_a_caption_may_not_be(tmp_path, value):
    """An error with the file, its line and the value: never its str()."""
    pictures(tmp_path, "0.png", "1.png")
    table(tmp_path, [{"file_name": "0.png", "text": "a"}, {"file_name": "1.png", "text": value}])
    with pytest.raises(UserError) as caught:
        folder_set(tmp_path)
    wrong = value if not isinstance(value, list) or isinstance(value[0], list) else value[-1]
    for part in ("metadata.jsonl", "line 2", repr(wrong)):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_rows_are_several_captions(tmp_path):
    pictures(tmp_path, "0.png", "sub/1.png")
    rows = [("0.png", "a"), ("sub/1.png", "b"), ("0.png", ["c", "a"]), ("0.png", None)]
    table(tmp_path, [{"file_name": name, "text": text} for name, text in rows])
    table(tmp_path / "sub", [{"file_name": "1.png", "text": "of the subfolder"}])
    assert texts(tmp_path) == {"0.png": ("a", "c"), "sub/1.png": ("b", "of the subfolder")}


def test_tables_are_read_as_the_datasets_library_reads_them(tmp_path):
    """The same captions in .jsonl, .csv and .parquet, against Hugging Face's ImageFolder."""
    library = pytest.importorskip("datasets")
    names = [f"{i}.png" for i in range(4)]
    captions = ["plain", 'with, comma and "quotes"', "two\nlines é", "東京"]
    for kind in ("jsonl", "csv", "parquet"):
        root = tmp_path / kind
        pictures(root, *names)
        file = root / f"metadata.{kind}"
        made = library.Dataset.from_dict({"file_name": names, "text": captions})
        {"jsonl": made.to_json, "csv": made.to_csv, "parquet": made.to_parquet}[kind](file)
        theirs = library.load_dataset(
            "imagefolder", data_dir=str(root), split="train", cache_dir=str(tmp_path / "hf")
        )
        theirs = theirs.cast_column("image", library.Image(decode=False))
        expected = {row["image"]["path"].split("/")[-1]: row["text"] for row in theirs}
        assert set(expected) == set(names)
        assert texts(root) == {n: (" ".join(t.split()),) for n, t in expected.items()}


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("between", [",", ";", "\t"])
def test_csv_of_spreadsheets(tmp_path, codec, between, capsys):
    pictures(tmp_path, "0.png", "1.png", "2.png")
    rows = [["file_name", "caption"], ["0.png", "café, noir"], ["1.png", ""], ["2.png", "2"]]
    with open(tmp_path / "metadata.csv", "w", encoding=codec, newline="") as file:
        csv.writer(file, delimiter=between).writerows(rows)
    assert texts(tmp_path, default_caption="-") == {
        "0.png": ("café, noir",), "1.png": ("-",), "2.png": ("2",)}  # fmt: skip
    assert ("metadata.csv: not UTF-8" in capsys.readouterr().out) == (codec != "utf-8-sig")


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("metadata.csv", "file_name,text\n0.png,a cat, sitting\n", "line 2.*3 fields"),
        ("metadata.csv", 'file_name,text\n0.png,a\n1.png,"a cat\n', "line 3"),
        ("metadata.csv", "file_name,text,text\n0.png,a,b\n", "twice"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": "a"}\n{"file', "line 2"),
        ("metadata.jsonl", "[1, 2]\n", r"line 1: \[1, 2\]"),
        ("metadata.parquet", "no parquet", "metadata.parquet cannot be read"),
    ],
)
def test_damaged_tables_are_named(tmp_path, name, content, match):
    pictures(tmp_path, "0.png", "1.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=match) as caught:
        folder_set(tmp_path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_csv_means_is_what_pandas_and_datasets_mean(tmp_path):
    """Null words, and lists as pandas and JSON write them."""
    pandas, library = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    words = ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "None",
             "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "n/a", "nan", "null", "none", "Na"]  # fmt: skip
    names = [f"{i:02d}.png" for i in range(len(words))]
    pictures(tmp_path, *names)
    frame = pandas.DataFrame({"file_name": names, "text": words})
    frame.to_csv(tmp_path / "metadata.csv", index=False)
    theirs = library.load_dataset(
        "imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "hf")
    )
    assert [own[0] or None for own in texts(tmp_path).values()] == theirs["text"][:]
    lists = [["a cat", "a dog"], ["it's", 'a "b"'], [], ["alone", None], ["é\n東", "x"]]
    as_json = [json.dumps(own) for own in lists]
    plain = [
        "[a cat]",
        "['a', 1]",
        "[1, 2]",
        "['a' + 'b']",
        "[",
        "[broken",
        "['a'] cat",
        "['a' 'b']",
    ]
    frame = pandas.DataFrame({"file_name": names[:18], "text": lists + as_json + plain})
    frame.to_csv(tmp_path / "metadata.csv", index=False)
    expected = [tuple(" ".join(t.split()) for t in own if t) or ("",) for own in lists]
    expected += expected + [(text,) for text in plain]
    assert list(texts(tmp_path).values())[:18] == expected


def test_csv_as_spreadsheets_and_people_write_it(tmp_path, capsys):
    pictures(tmp_path, "0.png", " 1.png")
    (tmp_path / "metadata.csv").write_text('file_name, text\n0.png, "a, b"\n 1.png, c\n')
    assert texts(tmp_path) == {"0.png": ("a, b",), " 1.png": ("c",)}
    (tmp_path / "metadata.csv").unlink()
    for name in ("metadata.csv", "metadata.jsonl"):
        for content in ("", "\n") if name.endswith("l") else ("", "file_name,text\n"):
            (tmp_path / "metadata.csv").unlink(missing_ok=True)
            (tmp_path / name).write_text(content)
            capsys.readouterr()
            assert folder_set(tmp_path).texts is None
            assert f"{name} has no column file_name" in capsys.readouterr().out


def test_the_first_column_that_holds_something(tmp_path, capsys):
    pictures(tmp_path, "0.png", "1.png", "2.png")
    rows = [(None, "c0"), ("t1", "c1"), (None, None)]
    table(
        tmp_path,
        [{"file_name": f"{i}.png", "text": t, "caption": c} for i, (t, c) in enumerate(rows)],
    )
    assert list(texts(tmp_path).values()) == [("c0",), ("t1",), ("",)]
    out = capsys.readouterr().out
    assert "column caption (1)" in out and "column text (1)" in out


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_in_the_other_form_of_unicode(tmp_path, form, capsys):
    here, there = form, "NFD" if form == "NFC" else "NFC"
    spelled = unicodedata.normalize
    pictures(tmp_path, *(spelled(here, name) for name in ("für/é.png", "für/ü.png", "für/ñ.png")))
    name = spelled(there, "für/é.png")
    table(tmp_path, [{"file_name": name, "text": "of a table"}])
    folder = tmp_path / spelled(here, "für")
    (folder / spelled(there, "ü.txt")).write_text("beside")
    (folder / spelled(there, "ñ.png.txt")).write_text("of the whole name")
    found = {spelled("NFC", name)[-5:]: own for name, own in texts(tmp_path).items()}
    assert found == {
        "é.png": ("of a table",),
        "ü.png": ("beside",),
        "ñ.png": ("of the whole name",),
    }
    out = capsys.readouterr().out
    assert "warning" not in out
    both = tmp_path / "both"
    pictures(both, *(spelled(f, "é.png") for f in ("NFC", "NFD")))
    table(both, [{"file_name": spelled(f, "é.png"), "text": f} for f in ("NFC", "NFD")])
    assert set(texts(both).values()) == {("NFC",), ("NFD",)}
    assert texts(both)[spelled("NFD", "é.png")] == ("NFD",)


def test_values_are_judged_where_their_image_is_used(tmp_path):
    pictures(tmp_path, "train/0.png", "train/1.png", "test/2.png")
    rows = [{"file_name": f"{name}.png", "text": text}
            for name, text in (("train/0", "a"), ("test/2", 7), ("nowhere", 8))]  # fmt: skip
    table(tmp_path, rows)
    assert texts(tmp_path) == {"0.png": ("a",), "1.png": ("",)}
    table(tmp_path, [*rows, {"file_name": "train/1.png", "text": 9}])
    with pytest.raises(UserError, match="line 4: the caption is 9"):
        folder_set(tmp_path)


UNUSED = {
    "a/metadata.csv": ("file_name,text\n0.png,a cat, sitting\n", "line 2: 3 fields"),
    "b/metadata.csv": ("text,text\n1,2\n", "names a column twice"),
    "c/metadata.csv": (b"file_name,text\n0.png," + JAPANESE, "cp1252"),
    "d/metadata.jsonl": ('{"file_name": "0.png", "text": 7}\n', "the caption is 7"),
    "f/metadata.jsonl": ('{"file_name": "0.png"', "line 1"),
    "g/metadata.parquet": ("no parquet", "metadata.parquet cannot be read"),
}


@pytest.mark.slow
def test_tables_do_not_stop_what_uses_no_captions(tmp_path):
    """In the modes without captions problems of tables are warnings; where they count, errors."""
    data = tmp_path / "data"
    for name, (content, problem) in UNUSED.items():
        file = data / name
        pictures(file.parent, "0.png")
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=problem):
            folder_set(file.parent)
    pictures(data, "1.png")
    (data / "1.txt").write_bytes(JAPANESE)
    common = ("--data", "data", "--image_size", "8", "--dry_run", "--device", "cpu")
    done = warm.script("train.py", *common, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, (_, problem) in UNUSED.items():
        assert any(name in line and problem in line for line in done.stdout.split("\n")), name
    assert "no caption;" not in done.stdout and "1.txt" not in done.stdout
    scratch = ("--mode", "latent", "--condition", "text", "--text_encoder", "scratch", "--vae", "x")
    done = warm.script("train.py", *scratch, *common, cwd=tmp_path)
    assert done.returncode == 1 and "metadata.csv" in done.stderr, done.stdout + done.stderr


def test_columns_of_tables(tmp_path, capsys):
    pictures(tmp_path, "0.png", "1.png")
    rows = [{"image": f"{i}.png", "prompt": f"p{i}", "caption": f"c{i}", "n": i} for i in range(2)]
    table(tmp_path, rows)
    assert list(texts(tmp_path).values()) == [("c0",), ("c1",)]
    out = capsys.readouterr().out
    assert "column caption (2)" in out and "image, prompt, caption, n" in out
    chosen = texts(tmp_path, selection=Selection(caption_column="prompt"))
    assert list(chosen.values()) == [("p0",), ("p1",)]
    with pytest.raises(UserError, match="--caption_column nope.*image, prompt, caption, n"):
        folder_set(tmp_path, selection=Selection(caption_column="nope"))
    with pytest.raises(UserError, match="column nope.*image, prompt, caption, n"):
        folder_set(tmp_path, selection=Selection(image_column="nope"))
    with pytest.raises(UserError, match="line 1: the caption is 0"):
        folder_set(tmp_path, selection=Selection(caption_column="n"))
    table(tmp_path, [{"nope": f"{i}.png", "image": i, "text": f"t{i}"} for i in range(2)])
    chosen = texts(tmp_path, selection=Selection(image_column="nope"))
    assert list(chosen.values()) == [("t0",), ("t1",)]
    table(tmp_path, [{"file_name": "0.png", "label": 3}])
    assert folder_set(tmp_path).texts is None
    assert "the columns are file_name, label" in capsys.readouterr().out
    (tmp_path / "metadata.csv").write_text("id,text\n0,a\n")  # of something else
    assert folder_set(tmp_path).texts is None
    assert "metadata.csv has no column file_name" in capsys.readouterr().out
    table(tmp_path, [{"id": 0, "text": "a"}])
    assert folder_set(tmp_path).texts is None
    assert "metadata.jsonl has no column file_name" in capsys.readouterr().out


def test_texts_beside_images(tmp_path, capsys):
    names = ("a.png", "b.png", "c.png", "d.png", "e.png", "f.png")
    pictures(tmp_path, *names)
    for name, text in (
        ("a.txt", "first"), ("a.caption", "second"), ("b.TXT", "capitals"), ("c.caption", "caption"),
        ("d.png.txt", "whole name"), ("e.Caption", "both"), ("orphan.txt", "alone"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
    (tmp_path / "f.txt").write_bytes("größer".encode("utf-16"))
    found = texts(tmp_path)
    assert [own[0] for own in found.values()] == [
        "first", "capitals", "caption", "whole name", "both", "größer"]  # fmt: skip
    out = capsys.readouterr().out
    assert "several texts; using 'a.txt'" in out and "read as UTF-16" in out
    table(tmp_path, [{"file_name": "a.png", "text": "table"}, {"file_name": "b.png", "text": None}])
    found = texts(tmp_path)
    assert (found["a.png"], found["b.png"]) == (("table",), ("capitals",))


def test_texts_that_cannot_be_read_are_named_where_there_is_nothing_else(tmp_path, capsys):
    pictures(tmp_path, "0.png")
    (tmp_path / "0.txt").write_bytes(b"\x89PNG\x00\x01\xff\xfe")
    assert folder_set(tmp_path).texts is None
    assert "0.txt': not a text" in capsys.readouterr().out


def test_rows_that_match_no_image_are_counted_and_named(tmp_path, capsys):
    root = tmp_path / "data"
    pictures(root, "sub/0.png", "sub/1.png", "sub/2.png", "4.png", ".hidden/5.png")
    (root / "3.psd").write_text("")
    pictures(tmp_path, "outside.png")
    names = {
        "sub\\0.png": None, "./sub/1.png": None, str(root / "sub" / "2.png"): None,  # these match
        "sub/2.jpg": "no image", "../outside.png": "no image", "SUB/0.png": "no image",
        "3.psd": "no image", ".hidden/5.png": "no image", "nowhere.png": "no image",
    }  # fmt: skip
    table(
        root, [{"file_name": name, "text": f"of {name}"} for name in names] + [{"file_name": None}]
    )
    found = texts(root)
    assert found == {"4.png": ("",)} | {
        name: (f"of {row}",) for name, row in zip(("sub/0.png", "sub/1.png", "sub/2.png"), names)
    }
    out = capsys.readouterr().out
    assert "7 of 10 rows" in out and "line 10: None" in out
    for number, (name, reason) in enumerate(names.items(), 1):
        lines = [line for line in out.split("\n") if f"line {number}:" in line]
        assert len(lines) == (reason is not None), name
        assert reason is None or reason in lines[0]


def test_a_table_above_the_train_split(tmp_path, capsys):
    pictures(tmp_path, "train/cat/0.png", "train/cat/1.png", "test/cat/2.png")
    rows = [f"{s}/cat/{i}.png" for i, s in enumerate(("train", "train", "test"))]
    table(tmp_path, [{"file_name": name, "text": name} for name in rows])
    assert texts(tmp_path) == {f"cat/{i}.png": (f"train/cat/{i}.png",) for i in range(2)}
    out = capsys.readouterr().out
    assert (
        "rows (3)" in out and "rows of another split or class (1)" in out and "warning" not in out
    )


# --- several captions in training ----------------------------------------------------------------


def test_each_step_draws_one_caption(latent, faces, tmp_path):
    """Uniformly among an image's own, the same for a step however it is cut; held-out: the first."""
    files = sorted(faces.rglob("*.png"))
    for i, file in enumerate(files):
        target = tmp_path / "data" / f"{i:03d}.png"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    captions = [[f"{i} {k}" for k in range(1 + i % 3)] for i in range(len(files))]
    rows = [{"file_name": f"{i:03d}.png", "text": own} for i, own in enumerate(captions)]
    table(tmp_path / "data", rows)
    options = latent | dict(data=str(tmp_path / "data"), batch_size=32)
    recipe = open_recipe(Config(**options), torch.device("cpu"))
    data = recipe.batches
    read = recipe.conditioning.tokenizer
    every = {tuple(read([text])[0].tolist()): text for own in captions for text in own}
    found = {}
    for step in range(60):
        ids = [tuple(row) for row in data(step, 0, 32).text.tolist()]
        for image, text in zip(data.indices(step), ids):
            found.setdefault(int(image), []).append(every[text])
    for image, drawn in found.items():
        assert set(drawn) == set(captions[image]), image
    threes = [int(text.split()[1]) for i, own in found.items() if i % 3 == 2 for text in own]
    counts = np.bincount(threes, minlength=3)
    assert (abs(counts / len(threes) - 1 / 3) < 4 * (2 / 9 / len(threes)) ** 0.5).all(), counts
    whole = data(7, 0, 32).text
    again = open_recipe(Config(**options), torch.device("cpu")).batches
    assert torch.equal(torch.cat([again(7, 0, 20).text, again(7, 20, 32).text]), whole)
    held = data.held_out_batch(0, len(data.held_out)).text
    assert [every[tuple(row)] for row in held.tolist()] == [captions[i][0] for i in data.held_out]


# --- the hub -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found = pytest.importorskip("datasets")
    cache = found.config.HF_DATASETS_CACHE
    found.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("hf_cache")
    yield found
    found.config.HF_DATASETS_CACHE = cache


def picture(i: int) -> dict:
    file = io.BytesIO()
    Image.fromarray(toy.draw(i, 16)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def repository(library, folder, splits=("train",), **columns) -> str:
    """A folder of parquet files, as a hub repository has them. columns: (values, feature)."""
    folder.mkdir()
    features = library.Features({name: feature for name, (_, feature) in columns.items()})
    made = library.Dataset.from_dict({n: v for n, (v, _) in columns.items()}, features=features)
    for split in splits:
        made.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return f"hf:{folder}"


def stream(data: str, monkeypatch, held_out=2, **options):
    monkeypatch.setattr(StreamBatches, "HELD_OUT", held_out)
    return StreamBatches(HubSet(data[3:], True, **options), 16, 4, 0, flip=False)


def test_null_rows_of_a_hub_set(library, tmp_path, monkeypatch, capsys):
    n, null = 12, {1, 5}
    data = repository(
        library, tmp_path / "set",
        image=([None if i in null else picture(i) for i in range(n)], library.Image()),
        text=([None if i % 4 == 0 else f"t{i}" for i in range(n)], library.Value("string")),
        label=([None if i % 4 == 0 else i % 2 for i in range(n)], library.ClassLabel(names=["a", "b"])),
    )  # fmt: skip
    images = open_data(data, default_caption="none")
    assert images.labels == [-1 if i % 4 == 0 else i % 2 for i in range(n)]
    assert images.texts == [("none",) if i % 4 == 0 else (f"t{i}",) for i in range(n)]
    usable = Pixels(images, 16, tmp_path / "cache").usable
    assert usable.tolist() == [i for i in range(n) if i not in null]
    assert "2 of 12 images cannot be used" in capsys.readouterr().out
    batches = stream(data, monkeypatch, default_caption="none")
    seen = [c for step in range(6) for c in batches(step, 0, 4).captions]
    assert set(seen) == {"none"} | {f"t{i}" for i in range(2, n) if i % 4 and i not in null}
    assert "row 5" in capsys.readouterr().out
    done = warm.script(
        "train.py", "--data", data, "--condition", "class", "--image_size", "16", "--unet_dim", "8",
        "--dim_mults", "1,2", "--heads", "2", "--batch_size", "4", "--train_steps", "2", "--device",
        "cpu", "--num_samples", "0", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 of 12 images" in done.stdout and "have no label" in done.stdout


def test_captions_of_a_hub_set_may_be_lists(library, tmp_path, monkeypatch):
    lists = [[f"{i} {k}" for k in range(i % 3)] or None for i in range(12)]
    lists[11] = [None, "x", ""]
    data = repository(
        library, tmp_path / "set",
        image=([picture(i) for i in range(12)], library.Image()),
        captions=(lists, library.Sequence(library.Value("string"))),
    )  # fmt: skip
    expected = [tuple(own or [""]) for own in lists[:11]] + [("x",)]
    assert open_data(data).texts == expected
    batches = stream(data, monkeypatch)
    found = {c for step in range(40) for c in batches(step, 0, 4).captions}
    assert found == {text for own in expected[2:] for text in own}
    again = stream(data, monkeypatch)
    again.length = 10
    assert again(23, 2, 4).captions == batches(23, 0, 4).captions[2:]


@pytest.mark.parametrize("streaming", [False, True])
def test_captions_of_a_hub_set_that_are_none(library, tmp_path, monkeypatch, streaming):
    data = repository(
        library, tmp_path / "set",
        image=([picture(i) for i in range(3)], library.Image()),
        text=([7, 8, 9], library.Value("int64")),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"row 0, column text: .* 7"):
        stream(data, monkeypatch) if streaming else open_data(data)
    unused = Selection(captions=False)
    if streaming:
        assert len(stream(data, monkeypatch, selection=unused)(0, 0, 1).pixels) == 1
    else:
        assert len(open_data(data, selection=unused)) == 3


def test_columns_of_images(library, tmp_path):
    pictures = [[picture(i + k) for i in range(3)] for k in (0, 10, 20)]
    kinds = dict(zip(("mask", "image", "other"), ((p, library.Image()) for p in pictures)))
    data = repository(library, tmp_path / "both", **kinds)

    def shows(images, k):
        return np.array_equal(images.read(0, 16), toy.draw(k, 16))

    assert shows(open_data(data), 10)
    other = open_data(data, selection=Selection(image_column="mask"))
    assert shows(other, 0) and other.stamp != open_data(data).stamp
    with pytest.raises(UserError, match="--image_column nope.*mask, image, other"):
        open_data(data, selection=Selection(image_column="nope"))
    with pytest.raises(UserError, match="--caption_column nope.*mask, image, other"):
        open_data(data, selection=Selection(caption_column="nope"))
    unnamed = {"left": kinds["mask"], "right": kinds["other"]}
    data = repository(library, tmp_path / "unnamed", **unnamed)
    with pytest.raises(UserError, match="--image_column.*left, right"):
        open_data(data)
    words = repository(library, tmp_path / "words", image=kinds["image"],
                       text=(list("abc"), library.Value("string")),
                       title=(list("def"), library.Value("string")))  # fmt: skip
    assert open_data(words).captions == list("abc")
    assert open_data(words, selection=Selection(caption_column="title")).captions == list("def")
    with pytest.raises(UserError, match="--image_column title"):
        open_data(words, selection=Selection(image_column="title"))


def test_labels_that_are_texts_or_numbers(library, tmp_path):
    for i, (values, kind, classes, labels) in enumerate((
        (["dog", None, "cat"], "string", ["cat", "dog"], [1, -1, 0]),
        (["dog", " ", "", "cat"], "string", ["cat", "dog"], [1, -1, -1, 0]),
        ([7, -1, 3], "int64", ["3", "7"], [1, -1, 0]),
        ([7, 3, 7], "int64", ["3", "7"], [1, 0, 1]),
    )):  # fmt: skip
        data = repository(library, tmp_path / str(i),
                          image=([picture(k) for k in range(len(values))], library.Image()),
                          label=(values, library.Value(kind)))  # fmt: skip
        images = open_data(data)
        assert (images.classes, images.labels) == (classes, labels)
    assert len(open_data(data, data_class="7")) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_a_hub_set(library, tmp_path, monkeypatch, streaming, capsys):
    columns = dict(image=([picture(i) for i in range(4)], library.Image()))
    one = repository(library, tmp_path / "one", ["test"], **columns)
    two = repository(library, tmp_path / "two", ["validation", "test"], **columns)

    def opened(data, split=None):
        selection = Selection(split=split)
        if streaming:
            return stream(data, monkeypatch, selection=selection)
        return open_data(data, selection=selection)

    opened(one)
    assert "split test" in capsys.readouterr().out
    opened(two, "validation")
    for split in (None, "dev"):
        with pytest.raises(UserError, match=r"no split .*--split takes one of .*validation"):
            opened(two, split)


def test_columns_through_the_commands(library, tmp_path):
    words = repository(
        library, tmp_path / "words", image=([picture(0)], library.Image()),
        text=(["a"], library.Value("string")),
    )  # fmt: skip
    for args, match in (
        (("--data", words, "--caption_column", "nope"), "--caption_column nope"),
        (("--data", words, "--split", "dev"), "--split takes one of train"),
        (("--data", "toy", "--split", "test"), "--split"),
        (("--data", "toy", "--caption_column", "text"), "--caption_column"),
    ):
        done = warm.script("train.py", *args, "--dry_run", cwd=tmp_path)
        assert done.returncode == 1 and match in done.stderr, done.stderr
        assert done.stderr.strip().split("\n")[-1].startswith("error: ")
        assert "Traceback" not in done.stderr
