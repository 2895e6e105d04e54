"""The CLIP tokenizer: byte-level byte-pair encoding (arXiv:1508.07909, arXiv:2103.00020).

    text -> NFC, one space for each run of whitespace, lower case
         -> words: a contraction's ending, letters, one digit, or other characters
         -> the bytes of each word, its last marked </w> -> merged pair by pair -> ids
         -> BOS ids EOS pad ..., one row of length L or several (chunks)

Ids are those of transformers' CLIPTokenizer: special tokens (BOS, EOS, pad) are found in the text
as it was typed, added tokens in the normalised text between them. Nothing here reads a file: a
tokenizer is built from the contents of its files, and `Tokenizer.files` gives them back. A word of
n bytes takes some n log n steps.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from unicodedata import normalize

import torch
from torch import Tensor

from .. import shown
from .prompt_syntax import parse

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
END_OF_WORD = "</w>"
BACKTRACK = 20  # how far from the end of a full chunk A1111 looks for a comma to cut it at

# a byte's character in vocabularies: its own where that can be printed, else one from 256 on
CHAR_OF = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
CHAR_OF |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in CHAR_OF)}
BYTE_OF = {char: bytes([b]) for b, char in CHAR_OF.items()}
SYMBOLS = [*BYTE_OF, *(char + END_OF_WORD for char in BYTE_OF)]

LONE = re.compile("[\ud800-\udfff]")  # surrogates are no characters
# Unicode's White_Space; Python's \s has U+001C to U+001F too
SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
# found before anything else: a contraction's ending, and the name of BOS or EOS, cut in three (in
# normalised text it is no special token, lower-casing made it)
FIXED = re.compile(r"('s|'t|'re|'ve|'m|'ll|'d)|(<\|)(startoftext|endoftext)(\|>)")


# --- text to words -------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Apply NFC, make each run of whitespace one space, and lower each character's case."""
    text = SPACES.sub(" ", normalize("NFC", text))
    return text.replace("Σ", "σ").lower()  # str.lower alone turns a final one into ς


def plain(name: str) -> str:
    """Write the name of an embedding as it stands in normalised text."""
    return normalise(name).strip(" ")


def kind_of(char: str) -> str:
    """Class a character as CLIP's pattern does: \\p{L}, \\p{N}, a space, or anything else."""
    if char == " ":
        return "space"
    if char.isalpha():
        return "letter"
    return "number" if char.isalnum() else "other"


def words(text: str) -> Iterator[str]:
    """Split normalised text: contractions' endings, runs of letters, single digits, other runs."""
    start = 0
    while start < len(text):
        kind = kind_of(text[start])
        end = start + 1
        if match := FIXED.match(text, start):
            yield from filter(None, match.groups())
            end = match.end()
        else:
            while kind != "number" and end < len(text) and kind_of(text[end]) == kind:
                end += 1
            if kind != "space":
                yield text[start:end]
        start = end


# --- names in a text -----------------------------------------------------------------------------


def any_of(names: Iterable[str], as_words: Collection[str] = ()) -> re.Pattern:
    """Match any of these names, the longest first, as a group: `split` has them at odd indices.

    as_words: those that no letter and no digit may touch.
    """
    longest_first = sorted(names, key=len, reverse=True)
    patterns = [as_word(name) if name in as_words else re.escape(name) for name in longest_first]
    return re.compile(f"({'|'.join(patterns) or '(?!)'})")


def as_word(name: str) -> str:
    """Write the pattern of a name that is not a part of a longer word."""
    before = r"(?<![^\W_])" if name[0].isalnum() else ""
    after = r"(?![^\W_])" if name[-1].isalnum() else ""
    return before + re.escape(name) + after


def is_text(value) -> bool:
    """Tell whether a value is a str without lone surrogates."""
    return isinstance(value, str) and not LONE.search(value)


def families(added: dict[str, int]) -> dict[str, list[int]]:
    """Expand added tokens to ids: <tok> to those of <tok>, <tok>_1, <tok>_2 ... that exist."""
    ids = {name: [i] for name, i in added.items()}
    for name, members in ids.items():
        while (vector := added.get(f"{name}_{len(members)}")) is not None:
            members.append(vector)
    return ids


