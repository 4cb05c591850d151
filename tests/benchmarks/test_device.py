"""The device page ranks its rows by time, and counts the operations of the network."""

from __future__ import annotations

from typing import Any

from benchmarks.device import ROWS, feeds, operations
from benchmarks.device_page import page


def rows() -> list[dict[str, Any]]:
    def row(name: str, engine: str, seconds: float, tokens: int) -> dict[str, Any]:
        who = "flashgen" if name.startswith("flashgen") else "peer"
        plain = {"peak_rss_mib": 900.0, "bytes": 2_500_000, "error": 0.0125, "share_of_peak": 0.5, "profile": "x"}
        laps = {"step_s": seconds, "step_s_all": [seconds, 1.1 * seconds]}
        return {"name": name, "who": who, "engine": engine, "text_tokens": tokens, **laps, **plain}

    return [
        row(name, engine, seconds * tokens / 77, tokens)
        for tokens in (77, 333)
        for name, engine, seconds in (("A", "openvino", 2.0), ("B", "onnxruntime", 4.0), ("flashgen C", "onnxruntime", 3.0))
    ]


def test_rows_are_ranked_and_compared_with_the_fastest_peers() -> None:
    curve = [{"size_px": px, "operations": px * 1e9, "seconds": {"onnxruntime": px / 512, "openvino": px / 1024}} for px in (512, 1024)]
    text = page(rows(), curve, 7e11, "torch bf16", "device-vnni")
    assert "| 1024 | 1024 | 2.00 | 1.00 | 0.73 | 1.46 |" in text
    assert text.count("## ") == 3 and text.index("## 77 text tokens") < text.index("## 333 text tokens")
    assert "Peak is 700 G operations" in text
    short = text.split("## ")[1]
    assert short.index("| A |") < short.index("| **flashgen C** |") < short.index("| B |")
    assert "| **flashgen C** | 3.00 | 10% | 1.50 x | 0.75 x | 0.50 | 900 | 2 | 0.0125 |" in short
    assert "| A | 2.00 | 10% | 1.00 x |  |" in short


def test_operations_count_products_and_grow_with_the_text() -> None:
    short, long = operations(77), operations(333)
    assert 3.4e11 < long < 4.6e11  # about 345 G of matrices and 58 G of attention
    assert 0.7 < short / long < 0.9
    assert feeds(77)["encoder_hidden_states"].shape == (1, 77, 4096)


def test_every_row_names_a_known_maker_and_engine() -> None:
    assert {who for who, *_ in ROWS.values()} == {"peer", "flashgen"}
    assert {engine for _, engine, *_ in ROWS.values()} == {"torch", "onnxruntime", "openvino", "openvino:int8"}
