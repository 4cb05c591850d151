from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from flashgen import worlds
from flashgen.artifact.manifest import File, Manifest, Sampler, content_digest, parse
from flashgen.errors import ArtifactError
from flashgen.pixels import Size

SHA = "a" * 64
SAMPLER = {"sigmas": [1.0, 0.5, 0.0], "shift": 3.0, "guidance": 1.0, "encoder": "full", "tokens": {"clip": 77, "t5": 16}}
SAMPLER |= {"size_px": 64, "trained_steps": [2]}


def make(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "kind": "student", "stage": "distill", "version": "v0001", "created": "2026-01-01T00:00:00+00:00", "flashgen_version": "0.1.0",
        "recipe": {}, "seed": 0, "parents": [], "packages": {}, "sampler": SAMPLER, "metrics": {}, "extra": {},
        "files": [{"path": "vae/a.json", "size": 1, "sha256": SHA}, {"path": "b.json", "size": 2, "sha256": SHA}],
    }  # fmt: skip
    return Manifest.model_validate(fields | changes).sealed()


def test_parse_returns_the_manifest_that_was_written() -> None:
    manifest = make()
    assert parse(manifest.model_dump_json().encode(), "m") == manifest


def test_digest_ignores_order_time_and_lineage_but_not_content() -> None:
    base = make()
    assert make(files=[f.model_dump() for f in reversed(base.files)], created="later", seed=7, extra={"key": "1"}).digest == base.digest
    assert make(kind="quantized").digest != base.digest
    assert make(sampler=SAMPLER | {"sigmas": [1.0, 0.4, 0.0]}).digest != base.digest
    assert make(files=[]).digest != base.digest
    assert make(family="packed").digest != base.digest
    assert make(extra={"graph": {"vae": {"scaling_factor": 1.5}}}).digest != base.digest


def test_a_changed_extra_is_refused_but_an_old_digest_that_does_not_cover_it_holds() -> None:
    data = json.loads(make(extra={"accuracy_level": 4}).model_dump_json())
    data["extra"]["accuracy_level"] = 0
    with pytest.raises(ArtifactError, match="digest does not fit"):
        parse(json.dumps(data).encode(), "m")
    data["digest"] = content_digest(data, is_old=True)
    assert parse(json.dumps(data).encode(), "m").extra == {"accuracy_level": 0}


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../x.json", "vae/../../x.json", "a\\b", "C:x", "a\0b", "", ".", "vae//a", "./a", "vae/", "manifest.json"],
)
def test_file_path_is_refused_when_it_could_leave_the_version(path: str) -> None:
    with pytest.raises(ValidationError, match="not a plain relative path"):
        File(path=path, size=0, sha256=SHA)


@pytest.mark.parametrize("path", ["a/model.pt", "diffusion_pytorch_model.bin", "x.PKL", "vae/pytorch_model-00001-of-2.bin", "a.ckpt"])
def test_file_is_refused_when_it_may_be_a_pickle(path: str) -> None:
    with pytest.raises(ValidationError, match="pickled"):
        File(path=path, size=0, sha256=SHA)


def test_file_is_accepted_when_it_is_a_weight_of_another_runtime() -> None:
    assert File(path="transformer/openvino_model.bin", size=0, sha256=SHA).path


@pytest.mark.parametrize(
    "sigmas",
    [[1.0, 0.5], [1.2, 0.0], [0.5, 0.5, 0.0], [0.4, 0.6, 0.0], [0.0], [float("nan"), 0.0], [1 - i / 1001 for i in range(1001)] + [0.0]],
)
def test_sampler_is_refused_when_sigmas_do_not_fall_to_zero(sigmas: list[float]) -> None:
    with pytest.raises(ValidationError):
        Sampler.model_validate(SAMPLER | {"sigmas": sigmas})


