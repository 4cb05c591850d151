from __future__ import annotations

import io
import json
import re
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flashgen.artifact.store import Artifact
from flashgen.cache import cache_path
from flashgen.errors import MachineError
from flashgen.export import page
from flashgen.export.page import PACKAGES, PAGE, Package, fetch, integrity, write_page
from flashgen.recipe.schema import Recipe
from tests.js.expected import FILE, expected


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a local npm registry, which `fetch` asks; the cache is empty."""
    folder = tmp_path / "registry"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield folder
    server.shutdown()
    server.server_close()


def publish(registry: Path, name: str, members: list[str]) -> Package:
    """A package in the registry whose members hold their own names."""
    package = Package(name, "1.2.3", "", {member: member.rpartition("/")[2] for member in members})
    path = registry / name / "-" / package.tarball
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            info = tarfile.TarInfo(f"package/{member}")
            info.size = len(member)
            archive.addfile(info, io.BytesIO(member.encode()))
    return replace(package, integrity=integrity(path))


def test_package_is_downloaded_once_and_then_there_offline(registry: Path) -> None:
    package = publish(registry, "@scope/name", ["dist/a.mjs"])
    path = fetch(package, offline=False)
    assert path == cache_path("npm") / "name-1.2.3.tgz" and integrity(path) == package.integrity
    assert fetch(package, offline=True) == path
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_file_of_another_hash_is_refused_and_not_kept(registry: Path) -> None:
    package = replace(publish(registry, "name", ["a.mjs"]), integrity=PACKAGES[0].integrity)
    with pytest.raises(MachineError, match=r"name-1.2.3.tgz is not the pinned name 1.2.3: sha512-.* instead of sha512-.* nothing was kept"):
        fetch(package, offline=False)
    assert not list(cache_path("npm").iterdir())


def test_broken_cache_is_mended_by_the_registry_and_named_offline(registry: Path) -> None:
    package = publish(registry, "name", ["a.mjs"])
    path = fetch(package, offline=False)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MachineError, match=r"--offline: .*name-1.2.3.tgz is not the pinned file of name 1.2.3; run .* without --offline"):
        fetch(package, offline=True)
    assert integrity(fetch(package, offline=False)) == package.integrity


def test_package_that_the_registry_does_not_have_is_one_sentence(registry: Path) -> None:
    with pytest.raises(
        MachineError, match=r"onnxruntime-web-.*tgz cannot be downloaded \(HTTP Error 404.*NPM_CONFIG_REGISTRY=URL, or copy"
    ):
        fetch(PACKAGES[0], offline=False)
    assert not list(cache_path("npm").iterdir())


def test_offline_without_cache_publishes_nothing(
    tiny_student: Artifact, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import runs

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(MachineError, match=r"--offline: .*onnxruntime-web-.*tgz is missing .* run the same command once without --offline"):
        runs.export(str(tiny_student.path), tmp_path / "site", recipe, 0, False, target="web", offline=True)
    assert not (tmp_path / "site" / "latest").exists()


def test_page_is_our_files_and_the_packages_members(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PACKAGES", (publish(registry, "@a/one", ["dist/x.js", "LICENSE"]), publish(registry, "two", ["y.wasm"])))
    (tmp_path / "site").mkdir()
    assert write_page(tmp_path / "site", offline=False) == {"@a/one": "1.2.3", "two": "1.2.3"}
    found = {p.relative_to(tmp_path / "site").as_posix(): p.read_text() for p in (tmp_path / "site").rglob("*") if p.is_file()}
    assert {k: v for k, v in found.items() if k.startswith("vendor/")} == {
        "vendor/x.js": "dist/x.js",
        "vendor/LICENSE": "LICENSE",
        "vendor/y.wasm": "y.wasm",
    }
    assert {k for k in found if "/" not in k} == {"index.html", "page.js", "flashgen.js", "files.js", "graph.js", "noise.js"}


def test_page_names_nothing_outside_its_folder() -> None:
    for file in PAGE.iterdir():
        assert not re.findall(r"""\b(?:https?|wss?|ftp):|["'(]//""", file.read_text()), file.name
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', (PAGE / "index.html").read_text())
    assert policy is not None
    assert "default-src 'none'" in policy[1] and "connect-src 'self';" in policy[1]


def test_script_finds_what_it_names() -> None:
    page_script, script, html = ((PAGE / name).read_text() for name in ("page.js", "flashgen.js", "index.html"))
    ids = set(re.findall(r'(?:at|show)\("(\w+)"', page_script))
    assert len(ids) > 10 and ids <= set(re.findall(r'id="(\w+)"', html))
    vendored = {f"vendor/{name}" for package in PACKAGES for name in package.files.values()}
    named = set(re.findall(r'"(vendor/[^"]+)"', script))
    assert len(named) == 7 and named <= vendored


def test_modules_find_what_they_import() -> None:
    for file in PAGE.glob("*.js"):
        for name in re.findall(r'^import .* from "(.*)";$', file.read_text(), re.MULTILINE):
            assert name.startswith("./") and (PAGE / name).is_file(), (file.name, name)


def test_numbers_that_the_javascript_is_tested_with_are_those_of_python() -> None:
    """tests/js reads expected.json; python -m tests.js.expected writes it."""
    stored, computed = (dict(flat(value)) for value in (json.loads(FILE.read_text()), json.loads(json.dumps(expected()))))
    assert stored.keys() == computed.keys()
    for name, value in stored.items():
        assert value == (pytest.approx(computed[name], abs=1e-6) if isinstance(value, float) else computed[name]), name


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and text within `value`, by the path to it."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        yield name, value
    else:
        for key, part in parts:
            yield from flat(part, f"{name}/{key}")
