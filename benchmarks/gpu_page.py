"""The page of `benchmarks.gpu`: what each number means, and the numbers that a GPU has given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.compression_page import cells, table

HEAD = """# On a GPU

`make bench-gpu` writes this page and [its raw numbers](gpu.json): speed, memory and agreement of one GPU, with random weights in
SD3.5-Medium's shapes. It takes at most ten minutes, downloads nothing, and keeps finished parts when it is run again. A device whose peak
is not known gets no shares; `python -m benchmarks.gpu --peak-tflops N` says it. Times are medians between events of the device; spread is
(largest - smallest) / median. F is a forward pass of the transformer, B its backward pass. A goal that is missed is marked **missed**.
"""
NOBODY = "**No GPU has run it yet.** The sections below say what each number will mean."
ABOUT = {
    "compare": """## The same numbers as on the CPU

One round of distribution matching and one picture of the tiny model from the same seed, on the CPU and on the device. *Metrics* is the
largest relative difference of a metric of the round (goal in fp32: 1e-3), *update* the size of the difference of the student's updates
over the size of the update (goal in fp32: .05; AdamW makes equal steps of large and of tiny gradients, whose signs rounding decides), PSNR
is of the pictures (goal in fp32: 40 dB).
""",
    "passes": """## Passes of the transformer

At 512 px, as flashgen's stages hold it: *frozen* in bf16, as a teacher and as `generate` draws; *adapters* on a frozen bf16 network, inside
autocast; *all weights learn*, fp32 under bf16 autocast. F + B recomputes activations and counts as 4 F. TFLOP/s count
the products of the transformer without those of adapters (6 % more), share is of the device's dense bf16 peak.
""",
    "lora": """## A round of LoRA training

Matching of the recipe sd35-medium-lora: rollout, fake score steps, student step. *Executed* counts the passes that recompute activations,
*needed* does not; the goal of 40 % of the peak is for what is executed. Memory is the peak of `torch.cuda.max_memory_allocated`; *plan* is
what `--plan` says for the phase `train` without the program itself (goal: within 10 %).
""",
    "full": """## Full training

Matching of the recipe sd35-medium at 1024 px: teacher in bf16, student and fake score in fp32 with their optimizers, EMA in the host's
memory, activations recomputed. The peak must stay within 75 GB, so that one 80 GB GPU does. Host is the largest memory of this process.
""",
    "drawing": """## Teacher and student

