"""Results as text: one table per operator, and what they come to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import exp, log

from .records import Record, describe_variant

# Below this a launch weighs more than the bytes, and a share of the copy says little.
LARGE_BYTES = 100e6
EMPTY = "empty"  # the empty kernel's name in context_us


def render(records: Sequence[Record]) -> str:
    """Tables by operator, then the summary, then what it was measured on."""
    parts = [_table(group) for group in by_bench(records).values()]
    return "\n\n".join([*parts, summary(records), _measured_on(records)])


def by_bench(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records of each operator, in the order they came."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.bench, []).append(record)
    return groups


def names(records: Iterable[Record], kind: str) -> list[str]:
    """Every name in peers_us or context_us (`kind`), in the order of first appearance."""
    return list(dict.fromkeys(name for record in records for name in getattr(record, kind)))


def summary(records: Sequence[Record]) -> str:
    """Per operator: geometric mean of peer / ours, and the least share of the copy where large."""
    lines = ["summary (ratio: peer's time / ours, geometric mean; above 1 ours is faster)"]
    for bench, group in by_bench(records).items():
        if any(record.flops for record in group):
            lines += [f"  {line}" for line in _products_summary(group)]
            continue
        words = [
            f"{peer} {geomean(ratios):.2f} over {len(ratios)}"
            for peer in names(group, "peers_us")
            if (ratios := [r.peers_us[peer] / r.ours_us for r in group if peer in r.peers_us])
        ]
        shares = [
            (share, record)
            for record in group
            if (share := share_of_limit(record)) and (record.num_bytes or 0) >= LARGE_BYTES
        ]
        if shares:
            least, record = min(shares, key=lambda pair: pair[0])
            words.append(f"least share of the copy from 100 MB on {least:.0%} ({_sizes(record)})")
        lines.append(f"  {bench}: {'; '.join(words) or 'no peer, and nothing of 100 MB'}")
    return "\n".join(lines)


def _products_summary(records: Sequence[Record]) -> Iterator[str]:
    """Per kind of scales: ratios to each other product, to the fastest peer, to the limit."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        cube = f" {record.M}^3" if record.M == record.N == record.K else ""
        groups.setdefault(f"{describe_variant(record.variant)}{cube}", []).append(record)
    for variant, group in groups.items():
        yield f"{group[0].bench} {variant}, cases: {len(group)}"
        others = {name: _times(group, "peers_us", name) for name in names(group, "peers_us")}
        peers = [(min(r.peers_us.values()), r) for r in group if r.peers_us]
        others["the fastest of these"] = peers
        for name in names(group, "context_us"):
            others[f"({name})"] = _times(group, "context_us", name)
        others["limit"] = [(r.limit_us, r) for r in group if r.limit_us is not None]
        for name, times in others.items():
            if times:
                yield f"  {name} {_ratios(times)}"
    slower = [
        (record.ours_us / other.ours_us, record)
        for record in records
        for other in records
        if (record.M, record.N, record.K) == (other.M, other.N, other.K)
        and (record.variant.get("scale"), other.variant.get("scale")) == ("fp32", "ue8m0")
    ]
    if slower:
        most, where = max(slower, key=lambda pair: pair[0])
        mean = geomean([ratio for ratio, _ in slower])
        yield f"{records[0].bench}, ours with fp32 scales / with ue8m0"
        yield f"  {mean:.3f} over {len(slower)}, most {most:.3f} ({_case(where)})"


def _times(records: Sequence[Record], kind: str, name: str) -> list[tuple[float, Record]]:
    return [(getattr(r, kind)[name], r) for r in records if name in getattr(r, kind)]


def _ratios(times: Sequence[tuple[float, Record]]) -> str:
    """Geometric mean of time / ours, the least, and by M where there are several."""
    ratios = [(time_us / record.ours_us, record) for time_us, record in times]
    least, where = min(ratios, key=lambda pair: pair[0])
    text = f"{geomean([ratio for ratio, _ in ratios]):.3f} over {len(ratios)}"
    if len(ratios) > 1:
        text += f", least {least:.3f} ({_case(where)})"
    by_m: dict[int | None, list[float]] = {}
    for ratio, record in ratios:
        by_m.setdefault(record.M, []).append(ratio)
    if len(by_m) > 1:
        text += "; " + ", ".join(f"M={M} {geomean(some):.3f}" for M, some in by_m.items())
    return text


def _case(record: Record) -> str:
    return f"M={record.M} {_n_k(record)}"


def geomean(values: Sequence[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def share_of_limit(record: Record) -> float | None:
    """1 is as fast as a copy of as many bytes."""
    return None if record.limit_us is None else record.limit_us / record.ours_us


def _table(records: Sequence[Record]) -> str:
    """One operator: a block of rows for each set of others that were timed beside ours."""
    blocks: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        others = (*record.peers_us, *record.context_us)
        blocks.setdefault(tuple(name for name in others if name != EMPTY), []).append(record)
    return "\n".join([records[0].bench, *map(_block, blocks.values())])


def _block(records: Sequence[Record]) -> str:
    peers, context = names(records, "peers_us"), names(records, "context_us")
    products = any(record.flops for record in records)
    header = ["variant", "M", "N/K", "ours us", "TB/s", *(["TFLOPS"] if products else [])]
    header += ["limit us", "limit/ours"]
    for peer in peers:
        header += [f"{peer} us", "/ours"]
    header += [f"({name} us)" for name in context]
    rows = [header]
    for record in records:
        tb_per_s = record.num_bytes and f"{record.num_bytes / record.ours_us / 1e6:.2f}"
        share = share_of_limit(record)
        row = [
            describe_variant(record.variant),
            str(record.M or "-"),
            _n_k(record),
            _us(record.ours_us),
            tb_per_s or "-",
            *([f"{record.flops / record.ours_us / 1e6:.1f}" if record.flops else "-"] * products),
            _us(record.limit_us),
            "-" if share is None else f"{share:.0%}",
        ]
        for peer in peers:
            time_us = record.peers_us.get(peer)
            row += [_us(time_us), f"{time_us / record.ours_us:.2f}" if time_us else "-"]
        row += [_us(record.context_us.get(name)) for name in context]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(f"  {line}" for line in lines)


def _us(time_us: float | None) -> str:
    if time_us is None:
        return "-"
    return f"{time_us:.2f}" if time_us < 100 else f"{time_us:.1f}"


def _n_k(record: Record) -> str:
    return "x".join(str(size) for size in (record.N, record.K) if size) or "-"


def _sizes(record: Record) -> str:
    sizes = [f"M={record.M}"] if record.M else []
    return " ".join([*sizes, _n_k(record), describe_variant(record.variant)]).strip()


def _measured_on(records: Sequence[Record]) -> str:
    """Each GPU, date and set of versions once: usually a single line."""
    lines = []
    for record in records:
        versions = " ".join(f"{name} {value or '-'}" for name, value in record.versions.items())
        lines.append(f"{record.gpu}, {record.date}: {versions}")
    return "\n".join(dict.fromkeys(lines))
