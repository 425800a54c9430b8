"""The memory of a cache's slots on the host."""

import numpy as np

from bigembed.kernels.prefetch import LINE_VALUES


def allocated(num_slots: int, width: int) -> np.ndarray:
    """An empty (S, E) float32 array, aligned to cache lines, in huge pages where the kernel gives them.

    NumPy asks for those and torch does not. With 4-KiB pages nearly every row of gigabytes costs a walk of page tables.
    """
    raw = np.empty(num_slots * width + LINE_VALUES, np.float32)
    first = -raw.ctypes.data % (4 * LINE_VALUES) // 4
    return raw[first : first + num_slots * width].reshape(num_slots, width)
