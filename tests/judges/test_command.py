"""Programs as judges: what they get, what they may print, and one sentence for everything else."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from flashgen.errors import FlashgenError, NumericsError, UsageError
from flashgen.judges import command
from flashgen.judges.base import Drawn
from flashgen.judges.command import CommandJudge

PICTURES = np.arange(3 * 8 * 6 * 3, dtype=np.uint8).reshape(3, 8, 6, 3)
DRAWN = Drawn(PICTURES, ["a cat", 'two "dogs"\n', "chat noir \N{CAT FACE}"], [7, 8, 2**63])


def program(folder: Path, body: str) -> Path:
    """An executable script that runs `body` with `folder`, the last argument, and `rows`, the lines of prompts.jsonl."""
    file = folder / "score.py"
    head = "import json, os, sys, pathlib\nfolder = pathlib.Path(sys.argv[-1])\n"
    rows = "rows = [json.loads(line) for line in (folder / 'prompts.jsonl').read_text().splitlines()]\n"
    file.write_text(f"#!{sys.executable}\n{head}{rows}{body}\n")
    file.chmod(0o755)
    return file


def test_the_program_gets_pictures_and_prompts_and_its_numbers_come_back(tmp_path: Path) -> None:
    body = """
from PIL import Image
import numpy as np
print("loading weights")
values = [float(np.asarray(Image.open(folder / row["picture"]), float).mean()) for row in rows]
print("loaded", file=sys.stderr)
print(json.dumps({"overall": sum(values) / 3, "values": values, "metric": "light", "higher_is_better": False,
                  "rows": len(rows), "seed": rows[1]["seed"], "is_empty": len(os.listdir("."))}))
