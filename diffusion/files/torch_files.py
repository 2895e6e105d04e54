"""Read what torch.save wrote, with a machine of our own that builds containers and tensors only.

    zip       NAME/data.pkl, a pickle of all but the numbers, and NAME/data/0, 1 ... with these
    legacy    before torch 1.6: five pickles, then each storage's length and numbers

A pickle is a program. torch.load finds the records of a zip file by other rules than those by which
one can check it, and allows other classes in each version; here the bytes that are checked are the
bytes that are read. A name in a pickle is but text: nothing is imported for it, and what is neither
a tensor nor a container becomes a Stub. What a file claims is bounded by what it holds.
"""

import io
import math
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, UntypedStorage

from .. import UserError, shown
from .atomic import name_of

LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the first of the five: a magic number
MAX_PICKLE = 3 << 20  # names, shapes, settings; in memory 80 times more. SDXL's training has 2 MB
MAX_DIRECTORY = 4 << 20  # of a zip file: of 40,000 records
MOST_VIEWS = 4  # times the file's size are all its tensors together: some are tied, or views
DTYPES = {f"torch.{k}": v for k, v in vars(torch).items() if isinstance(v, torch.dtype)}
STORAGES = dict(
    pair.split("=")
    for pair in """BFloat16=bfloat16 Bool=bool Byte=uint8 Char=int8 ComplexDouble=complex128
    ComplexFloat=complex64 Double=float64 Float=float32 Half=float16 Int=int32 Long=int64
    Short=int16 Untyped=uint8""".split()
)
# what settings are made of: names of Python's own, and modules of its library. A file that names
# others holds a program, which would not run here; but its owner wants to know. Also
# Python 2's names, which are written to this day
PLAIN = """bool bytearray bytes complex dict float frozenset int list object range set slice str
    tuple long unicode xrange""".split()
SETTINGS = """_codecs argparse collections copyreg datetime decimal enum fractions functools logging
    pathlib random types typing uuid""".split()
# the instructions that build nothing but plain values
INSTRUCTIONS = """PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE BININT BININT1
    BININT2 LONG1 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST
    APPEND APPENDS EMPTY_DICT GLOBAL STACK_GLOBAL BINPERSID REDUCE BINPUT LONG_BINPUT BINGET
    LONG_BINGET MEMOIZE""".split()
# those that do what others do. Sets are lists, and long numbers bytes: to hash or to show them
# could take for ever
SAME = dict(
    pair.split("=")
    for pair in """NEWOBJ=REDUCE EMPTY_SET=EMPTY_LIST ADDITEMS=APPENDS FROZENSET=LIST LONG4=BINBYTES
    BYTEARRAY8=BINBYTES8""".split()
)
# they are called with what they make, and are no more than that here
FIRST = """torch._utils._rebuild_parameter torch._utils._rebuild_parameter_with_state torch.Size
    builtins.set""".split()


class Stub(dict):
    """Stand for an object of a class that is not loaded: hold its name, items and state."""

    state = None

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def append(self, value) -> None:
        """Drop what a list, a set or the like holds."""

    extend = append


@dataclass(frozen=True)
class Name:
    """Hold the name of a class or function that is not loaded; what it makes is a stub."""

    text: str

    def __call__(self, *args) -> Stub:
        return Stub(self.text)


def code_of(instruction: str) -> int:
    return getattr(pickle, instruction)[0]


