"""What came of a question: rows to keep, each with all that it was measured on, and what changed between two runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from .cuda import CALLS
from .harness import EVERY, Case, Outcome, Samples, dtype_name
from .machine import Peak, Peaks, product_key
from .stats import FEWEST, geometric_mean, pooled_ratio, quartiles

FORMAT = 2  # of the JSON; to be raised when a reader of the old one would misread the new

Record = dict[str, Any]


class ReportError(ValueError):
    """A file that is not a report, in one sentence with the cure."""


@dataclass
class Measured:
    """A case, and what each process had to say of it."""

    case: Case
    outcomes: list[Outcome] = field(default_factory=list)

    def peers(self) -> list[str]:
        """By name: those of the case, or EVERY where nothing could be compared."""
        named = dict.fromkeys(
            name
            for outcome in self.outcomes
            for name in chain(outcome.samples, outcome.missing, outcome.errors)
            if name != EVERY
        )
        return list(named) or [EVERY]

    def error(self, peer: str) -> str | None:
        for outcome in self.outcomes:
            if error := outcome.errors.get(peer) or outcome.errors.get(EVERY):
                return error
        return None

    def missing(self, peer: str) -> str | None:
        return next((outcome.missing[peer] for outcome in self.outcomes if peer in outcome.missing), None)

    def samples(self, peer: str) -> list[Samples]:
        """Of each process; empty where the row is none of figures."""
        if self.missing(peer) is not None or self.error(peer) is not None:
            return []
        return [outcome.samples[peer] for outcome in self.outcomes]

    def complete(self) -> bool:
        """Whether there are rounds enough for an interval, which a run that is cut short may not have."""
        pooled = (sum(len(samples.ratios) for samples in self.samples(peer)) for peer in self.peers())
        return bool(self.outcomes) and all(rounds == 0 or rounds >= FEWEST for rounds in pooled)

    def fastest_ns(self) -> float | None:
        """The shortest median call of any side."""
        medians = [
            quartiles([value for samples in taken for value in getattr(samples, side)]).median
            for peer in self.peers()
            if (taken := self.samples(peer))
            for side in ("ours", "peer")
        ]
        return min(medians, default=None)


def make_records(about: Record, measured: Sequence[Measured], peaks: Peaks, machine: Record) -> list[Record]:
    """A record of each case and peer, as JSON holds it. Times are microseconds per call or, with steps, per step.

    No share of a peak is over 100%: a case that beats the measured peak becomes the peak, and says so.
    """
    timed = about["unit"] == "us"
    if timed:
        for each in measured:
            raise_peaks(each, peaks)
    return [
        {**about, **to_record(each, peer, peaks, timed), "machine": machine}
        for each in measured
        for peer in each.peers()
    ]


def raise_peaks(measured: Measured, peaks: Peaks) -> None:
    case, fastest = measured.case, measured.fastest_ns()
    if fastest is None:
        return
    source, step_ns = f"the case {case.name}", fastest / case.steps
    key, traffic = product_key(case), peaks.traffic[case.processor]
    peaks.products[key] = peaks.products[key].raised_to(Peak(case.flops / step_ns, source))
    size = min((size for size in traffic if size >= case.bytes), default=max(traffic))
    if case.bytes / step_ns > peaks.bandwidth(case.processor, case.bytes).rate:
        traffic[size] = Peak(case.bytes / step_ns, source)


def to_record(measured: Measured, peer: str, peaks: Peaks, timed: bool) -> Record:
    case = measured.case
    record: Record = {
        "case": case.name,
        "mode": case.mode,
        "sizes": case.sizes,
        "dtype": dtype_name(case.dtype),
        "threads": case.threads,
        "place": case.place,
        "cache": "warm" if case.way == CALLS else "flushed before each call",
        "peer": peer,
        "flops": case.flops,
        "bytes": case.bytes,
        "steps": case.steps,
        "processes": len(measured.outcomes),
        "missing": measured.missing(peer),
        "error": measured.error(peer),
    }
    taken = measured.samples(peer)
    if not taken:
        return record
    scale = 1e-3 / case.steps if timed else 1.0
    ours, theirs = (
        quartiles([value * scale for samples in taken for value in getattr(samples, side)]) for side in ("ours", "peer")
    )
    ratio, low, high = pooled_ratio([samples.ratios for samples in taken])
    record |= {
        "ours": asdict(ours),
        "theirs": asdict(theirs),
        "ratio": {"median": ratio, "low": low, "high": high},
        "rounds": sum(len(samples.ratios) for samples in taken),
    }
    if timed:
        products, traffic = peaks.products[product_key(case)], peaks.bandwidth(case.processor, case.bytes)
        gflops, gbs = (amount / ours.median * 1e-3 for amount in (case.flops, case.bytes))
        record |= {
            "gflops": gflops,
            "gbs": gbs,
            "share_of_peak": gflops / products.rate,
            "share_of_bandwidth": gbs / traffic.rate,
            "their_gflops": case.flops / theirs.median * 1e-3,
            "peak_gflops": asdict(products),
            "peak_gbs": asdict(traffic),
            "copying_gbs": {str(size): peak.rate for size, peak in peaks.traffic[case.processor].items()},
        }
    return record


def has_figures(record: Record) -> bool:
    return "ratio" in record


def verdict(ratio: dict[str, float]) -> str:
    """faster or slower where the interval says so, else even."""
    if ratio["low"] > 1:
        return "faster"
    return "slower" if ratio["high"] < 1 else "even"


def grouped(records: Iterable[Record], *keys: str) -> dict[tuple, list[Record]]:
    """The records by the values of `keys`, in the order of their first."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def summarise(records: Sequence[Record]) -> list[Record]:
    """Worst and geometric mean of the ratios, for each mode, dtype, place and peer."""
    groups = grouped(records, "mode", "dtype", "place", "peer")
    return [summarise_group(", ".join(key[:3]), key[3], group) for key, group in groups.items()]


