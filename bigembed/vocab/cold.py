"""Reading files that are not in the page cache: many pages are asked for before the first is waited for.

One fault after the other would get 18,000 random reads a second from a disk that serves 80,000 at once.
"""

import numpy as np

from bigembed import threads
from bigembed.kernels.token_search import TokenIndex, first_candidates, home_slots
from bigembed.storage.readers import MappedFile

MIN_PLACES = 256  # fewer come soon enough one after the other
MIN_BYTES = 4 << 20  # and so does all of a smaller file
SAMPLES = 8
ADVISED = 4096  # places asked for at once, while as many asked for before are waited for
WINDOW_BYTES = 64 << 20  # of mapped pages meanwhile
SLOT_BYTES = 8


def sample(values_N: np.ndarray) -> np.ndarray:
    """A few of many, or none of a few: then it makes no difference whether they are cold."""
    return values_N[:: len(values_N) // SAMPLES] if len(values_N) >= MIN_PLACES else values_N[:0]


def is_cold(file: MappedFile, offset_N: np.ndarray) -> bool:
    """Whether a sample of places says that most of the pages that will be touched have to be read."""
    return file.size_bytes >= MIN_BYTES and file.is_cold(offset_N)


def bring(file: MappedFile, offset_N: np.ndarray, count: int = 1) -> None:
    """Have `count` bytes from each offset on in the page cache."""
    file.advise(offset_N[:ADVISED], count)
    for start in range(0, len(offset_N), ADVISED):
        stop = min(start + ADVISED, len(offset_N))
        file.advise(offset_N[stop : stop + ADVISED], count)
        file.bytes_B[offset_N[start:stop]].sum()
        file.touched(stop - start)
        if file.mapped_bytes > WINDOW_BYTES:
            file.trim()  # they stay in the page cache


def homes(index: TokenIndex, hash_M: np.ndarray) -> np.ndarray:
    """int64 (M,): byte offsets of the slots where searches begin."""
    home_M = np.empty(len(hash_M), np.int64)
    threads.run(home_slots, len(hash_M), hash_M, index.num_homes, home_M)
    return home_M * SLOT_BYTES


def candidates(index: TokenIndex, hash_M: np.ndarray) -> np.ndarray:
    """int64 (M,): the first entry of each search whose bytes will be compared, or ABSENT."""
    entry_M = np.empty(len(hash_M), np.int64)
    threads.run(first_candidates, len(hash_M), hash_M, index, entry_M)
    return entry_M