class Machine(pickle._Unpickler):
    """Run a pickle with these instructions alone.

    storage: (key, bytes) -> numbers. size: of the file.
    """

    def __init__(self, pickled: BinaryIO, path: Path, storage: Callable, size: int):
        super().__init__(pickled, encoding="latin1")  # of Python 2's texts
        self.path = path
        self.storage = storage
        self.known = {}  # storages, by their keys
        self.left = MOST_VIEWS * size

    def find_class(self, module: str, name: str):
        text = f"{module}.{name}".replace("__builtin__", "builtins")
        if text.startswith("torch._utils._rebuild_tensor"):
            return self.tensor
        if text in FIRST:
            return lambda value, *rest: value
        if text == "torch._tensor._rebuild_from_type_v2":
            return lambda make, kind, args, *rest: make(*args)
        top = text.split(".")[0]
        plain = name in PLAIN if top == "builtins" else top in SETTINGS
        program = top in sys.stdlib_module_names and not plain
        if program or text.startswith("torch._utils."):  # sparse tensors, quantized ones ...
            raise UserError(
                f"{self.path} holds more than weights and is not opened: it calls "
                f"{shown(text)}; give a .safetensors version of it"
            )
        return DTYPES.get(text) or Name(text)

    def persistent_load(self, pid: tuple) -> tuple[torch.dtype, UntypedStorage]:
        _, kind, key, _, count, *view = pid
        dtype = DTYPES["torch." + STORAGES[kind.text.split(".")[-1].removesuffix("Storage")]]
        if not isinstance(key, str) or not isinstance(count, int) or any(view):
            raise pickle.UnpicklingError("a storage of another kind")
        if key not in self.known:
            self.known[key] = self.storage(key, count * dtype.itemsize)
        return dtype, self.known[key]

    def tensor(self, storage: tuple, offset: int, size: tuple, stride: tuple, *rest) -> Tensor:
        dtype, data = storage
        if len(rest) > 2 and isinstance(rest[2], torch.dtype):
            dtype = rest[2]
        if len(size) > 64:  # as torch has it
            raise pickle.UnpicklingError(f"a tensor of {len(size):,} dimensions")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        self.left -= count * dtype.itemsize
        inside = max(count, last + 1) * dtype.itemsize <= data.nbytes() or count == 0
        if not inside or min(0, self.left, offset, *size, *stride) < 0:
            raise UserError(
                f"{self.path} is not to be trusted: a tensor claims {count:,} values, more than "
                "the file holds"
            )
        return torch.tensor([], dtype=dtype).set_(data, offset, size, stride)

    def build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Stub):
            self.stack[-1].state = state

    def new_object(self) -> None:
        self.stack.pop()  # arguments by name
        self.load_reduce()

    def set_item(self) -> None:
        self.set_items([self.stack.pop(-2), self.stack.pop()])

    def set_items(self, items: list | None = None) -> None:
        """Put items into a dictionary, but those whose key is more than a name or a number."""
        items = self.pop_mark() if items is None else items
        if not isinstance(self.stack[-1], dict):
            raise pickle.UnpicklingError("items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2]):
            if key is None or isinstance(key, str | bytes | int | float | Name):
                self.stack[-1][key] = value

    dispatch = {
        code_of(name): pickle._Unpickler.dispatch[code_of(SAME.get(name, name))]
        for name in (*INSTRUCTIONS, *SAME)
    }
    dispatch[code_of("NEWOBJ_EX")] = new_object
    dispatch[code_of("BUILD")] = build
    dispatch[code_of("SETITEM")] = set_item
    dispatch[code_of("SETITEMS")] = set_items


class Bounded(io.BufferedReader):
    """Refuse to read more than `most` at once: zipfile reads a directory whole, whatever it has."""

    def __init__(self, file: BinaryIO, most: int):
        super().__init__(file.raw)
        self.most = most

    def read(self, size=-1):
        if size is not None and size > self.most:
            raise zipfile.BadZipFile(f"a directory of {size:,} bytes")
        return super().read(size)


def read_zip(path: Path, file: BinaryIO, size: int, check_crc: bool):
    """Read the pickle of a zip file, whose tensors lie in the mapped file until used.

    check_crc: also compare every record with the CRC that was written with it.
    Raises UserError, and nearly anything for a damaged file.
    """
    z = zipfile.ZipFile(Bounded(file, MAX_DIRECTORY))
    records = {record.filename: record for record in z.infolist()}
    total = sum(record.file_size for record in z.infolist())
    # torch never compresses
    compressed = any(
        record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size
        for record in z.infolist()
    )
    if total > size or compressed:
        raise UserError(
            f"{path} is a compressed zip file, or not to be trusted: {size:,} bytes would become "
            f"{total:,}; unpack it, or give the file as it was saved"
        )
    pickles = [name for name in records if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        held = shown(min(records, default=""))
        raise UserError(f"{path} is a zip file of {held} and others: no weights; unpack it")
    if check_crc and (damaged := z.testzip()):
        raise UserError(f"{path} is damaged: {shown(damaged)} does not have its CRC")
    record = records[pickles[0]]
    if record.file_size > MAX_PICKLE:
        most = f"{MAX_PICKLE >> 20} MB"
        raise UserError(f"{path} is not to be trusted: over {most} beside its tensors")
    whole = UntypedStorage.from_file(name_of(file, path), False, size)

    def storage(key, count):
        record = records[f"{pickles[0].removesuffix('.pkl')}/{key}"]
        file.seek(record.header_offset + 26)
        lengths = [int.from_bytes(file.read(2), "little") for _ in ("name", "extra")]
        start = record.header_offset + 30 + sum(lengths)
        data = whole[start : start + record.file_size]
        return data.clone() if start % 8 else data  # processors read whole words

    return Machine(io.BytesIO(z.read(record)), path, storage, size).load()


def read_legacy(path: Path, file: BinaryIO, size: int):
    """Read five pickles, and the numbers of the storages that they name.

    Raises UserError, and nearly anything for a damaged file.
    """
    pickled = io.BytesIO(file.read(MAX_PICKLE))

    def storage(key, count):
        if count > size:
            raise UserError(f"{path} is not to be trusted: its tensors claim more than its bytes")
        return UntypedStorage(count)  # takes no memory before it is written to

    machines = [Machine(pickled, path, storage, size) for _ in range(5)]
    parts = [machine.load() for machine in machines]
    known = machines[3].known
    file.seek(pickled.tell())
    for key in parts[4]:
        file.read(8)  # how many numbers follow, which the pickle has said
        numbers = torch.tensor([], dtype=torch.uint8).set_(known.pop(key)).numpy()
        if file.readinto(numbers) != numbers.size:
            raise EOFError("numbers are missing")
    if known:
        raise EOFError(f"the numbers of {len(known)} storages are missing")
    return parts[3]
