"""Pictures of a bench for the page: which prompts are shown, and the bytes of each picture."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from flashgen.errors import ArtifactError
from flashgen.png import read_picture
from flashgen.report.read import Bench

BUDGET_BYTES = 10_500_000  # of all pictures, before base64 makes 4 bytes of 3; with the libraries the page stays below 15 MB
MAX_PICTURES = 240  # of all artifacts together; a page with more of them is slow on a phone
# (longest side in pixels, JPEG quality). JPEG and not WebP: every build of Pillow writes it, ten times faster. One entry for all pictures,
# so that no artifact looks better than another for its share of the bytes.
SIZES = [(1024, 90), (1024, 80), (512, 90), (512, 80), (512, 65), (512, 50), (512, 35), (256, 80), (256, 50), (128, 50)]


@dataclass(frozen=True)
class Pictures:
    """Pictures by (number of the artifact, number of the prompt)."""

    sources: dict[tuple[int, int], str]  # data: URLs
    links: dict[tuple[int, int], str]  # of the originals, relative to the folder of the report, percent-encoded
    sides: dict[tuple[int, int], tuple[int, int]]  # (width, height) of the originals
    format: str  # how the pictures in the page differ from the originals


def choose(bench: Bench) -> list[int]:
    """Numbers of the prompts whose pictures are shown: all, or as many as the page holds, evenly spread."""
    limit = max(1, MAX_PICTURES // len(bench.results))
    total = len(bench.prompts)
    return list(range(total)) if total <= limit else [i * total // limit for i in range(limit)]


def embed(out: Path, bench: Bench, shown: list[int]) -> Pictures:
    """The pictures of the prompts `shown`: the PNG files where their bytes fit into the page, else JPEG of the best quality that fits.

    Raises ArtifactError for a picture that is broken or lies outside of `out`; a picture that does not exist is left out.
    """
    files: dict[tuple[int, int], Path] = {}
    links: dict[tuple[int, int], str] = {}
    for artifact, result in enumerate(bench.results):
        for prompt in shown if result.pictures else []:
            relative = f"{result.pictures}/{prompt:04d}.png"
            path = out / relative
            if not path.resolve().is_relative_to(out.resolve()):
                raise ArtifactError(f"{out / 'bench.json'} names pictures outside of {out}: {result.pictures}; run flashgen bench again")
            if path.is_file():
                files[artifact, prompt], links[artifact, prompt] = path, quote(relative)
    sides = {key: _side(path) for key, path in files.items()}
    if sum(path.stat().st_size for path in files.values()) <= BUDGET_BYTES:
        return Pictures({key: _url("png", path.read_bytes()) for key, path in files.items()}, links, sides, "as they are")
    for side, quality in SIZES:
        jpegs: dict[tuple[int, int], bytes] = {}
        total = 0
        for key, path in files.items():
            jpegs[key] = _jpeg(path, side, quality)
            total += len(jpegs[key])
            if total > BUDGET_BYTES:
                break
        else:
            break
    text = f"as JPEG of quality {quality} and at most {min(side, max(map(max, sides.values())))} px"
    return Pictures({key: _url("jpeg", data) for key, data in jpegs.items()}, links, sides, text)


def _picture(path: Path) -> Image.Image:
    try:
        return Image.fromarray(read_picture(path, ("PNG",)))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a whole PNG ({error}); run flashgen bench again") from error


def _side(path: Path) -> tuple[int, int]:
    return _picture(path).size


def _jpeg(path: Path, side: int, quality: int) -> bytes:
    image = _picture(path)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
