"""The token inspector's data: the rollouts of completions/, packed for inspector.js.

The page holds them as one block of base64: no text of a run stands in it as text, so that nothing in it can be markup.
Inside are 4 bytes, the length of the header (little-endian), and then the header and the arrays, each as zlib data,
which a browser unpacks itself (DecompressionStream):

    header: JSON. strings (each text once), pieces (what tokens add to a text), columns (a value a rollout; texts are
        places in strings, -1 for none), lengths (tokens a rollout), arrays (names, and bytes a value)
    arrays: a value a token over all rollouts in order, each as planes: all lowest bytes, then all next ones, …, since
        bytes of one kind compress better together

Quantities in nats are float16 of which the lowest 5 of 10 mantissa bits are 0, as is all below SMALLEST: two digits are
shown, and completions/ has three. A token so takes 3 to 10 bytes of the page, by how peaked the distributions are.
"""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.compute
import pyarrow.parquet

MAX_ROLLOUTS = 5_000  # in a page; of more, every second, third, … is taken
MAX_TOKENS = 2_500_000  # of them in all
TEXT_SHOWN = 4000  # characters of a prompt, or of a completion without token columns
PIECE_SHOWN = 100  # characters of a token
# Of each token, in nats but for the weight. float16 has three digits and half the bytes: they are there to be read.
QUANTITIES = ("logratio", "kl", "student_logprob", "student_entropy", "teacher_entropy", "gate")
ROUNDED_BITS = 5  # of a float16's mantissa
SMALLEST = 1e-4  # nats
LISTS = {
    "token_text": pyarrow.list_(pyarrow.string()),
    "agreement": pyarrow.list_(pyarrow.int8()),
    **dict.fromkeys(QUANTITIES, pyarrow.list_(pyarrow.float16())),
}
TEXTS = ("prompt", "completion", "answer", "extracted", "reason", "source")
NUMBERS = ("step", "verdict", "gate_verdict", "tokens", "truncated")
KINDS = {**dict.fromkeys(TEXTS, pyarrow.string()), **dict.fromkeys(NUMBERS, pyarrow.int64()), **LISTS}


@dataclass(frozen=True)
class Packed:
    """What the page holds."""

    data: str  # base64
    rollouts: int
    left_out: int  # rollouts that the run kept, and the page has no room for