class Tokenizer:
    """Turns prompts into rows of ids, L = context_length long.

    vocab, merges: contents of vocab.json and merges.txt, the latter as text or a list of merges.
    added: the contents of added_tokens.json, token -> id.
    pad: the token that fills rows: EOS in Stable Diffusion 1, "!" in 2. It becomes a special token,
        as in transformers: with "!", each "!" of a prompt is the padding's id.
    `add_embedding` is all that changes a tokenizer. Raises ValueError unless the
    vocabulary has every byte with and without </w>, BOS, EOS, pad, what merges need, and ids 0 ...
    len(self) - 1.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: str | list,
        *,
        added: dict[str, int] | None = None,
        pad: str = EOS,
        context_length: int = 77,
    ):
        self.merges, added = check(vocab, merges, {} if added is None else added, pad)
        self.vocab = dict(vocab)
        self.pad = pad
        self.context_length = context_length
        self.bos_id = vocab[BOS]
        self.eos_id = vocab[EOS]
        self.pad_id = vocab[pad]
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.special = any_of({BOS, EOS, pad})
        self.cache: dict[str, list[int]] = {}
        self.embeddings: dict[str, list[int]] = {}  # name -> ids, of `add_embedding`
        self.set_added(added)

    def __len__(self) -> int:
        """Count the rows that the text encoder's embedding needs."""
        vectors = {i for ids in self.embeddings.values() for i in ids}
        return len(self.vocab) + len(self.added) + len(vectors)

    def __call__(self, texts: str | Iterable[str], chunks: int | None = None) -> Tensor:
        """Turn prompts into int64 ids (B, L): BOS, up to L - 2 ids, EOS, padding. A str is B = 1.

        chunks: n for (B, n, L), up to n (L - 2) ids in n such rows, the last ones empty where a
            prompt is shorter (see `count_chunks`). What is longer is cut off.
        Raises ValueError as `encode` does.
        """
        texts = [texts] if isinstance(texts, str) else texts
        ids, _ = self.rows([self.plain_chunks(text) for text in texts], chunks or 1)
        return ids[:, 0] if chunks is None else ids

    def count_chunks(self, texts: Iterable[str]) -> int:
        """Count the chunks that hold the longest of these prompts in full; 1 or more."""
        return max((len(self.plain_chunks(text)) for text in texts), default=1)

    def plain_chunks(self, text: str) -> list[list[tuple[int, float]]]:
        """Cut a prompt into chunks of up to L - 2 ids, all of weight 1."""
        room = self.context_length - 2
        ids = [(i, 1) for i in self.encode(text)]
        return [ids[i : i + room] for i in range(0, max(1, len(ids)), room)]

    def weighted_chunks(self, prompt: str) -> list[list[tuple[int, float]]]:
        """Cut a prompt in A1111's syntax into chunks of up to L - 2 ids with their weights."""
        room = self.context_length - 2
        comma = self.vocab["," + END_OF_WORD]
        lengths = {ids[0]: len(ids) for ids in self.embeddings.values()}
        chunks: list[list[tuple]] = [[]]
        for text, weight in parse(prompt):
            for i in self.encode(text or ""):
                chunk = chunks[-1]
                if chunk and len(chunk) + lengths.get(i, 0) > room:  # an embedding moves as one
                    chunks.append([])
                elif len(chunk) == room:  # what follows a comma moves on
                    ids = [pair[0] for pair in reversed(chunk[-BACKTRACK:])]
                    cut = room - (ids.index(comma) if comma in ids and i != comma else 0)
                    chunks[-1:] = chunk[:cut], chunk[cut:]
                chunks[-1].append((i, weight))
            if text is None:
                chunks.append([])
        return chunks if chunks[-1] else chunks[:-1] or chunks

    def rows(self, prompts: Sequence[list], n: int) -> tuple[Tensor, Tensor]:
        """Turn prompts cut into chunks into ids and weights (B, n, L), of n chunks each."""
        L = self.context_length
        bos, eos, pad = ([(i, 1)] for i in (self.bos_id, self.eos_id, self.pad_id))
        rows = [
            (bos + chunk + eos + pad * L)[:L]
            for chunks in prompts
            for chunk in (chunks + [[]] * n)[:n]
        ]
        ids, weights = torch.tensor(rows).view(len(prompts), n, L, 2).unbind(-1)
        return ids.long(), weights

    def encode(self, text: str) -> list[int]:
        """List all ids of a prompt, without BOS and EOS. Raises ValueError unless `is_text`."""
        if not is_text(text):
            raise ValueError(
                f"a prompt is {text!r:.60}; it must be a str without lone surrogates "
                "(decode bytes with errors='replace')"
            )
        ids = []
        for i, part in enumerate(self.special.split(text)):
            if i % 2:
                ids.append(self.vocab[part])
                continue
            for j, chunk in enumerate(self.names.split(normalise(part))):
                if j % 2:
                    ids += self.expansions[chunk]
                else:
                    for word in words(chunk):
                        ids += self.bpe(word)
        return ids

    def bpe(self, word: str) -> list[int]:
        """List the ids of one word; those of words of ordinary length are cached."""
        if word in self.cache:
            return self.cache[word]
        *head, last = (CHAR_OF[b] for b in word.encode())
        ids = [self.vocab[symbol] for symbol in self.merge([*head, last + END_OF_WORD])]
        if len(self.cache) >= 2**16:
            self.cache.clear()
        if len(word) < 64:
            self.cache[word] = ids
        return ids

    def merge(self, symbols: list[str]) -> list[str]:
        """Merge the pair of lowest rank, the first of these, until no pair has a rank."""
        symbols = [*symbols, ""]  # the end; "" is also what has become part of the symbol before
        following = [*range(1, len(symbols)), 0]
        previous = [*range(-1, len(symbols) - 1)]
        queue: list[tuple[int, int]] = []  # rank and place of pairs

        def offer(i: int) -> None:
            rank = self.ranks.get((symbols[i], symbols[following[i]]))
            if rank is not None:
                heappush(queue, (rank, i))

        for i in range(len(symbols)):
            offer(i)
        while queue:
            rank, i = heappop(queue)
            j = following[i]
            if (symbols[i], symbols[j]) == self.merges[rank]:  # else one of them is gone
                symbols[i] += symbols[j]
                symbols[j] = ""
                following[i] = following[j]
                previous[following[i]] = i
                offer(previous[i])
                offer(i)
        return [symbol for symbol in symbols if symbol]

    def add_embedding(self, names: Iterable[str], vectors: int) -> list[int]:
        """Let each of `names` stand for the same new ids, one for each vector; returns the ids.

        A name is found as a whole word of the normalised text, and comes before a word of the
        vocabulary and an added token of that name. `files` leaves embeddings out. Raises
        ValueError, and adds nothing, if a name exists already or is none that a prompt can hold,
        such as a blank one.
        """
        names = list(names)
        known = set(map(plain, self.embeddings))
        for name in names:
            if not self.can_hold(name):
                raise ValueError(f"{name!r} cannot be typed in a prompt; choose another name")
            if plain(name) in known:
                raise ValueError(f"an embedding {name!r} exists already; choose another name")
        ids = [*range(len(self), len(self) + vectors)]
        self.embeddings |= dict.fromkeys(names, ids)
        self.set_added(self.added)
        return ids

    def can_hold(self, name: str) -> bool:
        """Tell whether a prompt can name an embedding so: not blank, and no special token in it."""
        return is_text(name) and plain(name) != "" and not self.special.search(name)

    def set_added(self, added: dict[str, int]) -> None:
        """Take these added tokens; rebuild what depends on them and on the embeddings."""
        expansions = {normalise(name): ids for name, ids in families(added).items()}
        if len(expansions) < len(added) or any(not name.strip() for name in added):
            raise ValueError(
                f"added tokens {list(added)}: a name is blank, or two are the same in "
                "lower case; rename them"
            )
        embeddings = {plain(name): ids for name, ids in self.embeddings.items()}
        self.added = added
        self.expansions = expansions | embeddings
        self.names = any_of(self.expansions, as_words=embeddings)

    def files(self) -> dict[str, dict | str]:
        """Return what a diffusers `tokenizer/` folder holds: dicts to write as JSON, and text."""
        names = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": self.pad}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.context_length}
        return {
            "vocab.json": dict(self.vocab),
            "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, self.merges), ""]),
            "added_tokens.json": dict(self.added),
            "special_tokens_map.json": names,
            "tokenizer_config.json": names | config,
        }


