"""Which claims measurements settle by themselves: from the newest of each artifact to holds, does not hold, or undecided.

A judge gets the measurements that name its claim, the newest of every metric and precision, and answers None where they do
not suffice. Claims without a judge are shown with their numbers and left to the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from labkit.stats import Estimate
from labkit.types import Measurement

Newest = dict[tuple[str, str], Measurement]  # (metric, precision) -> measurement
ORDER = ("f16", "q8_0", "q4_k_m")
SIXTEEN = ("f16", "fp16")


def newest(measurements: Iterable[Measurement]) -> Newest:
    """The last of each metric and precision, of the checkpoint that was measured last."""
    found = list(measurements)
    same = [one for one in found if one.artifact.get("checkpoint") == found[-1].artifact.get("checkpoint")]
    return {(one.metric, str(one.artifact.get("precision"))): one for one in same}


def value(measured: Newest, metric: str, precision: str) -> float | None:
    """The shown number, None when it was not measured."""
    import labkit

    one = measured.get((metric, precision))
    return labkit.measure.summary(one).value if one else None


def _saved(precision: str, stated: float, close: float = 0.01) -> Callable[[Newest], bool | None]:
    """Whether the file is smaller than 16 bits by the stated share."""

    def judge(measured: Newest) -> bool | None:
        one = measured.get(("size", precision))
        share = one.details.get("reduction_against_16_bits") if one else None
        return None if share is None else abs(share - stated) <= close

    return judge


def _bits(precision: str, stated: float) -> Callable[[Newest], bool | None]:
    def judge(measured: Newest) -> bool | None:
        one = measured.get(("size", precision))
        found = one.artifact.get("bits_per_weight") if one else None
        return None if found is None else abs(found - stated) < 0.1

    return judge


def _order(measured: Newest) -> bool | None:
    """Sizes fall and divergences rise along f16, q8_0, q4_k_m; whichever of the two was measured for all three."""
    sizes, moved = ([value(measured, metric, name) for name in ORDER] for metric in ("size", "divergence"))
    said = [row == sorted(row, reverse=down) for row, down in ((sizes, True), (moved, False)) if None not in row]
    return all(said) if said else None


def _loss(measured: Newest) -> tuple[float, Estimate] | None:
    """Accuracy at 16 bits, and what four bits lose on the same tasks, with its interval."""
    from labkit import decide

    four, full = (measured.get(("accuracy", name)) for name in ("q4_k_m", "f16"))
    if not four or not full or len(four.values) != len(full.values) or not sum(full.values):
        return None
    return sum(full.values) / len(full.values), decide.loss(four.values, full.values)


def _within(low: float, high: float, least: float, most: float) -> bool | None:
    """True when the whole interval lies in the stated range, False when none of it does."""
    return True if least <= low and high <= most else False if high < least or low > most else None


def _kept(measured: Newest) -> bool | None:
    found = _loss(measured)
    return _within(1 - found[1].high / found[0], 1 - found[1].low / found[0], 0.95, float("inf")) if found else None


def _lost(measured: Newest) -> bool | None:
    """Four bits lose clearly: more than two points of accuracy."""
    found = _loss(measured)
    return _within(found[1].low, found[1].high, 0.02, float("inf")) if found else None


def _faster(precision: str, least: float, most: float) -> Callable[[Newest], bool | None]:
    """Whether `precision` decodes at `least` to `most` times the speed of the sixteen bits timed in the same rounds."""

    def judge(measured: Newest) -> bool | None:
        from labkit import stats
        from labkit.headline import SMALL

        few = measured.get(("speed", precision))
        full = next((measured["speed", name] for name in SIXTEEN if ("speed", name) in measured), None)
        if not few or not full or len(few.values) != len(full.values):  # not the same rounds
            return None
        if 8 * few.artifact["weight_bytes"] / few.artifact["bits_per_weight"] < SMALL:  # calls, not reading, take its time
            return None
        found = stats.ratio(few.values, full.values)
        return _within(found.low, found.high, least, most)

    return judge


def _near(measured: Newest) -> bool | None:
    four, eight = (value(measured, "divergence", name) for name in ("q4_k_m", "q8_0"))
    return None if four is None or eight is None else eight < four


def _enough(measured: Newest) -> bool | None:
    eight = value(measured, "divergence", "q8_0")
    return None if eight is None else eight < 0.001


def _openvino(measured: Newest) -> bool | None:
    one = measured.get(("size", "int4_sym"))
    return None if one is None else 0.5 <= 1 - float(one.artifact["bits_per_weight"]) / 16 <= 0.75


def _eighth(measured: Newest) -> bool | None:
    one = measured.get(("size", "int4"))
    return None if one is None else abs(float(one.artifact["bits_per_weight"]) / 32 - 0.125) < 0.01


JUDGES: dict[str, Callable[[Newest], bool | None]] = {
    "C011": _bits("q4_0", 4), "C012": _bits("q5_1", 5), "C013": _bits("q8_0", 8), "C023": _saved("q4_0", 0.737), "C024": _saved("q8_0", 0.487),
    "C032": _order, "C065": _faster("q4_k_m", 2, 3), "C067": _faster("int4", 2, 6), "C095": _faster("int4", 2, 6), "C069": _faster("int4_sym", 2, 5), "C073": _faster("q4", 2, 4), "C079": _saved("q4_0", 0.75), "C080": _saved("q5_1", 0.70), "C081": _saved("q8_0", 0.50),
    "C082": _saved("q8_0", 0.50), "C090": _bits("f16", 16), "C097": _kept, "C101": _near, "C137": _saved("q4_k_m", 0.75), "C173": _lost, "C174": _enough,
    "C177": _bits("q4_k_m", 4), "C068": _openvino, "C167": _eighth,
}  # fmt: skip
