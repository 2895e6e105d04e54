"""The tokenizer: ids against transformers' CLIPTokenizer, rows and chunks, added tokens, contents.

The oracle gets the real vocabulary, which open_clip_torch brings along; without one of the two its
tests are skipped. Random text is of code points that both this Python's Unicode tables and the
oracle's assign, and of combining marks that are in Unicode 3.2 already: the oracle's NFC does not
know the order of marks that came after Unicode 9.
"""

import copy
import functools
import gzip
import importlib.util
import json
import pickle
import random
import unicodedata
from pathlib import Path

import pytest
import torch

from diffusion.models.tokenizer import (
    BOS,
    BYTE_OF,
    EOS,
    SYMBOLS,
    Tokenizer,
    byte_level,
    from_bpe_simple_vocab,
    from_tokenizer_json,
    normalise,
    words,
)

# --- the real vocabulary and the oracle ----------------------------------------------------------


@pytest.fixture(scope="module")
def bpe_text() -> str:
    spec = importlib.util.find_spec("open_clip")  # importing it takes seconds
    if spec is None:
        pytest.skip("open_clip_torch, which brings the vocabulary, is not installed")
    path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    return gzip.decompress(path.read_bytes()).decode()


@pytest.fixture(scope="module")
def clip(bpe_text) -> Tokenizer:
    """The real one, for all tests: those that add tokens take a copy."""
    return from_bpe_simple_vocab(bpe_text)


@pytest.fixture(scope="module")
def transformers(clip):
    """Makes the oracle: transformers' tokenizer of the same vocabulary."""
    module = pytest.importorskip(
        "transformers", reason="transformers, the oracle, is not installed"
    )
    return lambda **options: module.CLIPTokenizer(clip.vocab, clip.merges, **options)


@pytest.fixture(scope="module")
def _oracle(transformers):
    return transformers()


@pytest.fixture(scope="module")
def oracle(_oracle):
    return lambda texts: _oracle(texts, add_special_tokens=False).input_ids


def assert_same_ids(texts: list[str], ours, theirs: list[list[int]]):
    assert len(texts) == len(theirs)
    wrong = [
        (text[:80], ours(text)[:20], ids[:20])
        for text, ids in zip(texts, theirs)
        if ours(text) != ids
    ]
    assert not wrong, f"{len(wrong)} of {len(texts)}, first {wrong[0]!a}"


def tiny(**options) -> Tokenizer:
    """All bytes and four merges: cat, of which ca is a part, and at as an end."""
    merges = ["c a", "a t</w>", "ca t</w>", "a a"]
    tokens = [*SYMBOLS, *(merge.replace(" ", "") for merge in merges), BOS, EOS]
    return Tokenizer({token: i for i, token in enumerate(tokens)}, merges, **options)


def with_added(tokenizer: Tokenizer, *names: str) -> Tokenizer:
    """The same with these tokens in its added_tokens.json."""
    added = {name: len(tokenizer) + i for i, name in enumerate(names)}
    options = {"pad": tokenizer.pad, "context_length": tokenizer.context_length}
    return Tokenizer(tokenizer.vocab, tokenizer.merges, added=added, **options)


# --- random text ---------------------------------------------------------------------------------

WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2003\u2007\u200a\u2028\u2029\u202f\u205f\u3000"
ALMOST_WHITESPACE = "\x1c\x1d\x1e\x1f\u180e\u200b\u2060\ufeff\x00\x7f"
EMOJI = ["👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇫🇷", "❤️", "1️⃣", "🧑🏿‍🚀", "\u200d", "\ufe0f", "😀"]
QUOTED = ["'s", "'S", "'t", "'re", "'VE", "'m", "'ll", "'LL", "'d", "’s", "''", "'", "it's", "'ſ"]
MARKUP = [BOS, EOS, BOS.upper(), "<|EndOfText|>", "<|", "|>", "</w>", "<b>", "(a:1.2)", "[x]", "&amp;", "--",
          "<|start", "oftext|>", "\\", "{a|b}", "#version", "!!", "?!", "_", "<lora:x:1>", "http://a.b/c?d=e"]  # fmt: skip
