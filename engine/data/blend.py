"""Mixing corpora: which corpus sample k comes from, as a function of k, with nothing stored.

The corpora are the leaves of a binary tree. A node that has handed out n samples has given round(n * left / whole) of
them to its left child and the rest to its right, so every prefix of the sequence has the asked proportions. The
rounding errors of a leaf's ancestors add up, each scaled by the leaf's weight over the ancestor's:
    |count - k * weight| <= 1/2 * (1 + sum of leaf / ancestor over the ancestors below the root).
With two levels (up to four corpora) that is always below 1. With more, the tree is chosen to keep it low: Huffman's,
and up to sixteen corpora the best that exchanges find (`Blend.error_bound`: below 1 for balanced weights, below 1.3 for
very uneven ones). It never grows with k.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from engine.data.indexed import bare_prefix, one_corpus_twice
from engine.errors import UserError

_IMPROVED = 16  # corpora; the time to find a better tree grows with the fourth power of their number
_WHOLE = 1 << 30  # weights are whole numbers up to this sum, so that products stay inside int64


@dataclass(frozen=True, kw_only=True)
class _Node:
    """A leaf (its corpus' number) or an inner node (its two children); weight is the sum of its leaves'."""

    weight: int
    corpus: int = -1
    children: tuple[_Node, ...] = ()


class Blend:
    """Locates sample k: its corpus, and its number within that corpus."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        """weights: above 0, of any sum."""
        self.weights = _whole_numbers(weights)
        root = _huffman(self.weights)
        self._root = _improve(root) if len(self.weights) <= _IMPROVED else root
        self.error_bound = (1 + _spread(self._root)) / 2

    def locate(self, ks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The corpus of each sample and its number there: int64 [n] -> int64 [n], int64 [n]."""
        source, index = np.empty(len(ks), np.int64), np.empty(len(ks), np.int64)
        pending = [(self._root, np.arange(len(ks)), np.asarray(ks, dtype=np.int64))]
        while pending:
            node, where, n = pending.pop()
            if not node.children:
                source[where], index[where] = node.corpus, n
                continue
            left, right = node.children
            before = _share(n, left.weight, node.weight)
            goes_left = _share(n + 1, left.weight, node.weight) > before
            pending.append((left, where[goes_left], before[goes_left]))
            pending.append((right, where[~goes_left], (n - before)[~goes_left]))
        return source, index


def parse_spec(spec: str) -> list[tuple[str, Fraction]]:
    """ "PREFIX" or "P1:0.7,P2:0.3" as (prefix, weight) pairs. Raises UserError for anything else."""
    if os.path.exists(f"{spec}.idx") or not (":" in spec or "," in spec):
        if not spec.strip():
            raise UserError("the corpus is empty text; give a prefix, or a blend such as P1:0.7,P2:0.3")
        return [(bare_prefix(spec), Fraction(1))]
    named: list[tuple[str, Fraction]] = []
    for item in spec.split(","):
        prefix, colon, weight = item.strip().rpartition(":")
        prefix = bare_prefix(prefix)
        if not colon or not prefix:
            raise UserError(f'"{item}" in the blend "{spec}" is not PREFIX:WEIGHT; write P1:0.7,P2:0.3')
        if prefix in (other for other, _ in named):
            raise UserError(f'{prefix} is named twice in the blend "{spec}"; add its weights up')
        named.append((prefix, _weight(weight, prefix)))
    twice = one_corpus_twice([prefix for prefix, _ in named])
    if twice is not None:
        raise UserError(f'{twice[0]} and {twice[1]} in the blend "{spec}" are one corpus; name it once and add its '
                        "weights up")
    return named


def _weight(text: str, prefix: str) -> Fraction:
    try:
        rounded = float(text)
        if not math.isfinite(rounded):  # also keeps "1/3" and huge exponents out of Fraction
            raise ValueError
        weight = Fraction(text) if rounded else Fraction(0)  # nor does 1e-999999999 get there
    except (ValueError, OverflowError):
        raise UserError(f'the weight "{text}" of {prefix} is not a number; write P1:0.7,P2:0.3') from None
    if weight <= 0:
        raise UserError(f"the weight {text} of {prefix} must be above 0; leave a corpus out to not use it")
    return weight


def _whole_numbers(weights: Sequence[Fraction]) -> list[int]:
    """The same proportions in whole numbers: exact when their sum fits, else rounded to a billionth, at least 1."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    divisor = math.gcd(*whole)
    total = sum(whole) // divisor
    if total <= _WHOLE:
        return [weight // divisor for weight in whole]
    return [max(1, round(Fraction(weight // divisor, total) * (_WHOLE - len(whole)))) for weight in whole]


def _share(n: np.ndarray, part: int, whole: int) -> np.ndarray:
    """round(n * part / whole) without overflow: whole rounds first, then the rest."""
    rounds, rest = np.divmod(n, whole)
    return rounds * part + (2 * rest * part + whole) // (2 * whole)


def _huffman(weights: Sequence[int]) -> _Node:
    """Joins the two lightest until one is left."""
    number = itertools.count()  # breaks ties, so that nodes are never compared
    heap = [(w, next(number), _Node(weight=w, corpus=corpus)) for corpus, w in enumerate(weights)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, _, first), (_, _, second) = heapq.heappop(heap), heapq.heappop(heap)
        joined = _join(second, first)
        heapq.heappush(heap, (joined.weight, next(number), joined))
    return heap[0][2]


def _join(left: _Node, right: _Node) -> _Node:
    return _Node(weight=left.weight + right.weight, children=(left, right))


def _spread(node: _Node, ancestors: tuple[int, ...] = ()) -> float:
    """The largest sum, over the leaves, of leaf weight / ancestor weight for the ancestors below the root."""
    if not node.children:
        return sum(node.weight / ancestor for ancestor in ancestors[1:])
    return max(_spread(child, (*ancestors, node.weight)) for child in node.children)


def _improve(root: _Node) -> _Node:
    """Swaps subtrees while that lowers the error bound and it is not below 1 yet."""
    best = _spread(root)
    while best >= 1.0:
        trees = [
            _exchange(root, a, b)
            for a, b in itertools.combinations(_paths(root), 2)
            if a != b[: len(a)] and b != a[: len(b)]
        ]
        tree = min(trees, key=_spread)
        if _spread(tree) >= best - 1e-12:
            break
        root, best = tree, _spread(tree)
    return root


def _paths(node: _Node, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    below = [_paths(child, (*path, side)) for side, child in enumerate(node.children)]
    return [path, *itertools.chain.from_iterable(below)]


def _exchange(root: _Node, a: tuple[int, ...], b: tuple[int, ...]) -> _Node:
    first, second = _at(root, a), _at(root, b)
    return _put(_put(root, a, second), b, first)


def _at(node: _Node, path: tuple[int, ...]) -> _Node:
    for side in path:
        node = node.children[side]
    return node


def _put(node: _Node, path: tuple[int, ...], new: _Node) -> _Node:
    if not path:
        return new
    children = list(node.children)
    children[path[0]] = _put(children[path[0]], path[1:], new)
    return _join(*children)
