"""How kernels that allocate nothing are compiled."""

from typing import Any

# Numba counts references to arrays, with atomic instructions, around every view of one and every call of one kernel by
# another. That was three quarters of a token's look-up, and half of a gather. What allocates nothing can do without.
BARE: dict[str, Any] = {"nogil": True, "cache": True, "_nrt": False}

# The same, with NumPy's division: Python's puts a branch for zero into every one, and no loop with it becomes vectors.
BARE_NUMPY: dict[str, Any] = {**BARE, "error_model": "numpy"}
