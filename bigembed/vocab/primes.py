"""Prime numbers, exact below 2**64: for tables whose sizes must have no common factor."""


def distinct_primes(sizes: list[int]) -> list[int]:
    """For each size the first prime from it on that none before it took."""
    taken: dict[int, None] = {}
    for size in sizes:
        while size in taken or not is_prime(size):
            size += 1
        taken[size] = None
    return list(taken)


def is_prime(n: int) -> bool:
    """Whether n < 2**64 is prime: Miller-Rabin with bases that leave no exception there.

    Source: Sorenson and Webster, "Strong pseudoprimes to twelve prime bases", Mathematics of Computation 86, 2017.
    """
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if n < 2 or any(n % base == 0 for base in bases):
        return n in bases
    twos = ((n - 1) & -(n - 1)).bit_length() - 1
    return all(_passes(n, base, (n - 1) >> twos, twos) for base in bases)


def _passes(n: int, base: int, odd: int, twos: int) -> bool:
    """Whether n is a strong probable prime to a base; n - 1 == odd << twos."""
    x = pow(base, odd, n)
    if x in (1, n - 1):
        return True
    return any((x := x * x % n) == n - 1 for _ in range(twos - 1))