One picture by the teacher in 28 guided steps and by the student in 4 steps, in turns, from prompt to pixels, as `generate` draws it. Steps
are 56 passes against 4. The weights of the text encoders are zeros.
""",
}


def page(found: Mapping[str, Any]) -> str:
    """The page in Markdown of what `benchmarks.gpu` has found: `about` the machine (None: no GPU yet) and `parts`."""
    lines = [HEAD, machine_line(found["about"]) if found["about"] else NOBODY, ""]
    for name, text in ABOUT.items():
        lines.append(text)
        part = found["parts"].get(name)
        if part is None:
            lines += ["Not run yet.", ""]
            continue
        measured = [row for row in part["rows"] if "note" not in row or len(row) > 1]
        lines += [*TABLES[name](measured), ""] if measured else []
        lines += [f"{row['note'][0].upper()}{row['note'][1:]}.\n" for row in part["rows"] if row not in measured]
        lines += [f"**This part failed:** {part['error']}\n"] if "error" in part else []
    return "\n".join(lines).rstrip() + "\n"


def machine_line(about: Mapping[str, Any]) -> str:
    """The machine, the code and the day in a paragraph."""
    memory = f", {about['device_bytes'] / 1e9:.1f} GB" if about["device_bytes"] else ""
    peak = f"{about['peak_flop_per_s'] / 1e12:g} TFLOP/s" if about["peak_flop_per_s"] else "not known"
    driver = f"driver {about['driver']}, " if about["driver"] else ""
    tiny = "" if about["device_bytes"] else " A test of the script in small on a CPU: **no number below means anything.**"
    where = f"{about['device']}{memory} (dense bf16 peak {peak}); {driver}torch {about['torch']}; host {about['host']}"
    return f"{where}. {about['date']}, commit {about['commit']}.{tiny}"


def _compare(rows: list[dict[str, Any]]) -> list[str]:
    lines = table(["numbers", "", "metrics", "update", "PSNR, dB"])
    for row in rows:
        strict, shown = row["numbers"] == "fp32", tuple[str, ...]()
        if "psnr_db" in row:
            psnr = row["psnr_db"]
            shown = ("", "", "equal" if psnr is None else _goal(f"{psnr:.1f}", not strict or psnr >= 40))
        else:
            shown = (*(_goal(f"{row[k]:.1e}", not strict or row[k] <= bar) for k, bar in (("metrics", 1e-3), ("update", 0.05))), "")
        lines.append(cells(row["numbers"], row["what"], *shown))
    return lines


def _passes(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{rows[0]['tokens']} tokens.", "", *table(["network", "pass", "batch", "ms", "spread", "TFLOP/s", "of peak"])]
    for row in rows:
        name = (row["network"], row["pass"], str(row["batch"]))
        if "note" in row:
            lines.append(cells(*name, row["note"], "", "", ""))
        else:
            numbers = f"{1e3 * row['seconds']:.1f}", f"{row['spread']:.0%}", f"{row['tflop_per_s']:.3g}", _share(row["share"])
            lines.append(cells(*name, *numbers))
    return lines


def _lora(rows: list[dict[str, Any]]) -> list[str]:
    lines = table(
        ["batch", "micro-batch", "s per round", "spread", "samples/s", "TFLOP/s executed", "of peak", "needed", "peak GB", "plan GB"]
    )
    for row in rows:
        share = row["share"]
        of_peak = _share(share) if share is None else _goal(_share(share), share >= 0.4)
        speed = f"{row['seconds']:.2f}", f"{row['spread']:.0%}", f"{row['samples_per_s']:.2f}", f"{row['tflop_per_s']:.3g}"
        lines.append(cells(str(row["batch"]), str(row["micro_batch"]), *speed, of_peak, _share(row["share_needed"]), *_memory(row)))
    return lines


def _full(rows: list[dict[str, Any]]) -> list[str]:
    lines = table(["micro-batch", "px", "s per round", "peak GB", "plan GB", "host GiB"])
    for row in rows:
        name = (str(row["micro_batch"]), str(row["size_px"]))
        if "note" in row:
            lines.append(cells(*name, "", _goal(row["note"], False), "", ""))
            continue
        peak, plan = _memory(row)
        fits = row["peak_bytes"] is None or row["peak_bytes"] <= 75e9
        lines.append(cells(*name, f"{row['seconds']:.2f}", _goal(peak, fits), plan, f"{row['host_gib'] or 0:.1f}"))
    return lines


def _drawing(rows: list[dict[str, Any]]) -> list[str]:
    lines = table(["px", "", "picture, s", "spread", "encode", "steps", "decode"])
    for row in rows:
        for who in ("teacher", "student"):
            laps = row[who]
            numbers = (f"{laps['picture']:.3f}", f"{laps['spread']:.0%}", *(f"{laps[k]:.3f}" for k in ("encode", "steps", "decode")))
            lines.append(cells(str(row["size_px"]), who, *numbers))
        lines.append(
            cells(
                str(row["size_px"]), "teacher / student", f"{row['ratio']['picture']:.2f} x", "", "", f"{row['ratio']['steps']:.2f} x", ""
            )
        )
    peak = max((row["peak_bytes"] or 0 for row in rows), default=0)
    memory = f", peak {peak / 1e9:.1f} GB" if peak else ""
    return [*lines, "", f"Transformer in {rows[0]['numbers']}, text encoders {rows[0]['encoders']}{memory}."]


def _memory(row: Mapping[str, Any]) -> tuple[str, str]:
    """Peak and plan in GB; a plan that is more than 10 % away is marked."""
    plan, ratio = f"{row['plan_bytes'] / 1e9:.1f}", row["plan_over_peak"]
    if ratio is None:
        return "not counted", plan
    return f"{row['peak_bytes'] / 1e9:.1f}", _goal(f"{plan} ({ratio:.2f} x)", abs(ratio - 1) <= 0.1)


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _goal(text: str, met: bool) -> str:
    return text if met else f"{text} **missed**"


TABLES: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
    "compare": _compare,
    "passes": _passes,
    "lora": _lora,
    "full": _full,
    "drawing": _drawing,
}