NUMBERS = ["0", "12", "3.14", "٣", "Ⅷ", "½", "①", "²", "১২", "1st", "𝟘"]
CASES = ["Σ", "ΑΣ", "ΟΔΟΣ ", "İ", "I\u0307", "ẞ", "Dž", "ǅ", "\u212a", "\u212b", "\u2126", "ﬁ", "É", "E\u0301", "Ⓐ",
         "ÅÄÖ", "각", "\u1100\u1161\u11a8", "Ꭰ", "ꭰ", "\u1e9b\u0323", "\u0958", "\u0344", "\u0f73", "≠", "=\u0338"]  # fmt: skip
WORDS = "a photo of the Cat DOG's cute, studio lighting masterpiece 8k trending on artstation Zürich".split()


@functools.cache
def assigned() -> list[str]:
    """Assigned here and in the oracle's regular expressions, no surrogates; marks of 3.2 only."""
    tokenizers = pytest.importorskip("tokenizers")
    chars = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    removal = tokenizers.normalizers.Replace(tokenizers.Regex(r"\p{Cn}"), "")
    kept = removal.normalize_str("".join(chars))
    old = unicodedata.ucd_3_2_0.category
    return [c for c in kept if unicodedata.category(c)[0] != "M" or old(c)[0] == "M"]


def random_texts(rng: random.Random, count: int, pieces: int = 9, extra: tuple = ()) -> list[str]:
    every = assigned()
    marks = [c for c in every if unicodedata.combining(c)]
    pools = [every, marks, WHITESPACE, ALMOST_WHITESPACE, EMOJI, QUOTED, MARKUP, NUMBERS, CASES, WORDS,
             [chr(c) for c in range(32, 127)], [chr(c) for c in range(128, 0x250)], *extra]  # fmt: skip
    texts = []
    for _ in range(count):
        few = rng.sample(pools, rng.randint(1, 5))
        text = [rng.choice(rng.choice(few)) for _ in range(rng.randint(1, pieces))]
        texts.append(rng.choice(["", "", " "]).join(text))
    return texts


def test_ids_are_those_of_transformers(clip, oracle):
    rng = random.Random(0)
    texts = random_texts(rng, 12_000) + random_texts(rng, 20, pieces=3000) + ["", " ", "\n"]
    assert sum(not t.isascii() for t in texts) > 6000 and max(map(len, texts)) > 4000
    assert_same_ids(texts, clip.encode, oracle(texts))


def test_every_assigned_character_is_classed_as_by_transformers(clip, oracle):
    """Between a letter, a digit and a mark of punctuation each character shows its class.

    Of the tens of thousands of ideographs, syllables and private characters, one in 32.
    """
    some = [
        c
        for i, c in enumerate(assigned())
        if i % 32 == 0 or unicodedata.category(c) not in ("Lo", "Co")
    ]
    assert len(some) > 15_000
    texts = ["".join(f"a{c}!{c}1" for c in some[i : i + 100]) for i in range(0, len(some), 100)]
    assert_same_ids(texts, clip.encode, oracle(texts))


def test_known_ids(clip):
    assert len(clip) == 49408 and (clip.bos_id, clip.eos_id, clip.pad_id) == (49406, 49407, 49407)
    assert clip.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("ΑΣ ΑΣ", "ας ας".replace("ς", "σ")),
        ("E\u0301", "é"),
        ("a\x85\u3000\n b", "a b"),
        ("a\x1cb", "a\x1cb"),
        ("İ", "i\u0307"),
        ("ſ\u212a", "ſk"),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("it's they'll 's", "it 's they 'll 's"),
        ("a12b", "a 1 2 b"),
        ("½²x٣", "½ ² x ٣"),
        ("<b>hé</b>!?", "< b > hé </ b >!?"),
        ("l'ami ''s", "l ' ami '' s"),
        ("\x1c日本。", "\x1c 日本 。"),
        ("!<|endoftext|>!!", "!<| endoftext |>!!"),
        (" <|endoftext|>!!", "<| endoftext |> !!"),
    ],
)
def test_words(text, expected):
    assert list(words(text)) == expected.split(" ")