def pack(folder: Path, unreadable: list[str]) -> Packed | None:
    """The rollouts of a run's completions/; None where there are none. `unreadable` gets a sentence a broken file."""
    rollouts = read_rollouts(folder, unreadable)
    if rollouts is None:
        return None
    kept = thinned(rollouts)
    lengths, arrays = token_arrays(kept)
    header, body = {"arrays": [], "lengths": lengths.tolist()}, b""
    header["pieces"] = [cut(text, PIECE_SHOWN) for text in arrays.pop("pieces")]
    for name, values in arrays.items():
        header["arrays"].append([name, values.dtype.itemsize])
        body += values.view(numpy.uint8).reshape(-1, values.dtype.itemsize).T.tobytes()
    strings: dict[str, int] = {}
    header["columns"] = columns = {name: kept[name].to_pylist() for name in NUMBERS}
    for name in TEXTS:
        texts = kept[name].to_pylist()
        if name == "completion":  # the tokens have it
            texts = [None if length else text for text, length in zip(texts, lengths)]
        texts = [None if text is None else cut(text, TEXT_SHOWN) for text in texts]
        columns[name] = [-1 if text is None else strings.setdefault(text, len(strings)) for text in texts]
    header["strings"] = list(strings)
    head = zlib.compress(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"))
    noise = zlib.compressobj(strategy=zlib.Z_RLE)  # numbers repeat in runs or not at all; a tenth of the time
    data = len(head).to_bytes(4, "little") + head + noise.compress(body) + noise.flush()
    return Packed(base64.b64encode(data).decode(), len(kept), len(rollouts) - len(kept))


def read_rollouts(folder: Path, unreadable: list[str]) -> pyarrow.Table | None:
    """All rows, each column of one type; null where a run of an older version has no such column."""
    tables = []
    for path in sorted(folder.glob("*.parquet")):
        try:
            table = pyarrow.parquet.read_table(path)
            tables.append(pyarrow.table({name: column(table, name, kind) for name, kind in KINDS.items()}))
        except (OSError, pyarrow.ArrowException):
            sentence = f"completions/{path.name} is not a readable parquet file and was left out."
            if sentence not in unreadable:
                unreadable.append(sentence)
    rows = pyarrow.concat_tables(tables) if tables else []
    return rows if len(rows) else None


def column(table: pyarrow.Table, name: str, kind: pyarrow.DataType) -> pyarrow.ChunkedArray:
    if name not in table.column_names:
        return pyarrow.chunked_array([pyarrow.nulls(len(table), kind)])
    values = table[name]
    if name in TEXTS and not pyarrow.types.is_string(values.type):  # a conversation, a number, whatever was written
        return pyarrow.chunked_array([[None if value is None else str(value) for value in values.to_pylist()]], kind)
    return values.cast(kind)


def thinned(rollouts: pyarrow.Table) -> pyarrow.Table:
    """Evenly spaced rows, as many as the page has room for."""
    every = -(-len(rollouts) // MAX_ROLLOUTS)
    kept = rollouts.take(list(range(0, len(rollouts), every)))
    tokens = pyarrow.compute.sum(pyarrow.compute.list_value_length(kept["token_text"])).as_py() or 0
    every = -(-tokens // MAX_TOKENS) or 1
    return kept.take(list(range(0, len(kept), every)))


def token_arrays(rollouts: pyarrow.Table) -> tuple[numpy.ndarray, dict[str, Any]]:
    """(tokens of each rollout that have statistics, the arrays over all tokens), and under "pieces" the texts."""
    # A row counts where its lists are all there and of one length: a file may hold anything.
    sizes = [
        pyarrow.compute.fill_null(pyarrow.compute.list_value_length(rollouts[name]), 0).to_numpy() for name in LISTS
    ]
    whole = numpy.all([size == sizes[0] for size in sizes], axis=0)
    lengths = numpy.where(whole, sizes[0], 0)
    rows = rollouts.filter(pyarrow.array(lengths > 0))
    flat = {name: pyarrow.compute.list_flatten(rows[name]).combine_chunks() for name in LISTS}
    texts = pyarrow.compute.fill_null(flat["token_text"], "").dictionary_encode()
    if isinstance(texts, pyarrow.ChunkedArray):
        texts = texts.combine_chunks()
    pieces = texts.dictionary.to_pylist()
    ids = texts.indices.to_numpy(zero_copy_only=False)
    arrays: dict[str, Any] = {
        "pieces": pieces,
        "piece": ids.astype("<u2" if len(pieces) <= 2**16 else "<u4"),
        "agreement": (pyarrow.compute.fill_null(flat["agreement"], 0).to_numpy(zero_copy_only=False) + 1).astype("u1"),
    }
    for name in QUANTITIES:
        values = flat[name].to_numpy(zero_copy_only=False).astype("<f2")
        arrays[name] = values.view("<u2") if name == "gate" else rounded(values)
    return lengths, arrays


def rounded(values: numpy.ndarray) -> numpy.ndarray:
    """The bits of float16 `values` with fewer digits, to the nearest; infinities and NaN as they are."""
    bits = numpy.where(numpy.abs(values) < SMALLEST, numpy.float16(0), values).view("<u2")
    half, mask = 1 << (ROUNDED_BITS - 1), 0xFFFF << ROUNDED_BITS & 0xFFFF
    return numpy.where(numpy.isfinite(values), (bits + half) & mask, bits).astype("<u2")


def cut(text: str, limit: int) -> str:
    left_out = len(text) - limit
    return text if left_out <= 0 else f"{text[:limit]}\n[… {left_out:,} more characters]"
