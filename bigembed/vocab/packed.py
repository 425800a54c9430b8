"""PackedTokens: many tokens as one array of bytes, and where each begins. What kernels, files and readers exchange."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numba as nb
import numpy as np

from bigembed import threads
from bigembed.errors import InvalidArgument
from bigembed.kernels.token_search import copy_ranges
from bigembed.kernels.tokens import hash_tokens

Token = str | bytes


@dataclass(frozen=True)
class PackedTokens:
    """M tokens; token m is the bytes `bytes_B[start_M1[m] : start_M1[m + 1]]`.

    Args:
        bytes_B: uint8, all tokens one after the other.
        start_M1: int64 (M + 1,), ascending; the first need not be 0.
    """

    bytes_B: np.ndarray
    start_M1: np.ndarray

    @classmethod
    def of(cls, tokens: "PackedTokens | Token | Iterable[Token]") -> "PackedTokens":
        """Pack tokens; text becomes UTF-8 (a lone surrogate the byte it escapes), bytes stay as they are.

        Raises:
            InvalidArgument: something is neither text nor bytes; names it and its position.
        """
        if isinstance(tokens, PackedTokens):
            return tokens
        all_tokens = listed(tokens)
        packed = _pack_joined(all_tokens)
        return _pack_each(all_tokens) if packed is None else packed

    @classmethod
    def joined(cls, parts: "Sequence[PackedTokens]") -> "PackedTokens":
        """The tokens of all parts, one after the other; a single part as it is."""
        kept = [part for part in parts if len(part)] or list(parts[:1])
        if len(kept) == 1:
            return kept[0]
        bytes_B = np.concatenate([part.bytes_B[part.start_M1[0] : part.start_M1[-1]] for part in kept])
        start_M1 = np.zeros(sum(map(len, kept)) + 1, np.int64)
        np.cumsum(np.concatenate([part.length_M for part in kept]), out=start_M1[1:])
        return cls(bytes_B, start_M1)

    def checked(self) -> "PackedTokens":
        """The same tokens as kernels need them: contiguous, and inside the bytes.

        Raises:
            InvalidArgument: they are not.
        """
        bytes_B, start_M1 = np.ascontiguousarray(self.bytes_B), np.ascontiguousarray(self.start_M1)
        fits = bytes_B.dtype == np.uint8 and bytes_B.ndim == 1 and start_M1.dtype == np.int64 and start_M1.ndim == 1
        if not fits or not len(start_M1) or start_M1[0] < 0 or start_M1[-1] > len(bytes_B):
            raise InvalidArgument("packed tokens must be uint8 bytes, and int64 starts (M + 1,) inside them.")
        if (start_M1[1:] < start_M1[:-1]).any():
            raise InvalidArgument("packed tokens must begin at ascending places.")
        return PackedTokens(bytes_B, start_M1).sealed()

    def sealed(self) -> "PackedTokens":
        """The same tokens in views that may not be written to, so that each kernel is compiled only once."""
        return PackedTokens(_read_only(self.bytes_B), _read_only(self.start_M1))

    def __len__(self) -> int:
        return len(self.start_M1) - 1

    def __getitem__(self, m: int) -> bytes:
        if not -len(self) <= m < len(self):
            raise IndexError(m)
        m %= len(self)
        return self.bytes_B[self.start_M1[m] : self.start_M1[m + 1]].tobytes()

    @property
    def length_M(self) -> np.ndarray:  # noqa: N802 - the dimension suffix
        """int64: bytes of each token."""
        return np.diff(self.start_M1)

    def between(self, start: int, stop: int) -> "PackedTokens":
        """Tokens start to stop - 1; shares the bytes."""
        return PackedTokens(self.bytes_B, self.start_M1[start : max(start, stop) + 1])

    def select(self, index_N: np.ndarray) -> "PackedTokens":
        """The tokens at some positions, copied."""
        start_N1 = np.zeros(len(index_N) + 1, np.int64)
        length_N = self.start_M1[index_N + 1] - self.start_M1[index_N]
        np.cumsum(length_N, out=start_N1[1:])
        out_B = np.empty(start_N1[-1], np.uint8)
        threads.run(
            copy_ranges, len(index_N), _read_only(self.bytes_B), self.start_M1[index_N], length_N, start_N1, out_B
        )
        return PackedTokens(out_B, start_N1)

    def to_list(self) -> list[bytes]:
        whole = self.bytes_B.tobytes()
        edges = self.start_M1.tolist()
        return [whole[a:b] for a, b in pairwise(edges)]


def hashes(tokens: PackedTokens, seed: int) -> np.ndarray:
    """uint64 (M,): the hash of each token; see bigembed.kernels.tokens."""
    hash_M, sealed = np.empty(len(tokens), np.uint64), tokens.sealed()
    threads.run(hash_tokens, len(tokens), sealed.bytes_B, sealed.start_M1, hash_M, np.uint64(seed))
    return hash_M


def listed(tokens: Token | Iterable[Token]) -> list[Token]:
    """The tokens as a list; one token alone is a list of one."""
    if isinstance(tokens, str | bytes):
        return [tokens]
    return tokens if isinstance(tokens, list) else list(tokens)


def packed_slices(tokens: PackedTokens | Token | Iterable[Token], count: int) -> Iterator[PackedTokens]:
    """The tokens packed and checked, `count` at a time; an iterator is never held whole."""
    if isinstance(tokens, PackedTokens):
        whole = tokens.checked()
        for start in range(0, len(whole), count):
            yield whole.between(start, min(start + count, len(whole)))
    elif isinstance(tokens, str | bytes | list):
        all_tokens = listed(tokens)
        for start in range(0, len(all_tokens), count):
            yield PackedTokens.of(all_tokens[start : start + count]).checked()
    else:
        source = iter(tokens)
        while part := list(islice(source, count)):
            yield PackedTokens.of(part).checked()


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that may not be written to."""
    view = array.view()
    view.flags.writeable = False
    return view


