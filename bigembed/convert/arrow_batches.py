"""Record batches of Parquet and Arrow files, in slices of bounded size, with bounded memory behind them."""

from collections.abc import Iterator
from typing import Any

from bigembed.convert.libraries import load_library

MAPPED_BYTES = 64 << 20  # pages of a mapped file that stay mapped at most, about
PAGE_BUFFER_BYTES = 1 << 20


class ParquetBatches:
    """Batches of a Parquet file. Pages are read as they are needed; pyarrow's default would hold whole row groups."""

    def __init__(self, path: str) -> None:
        parquet = load_library("pyarrow.parquet", "Parquet")
        self._file = parquet.ParquetFile(path, buffer_size=PAGE_BUFFER_BYTES, pre_buffer=False)
        self.schema = self._file.schema_arrow
        self.num_rows: int | None = self._file.metadata.num_rows
        self.lacks_end = False

    def read(self, columns: list[str], rows: int, row_bytes: int) -> Iterator[Any]:
        """At most `rows` rows at a time of some columns."""
        yield from self._file.iter_batches(batch_size=rows, columns=columns, use_threads=False)

    def close(self) -> None:
        self._file.close()


class IpcBatches:
    """Batches of an Arrow IPC file or stream, mapped, and mapped anew before too much of it counts as memory.

    How many rows there are is not said anywhere. A compressed batch is unpacked whole.
    """

    def __init__(self, path: str) -> None:
        import pyarrow as pa

        self._path = path
        self.lacks_end = False  # of a stream: nothing says that all batches were there
        with open(path, "rb") as file:
            self._is_stream = file.read(6) != b"ARROW1"
        self._open()
        self.schema = self._reader.schema
        self.num_rows: int | None = None
        # A reader that begins in the middle of a stream has not seen the dictionaries before.
        has_dictionary = any(pa.types.is_dictionary(field.type) for field in self.schema)
        self._may_reopen = not (self._is_stream and has_dictionary)

    def _open(self) -> None:
        import pyarrow as pa

        self._map = pa.memory_map(self._path)
        self._begin = self._map.read_buffer(1).address
        self._end = self._begin + self._map.size()
        self._map.seek(0)
        self._reader = (pa.ipc.open_stream if self._is_stream else pa.ipc.open_file)(self._map)

    def read(self, columns: list[str], rows: int, row_bytes: int) -> Iterator[Any]:
        """At most `rows` rows at a time of some columns."""
        self._open()
        position = self._map.tell() if self._is_stream else 0
        start, mapped_bytes = 0, 0
        batch, following = self._batch(position)
        while batch is not None:
            while start < batch.num_rows and mapped_bytes < MAPPED_BYTES:
                yield batch.select(columns).slice(start, rows)
                start += rows
                mapped_bytes += rows * row_bytes if self._is_mapped(batch, columns) else 0
            if start >= batch.num_rows:
                position, start = following, 0
            if mapped_bytes >= MAPPED_BYTES:
                batch, mapped_bytes = None, 0
                if self._may_reopen:
                    self._open()
            batch, following = self._batch(position)

    def _batch(self, position: Any) -> tuple[Any, Any]:
        """The batch at a position (a number, or a byte of a stream) and the position after it; None at the end."""
        if not self._is_stream:
            if position >= self._reader.num_record_batches:
                return None, position
            return self._reader.get_batch(position), position + 1
        self._map.seek(position)
        try:
            return self._reader.read_next_batch(), self._map.tell()
        except StopIteration:
            self.lacks_end = self._map.tell() == position
            return None, position

    def _is_mapped(self, batch: Any, columns: list[str]) -> bool:
        """The values lie in the map, not in memory of their own (where a compressed batch was unpacked to)."""
        buffers = [each for each in batch.column(columns[0]).buffers() if each is not None]
        return bool(buffers) and self._begin <= buffers[-1].address < self._end

    def close(self) -> None:
        self._reader = None
        self._map.close()