# --- from the contents of files ------------------------------------------------------------------


def check(vocab: dict, merges: str | list, added: dict, pad: str) -> tuple[list, dict]:
    """Check a vocabulary; returns the merges as pairs, and the added tokens without special ones.

    Files of older versions of transformers list the special tokens among the added ones again.
    """
    if isinstance(merges, str):
        merges = [m for m in merges.split("\n") if m.strip() and not m.startswith("#version")]
    if (kinds := [type(v) for v in (vocab, merges, added)]) != [dict, list, dict]:
        raise ValueError(f"vocab, merges, added are {kinds}; give dict, str or list, dict")
    if lacking := [t for t in dict.fromkeys((*SYMBOLS, BOS, EOS, pad)) if t not in vocab]:
        raise ValueError(
            f"the vocabulary lacks {len(lacking)} tokens, {shown(lacking)}; it must have "
            "all bytes with and without </w>, BOS, EOS, pad"
        )
    split = lambda merge: merge if isinstance(merge, list | tuple) else str(merge).split()
    pairs = [tuple(map(str, split(merge))) for merge in merges]
    known = set()
    for n, pair in enumerate(pairs, 1):
        if pair in known or len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(
                f"merge {n} is {merges[n - 1]!r}; it must be new and join two tokens to a third: "
                "give vocab and merges of one model"
            )
        known.add(pair)
    added = {k: i for k, i in added.items() if k not in (BOS, EOS, pad) or vocab[k] != i}
    ids = [*vocab.values(), *added.values()]
    free = {*range(len(ids))} - {i for i in ids if type(i) is int}
    if free:
        raise ValueError(
            f"{len(ids)} tokens need ids 0 ... {len(ids) - 1}, one each; none has "
            f"{sorted(free)[:3]}"
        )
    return pairs, added