@pytest.mark.parametrize(
    "text, ids",
    [
        (f"a{EOS}b", [320, 49407, 321]),
        (f"{BOS} x", [49406, 343]),
        (f"x{EOS}\u0301b", [343, 49407, 136, 479, 321]),  # normalised apart from each other
        ("a <|EndOfText|> b", [320, 27, 347, 40786, 4160, 91, 285, 321]),  # only as it is spelt
    ],
)
def test_special_tokens_in_a_prompt(clip, oracle, text, ids):
    assert clip.encode(text) == ids == oracle(text)


@pytest.mark.parametrize("pad", [EOS, "!"])
def test_rows_are_those_of_transformers(clip, transformers, pad):
    """Padded, and cut to BOS, 75 ids, EOS; a "!" that pads is a special token."""
    ours = Tokenizer(clip.vocab, clip.merges, pad=pad)
    texts = ["", "a cat!", "one " * 75, "one " * 76, "one " * 74 + "!!", "wow!! " * 200]
    theirs = transformers(pad_token=pad)(
        texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    assert torch.equal(ours(texts), theirs.input_ids)
    assert ours.pad_id == {EOS: 49407, "!": 0}[pad]


# --- long prompts --------------------------------------------------------------------------------

LONG = {
    "one letter": "a" * 5000,
    "one word": "".join(random.Random(0).choices("etaoinshrdlu", k=5000)),
    "words": "a photo of a cat, it's 12 " * 2000,
    "punctuation": "!?" * 5000,
    "marks out of order": "a" + "\u0301\u0316" * 1000,
    "marks that decompose": "\u0f73" * 2000,
    "special tokens": EOS * 5000,
}


@pytest.mark.parametrize("kind", LONG)
def test_long_prompts_are_those_of_transformers(clip, oracle, kind):
    assert_same_ids([LONG[kind]], clip.encode, [oracle(LONG[kind])])


def test_the_cache_is_bounded():
    tokenizer = tiny()
    tokenizer.encode("x" * 64 + " cat")
    assert list(tokenizer.cache) == ["cat"]
    tokenizer.cache |= {str(i): [] for i in range(2**16)}
    tokenizer.encode("cat cats")
    assert list(tokenizer.cache) == ["cats"]


# --- byte-pair encoding --------------------------------------------------------------------------


def test_merges_go_by_rank_then_from_the_left():
    tokenizer = tiny()

    def split(text: str) -> list[str]:
        tokens = list(tokenizer.vocab)
        return [tokens[i] for i in tokenizer.encode(text)]

    assert split("cat") == ["cat</w>"]  # c a, then ca t</w>, though a t</w> comes before it
    assert split("at") == ["at</w>"]
    assert split("cats") == ["ca", "t", "s</w>"]
    assert split("aaab") == ["aa", "a", "b</w>"]
    assert split("aaaab") == ["aa", "aa", "b</w>"]


def test_byte_level():
    tokenizer = byte_level()
    assert len(tokenizer) == 514 and tokenizer.merges == [] and tokenizer.context_length == 256
    assert tokenizer.encode("hi A") == [SYMBOLS.index(s) for s in ("h", "i</w>", "a</w>")]
    spelt = ["Ã", "©</w>", "â", "Ĥ", "¬</w>", "Ã", "©</w>"]  # three words
    assert tokenizer.encode("é€ é") == [SYMBOLS.index(s) for s in spelt]
    assert byte_level(16)(["a", "a b" * 20]).shape == (2, 16)


def test_byte_level_round_trip():
    """Words come back as they were, with one space between each two."""
    tokenizer = byte_level()
    every = [c for c in map(chr, range(0x3000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices(every, k=20)) + rng.choice(MARKUP[2:] + QUOTED + EMOJI)
        spelt = "".join(SYMBOLS[i] for i in tokenizer.encode(text)).replace("</w>", " ")
        again = b"".join(BYTE_OF.get(char, b" ") for char in spelt).decode()
        assert again.strip(" ") == " ".join(words(normalise(text))).strip(" ")


# --- rows and chunks -----------------------------------------------------------------------------


def test_rows():
    tokenizer = tiny(context_length=5)
    cat, dog, bos, eos = *tokenizer.encode("cat x"), tokenizer.bos_id, tokenizer.eos_id
    rows = tokenizer(["cat x", "", "x x x cat"])
    assert rows.dtype == torch.long
    assert rows.tolist() == [
        [bos, cat, dog, eos, eos],
        [bos, eos, eos, eos, eos],
        [bos, dog, dog, dog, eos],
    ]
    assert tokenizer("cat").tolist() == [[bos, cat, eos, eos, eos]]  # one prompt, not three
    assert tokenizer([]).shape == (0, 5) and tokenizer([], chunks=2).shape == (0, 2, 5)
    assert tiny(context_length=5, pad="!")("cat").tolist() == [[bos, cat, eos, 0, 0]]


def test_chunks():
    tokenizer = tiny(context_length=5, pad="?")
    x, y, bos, eos, pad = (
        *tokenizer.encode("x y"),
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    texts = ["x x x y", "y"]
    assert tokenizer.count_chunks(texts) == 2
    assert tokenizer(texts, chunks=2).tolist() == [
        [[bos, x, x, x, eos], [bos, y, eos, pad, pad]],
        [[bos, y, eos, pad, pad], [bos, eos, pad, pad, pad]],
    ]
    assert torch.equal(tokenizer(texts, chunks=1)[:, 0], tokenizer(texts))
    assert torch.equal(tokenizer(texts, chunks=3)[:, :2], tokenizer(texts, chunks=2))


@pytest.mark.parametrize("count, chunks", [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_count_chunks(count, chunks):
    tokenizer = tiny()
    assert tokenizer.count_chunks(["x " * count]) == chunks
    assert tokenizer.count_chunks(["", "x " * count]) == chunks and tokenizer.count_chunks([]) == 1


def test_chunks_are_those_of_kohya(clip, transformers):
    """kohya (v1) cuts one row of 227: BOS, 75 of it, EOS."""
    texts = ["", "one " * 70, "a cat, " * 50, "three " * 500]
    row = transformers()(texts, padding="max_length", max_length=227, truncation=True).input_ids
    for text, ids in zip(texts, row):
        cut = [[ids[0], *ids[i : i + 75], ids[-1]] for i in range(1, 226, 75)]
        assert clip(text, chunks=3)[0].tolist() == cut


# --- added tokens --------------------------------------------------------------------------------


def test_added_tokens_are_those_of_transformers(clip, transformers):
    names = ["<cat-toy>", "<Dog>", "sks", "<cat", "É", "a  b", "<x>_0", "日本", "#@!", "the", "s's"]
    names = [n for n in names if n not in clip.vocab]
    clip, theirs = with_added(clip, *names), transformers()
    assert theirs.add_tokens(names) == len(names)
    assert list(clip.added.values()) == theirs.convert_tokens_to_ids(names)
    assert len(clip) == len(theirs) == 49408 + len(names)
    spelt = [*names, *map(str.upper, names), "a b", "<dog>", "E\u0301", EOS]
    rng = random.Random(3)
    texts = random_texts(rng, 3000, extra=(spelt, spelt, spelt, spelt))
    texts += ["".join(rng.choices([*spelt, " ", "a", "<", ">"], k=6)) for _ in range(1000)]
    ids = theirs(texts, add_special_tokens=False).input_ids
    assert sum(max(i, default=0) > 49407 for i in ids) > 1000
    assert_same_ids(texts, clip.encode, ids)


def test_added_tokens_are_units():
    tokenizer = with_added(tiny(), "<Cat>", "sks")
    x, y = tokenizer.encode("x y")
    assert tokenizer.encode("x<cat>y <CAT>") == [x, 518, y, 518]
    assert tokenizer.encode("xsksy") == [x, 519, y] and len(tokenizer) == 520


def test_many_vectors():
    """<tok> stands for <tok> <tok>_1 <tok>_2, as in diffusers."""
    names = [f"{name}{end}" for name in ("<tok>", "<b>") for end in ("", "_1", "_2")]
    tokenizer = with_added(tiny(), *names)
    ids = list(range(518, 524))
    assert tokenizer.encode("<tok>") == ids[:3]
    assert tokenizer.encode("<b><tok>") == ids[3:] + ids[:3]
    assert tokenizer.encode("<tok>_1 <tok>_2") == ids[1:3]


@pytest.mark.parametrize(
    "names, message",
    [
        (["<new>", "<NEW>"], "lower case"),
        (["<new>", " "], "blank"),
        ([""], "blank"),
    ],
)
def test_names_that_cannot_be_added(names, message):
    with pytest.raises(ValueError, match=message):
        with_added(tiny(), *names)


def test_copies_are_independent():
    tokenizer = tiny()
    vocab = dict(tokenizer.vocab)
    other = Tokenizer(vocab, tokenizer.merges)
    vocab.clear(), tokenizer.files()["vocab.json"].clear()
    assert len(other) == len(tokenizer) == 518
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.add_embedding(["<cat>"], 1) == [518] and other.encode("<cat> cat")[0] == 518
    assert len(tokenizer) == 518 and 518 not in tokenizer.encode("<cat>")


# --- contents ------------------------------------------------------------------------------------

TEXTS = ["a Photo of a cat, it's 12!", "<Tok> hé <tok>_1", "日本 👍🏽", f"x {EOS} y"]


def write(folder: Path, files: dict) -> Path:
    for name, contents in files.items():
        text = contents if isinstance(contents, str) else json.dumps(contents)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_files_go_round(clip):
    clip = with_added(clip, "<Tok>", "<Tok>_1")
    files = json.loads(json.dumps(clip.files()))
    again = Tokenizer(files["vocab.json"], files["merges.txt"], added=files["added_tokens.json"])
    assert again.files() == clip.files() and len(again) == 49410
    assert [again.encode(t) for t in TEXTS] == [clip.encode(t) for t in TEXTS]


@pytest.mark.parametrize("pad, length", [(EOS, 77), ("!", 32)])
def test_transformers_reads_our_files(clip, transformers, tmp_path, pad, length):
    ours = Tokenizer(clip.vocab, clip.merges, pad=pad, context_length=length)
    ours = with_added(ours, "<Tok>", "sks")
    module = pytest.importorskip("transformers")
    theirs = module.CLIPTokenizer.from_pretrained(write(tmp_path, ours.files()))
    assert theirs.model_max_length == length and len(theirs) == len(ours)
    rows = theirs(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours(TEXTS), rows)


def test_reads_the_files_of_transformers(clip, transformers, tmp_path):
    theirs = transformers()
    theirs.add_tokens(["<Tok>", "sks"])
    theirs.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    ours = from_tokenizer_json(data)
    assert_same_ids(TEXTS, ours.encode, theirs(TEXTS, add_special_tokens=False).input_ids)
    assert list(ours.added) == ["<Tok>", "sks"] and ours.vocab == clip.vocab
    data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]  # older files
    assert from_tokenizer_json(data).merges == ours.merges == clip.merges


def tokenizer_json(**changes) -> dict:
    files = tiny().files()
    flags = {"normalized": True, "lstrip": False, "rstrip": False, "single_word": False}
    added = [{"content": "<a>", "id": 518, "special": False, **flags, **changes.pop("flags", {})}]
    added += [{"content": EOS, "id": 517, "special": True, **flags, "normalized": False}]
    model = {"type": "BPE", "vocab": files["vocab.json"], "merges": files["merges.txt"].split("\n")[1:-1],
             "end_of_word_suffix": "</w>", **changes}  # fmt: skip
    return {"model": model, "added_tokens": added}


def test_tokenizer_json():
    tokenizer = from_tokenizer_json(tokenizer_json(), pad="!", context_length=8)
    assert tokenizer.added == {"<a>": 518} and tokenizer.merges == tiny().merges
    assert tokenizer("cat <A>").tolist() == [[516, *tokenizer.encode("cat"), 518, 517, 0, 0, 0, 0]]


def broken(**changes):
    """Makes the tiny tokenizer from contents of which some are others."""
    contents = {"vocab": tiny().vocab, "merges": tiny().merges} | changes
    return lambda: Tokenizer(**contents)


def without(token: str) -> dict:
    return {t: i for t, i in tiny().vocab.items() if t != token}


@pytest.mark.parametrize(
    "make, message",
    [
        (broken(vocab=None), "vocab, merges, added are .*NoneType"),
        (broken(vocab=list(tiny().vocab)), "vocab, merges, added are .*list"),
        (broken(merges=None), "vocab, merges, added are .*NoneType"),
        (broken(added=["<a>"]), "vocab, merges, added are .*list"),
        (broken(vocab={}), "lacks 514 tokens"),
        (broken(vocab=without(BOS)), "lacks 1 tokens.*startoftext"),
        (broken(vocab=without(EOS)), "lacks 1 tokens.*endoftext"),
        (broken(vocab=without("Ġ</w>")), "lacks 1 tokens.*Ġ</w>"),
        (broken(pad="<pad>"), "lacks 1 tokens.*<pad>"),
        (broken(vocab=without("cat</w>")), r"merge 3 is \('ca', 't</w>'\)"),
        (broken(merges=["c a", "c b"]), "merge 2 is 'c b'"),
        (broken(merges="#version: 0.2\nc a\nx"), "merge 2 is 'x'"),
        (broken(merges=["c a t"]), "merge 1 is 'c a t'"),
        (broken(merges=["c a", ["c", "a"]]), "merge 2 is"),
        (broken(merges=[None]), "merge 1 is None"),
        (broken(merges=[[1, 2]]), "merge 1 is"),
        (broken(vocab={**tiny().vocab, "x": 3}), "none has .87"),
        (broken(vocab={**tiny().vocab, EOS: 600}), "none has .517"),
        (broken(vocab={**tiny().vocab, EOS: "517"}), "none has .517"),
        (broken(vocab={**tiny().vocab, EOS: [517]}), "none has .517"),
        (broken(added={"<a>": 5}), "none has .518"),
        (broken(added={"<a>": 518, "<b>": 518}), "none has .519"),
        (broken(added={"<a>": 518, "<A>": 519}), "the same in lower case"),
        (lambda: from_bpe_simple_vocab("#version\nt h\n"), "2 merges of 48894"),
        (lambda: from_tokenizer_json([]), "tokenizer.json"),
        (
            lambda: from_tokenizer_json({"model": {}, "added_tokens": []}),
            "tokenizer.json.*vocab",
        ),
        (lambda: from_tokenizer_json(tokenizer_json() | {"added_tokens": [3]}), "tokenizer.json"),
        (lambda: from_tokenizer_json(tokenizer_json(vocab=None)), "tokenizer.json|vocab, merges"),
        (lambda: from_tokenizer_json(tokenizer_json(merges=3)), "vocab, merges, added are .*int"),
        (lambda: from_tokenizer_json(tokenizer_json(end_of_word_suffix="")), "words end in ''"),
        (lambda: from_tokenizer_json(tokenizer_json(flags={"lstrip": True})), "<a>.*lstrip"),
        (
            lambda: from_tokenizer_json(tokenizer_json(flags={"normalized": False})),
            "<a>.*normalized",
        ),
        (lambda: tiny().encode(None), "a prompt is None"),
        (lambda: tiny().encode(b"a cat"), "a prompt is b'a cat'"),
        (lambda: tiny()(["a", 5]), "a prompt is 5"),
        (lambda: tiny()("a \ud800 b"), "lone surrogates"),
        (lambda: tiny().encode("\udc80"), "lone surrogates"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_special_tokens_may_be_listed_again():
    """Folders written by older versions of transformers have them in added_tokens.json too."""
    tokenizer = Tokenizer(tiny().vocab, tiny().merges, added={BOS: 516, EOS: 517, "<a>": 518})
    assert tokenizer.added == {"<a>": 518} and len(tokenizer) == 519
