"""What other models of text need for the same lines: general compressors and an n-gram model.

Both see the training lines first and are charged for the held-out lines alone, every line's end
included; bits are per byte, ends counted.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Sequence

END = b"\n"
_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 9, mtime=0),
    "bzip2": lambda data: bz2.compress(data, 9),
    "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}


def compressor_bits(training: Sequence[bytes], held_out: Sequence[bytes]) -> dict[str, float]:
    """(size of both compressed together − of the training lines alone) · 8 / held-out bytes."""
    before = b"".join(line + END for line in training)
    after = b"".join(line + END for line in held_out)
    return {
        name: 8.0 * (len(compress(before + after)) - len(compress(before))) / len(after)
        for name, compress in _COMPRESSORS.items()
    }


class NGram:
    """Interpolated n-gram model of the bytes of lines, smoothed after Witten and Bell.

        p(s | h) = (c(h s) + d(h) · p(s | h′)) / (c(h) + d(h)),   p(s | no context) with p = 1/256
                                                                  below it

    c counts occurrences, d(h) the different bytes seen after h, and h′ is h without its first
    byte. It sums to one over all 256 bytes after every h, the newline that ends a line included.

    Args:
        lines: to count in.
        order: bytes of the longest context; a line begins with the newline of the one before.
    Witten & Bell 1991, doi:10.1109/18.87000, method C.
    """

    def __init__(self, lines: Iterable[bytes], order: int = 5) -> None:
        if order < 0:
            raise ValueError(f"NGram: order must be 0 or more; got {order}.")
        self.order = order
        self._counts: dict[bytes, dict[int, int]] = {}
        for line in lines:
            text = END + line + END
            for place in range(1, len(text)):
                symbol = text[place]
                for start in range(max(0, place - order), place + 1):
                    seen = self._counts.setdefault(text[start:place], {})
                    seen[symbol] = seen.get(symbol, 0) + 1
        self._totals = {context: sum(seen.values()) for context, seen in self._counts.items()}

    def probability(self, context: bytes, symbol: int) -> float:
        """p(symbol | context), of which the last `order` bytes count."""
        p = 1.0 / 256.0
        last = context[max(0, len(context) - self.order) :]
        for start in range(len(last), -1, -1):
            seen = self._counts.get(last[start:])
            if seen is None:
                break
            total = self._totals[last[start:]]
            p = (seen.get(symbol, 0) + len(seen) * p) / (total + len(seen))
        return p

    def bits(self, lines: Iterable[bytes]) -> float:
        """Bits per byte of lines, ends counted."""
        bits, count = 0.0, 0
        for line in lines:
            text = END + line + END
            for place in range(1, len(text)):
                context = text[max(0, place - self.order) : place]
                bits -= math.log2(self.probability(context, text[place]))
            count += len(text) - 1
        return bits / count