@pytest.mark.parametrize("change", [{"shift": float("inf")}, {"guidance": float("inf")}, {"scales": [[float("nan"), 1.0], [1.0, 1.0]]}])
def test_sampler_is_refused_when_a_number_is_not_finite(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        Sampler.model_validate(SAMPLER | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version is 2"),
        ({"schema_version": None}, "schema_version is None"),
        ({"surprise": 1}, "surprise"),
        ({"kind": "virus"}, "kind"),
        ({"version": "../v0001"}, "version"),
        ({"files": [{"path": "../../home", "size": 1, "sha256": SHA}]}, r"files\.0"),
        ({"files": [{"path": "a", "size": 1, "sha256": SHA}] * 2}, "listed twice"),
        ({"files": []}, "altered"),
        ({"digest": "0" * 64}, "altered"),
    ],
)
def test_parse_names_the_field_when_the_manifest_is_hostile(change: dict[str, Any], message: str) -> None:
    raw = json.loads(make().model_dump_json()) | change
    with pytest.raises(ArtifactError, match=message):
        parse(json.dumps(raw).encode(), "m")


# manifests of flashgen 0.1 and 0.2: no family, no world, and one field per token length


def old_manifest() -> dict[str, Any]:
    """The embedded teacher's, as 0.1 wrote it."""
    raw: dict[str, Any] = json.loads((worlds.get("shapes").teacher() / "manifest.json").read_text())
    assert {"clip_tokens", "t5_tokens"} <= raw["sampler"].keys() and "tokens" not in raw["sampler"]
    return {key: value for key, value in raw.items() if key not in ("family", "world")}


def test_an_old_manifest_is_read_under_its_own_digest() -> None:
    raw = old_manifest()
    manifest = parse(json.dumps(raw).encode(), "m")
    assert manifest.digest == raw["digest"] and (manifest.family, manifest.world) == ("sd3", None)
    assert manifest.sampler is not None
    assert manifest.sampler.tokens == {"clip": 16, "t5": 16} and manifest.sampler.size_px == Size(64, 64)
    assert manifest.sampler.sigmas == raw["sampler"]["sigmas"]


@pytest.mark.parametrize("change", [{"t5_tokens": 0}, {"clip_tokens": 77}, {"size_px": 32}, {"encoder": "zeros"}])
def test_an_old_manifest_that_was_altered_is_refused(change: dict[str, Any]) -> None:
    raw = old_manifest()
    with pytest.raises(ArtifactError, match="altered"):
        parse(json.dumps(raw | {"sampler": raw["sampler"] | change}).encode(), "m")


def test_an_old_manifest_written_again_is_todays_with_a_digest_of_its_own() -> None:
    manifest = parse(json.dumps(old_manifest()).encode(), "m").sealed()
    again = json.loads(manifest.model_dump_json())
    assert again["sampler"]["tokens"] == {"clip": 16, "t5": 16} and "clip_tokens" not in again["sampler"]
    assert parse(json.dumps(again).encode(), "m") == manifest


@pytest.mark.parametrize(("size", "text"), [(Size(64, 64), "64"), (Size(64, 96), '"96x64"')])
def test_a_square_is_written_as_one_number(size: Size, text: str) -> None:
    manifest = make(sampler=SAMPLER | {"size_px": size})
    assert f'"size_px":{text}' in manifest.model_dump_json()
    assert parse(manifest.model_dump_json().encode(), "m").sampler == manifest.sampler


@pytest.mark.parametrize("size", [0, -64, "64x", "64x0", "1x2x3", 64.5, None, 1 << 20])
def test_sampler_is_refused_when_its_size_is_none(size: object) -> None:
    with pytest.raises(ValidationError, match="size_px"):
        Sampler.model_validate(SAMPLER | {"size_px": size})


@pytest.mark.parametrize(
    ("sigmas", "want"),
    [([1.0, 0.5, 0.0], [(1.0, 2.0), (3.0, 4.0)]), ([0.5, 0.0], [(3.0, 4.0)]), ([1.0, 0.0], None), ([1.0, 0.4, 0.0], None), ([0.0], None)],
)
def test_step_scales_are_those_of_the_steps_that_are_left(sigmas: list[float], want: object) -> None:
    """`--init-image` begins in the middle of the grid: the steps that it takes keep their scales."""
    assert Sampler.model_validate(SAMPLER | {"scales": [(1.0, 2.0), (3.0, 4.0)]}).scales_on(sigmas) == want


@pytest.mark.parametrize("change", [{"family": "SD3"}, {"world": "../x"}, {"family": ""}, {"world": "a b"}])
def test_families_and_worlds_are_plain_names(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(change))):
        make(**change)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b"{}"])
def test_parse_refuses_when_the_text_is_no_manifest(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        parse(data, "m")
