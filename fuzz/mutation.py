"""Ways to damage a file, each from its content and a random generator to another content.

Blind ones take any bytes. The others know the format, so that what they make gets past the first check of a reader.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

Mutator = Callable[[random.Random, bytes], bytes]

DEEP = b"[" * 100_000
BOMB = 64 << 20  # bytes that a compressed member of a hostile archive unpacks to
TEXTS = (
    "", " ", "x" * 70_000, "\x00", "\x1b[31m", "\u202e", "\ud800", "\U0001f600", "e\u0301", "\ufeff",
    "../../etc/passwd", "/etc/passwd", "~", "C:\\x", "a\nb", "NaN", "1e999", "-1", "None", "{}", "{0}",
    "{0.__class__}", "%s", "<script>", "=1+1",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2, 255, 2**31, 2**53 + 1, 2**63, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e-320, 1e308, 1e39)
VALUES: tuple[Any, ...] = (
    None, True, False, *NUMBERS, float("nan"), float("inf"), float("-inf"), *TEXTS, [], {}, [[]], [None], {"": None},
    [0] * 1000, [[[[[[[[1]]]]]]]], {"a": {"a": {"a": {}}}},
)  # fmt: skip
WHOLE_FILES = (
    b"", b"\x00", b"null", b"[]", b"{}", b"0", b'""', b"\xff\xfe", b"\xef\xbb\xbf{}", DEEP, DEEP + b"]" * 100_000,
    b'{"a":' * 50_000, b"1" * 5000, b"[1e999]", b"[" + b"1" * 100_000 + b"]", b"<!DOCTYPE html>", b"PK\x03\x04",
    b"PK\x05\x06" + b"\0" * 18, pickle.dumps({"a": 1}), b"\xff" * 4096, bytes(4096), struct.pack("<Q", 2**63) + b"{}",
    struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 100_000) + DEEP, b"version https://git-lfs.github.com/spec/v1\n",
    b"PAR1", b"PAR1" + bytes(64) + b"PAR1",
)  # fmt: skip


def _span(rng: random.Random, content: bytes, most: int = 64) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.randint(1, most))


def flip(rng: random.Random, content: bytes) -> bytes:
    """One to four bits."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 4))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def put(rng: random.Random, content: bytes) -> bytes:
    """A byte that formats read something into."""
    changed = bytearray(content)
    if changed:
        changed[rng.randrange(len(changed))] = rng.choice(b'\x00\xff\x7f\x80 "{}[],:\\\n-0919.eEtfn')
    return bytes(changed)


def cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def drop(rng: random.Random, content: bytes) -> bytes:
    start, stop = _span(rng, content)
    return content[:start] + content[stop:]


def repeat(rng: random.Random, content: bytes) -> bytes:
    start, stop = _span(rng, content)
    return content[:stop] + content[start:stop] * rng.choice((1, 1, 3, 200)) + content[stop:]


def blank(rng: random.Random, content: bytes) -> bytes:
    """A hole of zeros, as a block that never reached the disk."""
    start, stop = _span(rng, content, 4096)
    return content[:start] + bytes(stop - start) + content[stop:]


def append(rng: random.Random, content: bytes) -> bytes:
    return content + rng.choice((b"\x00", b"\n", b"}", content, rng.randbytes(rng.randint(1, 64))))


def move(rng: random.Random, content: bytes) -> bytes:
    """A part at another place."""
    start, stop = _span(rng, content)
    rest = content[:start] + content[stop:]
    place = rng.randrange(len(rest) + 1)
    return rest[:place] + content[start:stop] + rest[place:]


def number(rng: random.Random, content: bytes) -> bytes:
    """A binary integer of two, four or eight bytes."""
    size, kind = rng.choice(((2, "H"), (4, "I"), (8, "Q")))
    if len(content) < size:
        return content
    place = rng.randrange(len(content) - size + 1)
    value = rng.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), rng.randrange(2 ** (8 * size)), len(content)))
    return content[:place] + struct.pack("<" + kind, value) + content[place + size :]


