"""Results of `benchmarks.device` as plain text."""

from collections.abc import Iterator, Sequence
from typing import Any

PEERS = ("flax", "plain", "torch", "tokamax")
MIB = 2**20


def text(results: dict[str, Any]) -> str:
    """What the results ran on, a table for each part, what failed and what was left out."""
    about, versions = results["machine"], results["versions"]
    absent = [name for name, version in versions.items() if version is None]
    sections = [
        [
            f"{about['device']}, {about['platform']}" + (", reduced size" * about["reduced"]),
            ", ".join(f"{name} {version}" for name, version in versions.items() if version),
            *([f"absent: {', '.join(absent)}"] if absent else []),
            *([] if about["accelerator"] else ["No accelerator was found: this is the CPU."]),
        ]
    ]
    for part, show in (("check", _check), ("bandwidth", _bandwidth), ("network", _network)):
        rows = [row for row in results["rows"] if row["part"] == part]
        if rows:
            sections.append(list(show(rows)))
    if notes := [f"{label(row)}{note}" for row in results["rows"] for note in _notes(row)]:
        sections.append(["What failed:", *notes])
    if results["left_out"]:
        sections.append(["Left out, for there was no time:", *results["left_out"]])
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def label(row: dict[str, Any]) -> str:
    """What a row is about."""
    parts = [row["part"], row.get("method"), row.get("input"), row.get("dtype")]
    if row["part"] == "bandwidth" and "shape" in row:
        parts.insert(2, "x".join(map(str, row["shape"])))
    words = " ".join(part for part in parts if part)
    if "within" in row:
        words += ": within tolerance" if row["within"] else ": OUT OF TOLERANCE"
    return words


def _notes(row):
    if "note" in row:
        yield f": {row['note']}"
    for name, program in row.get("programs", {}).items():
        if "note" in program:
            yield f", {name}: {program['note']}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """Lines of a table, of which the first `left` columns are flush left."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _check(rows):
    yield "Largest errors relative to the largest value, beyond roundings of bfloat16 by themselves"
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    cases: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cell = "failed"
        if "errors" in row:
            error = row["errors"][row["worst"]]
            cell = f"{row['worst']} {'not finite' if error is None else f'{error:.1e}'}"
        cell += "" if row["within"] else "  OUT"
        cases.setdefault((row["method"], row["input"]), {})[row["dtype"]] = cell
    cells = [[*case, *(found.get(d, "") for d in dtypes)] for case, found in cases.items()]
    yield from _table(("method", "input", *dtypes), cells, 2)
    out = sum(not row["within"] for row in rows)
    yield f"{len(rows)} answers, {out} out of tolerance"


def _bandwidth(rows):
    for row in rows:
        if "call_us" in row:
            yield (
                "A copy moves {gb_s:.0f} GB/s [{gb_s_low:.0f}, {gb_s_high:.0f}]; a program that "
                "has nothing to do takes {call_us:.0f} us"
            ).format(**row)
    rows = [row for row in rows if "programs" in row]
    names = [name for name in PEERS if any(name in row["programs"] for row in rows)]
    yield "GB/s of the passes that nothing goes below, and their share of a copy; kernels, bytes"
    yield "accessed and bytes kept by byte of input; time over that of others, forward and backward"
    each = ("GB/s", "share", "kernels", "bytes")
    passes = ("forward ms", *each, "backward ms", *each, "kept")
    columns = ("method", "shape", "dtype", *passes, *(f"/ {name}" for name in names))
    cells = []
    for row in rows:
        ours = row["programs"].get("normjax", {})
        kept = f"{ours['kept']:.2f}" if "kept" in ours else ""
        cells.append(
            [
                row["method"],
                "x".join(map(str, row["shape"])),
                row["dtype"],
                *(cell for d in ("forward", "backward") for cell in _direction(ours.get(d, {}))),
                kept,
                *(_ratios(ours, row["programs"].get(name, {})) for name in names),
            ]
        )
    yield from _table(columns, cells, 3)


def _direction(found):
    if "ms" not in found:
        return [""] * 5
    share = "" if found["share"] is None else f"{found['share']:.0%}"
    accessed = "" if found["bytes"] is None else f"{found['bytes']:.1f}"
    return [
        f"{found['ms']:.3f}",
        f"{found['gb_s']:.0f}",
        share,
        f"{found['kernels']:.3g}",
        accessed,
    ]


def _ratios(ours, theirs):
    pairs = [(ours.get(d, {}), theirs.get(d, {})) for d in ("forward", "backward")]
    return " ".join(
        f"{a['ms'] / b['ms']:.2f}" if "ms" in a and "ms" in b else "-" for a, b in pairs
    )


def _network(rows):
    for row in rows:
        if "programs" not in row:
            continue
        name = "ResNet-50" if len(row["stages"]) == 4 else "a small ResNet"
        yield f"Training step of {name}, {row['batch']} images of {row['size']}, bfloat16"
        base = row["programs"].get("flax", {}).get("ms")
        cells = []
        for arm, found in row["programs"].items():
            if "ms" not in found:
                continue
            mib = [found[key] for key in ("peak_bytes", "compiling_bytes", "temporary_bytes")]
            cells.append(
                [
                    arm,
                    "{ms:.2f} [{ms_low:.2f}, {ms_high:.2f}]".format(**found),
                    f"{found['ms'] / base:.3f}" if base else "",
                    *("" if b is None else f"{b / MIB:.0f}" for b in mib),
                    ""
                    if found["accessed_bytes"] is None
                    else f"{found['accessed_bytes'] / MIB:.0f}",
                    f"{found['compile_s']:.1f}",
                ]
            )
        columns = ("norm", "ms", "/ flax", "peak MiB", "by compiling", "temporaries", "accessed")
        yield from _table((*columns, "compile s"), cells, 1)
