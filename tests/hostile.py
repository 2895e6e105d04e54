"""Files that want to do harm, and the watch that is kept while something reads them.

A reader is one row: how a good file is made, of what kind it is, and what reads it. The corpus of
its kind and the fuzzer then go over it (test_hostile.py).
"""

import io
import json
import os
import pickle
import pickletools
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion import UserError
from diffusion.data.images import BadImage

st = pytest.importorskip("hypothesis.strategies", reason="pip install hypothesis")

MOST_MEMORY = 300 << 20  # bytes that a reader of small files may take while it reads
PWNED = "pwned"  # the file that code in a hostile file would leave in the working folder


@dataclass(frozen=True)
class Reader:
    """make(folder) writes what is read, and returns the file that is attacked; read(file).

    kind: of CORPUS. heals: nothing is refused, what is damaged is made again or passed over.
    """

    name: str
    kind: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    heals: bool = False


def peak_memory() -> int:
    """Most bytes held since `forget_peak`; 0 where the system does not tell."""
    try:
        line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except OSError:
        return 0


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def watched(reader: Reader, file: Path) -> str | None:
    """The message with which it was refused, None if it was read. Fails on anything else:
    another exception, a message of several lines, code that ran, much memory, much time."""
    forget_peak()
    before, began, told = peak_memory(), time.monotonic(), None
    try:
        reader.read(file)
    except (UserError, BadImage) as error:
        told = str(error)
        assert told and "\n" not in told and len(told) < 1500, told
    assert not Path(PWNED).exists(), "code of the file has run"
    assert peak_memory() - before < MOST_MEMORY, f"{peak_memory() - before:,} bytes"
    assert time.monotonic() - began < 60
    return told


# --- the corpus: functions that write a hostile file in place of a good one -------------------------


class Code:
    """A pickle of it is a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


RUNS = {
    "os.system": Code(os.system, f"touch {PWNED}"),
    "eval": Code(eval, f"open({PWNED!r}, 'w')"),
    "exec": Code(exec, f"open({PWNED!r}, 'w')"),
    "open": Code(open, PWNED, "w"),
    "print": Code(print, "code has run"),
}


def lies(value: torch.Tensor, size: tuple) -> torch.Tensor:
    """A tensor of any size over one number's storage."""
    return torch.as_strided(value.flatten()[:1].clone(), size, (0,) * len(size))


def itself() -> dict:
    d: dict = {}
    d["state_dict"] = d
    return d


@lru_cache
def bomb() -> bytes:
    """A checkpoint's zip file of half a megabyte that would become half a gigabyte."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        for name in ("archive/data.pkl", "archive/data/0"):
            with z.open(name, "w") as entry:
                for _ in range(16):
                    entry.write(bytes(1 << 24))
    return out.getvalue()


def zip_bomb(file: Path) -> None:
    file.write_bytes(bomb())


def packed(file: Path) -> None:
    """A good file whose entries are compressed: what a bomb needs."""
    with zipfile.ZipFile(file) as z:
        entries = {e.filename: z.read(e) for e in z.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in entries.items():
            z.writestr(name, data)


def safetensors(header, data: bytes = b"\0" * 64, length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(**change) -> dict:
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | change}


def with_nan(file: Path) -> None:
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        told = {k: v for k, v in (opened.metadata() or {}).items() if k != "sha256"}
    name = max(tensors, key=lambda k: tensors[k].numel())
    tensors[name].flatten()[-1] = float("nan")
    save_file(tensors, file, metadata=told)


def change_state(file: Path, change) -> None:
    state = torch.load(file, weights_only=True)
    torch.save(change(state), file)


def nan_state(state: dict) -> dict:
    part = state.get("ema", state)
    name = next(k for k, v in part.items() if isinstance(v, torch.Tensor) and v.numel() > 1)
    part[name] = torch.full_like(part[name], float("nan"))
    return state


def lying_state(state: dict) -> dict:
    part = state.get("ema", state)
    name = next(k for k, v in part.items() if isinstance(v, torch.Tensor) and v.numel() > 1)
    part[name] = lies(part[name], (1 << 20, 1 << 20))
    return state


def png(width: int, height: int, rest: bytes = b"") -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1 << 16)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rest + pixels + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    body = b"zTXtcomment\0\0" + zlib.compress(bytes(1 << 28), 1)
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


EPS = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n({PWNED}) (w) file closefile\nshowpage\n"


def hexes(times: int, size: int = 1000) -> bytes:
    """A pickle whose bytes double with each call of _codecs.encode(..., "hex")."""
    text = b"X" + struct.pack("<I", size) + b"a" * size
    return (b"\x80\x02}X\x01\0\0\0a" + b"c_codecs\nencode\n" * (times + 1) + text
            + b"X\x06\0\0\0latin1\x86R" + b"X\x03\0\0\0hex\x86R" * times + b"s.")  # fmt: skip


def zipped(text: bytes, name: str = "archive/data.pkl") -> bytes:
    """As torch.save writes, with any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr(name, text)
        z.writestr("archive/version", "3\n")
        z.writestr("archive/byteorder", "little")
    return out.getvalue()