def other_file(rng: random.Random, content: bytes) -> bytes:
    return rng.choice(WHOLE_FILES)


BLIND: tuple[Mutator, ...] = (flip, flip, flip, put, cut, drop, repeat, blank, append, move, number, other_file)


# ---------------------------------------------------------------------- JSON


def _places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside, the whole one first."""
    found = [above]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _places(inner, (*above, key))
    return found


def _at(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def change_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with one place replaced, removed, renamed, moved or made another type."""
    value = json.loads(json.dumps(value))
    places = _places(value)[1:]
    if not places:
        return rng.choice(VALUES)
    path = rng.choice(places) if rng.random() < 0.6 else rng.choice([place for place in places if len(place) == 1])
    above, key = _at(value, path[:-1]), path[-1]
    kind = rng.randrange(8)
    if kind == 0:
        del above[key]
    elif kind == 1 and isinstance(above, dict):
        above[rng.choice((*TEXTS, str(key).upper(), f"{key} ", "0", "-1", "00"))] = above.pop(key)
    elif kind == 2:
        above[key] = json.loads(json.dumps(_at(value, rng.choice(places))))  # of another place
    elif kind == 3 and isinstance(above[key], (int, float)):
        above[key] = rng.choice((above[key] + 1, -above[key], above[key] * 2, str(above[key]), [above[key]]))
    elif kind == 4 and isinstance(above[key], str):
        text = above[key]
        above[key] = rng.choice((text + "x", text[1:], text.upper(), [text], f"{text}\x00", f"../{text}", text * 100))
    elif kind == 5 and isinstance(above[key], list):
        above[key] = rng.choice((above[key][::-1], above[key] * 2, above[key][1:], dict(enumerate(above[key]))))
    else:
        above[key] = rng.choice(VALUES)
    return json.loads(json.dumps(value))