def _pack_joined(listed: Sequence[Token]) -> PackedTokens | None:
    """The fast way for a list of only text, or only bytes, without line ends: join once, then find the ends.

    None where it does not apply.
    """
    try:
        if len(listed) and isinstance(listed[0], bytes):
            joined = b"\n".join(listed)  # type: ignore[arg-type]
        else:
            joined = "\n".join(listed).encode("utf-8", "surrogateescape")  # type: ignore[arg-type]
    except (TypeError, UnicodeEncodeError):
        return None
    joined_B = np.frombuffer(joined, np.uint8)
    start_M1 = np.empty(len(listed) + 1, np.int64)
    bytes_B = np.empty(max(0, len(joined_B) - len(listed) + 1), np.uint8)
    whole = cut_at_line_ends(joined_B, len(listed), bytes_B, start_M1)
    return PackedTokens(bytes_B, start_M1) if whole else None


@nb.njit(nogil=True, cache=True)
def cut_at_line_ends(joined_B, count, bytes_B, start_M1):
    """Copy `count` tokens that line ends separate, without these; False where there are more or fewer."""
    start_M1[0] = 0
    if count == 0:
        return True
    at, m = 0, 1
    for b in range(joined_B.shape[0]):
        byte = joined_B[b]
        if byte == 10:
            if m == count:
                return False
            start_M1[m] = at
            m += 1
        else:
            if at == bytes_B.shape[0]:
                return False
            bytes_B[at] = byte
            at += 1
    start_M1[m] = at
    return m == count


def _pack_each(listed: Sequence[Token]) -> PackedTokens:
    packed = []
    for m, token in enumerate(listed):
        if not isinstance(token, str | bytes):
            raise InvalidArgument(f"tokens hold {token!r} (at position {m}); a token is text or bytes.")
        try:
            packed.append(token.encode("utf-8", "surrogateescape") if isinstance(token, str) else token)
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"token {token!r} (at position {m}) is no valid text: {error.reason}.") from error
    start_M1 = np.zeros(len(packed) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, packed), np.int64, len(packed)), out=start_M1[1:])
    return PackedTokens(np.frombuffer(b"".join(packed), np.uint8), start_M1)