@lru_cache
def long_pickle() -> bytes:
    """What asks for memory stands behind 33 MB of text."""
    text = b"X" + struct.pack("<I", 33 << 20) + b"a" * (33 << 20)
    return zipped(b"\x80\x02" + text + b"0" + BYTEARRAY[2:])


def odd_state(kind: str):
    """A state with a tensor that is no plain numbers."""

    def change(state: dict) -> dict:
        part = state.get("ema", state)
        name = next(k for k, v in part.items() if isinstance(v, torch.Tensor) and v.ndim == 2)
        part[name] = {
            "sparse": lambda v: v.to_sparse(), "sparse rows": lambda v: v.to_sparse_csr(),
            "meta": lambda v: v.to("meta"), "complex": lambda v: v * 1j,
            "quantized": lambda v: torch.quantize_per_tensor(v.float(), 0.1, 0, torch.quint8),
            "float4": lambda v: torch.zeros_like(v, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        }[kind](part[name])  # fmt: skip
        return state

    return lambda file: change_state(file, change)


def claims(text: bytes) -> bytes:
    """A pickle of torch.save's whose first tensor, and its storage, has 2^28 rows."""
    sizes = {"BININT": 5, "BININT1": 2, "BININT2": 3}
    found = [(at, op.name) for op, _, at in pickletools.genops(text)
             if op.name in sizes or op.name == "BINPERSID"]  # fmt: skip
    first = [name for _, name in found].index("BINPERSID")
    for at, name in (found[first + 2], found[first - 1]):  # the offset lies between them
        text = text[:at] + b"J\0\0\0\x10" + text[at + sizes[name] :]
    return text


def giant_storage(file: Path) -> None:
    with zipfile.ZipFile(file) as z:
        entries = {e.filename: z.read(e) for e in z.infolist()}
    with zipfile.ZipFile(file, "w") as z:
        for name, data in entries.items():
            z.writestr(name, claims(data) if name.endswith("data.pkl") else data)


def old_giant_storage(file: Path) -> None:
    """The same as it was saved before torch 1.6: five pickles, then the numbers."""
    state = torch.load(file, weights_only=True)
    torch.save(state, file, _use_new_zipfile_serialization=False)
    data = file.read_bytes()
    text = io.BytesIO(data)
    for _ in range(3):
        pickle.load(text)
    file.write_bytes(data[: text.tell()] + claims(data[text.tell() :]))


BYTEARRAY = b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0\x40\x85R."
BYTES = {
    "empty": b"", "one byte": b"\x80", "noise": bytes(range(256)) * 40, "text": b"hello\n" * 99,
    "html": b"<!doctype html><title>404</title>", "git lfs": b"version https://git-lfs.github.com/spec/v1\n",
}  # fmt: skip
PICKLES = {
    **{f"pickle of {k}": pickle.dumps({"format": v, "state_dict": v}) for k, v in RUNS.items()},
    "pickle of a list": pickle.dumps([1, 2]),
    "bytearray bomb": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "deep pickle": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "not a stack": b"\x80\x02.",
    "hex of hex": hexes(20),
    "hex of hex, zip": zipped(hexes(20)),
    "bytearray in data.PKL": zipped(BYTEARRAY, "archive/data.PKL"),
    "names from the stack": zipped(pickle.dumps(bytearray(b"a"), 4)),
    "typed storage": zipped(b"\x80\x02ctorch.storage\nTypedStorage\nJ\0\0\0\x40\x85R."),
    "calls a tensor": zipped(b"\x80\x02ctorch\nTensor\nJ\0\0\0\x40\x85R."),
}
SAFETENSORS = {
    "header of 2^63": safetensors(one(), length=1 << 63),
    "header beyond the end": safetensors(one(), length=1 << 30),
    "header of nothing": safetensors(b""),
    "header is a list": safetensors([]),
    "header is deep": safetensors(b"[" * 200_000),
    "header is not UTF-8": safetensors(b"\xff\xfe" * 9),
    "overlapping tensors": safetensors(one() | {"b": one()["a"]}, b"\0" * 16),
    "offsets backwards": safetensors(one(data_offsets=[16, 0])),
    "offsets beyond the end": safetensors(one(data_offsets=[0, 1 << 40], shape=[1 << 38])),
    "hole": safetensors(one() | {"b": {"dtype": "F32", "shape": [4], "data_offsets": [32, 48]}}, b"\0" * 48),
    "shape overflows": safetensors(one(shape=[1 << 40, 1 << 40])),
    "negative shape": safetensors(one(shape=[-4])),
    "shape without data": safetensors(one(shape=[1 << 30])),
    "unknown type": safetensors(one(dtype="PICKLE")),
    "no tensors": safetensors({}, b""),
}  # fmt: skip
JSON = {
    "deep": b"[" * 100_000, "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "list": b"[]", "null": b"null", "number": b"1e999", "endless number": b"1" * 10_000,
    "not UTF-8": b'{"\xff": 1}', "NaN": b"NaN", "torn": b'{"a": 1', "nothing in it": b"{}",
}  # fmt: skip
IMAGES = {
    "bomb of 10^10 pixels": png(100_000, 100_000), "bomb of 2^62": png(2**31 - 1, 2**31 - 1),
    "no width": png(0, 5), "text bomb": png(8, 8, text_bomb()), "EPS": EPS.encode(),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>',
    "BMP of 2^60": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 70, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
    "GIF of 65535^2": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x08\x00;",
    "PPM of 10^12": b"P6 1000000 1000000 255\n",
}  # fmt: skip
ODD = ("sparse", "sparse rows", "meta", "complex", "quantized")
ODD += ("float4",) if hasattr(torch, "float4_e2m1fn_x2") else ()  # since torch 2.8
EDITS: dict[str, dict[str, Callable[[Path], None]]] = {
    "checkpoint": {
        "code inside": lambda f: change_state(f, lambda s: s | {"optimizer": RUNS["os.system"]}),
        "NaN weights": lambda f: change_state(f, nan_state),
        "claims 2^40 numbers": lambda f: change_state(f, lying_state),
        "holds itself": lambda f: torch.save(itself(), f),
        "no weights": lambda f: change_state(f, lambda s: s | {"ema": {}, "model": 3}),
        "no dictionary": lambda f: torch.save([1], f),
        "compressed": packed, "zip bomb": zip_bomb, "giant storage": giant_storage,
        "long pickle": lambda f: f.write_bytes(long_pickle()),
        **{f"{kind} tensor": odd_state(kind) for kind in ODD},
    },
    "weights": {
        "code inside": lambda f: change_state(f, lambda s: s | {"x": RUNS["os.system"]}),
        "no dictionary": lambda f: torch.save([1], f),
        "compressed": packed, "zip bomb": zip_bomb, "giant storage": giant_storage,
        "giant storage of before torch 1.6": old_giant_storage,
        "long pickle": lambda f: f.write_bytes(long_pickle()),
    },
    "network": {"NaN weights": with_nan},
}  # fmt: skip


def huge(file: Path) -> None:
    """400 MB that take no place on the disk."""
    with open(file, "wb") as out:
        out.truncate(400 << 20)


def attacks(kind: str) -> dict[str, Callable[[Path], None]]:
    """{what it is: write it in place of a good file} for a kind of file."""
    contents = BYTES | {
        "checkpoint": PICKLES, "weights": PICKLES, "safetensors": SAFETENSORS,
        "network": SAFETENSORS, "json": JSON, "image": IMAGES,
    }.get(kind, {})  # fmt: skip
    found = {name: lambda f, data=data: f.write_bytes(data) for name, data in contents.items()}
    for percent in range(10, 100, 10):
        found[f"cut at {percent} %"] = lambda f, p=percent: os.truncate(
            f, f.stat().st_size * p // 100
        )
    if kind != "packed":  # what is unpacked is copied first, and may be of any size
        found["huge"] = huge
    found |= EDITS.get(kind, {})
    found["a folder"] = lambda f: (f.unlink(), f.mkdir())
    found["link to itself"] = lambda f: (f.unlink(), f.symlink_to(f.name))
    found["missing"] = lambda f: f.unlink()
    return found


# --- fuzzing ----------------------------------------------------------------------------------------


def edits() -> st.SearchStrategy:
    """Changes of a file's bytes: (where, as a share of the file, what is put there)."""
    where = st.floats(0, 1, exclude_max=True)
    change = st.tuples(st.just("put"), where, st.binary(min_size=1, max_size=8))
    flip = st.tuples(st.just("flip"), where, st.integers(0, 7))
    cut = st.tuples(st.just("cut"), where, st.integers(0, 64))
    return st.lists(st.one_of(flip, change, cut), min_size=1, max_size=6)


def edited(data: bytes, changes: list) -> bytes:
    out = bytearray(data)
    for kind, where, what in changes:
        i = int(where * len(out))
        if kind == "put":
            out[i : i + len(what)] = what
        elif kind == "cut":
            del out[i : i + what]
        elif out:
            out[i] ^= 1 << what
    return bytes(out)


def json_changes() -> st.SearchStrategy:
    """Other values for a JSON document: (which of its values, what instead)."""
    simple = st.one_of(
        st.none(), st.booleans(), st.integers(-2, 2), st.just(10**12), st.floats(), st.text(max_size=5),
        st.just([]), st.just({}), st.just([1, "a"]), st.just({"a": None}), st.just("../../x"),
    )  # fmt: skip
    return st.lists(st.tuples(st.floats(0, 1, exclude_max=True), simple), min_size=1, max_size=3)


def json_edited(value, changes: list):
    value = json.loads(json.dumps(value))
    for where, new in changes:
        places = list(_places(value))
        if places:
            holder, key = places[int(where * len(places))]
            holder[key] = json.loads(json.dumps(new))  # a copy: it may be edited next
    return value


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)
