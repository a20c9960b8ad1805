"""Matrices kept as products B·A: norms, sums and the best truncation, none of which forms the (out, in) matrix.

This module knows linear algebra alone; which matrices are summed with which weights is `aggregation_rules`' to decide.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix ΔW = B·A, with B (out_features, rank), A (rank, in_features); any alpha / rank is folded into B."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        """Number of components, live or dead."""
        return self.B.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the product."""
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Tensor:
        """The product itself, (out_features, in_features)."""
        return self.B @ self.A

    def leading(self, rank: int) -> "LowRank":
        """The first `rank` components, sharing memory."""
        return LowRank(self.B[:, :rank], self.A[:rank])

    def scaled(self, factor: float | Tensor) -> "LowRank":
        """The product times a number, or component by component times a vector (rank,); B carries the factor."""
        return LowRank(self.B * factor, self.A)

    def select(self, components: Tensor) -> "LowRank":
        """The components a boolean mask (rank,) names."""
        return LowRank(self.B[:, components], self.A[components])

    def equals(self, other: "LowRank") -> bool:
        """Whether both factors hold the same numbers."""
        return torch.equal(self.B, other.B) and torch.equal(self.A, other.A)

    def norm(self) -> float:
        """Frobenius norm of the product."""
        return math.sqrt(max(inner(self, self), 0.0))


def inner(left: LowRank, right: LowRank) -> float:
    """Frobenius inner product ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ), in O((out + in)·rank₁·rank₂)."""
    return float(((left.B.T @ right.B).double() * (left.A @ right.A.T).double()).sum())


def stacked(terms: Iterable[LowRank]) -> LowRank:
    """The sum of products as one product: factors side by side, ranks added."""
    terms = list(terms)
    return LowRank(torch.cat([term.B for term in terms], dim=1), torch.cat([term.A for term in terms], dim=0))


def change(start: LowRank, trained: LowRank) -> LowRank:
    """The difference B·A − B⁰·A⁰ as one product.

    With equal ranks it is [B − B⁰ | B⁰]·[A ; A − A⁰]: unlike [B | −B⁰]·[A ; A⁰] it does not subtract large numbers
    to get a small one, so the norm of a small change keeps its digits in float32.
    """
    if start.rank != trained.rank:
        return stacked([trained, start.scaled(-1.0)])
    return LowRank(
        torch.cat([trained.B - start.B, start.B], dim=1),
        torch.cat([trained.A, trained.A - start.A], dim=0),
    )


def truncate(stack: LowRank, energy: float, rank_cap: int) -> tuple[LowRank, float]:
    """The best product of fewer components, and what that costs.

    With thin QR of both factors, B = Q_B·R_B and Aᵀ = Q_A·R_A, the SVD of the small core R_B·R_Aᵀ = X·Σ·Yᵀ gives
    that of B·A; kept are the fewest components that hold `energy` of Σσ², at most `rank_cap` (Eckart and Young 1936).
    Both sides carry √σ, components fall in σ, and the largest entry of every column of B is positive, so equal inputs
    give equal bytes. A stack whose rank reaches min(out, in) is multiplied out instead, which is then cheaper.

    Returns the truncated product (at least one component, even of a zero matrix) and the Frobenius norm of what was
    cut, √Σσ² over the cut components. Factors in half precision are computed in float32.
    """
    if stack.B.dtype not in (torch.float32, torch.float64):
        stack = LowRank(stack.B.float(), stack.A.float())
    if stack.rank >= min(stack.shape):
        return truncate_dense(stack.dense(), energy, rank_cap)
    left, left_core = torch.linalg.qr(stack.B)
    right, right_core = torch.linalg.qr(stack.A.T)
    # The core is small: float64 costs nothing there and keeps the small singular values apart.
    columns, sigma, rows = torch.linalg.svd(left_core.double() @ right_core.double().T, full_matrices=False)
    rank = _kept_rank(sigma, energy, rank_cap, precision=torch.finfo(stack.B.dtype).eps)
    root = sigma[:rank].sqrt()
    kept = LowRank(
        left @ (columns[:, :rank] * root).to(left.dtype),
        (root[:, None] * rows[:rank]).to(left.dtype) @ right.T,
    )
    return _with_fixed_signs(kept), _norm_of(sigma[rank:])


def truncate_dense(matrix: Tensor, energy: float, rank_cap: int) -> tuple[LowRank, float]:
    """`truncate` of a matrix (out_features, in_features) that is already multiplied out."""
    columns, sigma, rows = torch.linalg.svd(matrix, full_matrices=False)
    rank = _kept_rank(sigma.double(), energy, rank_cap, precision=torch.finfo(matrix.dtype).eps)
    root = sigma[:rank].sqrt()
    kept = LowRank(columns[:, :rank] * root, root[:, None] * rows[:rank])
    return _with_fixed_signs(kept), _norm_of(sigma[rank:].double())


def _kept_rank(sigma: Tensor, energy: float, rank_cap: int, precision: float) -> int:
    squares = sigma.square()
    needed = int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1
    live = int((sigma > precision * len(sigma) * sigma[0]).sum())  # the rest is rounding, not directions
    return max(1, min(needed, live, rank_cap))


def _with_fixed_signs(product: LowRank) -> LowRank:
    largest = product.B.abs().argmax(dim=0)
    signs = torch.where(product.B.gather(0, largest[None])[0] < 0, -1.0, 1.0).to(product.B.dtype)
    return LowRank((product.B * signs).contiguous(), (product.A * signs[:, None]).contiguous())


def _norm_of(sigma: Tensor) -> float:
    return float(sigma.square().sum().sqrt())


class RunningSum:
    """A sum of products in bounded memory: factors are stacked until a dense matrix is smaller, then added into one."""

    def __init__(self) -> None:
        self._terms: list[LowRank] = []
        self._dense: Tensor | None = None

    @property
    def rank(self) -> int:
        """Components stacked and not yet multiplied out."""
        return sum(term.rank for term in self._terms)

    def add(self, product: LowRank, weight: float = 1.0) -> None:
        """Add weight·B·A."""
        self._terms.append(product.scaled(weight))
        if self.rank >= min(product.shape):
            self._multiply_out()

    def add_sum(self, other: "RunningSum | LowRank", weight: float) -> None:
        """Add weight times another sum or product."""
        terms, dense = ([other], None) if isinstance(other, LowRank) else (other._terms, other._dense)
        if dense is not None:
            self._multiply_out()
            self._dense = dense * weight if self._dense is None else self._dense.add(dense, alpha=weight)
        for term in terms:
            self.add(term, weight)

    def inner(self, product: LowRank) -> float:
        """Frobenius inner product of the sum so far with a product."""
        found = 0.0 if self._dense is None else float(((product.B.T @ self._dense) * product.A).double().sum())
        return found + sum(inner(term, product) for term in self._terms)

    def truncate(self, energy: float, rank_cap: int) -> tuple[LowRank, float]:
        """`truncate` of the sum so far."""
        if self._dense is None:
            return truncate(stacked(self._terms), energy, rank_cap)
        self._multiply_out()
        return truncate_dense(self._dense, energy, rank_cap)

    def exact(self) -> LowRank:
        """The sum as one product: stacked, or compressed without loss where stacking would exceed min(out, in)."""
        if self._dense is None:
            return stacked(self._terms)
        return self.truncate(1.0, min(self._dense.shape))[0]

    def _multiply_out(self) -> None:
        if not self._terms:
            return
        total = stacked(self._terms)
        self._terms = []
        if self._dense is None:
            self._dense = total.dense()
        else:
            self._dense.addmm_(total.B, total.A)