"""
    judge = CommandJudge(str(program(tmp_path, body)))
    assert (judge.metric, judge.higher_is_better) == ("score", True)
    before = judge.identity()
    judgement = judge.judge(DRAWN)
    assert judgement.values is not None
    np.testing.assert_allclose(judgement.values, PICTURES.mean((1, 2, 3)), rtol=1e-12)
    assert judgement.scores == {"overall": pytest.approx(PICTURES.mean()), "rows": 3, "seed": 8, "is_empty": 0}
    assert (judge.metric, judge.higher_is_better, judge.better(2.0)) == ("light", False, -2.0)
    assert judge.identity() == before


def test_prompts_and_seeds_arrive_as_they_are_and_pictures_may_differ_in_size(tmp_path: Path) -> None:
    wanted = ascii(list(zip(DRAWN.prompts, DRAWN.seeds, strict=True)))
    body = f"print(json.dumps({{'overall': int([(row['prompt'], row['seed']) for row in rows] == {wanted})}}))"
    judge = CommandJudge(str(program(tmp_path, body)))
    judgement = judge.judge(Drawn([PICTURES[0], PICTURES[1, :4], PICTURES[2]], DRAWN.prompts, DRAWN.seeds))
    assert judgement.overall == 1 and judgement.values is None and judgement.mean == 1


def test_paths_are_relative_to_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a.txt").write_text("4")
    program(tmp_path, "print(json.dumps({'overall': int(pathlib.Path(sys.argv[1], 'a.txt').read_text()) + (sys.argv[2] == '-q')}))")
    monkeypatch.chdir(tmp_path)
    judges = [CommandJudge(f"{first}score.py weights -q") for first in ("", "./", f"{sys.executable} ")]
    monkeypatch.chdir("/")
    for judge in judges[:2]:
        assert judge.metric == "score" and judge.judge(DRAWN).overall == 5
    assert judges[2].judge(DRAWN).overall == 5


def test_identity_changes_with_the_program_and_with_files_among_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program(tmp_path, "print(1)")
    (tmp_path / "net.bin").write_text("1")
    identities = [CommandJudge("./score.py net.bin").identity()]
    (tmp_path / "net.bin").write_text("2")
    identities.append(CommandJudge("./score.py net.bin").identity())
    program(tmp_path, "print(2)")
    identities += [CommandJudge("./score.py net.bin").identity(), CommandJudge("./score.py net.bin --fast").identity()]
    assert len({str(identity) for identity in identities}) == 4
    assert CommandJudge("./score.py net.bin").identity() == identities[2]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("sys.exit('CUDA out of memory')", UsageError, r"score\.py ended with code 1; its last line on stderr: CUDA out of memory$"),
        ("1 / 0", UsageError, r"ended with code 1; its last line on stderr: ZeroDivisionError: division by zero$"),
        ("", UsageError, r"printed nothing; print one JSON object, as in \{\"overall\": 0\.5\}; see docs/judges\.md$"),
        ("print('all good')", UsageError, r"printed 'all good', which is no JSON object; print one"),
        ("print('0.5')", UsageError, r"printed '0\.5', which is no JSON object"),
        ("print('{\"a\": 1}')", UsageError, r"printed no number 'overall'; print one"),
        ("print('[' * 100000)", UsageError, r"is no JSON object"),
        ("print(json.dumps({'overall': 'good'}))", UsageError, r"printed 'good' under 'overall'; all but metric"),
        ("print(json.dumps({'overall': True}))", UsageError, r"printed True under 'overall'"),
        ("print(json.dumps({'overall': 1, 'note': 'x'}))", UsageError, r"printed 'x' under 'note'"),
        ("print(json.dumps({'overall': float('nan')}))", NumericsError, r"printed nan under 'overall'; print finite numbers$"),
        ("print('{\"overall\": 1' + '0' * 400 + '}')", NumericsError, r"printed 10+ under 'overall'; print finite numbers$"),
        ("print(json.dumps({'overall': 1, 'values': [1, 2, float('inf')]}))", NumericsError, r"printed inf under 'values'"),
        ("print(json.dumps({'overall': 1, 'values': [1, 2]}))", UsageError, r"printed 2 values for 3 pictures; print one per picture"),
        ("print(json.dumps({'overall': 1, 'values': 1}))", UsageError, r"printed no list of values for 3 pictures"),
        ("print(json.dumps({'overall': 1, 'metric': 3}))", UsageError, r"'metric' must be a name"),
        ("print(json.dumps({'overall': 1, 'higher_is_better': 1}))", UsageError, r"'higher_is_better' true or false, not 'score' and 1$"),
        ("while True: print('x' * 10**6)", UsageError, r"printed more than 4 MiB on stdout; print one JSON object"),
        ("sys.stderr.write('a\\n' * 10 + 'b\\r\\n\\n'); os.kill(os.getpid(), 9)", UsageError, r"ended with code -9; .* stderr: b$"),
    ],
)  # fmt: skip
def test_a_broken_answer_ends_with_one_sentence(body: str, error: type[FlashgenError], message: str, tmp_path: Path) -> None:
    judge = CommandJudge(str(program(tmp_path, body)))
    with pytest.raises(error, match=message) as refused:
        judge.judge(DRAWN)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_stderr_has_a_limit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "MAX_LOG_BYTES", 1 << 20)
    with pytest.raises(UsageError, match=r"printed more than 1 MiB on stderr"):
        CommandJudge(str(program(tmp_path, "while True: sys.stderr.write('x' * 10**6)"))).judge(DRAWN)


def test_a_program_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    body = f"""
import subprocess, time
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(child)!r}).write_text(str(started.pid))
print("waiting", file=sys.stderr, flush=True)
time.sleep(600)
"""
    judge = CommandJudge(str(program(tmp_path, body)), timeout_s=3)
    with pytest.raises(UsageError, match=r"did not end within 3 s and was stopped; .*; its last line on stderr: waiting$"):
        judge.judge(DRAWN)
    pid = int(child.read_text())
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    raise AssertionError("the program's child still runs")


def test_an_answer_that_changes_its_name_or_direction_is_refused(tmp_path: Path) -> None:
    file = program(tmp_path, "print(json.dumps({'overall': 1, 'metric': 'a'}))")
    judge = CommandJudge(str(file))
    assert judge.judge(DRAWN).overall == judge.judge(DRAWN).overall == 1
    for more in ("'metric': 'b'", "'metric': 'a', 'higher_is_better': False"):
        program(tmp_path, f"print(json.dumps({{'overall': 1, {more}}}))")
        with pytest.raises(UsageError, match=r"changed 'metric' or 'higher_is_better' between two runs"):
            judge.judge(DRAWN)


def test_no_pictures_are_refused_before_the_program_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="got no pictures to judge"):
        CommandJudge(str(program(tmp_path, "1 / 0"))).judge(Drawn(PICTURES[:0], [], []))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"^command: names no program; write command:PROGRAM ARGS"),
        ("./absent.py -x", r"^command:\./absent\.py -x: \./absent\.py is no file and no program in PATH"),
        ("'score.py", r"cannot be split into words \(No closing quotation\)"),
        ("plain.py", r"plain\.py cannot be executed; chmod \+x plain\.py, or name its interpreter: command:python plain\.py$"),
        ("headless", r"^command:headless cannot be started \(Exec format error\); begin a script with its interpreter"),
    ],
)
def test_a_program_that_cannot_run_is_refused(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.py").write_text("print(1)")
    (tmp_path / "headless").write_text("print(1)")
    (tmp_path / "headless").chmod(0o755)

    def run() -> Any:
        return CommandJudge(text).judge(DRAWN)

    with pytest.raises(UsageError, match=message):
        run()