def json_value(rng: random.Random, content: bytes) -> bytes:
    """Another value somewhere; also a key that is there twice."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return flip(rng, content)
    changed = change_value(rng, value)
    if isinstance(value, dict) and value and rng.random() < 0.1:
        key = rng.choice(list(value))
        twice = f"{json.dumps(key)}: {json.dumps(rng.choice(VALUES))}"
        text = json.dumps(value)
        return (f"{{{twice}, {text[1:]}" if rng.random() < 0.5 else f"{text[:-1]}, {twice}}}").encode()
    return json.dumps(changed).encode()


def json_lines(rng: random.Random, content: bytes) -> bytes:
    """Another value in one line."""
    lines = content.split(b"\n")
    place = rng.randrange(len(lines))
    lines[place] = json_value(rng, lines[place])
    return b"\n".join(lines)


# ---------------------------------------------------------------------- safetensors


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return header, content[8 + length :]


def join_safetensors(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def safetensors_header(rng: random.Random, content: bytes) -> bytes:
    """Other names, dtypes, shapes, places or metadata."""
    try:
        header, body = split_safetensors(content)
    except (ValueError, RecursionError):
        return flip(rng, content)
    metadata = header.get("__metadata__", {})
    inner = [key for key, text in metadata.items() if text[:1] in "{["]
    if inner and rng.random() < 0.4:
        key = rng.choice(inner)
        metadata[key] = json.dumps(change_value(rng, json.loads(metadata[key])))
    elif metadata and rng.random() < 0.3:
        metadata[rng.choice(list(metadata))] = rng.choice(TEXTS)
    else:
        header = change_value(rng, header)
    return join_safetensors(header, body)


def safetensors_values(rng: random.Random, content: bytes) -> bytes:
    """Numbers within the tensors: NaN, infinite, huge, or one bit."""
    try:
        header, body = split_safetensors(content)
    except (ValueError, RecursionError):
        return flip(rng, content)
    if len(body) < 4:
        return flip(rng, content)
    place = rng.randrange(len(body) // 4) * 4
    value = rng.choice((struct.pack("<f", float("nan")), struct.pack("<f", float("inf")), b"\xff\xff\x7f\x7f", None))
    if value is None:
        return join_safetensors(header, flip(rng, body))
    return join_safetensors(header, body[:place] + value + body[place + 4 :])


# ---------------------------------------------------------------------- tables, archives, pickles


def cells(rng: random.Random, content: bytes) -> bytes:
    """A cell, a row, a separator or the encoding of a table of text."""
    lines = content.split(b"\n")
    place = rng.randrange(len(lines))
    row = lines[place].split(b",")
    column = rng.randrange(len(row))
    kind = rng.randrange(9)
    if kind < 3:
        row[column] = str(rng.choice((*TEXTS, *NUMBERS))).encode("utf-8", "surrogatepass")
    elif kind == 3:
        row.insert(column, row[column])
    elif kind == 4:
        row[column] = b'"' + row[column] + rng.choice((b'"', b"", b'""'))
    elif kind == 5:
        rng.shuffle(row)
    lines[place] = b",".join(row)
    if kind == 6:
        lines.insert(place, rng.choice(lines))
    elif kind == 7:
        mark = rng.choice((b";", b"\t", b"|", b",,", b" "))
        return content.replace(b",", mark)
    elif kind == 8:
        encoding = rng.choice(("utf-16", "utf-32", "utf-8-sig", "cp037"))
        return content.decode("utf-8", "replace").encode(encoding)
    return b"\n".join(lines)


NAMES = (
    "../out.png", "/tmp/out.png", "a/../../out.png", "C:\\out.png", "\\\\server\\out.png", "a\\..\\..\\out.png", ".",
    "", "/", "a" * 300 + ".png", "d/" * 300 + "x.png", "\u202egnp.png", "a\x00.png", "__MACOSX/._1.png",
    ".hidden.png", "TRAIN/x.png", "train/x/1.png/2.png", "con.png",
)  # fmt: skip


def zip_members(rng: random.Random, content: bytes) -> bytes:
    """A zip made anew, with right checksums, after something was done to one member."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info, archive.read(info)) for info in archive.infolist()]
    except (zipfile.BadZipFile, RuntimeError, OSError, ValueError, NotImplementedError):
        return flip(rng, content)
    sink, chosen, kind = io.BytesIO(), rng.randrange(len(members) or 1), rng.randrange(8)
    compression = zipfile.ZIP_DEFLATED if kind == 2 else zipfile.ZIP_STORED
    with zipfile.ZipFile(sink, "w", compression) as archive:
        for place, (old, data) in enumerate(members):
            info = zipfile.ZipInfo(old.filename)
            info.external_attr, info.compress_type = old.external_attr, compression
            if place == chosen:
                if kind == 0:
                    info.filename = rng.choice(NAMES)
                elif kind == 1:
                    data = rng.choice(BLIND)(rng, data)
                elif kind == 2 and rng.random() < 0.1:
                    data = bytes(BOMB)
                elif kind == 3:
                    info.external_attr = 0o120777 << 16
                elif kind == 4:
                    continue
                elif kind == 5:
                    data = pickled(rng, data) if info.filename.endswith(".pkl") else rng.choice(WHOLE_FILES)
            archive.writestr(info, data)
            if kind == 6 and place == chosen:
                info = zipfile.ZipInfo(rng.choice((old.filename, *NAMES)))
                archive.writestr(info, rng.choice(WHOLE_FILES))
    made = sink.getvalue()
    return number(rng, made) if kind == 7 else made


