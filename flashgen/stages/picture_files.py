"""Files with pictures and captions: folders, webdataset shards, parquet files, and latents in safetensors.

A picture's caption is in the .txt file beside it, in its row of metadata.jsonl, in the .txt member of its key in a .tar, or in a column of
its .parquet file. A picture without one has the caption "".
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashgen.errors import UsageError
from flashgen.pixels import Size
from flashgen.png import fit, opened, read_picture
from flashgen.recipe.distillation import AdversarialTraining
from flashgen.stages.rows import Row, jsonl_rows, open_parquet, parquet_rows, require_columns, text_lines

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {".bmp": "BMP", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP"}
METADATA = "metadata.jsonl"  # as in image folders of the library datasets


class Picture(NamedTuple):
    """A picture that is not read yet. `read` gives the bytes of its file, or its latent [C, h, w]; `caption` is "" without one."""

    name: str
    caption: str
    read: Callable[[], bytes | Tensor]


def decode(data: bytes, size: Size) -> NDArray[np.uint8]:
    """Picture [H, W, 3] of an image file's bytes, as `png.read_picture` and `png.fit` give it. Raises OSError or ValueError."""

    return fit(read_picture(io.BytesIO(data)), size)


def proportions(data: bytes) -> float:
    """Width over height of the picture in an image file's bytes, turned upright; only its header is read. Raises as `decode` does."""
    from PIL import ExifTags

    with opened(io.BytesIO(data)) as image:
        width, height = image.size
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter
    return height / width if is_turned else width / height


