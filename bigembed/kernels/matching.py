"""Where the rows of one ascending list stand in another."""

import numba as nb

ABSENT = -1


@nb.njit(nogil=True, cache=True)
def match(rows_M, others_L, usable_L, at_M):
    """at_M[m] = the l with others_L[l] == rows_M[m] and usable_L[l], or ABSENT; returns how many there are.

    Both lists ascend without duplicates. Where one is far shorter, its rows are searched for in the other, so the cost
    is that of the shorter one.
    """
    count = 0
    low = 0
    for m in range(rows_M.shape[0]):
        row = rows_M[m]
        # Gallop from where the last row was found, then bisect: linear where the lists are alike, logarithmic where
        # this one is short.
        step, high = 1, low
        while high < others_L.shape[0] and others_L[high] < row:
            low = high + 1
            high += step
            step *= 2
        high = min(high, others_L.shape[0])
        while low < high:
            middle = (low + high) >> 1
            if others_L[middle] < row:
                low = middle + 1
            else:
                high = middle
        found = low < others_L.shape[0] and others_L[low] == row and usable_L[low]
        at_M[m] = low if found else ABSENT
        count += found
    return count