def tar_members(rng: random.Random, content: bytes) -> bytes:
    """A tar made anew after something was done to one member."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            members = [(info, archive.extractfile(info)) for info in archive]
            contents = [stream.read() if stream else b"" for _, stream in members]
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError):
        return flip(rng, content)
    sink, chosen, kind = io.BytesIO(), rng.randrange(len(members) or 1), rng.randrange(8)
    mode = rng.choice(("w", "w", "w:gz", "w:bz2", "w:xz")) if kind == 7 else "w"
    with tarfile.open(fileobj=sink, mode=mode, format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as archive:  # type: ignore[call-overload]
        for place, ((info, _), data) in enumerate(zip(members, contents, strict=True)):
            if place == chosen:
                if kind == 0:
                    info.name = rng.choice(NAMES)
                elif kind == 1:
                    data = rng.choice(BLIND)(rng, data)
                elif kind == 2:
                    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
                    info.type, info.linkname = rng.choice(kinds), rng.choice(NAMES)
                elif kind == 3:
                    continue
                elif kind == 4:
                    info.pax_headers = {rng.choice(("path", "size", "GNU.sparse.size", "x")): rng.choice(TEXTS[:9])}
                elif kind == 5 and rng.random() < 0.1:
                    data = bytes(BOMB)
            info.size = len(data) if info.isreg() else 0
            try:
                archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
                if kind == 6 and place == chosen:
                    archive.addfile(info, io.BytesIO(data))
            except (ValueError, UnicodeError):
                return flip(rng, content)
    return sink.getvalue()


_PICKLES = (
    b"cos\nsystem\n(S'touch HACKED'\ntR.", b"\x80\x02cbuiltins\neval\n(X\x04\x00\x00\x00exit\x85R.",
    b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", b"(" * 100_000 + b".",
    b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", b"\x80\x02X\xff\xff\xff\x7f.",
    b"\x80\x02\x8b\xff\xff\xff\x7f.", b"\x80\x02}q\x00h\x00h\x00s.", b"\x80\x02]q\x00h\x00a.", b"\x80\x02Q.",
    b"\x80\x02).", b".", b"0.", b"\x80\x02}(}}u.", b"\x80\x02(K\x01K\x02t}R.",
    b"\x80\x02ccollections\nOrderedDict\n)R(X\x17\x00\x00\x00text_feature_residualsK\x01u.",
)  # fmt: skip
_OPCODES = b"()]}.NKMJXqrhjtuesaRQbc\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x93\x94\x95"


def pickled(rng: random.Random, content: bytes) -> bytes:
    """A pickle with other instructions, or one that would run code, never end or fill memory."""
    if rng.random() < 0.3:
        return rng.choice(_PICKLES)
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(changed) + 1)
        if rng.random() < 0.5 and place < len(changed):
            changed[place] = rng.choice(_OPCODES)
        else:
            changed.insert(place, rng.choice(_OPCODES))
    return bytes(changed)


BY_ENDING: dict[str, tuple[Mutator, ...]] = {
    ".json": (json_value,) * 12,
    ".jsonl": (json_lines,) * 8 + (cells,) * 2,
    ".partial": (json_lines,) * 4,
    ".safetensors": (safetensors_header,) * 8 + (safetensors_values,) * 4,
    ".csv": (cells,) * 10,
    ".tsv": (cells,) * 6,
    ".txt": (cells,) * 6,
    ".zip": (zip_members,) * 10,
    ".tar": (tar_members,) * 10,
    ".pth": (zip_members,) * 10,
}


# What these make has right checksums again: the work of a hand, not of a disk.
FORGING = (zip_members, tar_members, pickled)


def mutate(rng: random.Random, name: str, content: bytes) -> tuple[bytes, bool]:
    """One to three damages to a file, by what its ending says it is; and whether inner checksums were made right."""
    ending = name[name.rfind(".") :]
    ways = (*BLIND, *BY_ENDING.get(ending, ()))
    changed, forged = content, False
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        way = rng.choice(ways)
        try:
            changed, forged = way(rng, changed), forged or way in FORGING
        except Exception:  # of the modules that take the file apart
            changed = flip(rng, changed)
    return changed, forged