def from_tokenizer_json(data: dict, *, pad: str = EOS, context_length: int = 77) -> Tokenizer:
    """Make a tokenizer from the contents of tokenizer.json, all that transformers 5 writes.

    Raises ValueError as Tokenizer does, and for added tokens that are not matched as its are.
    """
    flags = {"normalized": True, "lstrip": False, "rstrip": False, "single_word": False}
    try:
        model = data["model"]
        vocab = model["vocab"]
        merges = model["merges"]
        end = model["end_of_word_suffix"]
        added = {token["content"]: token["id"] for token in data["added_tokens"]}
        new = [token for token in data["added_tokens"] if token["content"] not in vocab]
        odd = [token for token in new if flags.items() - token.items()]
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"tokenizer.json is invalid ({e!r}); give a CLIP model's contents") from e
    if end != END_OF_WORD or odd:
        raise ValueError(
            f"words end in {end!r}, not </w>, or tokens {odd} are not {flags}; give a "
            "CLIP model's tokenizer.json"
        )
    return Tokenizer(vocab, merges, added=added, pad=pad, context_length=context_length)


def from_bpe_simple_vocab(text: str, *, pad: str = EOS, context_length: int = 77) -> Tokenizer:
    """Make a tokenizer from the text of OpenAI's bpe_simple_vocab_16e6.txt.

    Ids: bytes, bytes with </w>, merges (lines 2 to 48,895), BOS, EOS: 49,408. Raises ValueError if
    the text is shorter.
    """
    merges = text.split("\n")[1:48895]
    if len(merges) < 48894:
        raise ValueError(f"the text has {len(merges)} merges of 48894; give the complete file")
    tokens = [*SYMBOLS, *("".join(merge.split()) for merge in merges), BOS, EOS]
    vocab = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(vocab, merges, pad=pad, context_length=context_length)


def byte_level(context_length: int = 256) -> Tokenizer:
    """Make a tokenizer for text encoders trained from scratch: 514 ids and no merges.

    Ids: bytes, bytes with </w>, BOS, EOS (also the padding). That a byte has two ids costs 256 rows
    of the embedding, but then words end without spaces that take positions of the L, and text
    becomes ids on CLIP's own path.
    """
    vocab = {token: i for i, token in enumerate([*SYMBOLS, BOS, EOS])}
    return Tokenizer(vocab, [], context_length=context_length)
