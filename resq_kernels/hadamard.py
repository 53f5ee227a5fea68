"""Hadamard matrices of every order that Llama and Qwen2.5 MLPs need, constructed, not stored.

The transform of size n is H = kron(H_m1, H_m2, ..., H_2^a) / sqrt(n): Paley factors m_i outside
in ascending order, Sylvester's power of two inside and contiguous. csrc/core/hadamard.h constructs
the same matrices; a test compares the two.
"""

from __future__ import annotations

import functools
import itertools

import torch

MAX_PALEY_ORDER = 1024


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, or None."""
    if q < 2:
        return None
    p = next(d for d in itertools.count(2) if q % d == 0 or d * d > q)
    p = p if q % p == 0 else q
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


def _quadratic_character(p: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """chi [q] int64 and the differences a - b [q, q] of GF(p^k), elements as base-p digits."""
    q = p**k
    weights = torch.tensor([p**i for i in range(k)])
    digits = torch.arange(q)[:, None] // weights % p
    differences = ((digits[:, None] - digits[None, :]) % p * weights).sum(-1)
    # x^k = -poly(x): the first monic polynomial of degree k <= 3 without a root is irreducible.
    poly = next(
        c
        for c in itertools.product(range(p), repeat=k)
        if k == 1 or all((x**k + sum(c[i] * x**i for i in range(k))) % p for x in range(p))
    )
    squares = torch.zeros(q, 2 * k - 1, dtype=torch.int64)  # of all elements, as polynomials
    for i, j in itertools.product(range(k), repeat=2):
        squares[:, i + j] += digits[:, i] * digits[:, j]
    for i in range(2 * k - 2, k - 1, -1):
        for j in range(k):
            squares[:, i - k + j] -= squares[:, i] * poly[j]
    chi = torch.full((q,), -1)
    chi[(squares[:, :k] % p * weights).sum(-1)] = 1
    chi[0] = 0
    return chi, differences


def paley_kind(order: int) -> int:
    """1 or 2: which Paley construction gives this order (1 where both do); 0: none."""
    if order % 4:
        return 0
    power = _prime_power(order - 1)
    if power and (order - 1) % 4 == 3 and power[1] <= 3:
        return 1
    q = order // 2 - 1
    power = _prime_power(q)
    return 2 if power and q % 4 == 1 and power[1] <= 3 else 0


@functools.cache
def paley(order: int) -> torch.Tensor:
    """A Hadamard matrix [order, order] of int64 +-1 by Paley's construction I or II.

    Formula: with Q[a, b] = chi(a - b) over GF(q), construction I (q = order - 1 = 3 mod 4):
    I + [[0, 1], [-1, Q]]; construction II (q = order / 2 - 1 = 1 mod 4):
    [[0, 1], [1, Q]] (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]].
    """
    kind = paley_kind(order)
    if not kind:
        raise ValueError(f"no Paley construction of order {order}")
    q = order - 1 if kind == 1 else order // 2 - 1
    power = _prime_power(q)
    assert power is not None
    chi, differences = _quadratic_character(*power)
    core = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    core[0, 1:] = 1
    core[1:, 0] = -1 if kind == 1 else 1
    core[1:, 1:] = chi[differences]
    eye = torch.eye(q + 1, dtype=torch.int64)
    if kind == 1:
        return core + eye
    plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(core, plus) + torch.kron(eye, minus)


def sylvester(order: int) -> torch.Tensor:
    """The Hadamard matrix [order, order] of a power of two, int64 +-1: H[i, j] = (-1)^|i & j|."""
    matrix = torch.ones(1, 1, dtype=torch.int64)
    while len(matrix) < order:
        matrix = torch.kron(matrix, torch.tensor([[1, 1], [1, -1]]))
    return matrix


@functools.cache
def factors(n: int) -> tuple[int, ...]:
    """(m_1 <= m_2 <= ..., 2^a) with product n: the cheapest factorization into Paley orders.

    Cost is the sum of the Paley orders (multiply-adds per element of the dense factors); ties go
    to the lexicographically smallest list. Powers of two give (n,).

    Raises:
        ValueError: no product of Paley orders up to 1024 and a power of two equals n.
    """
    best: tuple[int, tuple[int, ...]] | None = None

    def search(rest: int, smallest: int, chosen: tuple[int, ...]) -> None:
        nonlocal best
        if rest & (rest - 1) == 0:
            candidate = (sum(chosen), (*chosen, rest))
            best = candidate if best is None or candidate < best else best
            return
        for order in range(smallest, min(rest, MAX_PALEY_ORDER) + 1, 4):
            if rest % order == 0 and order & (order - 1) and paley_kind(order):
                search(rest // order, order, (*chosen, order))

    if n >= 1:
        search(n, 12, ())
    if best is None:
        raise ValueError(
            f"hadamard: expected a size 2^a * m with Paley orders m (12, 20, 28, ...), got {n}"
        )
    return best[1]


def matrix(n: int) -> torch.Tensor:
    """The +-1 matrix [n, n] of the transform, int64, without the factor 1/sqrt(n)."""
    *orders, power = factors(n)
    result = torch.ones(1, 1, dtype=torch.int64)
    for order in orders:
        result = torch.kron(result, paley(order))
    return torch.kron(result, sylvester(power))


def transform(x: torch.Tensor) -> torch.Tensor:
    """y = H x / sqrt(n) along the last dimension, in x's own floating dtype."""
    *orders, power = factors(x.shape[-1])
    y = x.reshape(-1, *orders, power)
    for axis, order in enumerate([*orders, power], start=1):
        if order == 1:
            continue
        dense = paley(order) if axis <= len(orders) else None
        if dense is None:
            half = 1
            y = y.reshape(*y.shape[:-1], power)
            while half < power:
                pairs = y.reshape(*y.shape[:-1], power // (2 * half), 2, half)
                a, b = pairs[..., 0, :], pairs[..., 1, :]
                y = torch.stack([a + b, a - b], dim=-2).reshape(y.shape)
                half *= 2
        else:
            y = torch.tensordot(y, dense.to(y), dims=([axis], [1])).movedim(-1, axis)
    scale: float = x.shape[-1] ** -0.5
    return (y * scale).reshape(x.shape)


def transform_low(x: torch.Tensor, k_hi: int, block: int) -> torch.Tensor:
    """The transform of rows whose last `k_hi` columns are kept in INT8: of every `block` columns
    before those, which stay as they are; with block 0, of the whole row."""
    if block == 0:
        return transform(x)
    low, high = x.split([x.shape[-1] - k_hi, k_hi], dim=-1)
    if low.numel() == 0:
        return x
    blocks = transform(low.unflatten(-1, (-1, block)))
    return torch.cat([blocks.flatten(-2), high], dim=-1)