@dataclass(frozen=True)
class Listing:
    """Lists pictures without reading them; latents must have the shape `shape`.

    In messages `where` names the source, and `section` the settings `config`. Raises UsageError for what cannot be read.
    """

    where: str
    section: str
    config: AdversarialTraining
    shape: tuple[int, ...]

    def files(self, path: Path) -> dict[str, Path]:
        """Files of the source `path` by name, sorted."""
        if path.is_dir():
            kinds = {*FORMATS, ".tar", ".parquet", ".txt"}
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in kinds or file.name == METADATA)
            return {file.relative_to(path).as_posix(): file for file in found if file.is_file()}
        if not path.is_file():
            raise UsageError(f"{self.where} is not there; name a folder of pictures, or a .tar, .parquet or .safetensors file")
        beside = [path.with_suffix(".txt")] if path.suffix == ".safetensors" and path.with_suffix(".txt").is_file() else []
        return {file.name: file for file in (path, *beside)}

    def of(self, files: dict[str, Path]) -> Iterator[Picture]:
        """The pictures in `files`."""
        captions: dict[Path, str] = {}
        for name, file in files.items():
            if file.name == METADATA and self.config.caption_column is not None:
                captions |= self._metadata(file, name)
        present = set(files.values())
        for name, file in files.items():
            match file.suffix.lower():
                case ".tar":
                    yield from self._tar(file, name)
                case ".parquet":
                    yield from self._parquet(file, name)
                case ".safetensors":
                    yield from self._latents(file, files.get(file.with_suffix(".txt").name))
                case suffix if suffix in FORMATS:
                    beside = file.with_suffix(".txt")
                    text = captions.get(file) or ("".join(text_lines(beside, f"{self.where}, ")) if beside in present else "")
                    yield Picture(name, _words(text), file.read_bytes)

    def _metadata(self, file: Path, name: str) -> dict[Path, str]:
        captions, option = {}, f"{self.where}, "
        for place, row in jsonl_rows(file, option):
            if not isinstance(row.get("file_name"), str):
                raise UsageError(f"{option}{name}{place} does not name its picture; give its path in the folder as 'file_name'")
            captions[file.parent / row["file_name"]] = self._caption(row, f"{option}{name}{place}")
        return captions

    def _caption(self, row: Any, where: str) -> str:
        column = self.config.caption_column
        if column is None:
            return ""
        require_columns(row, {f"{self.section}.caption_column": column}, where)
        if not isinstance(row[column], str | None):
            raise UsageError(
                f"{where}: column {column!r} holds {type(row[column]).__name__}, not text; --set {self.section}.caption_column=NAME"
            )
        return _words(row[column] or "")

    def _tar(self, file: Path, name: str) -> Iterator[Picture]:
        """Members with one key, the name up to the first dot, are a picture and its caption (webdataset)."""
        captions, pictures = dict[str, str](), list[tuple[str, str, int, int]]()
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    path = PurePosixPath(member.name)
                    stem, _, suffix = path.name.partition(".")
                    key = str(path.with_name(stem)) if stem else ""
                    if key and member.isreg() and suffix.lower() == "txt":
                        captions[key] = _words(_part(file, member.offset_data, member.size).decode(errors="replace"))
                    elif key and member.isreg() and path.suffix.lower() in FORMATS:
                        pictures.append((member.name, key, member.offset_data, member.size))
        except (OSError, tarfile.TarError) as error:
            raise UsageError(f"{self.where}: {name} cannot be read as a tar without compression ({error}); write it again") from error
        for member_name, key, offset, size in pictures:
            yield Picture(f"{name}/{member_name}", captions.get(key, ""), partial(_part, file, offset, size))

    def _parquet(self, file: Path, name: str) -> Iterator[Picture]:
        picture, caption = self.config.picture_column, self.config.caption_column
        wanted = {f"{self.section}.picture_column": picture, f"{self.section}.caption_column": caption}
        with open_parquet(file, f"{self.where}, ") as table:
            require_columns(table.schema_arrow.names, wanted, f"{self.where}: {name}")
            kind = str(table.schema_arrow.field(picture).type)
            groups = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        if "binary" not in kind:
            mend = f"--set {self.section}.picture_column=NAME"
            raise UsageError(f"{self.where}: {name}: column {picture!r} holds {kind}, not the bytes of picture files; {mend}")
        places = ((group, row) for group, rows in enumerate(groups) for row in range(rows))
        captions: Iterator[tuple[str, Row]] = repeat(("", {})) if caption is None else parquet_rows(file, f"{self.where}, ", [caption])
        for number, ((group, row), (_, cells)) in enumerate(zip(places, captions, strict=False)):
            where = f"{name}, row {number}"
            yield Picture(where, self._caption(cells, f"{self.where}: {where}"), partial(_cell, file, group, row, picture))

    def _latents(self, file: Path, beside: Path | None) -> Iterator[Picture]:
        from flashgen.models.stream import header

        count, *shape = header(file)[0].get("latents", {"shape": [0]})["shape"]
        if tuple(shape) != self.shape:
            has = f"has {[count, *shape]}" if shape else "has no such tensor"
            wanted = f"[N, {', '.join(map(str, self.shape))}]"
            raise UsageError(f"{self.where} {has}; give the tensor `latents` {wanted}, on the transformer's scale for the student's size")
        captions = [_words(line) for line in text_lines(beside, f"{self.where}, ")] if beside else [""] * count
        if len(captions) != count:
            raise UsageError(f"{self.where} holds {count} latents, and {beside} has {len(captions)} lines; write one caption per line")
        for row, caption in enumerate(captions):
            yield Picture(file.name, caption, partial(_row, file, row))


def _words(text: str) -> str:
    return " ".join(text.split())


def _part(file: Path, offset: int, size: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)


@lru_cache(maxsize=1)
def _column(file: Path, group: int, column: str) -> Any:
    with open_parquet(file, "") as table:
        return table.read_row_group(group, [column]).column(0)


def _cell(file: Path, group: int, row: int, column: str) -> bytes:
    """Bytes of a picture in a parquet file; b"" where the cell has no such tensor."""
    value = _column(file, group, column)[row].as_py()
    data: bytes = (value.get("bytes") if isinstance(value, dict) else value) or b""
    return data


def _row(file: Path, row: int) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        latent: Tensor = tensors.get_slice("latents")[row]
    return latent
