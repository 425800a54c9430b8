"""Rows as "torch": a state dict {"weight": tensor} as torch.save writes it, streamed without holding the tensor.

torch.save needs the whole tensor in memory. Its zip format is written here instead: `data.pkl`, a pickle that names
torch's own classes and the tensor's shape, and `data/0`, the numbers, on a border of 64 bytes so that they can be
mapped. `torch.load(path, weights_only=True, mmap=True)` reads it, and `nn.Embedding.load_state_dict` takes it.

Source: torch/serialization.py (_save) and caffe2/serialize/inline_container.cc of PyTorch.
"""

import pickle
import struct

import numpy as np

from bigembed.convert.writers.narrow import ITEM_BYTES
from bigembed.convert.writers.writer import Writer
from bigembed.convert.writers.zip_file import BORDER_BYTES, StoredZip
from bigembed.vocab.packed import PackedTokens

_STORAGES = {"float32": b"FloatStorage", "float16": b"HalfStorage", "bfloat16": b"BFloat16Storage"}
_EMPTY_DICT = pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE


def state_dict_pickle(name: str, dtype: str, num_rows: int, dim: int) -> bytes:
    """The pickle of OrderedDict({name: a contiguous CPU tensor of this shape over storage "0"})."""
    storage = (
        pickle.MARK
        + _text("storage")
        + pickle.GLOBAL
        + b"torch\n"
        + _STORAGES[dtype]
        + b"\n"
        + _text("0")
        + _text("cpu")
        + _integer(num_rows * dim)
        + pickle.TUPLE
        + pickle.BINPERSID
    )
    shape = _integer(num_rows) + _integer(dim) + pickle.TUPLE2
    stride = _integer(dim) + _integer(1) + pickle.TUPLE2
    arguments = storage + _integer(0) + shape + stride + pickle.NEWFALSE + _EMPTY_DICT
    tensor = pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + pickle.MARK + arguments + pickle.TUPLE
    return pickle.PROTO + b"\2" + _EMPTY_DICT + _text(name) + tensor + pickle.REDUCE + pickle.SETITEM + pickle.STOP


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(number: int) -> bytes:
    if number < 1 << 31:
        return pickle.BININT + struct.pack("<i", number)
    encoded = pickle.encode_long(number)
    return pickle.LONG1 + struct.pack("<B", len(encoded)) + encoded


class TorchWriter(Writer):
    """Writes "torch"."""

    format = "torch"
    default_tensor = "weight"

    def _begin(self) -> None:
        dtype = self.options.dtype
        self._zip = StoredZip(self._file(self.target))
        self._zip.add("archive/data.pkl", state_dict_pickle(self.tensor, dtype, self.num_rows, self.dim))
        self._zip.add("archive/.format_version", b"1")
        self._zip.add("archive/.storage_alignment", str(BORDER_BYTES).encode())
        self._zip.add("archive/byteorder", b"little")
        self._zip.begin("archive/data/0", self.num_rows * self.dim * ITEM_BYTES[dtype])

    def _append(self, values_MD: np.ndarray, tokens: PackedTokens | None) -> None:
        self._zip.write(self._narrowed(values_MD))

    def _end(self) -> None:
        self._zip.add("archive/version", b"3\n")
        self._zip.finish()
