"""Updates as bytes: what travels is the change against the start, which is small, so rounding it costs little.

What rounding and truncation left out of one round's bytes, the residual, is kept at the edge and added to the next
round's change (error feedback, 1809.07599), so that nothing an edge learned is lost for good.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedpipe_core.adapters import Adapter
from fedpipe_core.config_base import WireDtype
from fedpipe_core.low_rank import LowRank, change, stacked, truncate
from fedpipe_core.wire import (
    Content,
    StoredFactors,
    decode_any,
    encode_adapter,
    is_plain,
    malformed_is_integrity_error,
)

# Directions in which a factor is this much weaker than in its strongest take up no residual: they would grow too far.
WEAKEST_SHARE = 0.1


def encode_update(
    trained: Adapter, start: Adapter, dtype: WireDtype, residual: Adapter | None = None, energy: float = 1.0
) -> tuple[bytes, Adapter | None]:
    """The update as bytes, and the residual to hand in next round (None for fp32 and bf16, which leave nothing out).

    With `energy` 1 the changes of the factors are sent, B − B⁰ and A − A⁰, whatever rule combines them; where every A
    stayed as it was, as rule ffa has it, B − B⁰ alone. Below 1 it is
    the leading singular directions of B·A − B⁰·A⁰ + residual: the fewest that hold `energy` of its Σσ², never more
    than the trained rank. They suit the rules that combine products: delta_svd, flexlora and flora_stack.

    The residual is kept as products, cut to twice the trained rank: the factors' basis changes at every aggregation.
    """
    left = residual.factors if residual else {}
    head = {name: trained.head[name] - start.head[name] for name in start.head}
    if residual:
        head = {name: value + residual.head[name] for name, value in head.items()}
    wanted = {
        m: stacked([change(start.factors[m], factors), *([left[m]] if m in left else [])])
        for m, factors in trained.factors.items()
    }
    if energy < 1:
        sent = {m: truncate(factors, energy, trained.factors[m].rank)[0] for m, factors in wanted.items()}
    else:
        sent = {m: _factor_change(start.factors[m], f, left.get(m)) for m, f in trained.factors.items()}
    data = encode_adapter(Adapter(sent, head), dtype, "directions" if energy < 1 else _content(sent))
    if is_plain(dtype) and energy == 1:
        return data, None
    return data, _residual(Adapter(wanted, head), decode_any(data), start, trained.ranks)


def decode_update(data: bytes, start: Adapter) -> Adapter:
    """What the edge trained, given the start it trained from: the start plus the change.

    Of directions the factors are the start's own with the change's behind them, [B⁰ | P]·[A⁰ ; Q].
    Raises IntegrityError on bytes `encode_update` cannot have written from this start.
    """
    content, changes = decode_any(data)
    with malformed_is_integrity_error(f"update of {len(data)} bytes"):
        _require_changes(content)
        factors = {m: _changed(start.factors[m], changes.factors[m], content) for m in changes.factors}
        return Adapter(factors, _changed_head(start.head, changes.head))


def open_update(path: Path, start: Adapter) -> Adapter:
    """`decode_update` of a file, read module by module at each use. Raises IntegrityError, now or at that use."""
    changes = StoredFactors(path)
    with malformed_is_integrity_error(f"update file {path.name}"), changes.opened() as stored:
        _require_changes(stored.content)
        return Adapter(_ChangedFactors(start.factors, changes), _changed_head(start.head, stored.head()))


class _ChangedFactors(Mapping[str, LowRank]):
    """start + change for each module of a stored update, computed at each use."""

    def __init__(self, start: Mapping[str, LowRank], changes: StoredFactors) -> None:
        self._start, self._changes = start, changes

    def __getitem__(self, module: str) -> LowRank:
        with malformed_is_integrity_error(f"update of {module}"):
            return _changed(self._start[module], self._changes[module], self._changes.content)

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)


def _content(changes: Mapping[str, LowRank]) -> Content:
    return "factor_changes" if any(bool(factors.A.any()) for factors in changes.values()) else "left_factor_changes"


def _factor_change(start: LowRank, trained: LowRank, left: LowRank | None) -> LowRank:
    """Change of both factors, after moving them so that their product takes up what it can of the residual E.

    δB = E·A⁺ covers E within the rows of A, δA = B⁺·(E − δB·A) the rest within the columns of B; the remainder stays
    residual. An A that was kept frozen stays so.
    """
    if left is None:
        return LowRank(trained.B - start.B, trained.A - start.A)
    step_B = left.B @ (left.A @ torch.linalg.pinv(trained.A, rtol=WEAKEST_SHARE))
    B, A = trained.B + step_B, trained.A
    if not torch.equal(trained.A, start.A):
        rest = stacked([left, LowRank(-step_B, trained.A)])
        A = A + (torch.linalg.pinv(trained.B, rtol=WEAKEST_SHARE) @ rest.B) @ rest.A
    return LowRank(B - start.B, A - start.A)


def _residual(wanted: Adapter, sent: tuple[Content, Adapter], start: Adapter, ranks: Mapping[str, int]) -> Adapter:
    """What the bytes leave out of the wanted change."""
    content, changes = sent
    factors = {}
    for module, product in wanted.factors.items():
        got = changes.factors[module]
        if content != "directions":
            got = change(start.factors[module], _changed(start.factors[module], got, content))
        factors[module] = truncate(stacked([product, got.scaled(-1.0)]), 1.0, 2 * ranks[module])[0]
    return Adapter(factors, {name: value - changes.head[name] for name, value in wanted.head.items()})


def _changed(start: LowRank, changed: LowRank, content: Content) -> LowRank:
    if content == "directions":
        _same_shape(start.shape, changed.shape)
        return stacked([start, changed])
    _same_shape((*start.shape, start.rank), (*changed.shape, changed.rank))
    return LowRank(start.B + changed.B, start.A + changed.A)


def _changed_head(start: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    _same_shape(tuple(sorted(start)), tuple(sorted(changed)))
    for name, value in start.items():
        _same_shape(tuple(value.shape), tuple(changed[name].shape))
    return {name: value + changed[name] for name, value in start.items()}


def _require_changes(content: Content) -> None:
    if content == "adapter":
        raise ValueError("it holds an adapter, not the changes of one")


def _same_shape(needed: tuple[object, ...], found: tuple[object, ...]) -> None:
    if needed != found:
        raise ValueError(f"it holds {found}, while its start has {needed}")
