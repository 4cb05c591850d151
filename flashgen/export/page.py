"""The static page of `export --target web`: the files of web/, and libraries from npm packages that are pinned by version and hash."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from flashgen.cache import cache_path
from flashgen.errors import MachineError
from flashgen.progress import say

PAGE = Path(__file__).parent / "web"
REGISTRY = "https://registry.npmjs.org"


@dataclass(frozen=True)
class Package:
    """An npm package; `integrity` is the hash in npm's notation, `files` maps its members to names in the page's vendor folder.

    Modules are named .js there: some static servers do not serve .mjs as JavaScript, and browsers refuse it then.
    """

    name: str
    version: str
    integrity: str
    files: Mapping[str, str]

    @property
    def tarball(self) -> str:
        """File name of the package in the registry and in the cache."""
        return f"{self.name.rpartition('/')[2]}-{self.version}.tgz"


PACKAGES = (
    Package(
        "onnxruntime-web",
        "1.30.0",
        "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        {
            "dist/ort.wasm.min.mjs": "ort.wasm.min.js",
            "dist/ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.js",
            "dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
            "dist/ort.webgpu.min.mjs": "ort.webgpu.min.js",
            "dist/ort-wasm-simd-threaded.asyncify.mjs": "ort-wasm-simd-threaded.asyncify.js",
            "dist/ort-wasm-simd-threaded.asyncify.wasm": "ort-wasm-simd-threaded.asyncify.wasm",
            "package.json": "onnxruntime-web.json",  # names the licence, MIT, for which the package has no file
        },
    ),
    Package(
        "@huggingface/tokenizers",
        "0.2.0",
        "sha512-LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        {"dist/tokenizers.min.mjs": "tokenizers.min.js", "LICENSE": "tokenizers.LICENSE"},
    ),
)


def fetch(package: Package, offline: bool) -> Path:
    """Path of the package's tarball in the cache, with its hash checked; it is downloaded when missing, unless `offline`.

    Raises MachineError when it cannot be downloaded, or has another hash.
    """
    path = cache_path("npm") / package.tarball
    label = f"{package.name} {package.version}"
    if path.is_file() and integrity(path) == package.integrity:
        return path
    if offline:
        what = f"is not the pinned file of {label}" if path.exists() else f"is missing ({label})"
        raise MachineError(f"--offline: {path} {what}; run the same command once without --offline, or copy the file there")
    url = f"{os.environ.get('NPM_CONFIG_REGISTRY', REGISTRY).rstrip('/')}/{package.name}/-/{package.tarball}"
    mend = f"name another registry with NPM_CONFIG_REGISTRY=URL, or copy the file to {path}"
    say(f"downloading {url}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{package.tarball}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                shutil.copyfileobj(response, file)
            file.close()
            if (actual := integrity(temporary)) != package.integrity:
                raise MachineError(f"{url} is not the pinned {label}: {actual} instead of {package.integrity}; nothing was kept; {mend}")
            os.replace(temporary, path)
        except (OSError, HTTPException) as error:
            raise MachineError(f"{url} cannot be downloaded ({error}); check the network, {mend}") from error
        finally:
            temporary.unlink(missing_ok=True)
    return path


def integrity(file: Path) -> str:
    """sha512 of `file` in npm's notation."""
    with file.open("rb") as stream:
        return f"sha512-{base64.b64encode(hashlib.file_digest(stream, 'sha512').digest()).decode()}"


def write_page(folder: Path, offline: bool) -> dict[str, str]:
    """Write the page and vendor/ into `folder`; returns the packages' versions. Raises MachineError as `fetch` does."""
    tarballs = [fetch(package, offline) for package in PACKAGES]
    for file in PAGE.iterdir():
        shutil.copyfile(file, folder / file.name)
    vendor = folder / "vendor"
    vendor.mkdir()
    for package, tarball in zip(PACKAGES, tarballs, strict=True):
        with tarfile.open(tarball) as archive:
            for member, name in package.files.items():
                source = archive.extractfile(f"package/{member}")
                assert source is not None, f"{tarball} has no {member}"
                with (vendor / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    return {package.name: package.version for package in PACKAGES}