def summarise_group(name: str, peer: str, records: list[Record]) -> Record:
    timed = [record for record in records if has_figures(record)]
    verdicts = [verdict(record["ratio"]) for record in timed]
    worst = min(timed, key=lambda record: record["ratio"]["median"], default=None)
    return {
        "rows": name,
        "peer": peer,
        "worst": None if worst is None else {"case": worst["case"], "ratio": worst["ratio"]["median"]},
        "geometric_mean": geometric_mean([record["ratio"]["median"] for record in timed]) if timed else None,
        "faster": verdicts.count("faster"),
        "even": verdicts.count("even"),
        "slower": verdicts.count("slower"),
        "errors": sum(record["error"] is not None for record in records),
        "missing": sum(record["missing"] is not None for record in records),
    }


def failed(records: Iterable[Record]) -> bool:
    return any(record["error"] is not None for record in records)


def write_rows(records: Sequence[Record], path: Path) -> None:
    path.write_text(json.dumps({"format": FORMAT, "rows": records}, indent=1) + "\n")


def read_rows(path: Path) -> list[Record]:
    """The rows of a file, or of every file of a folder; a ReportError says what is wrong with any other."""
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise ReportError(f"{path} holds no JSON file; give a folder that --out has written, or one of its files")
        return [record for file in files for record in read_rows(file)]
    try:
        report = json.loads(path.read_text())
        if report["format"] != FORMAT:
            raise ReportError(f"{path} has format {report['format']} and this program reads {FORMAT}; measure again")
        return [record for record in report["rows"] if record["case"]]
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ReportError):
            raise
        raise ReportError(f"{path} is not a benchmark report; give a file that --out has written") from None


def compare(before: Sequence[Record], after: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """What changed between two runs: (kind, line), kind being slower, faster, failed, mended, new, gone or note.

    A row is slower or faster when the intervals of its two ratios do not overlap.
    """
    for key in ("cpu", "cores", "gpu", "torch"):
        was, now = ({str(record["machine"][key]) for record in records} for records in (before, after))
        if was != now:
            yield "note", f"{key} differs: {', '.join(sorted(was))} and {', '.join(sorted(now))}"
    old, new = ({row_name(record): record for record in records} for records in (before, after))
    for name in old | new:
        if name not in old or name not in new:
            yield ("new" if name in new else "gone"), name
        elif old[name]["error"] is not None or new[name]["error"] is not None:
            if old[name]["error"] is None:
                yield "failed", f"{name}: {new[name]['error']}"
            elif new[name]["error"] is None:
                yield "mended", name
        elif has_figures(old[name]) and has_figures(new[name]):
            was, now = old[name]["ratio"], new[name]["ratio"]
            if now["high"] < was["low"] or now["low"] > was["high"]:
                kind = "slower" if now["median"] < was["median"] else "faster"
                yield kind, f"{name}: {was['median']:.2f} -> {now['median']:.2f}"


def row_name(record: Record) -> str:
    return f"{record['question']}, {record['case']}, against {record['peer']}"
