from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashgen.arena.analysis import analyse
from flashgen.arena.study import Study
from flashgen.arena.votes import Votes, counted, opened
from flashgen.errors import MachineError, UsageError
from tests.arena.conftest import PROMPT

pytest.importorskip("uvicorn", reason="needs the extra arena")
from starlette.testclient import TestClient

from flashgen.arena.server import LOOPBACK, application, serve

Make = Callable[..., Study]
TOKEN = "a" * 32
START = (
    "import sys; from pathlib import Path; from flashgen.arena.server import serve; serve(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))"
)


@pytest.fixture
def open_votes(make_study: Make) -> Iterator[Votes]:
    with opened(make_study()) as votes:
        yield votes


@pytest.fixture
def client(open_votes: Votes) -> TestClient:
    return TestClient(application(open_votes.study, open_votes, None, LOOPBACK), base_url="http://127.0.0.1")


def join(client: TestClient, name: str = "Anna", token: str = TOKEN) -> Any:
    return client.post("/api/join", json={"name": name, "token": token})


def test_a_rater_joins_votes_and_finds_the_votes_again(client: TestClient, open_votes: Votes) -> None:
    given = join(client).json()
    assert given["question"] and given["votes"] == {} and given["rater"] == "Anna"
    first = given["comparisons"][0]
    for _ in range(2):  # the second is a retry
        vote = {"name": "Anna", "token": TOKEN, "comparison": first["id"], "choice": "left", "seconds": 1.5}
        assert client.post("/api/vote", json=vote).json() == {"recorded": first["id"]}
    assert join(client).json()["votes"] == {first["id"]: "left"}
    assert len(open_votes.rows()) == 1
    strange = f'{{"name": "Anna", "token": "{TOKEN}", "comparison": "{given["comparisons"][1]["id"]}", "choice": "tie", "seconds": NaN}}'
    assert client.post("/api/vote", content=strange, headers={"content-type": "application/json"}).status_code == 200
    assert [row["seconds"] for row in open_votes.rows()] == [1.5, None]


def test_a_picture_comes_by_its_opaque_name_alone(client: TestClient, open_votes: Votes) -> None:
    first = join(client).json()["comparisons"][0]
    picture = client.get(f"/picture/{first['left']}")
    assert picture.headers["content-type"] == "image/png" and picture.content.startswith(b"\x89PNG")
    for path in ("../study.json", "..%2Fstudy.json", "%2e%2e%2fvotes.jsonl", "/etc/passwd", first["left"] + ".png", "x%00"):
        assert client.get(f"/picture/{path}").status_code == 404
    for path in ("/study.json", "/votes.jsonl", "/pictures/", "/page.py", "/server.py", "/../server.py"):
        assert client.get(path).status_code == 404


def test_every_answer_has_the_security_headers(client: TestClient) -> None:
    first = join(client).json()["comparisons"][0]
    for path in ("/", "/page.js", "/page.css", f"/picture/{first['left']}", "/nothing"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"] and "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_the_question_is_escaped_and_prompts_are_data(make_study: Make) -> None:
    study = make_study(question="<b>Which</b> & why?")
    with opened(study) as votes:
        client = TestClient(application(study, votes), base_url="http://127.0.0.1")
        assert "&lt;b&gt;Which&lt;/b&gt; &amp; why?" in client.get("/").text
        assert PROMPT in {c["prompt"] for c in join(client).json()["comparisons"]} and PROMPT not in client.get("/").text


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b'{"name": "Anna"}', "application/json", 400),
        (b"[]", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[" * 4000, "application/json", 400),
        (b'{"name": "Anna", "token": "%s"}' % (b"a" * 5000), "application/json", 400),
        (b'{"name": "Anna", "token": "short"}', "application/json", 400),
        (b'{"name": "judge:clip", "token": "aaaaaaaaaaaaaaaaaaaa"}', "application/json", 400),
        (b'{"name": "Anna", "token": "aaaaaaaaaaaaaaaaaaaa"}', "text/plain", 400),  # what a form of another site can send
        (b'{"name": "ANNA", "token": "bbbbbbbbbbbbbbbbbbbb"}', "application/json", 409),
    ],
)
def test_bad_requests_are_refused_with_a_sentence(client: TestClient, body: bytes, kind: str, status: int) -> None:
    join(client)
    answer = client.post("/api/join", content=body, headers={"content-type": kind})
    assert answer.status_code == status and len(answer.json()["error"]) > 10


def test_nobody_votes_for_another_rater_or_on_anothers_comparison(client: TestClient, open_votes: Votes) -> None:
    given, other = join(client).json(), join(client, "Ben", "b" * 32).json()
    vote = {"name": "Anna", "token": TOKEN, "comparison": given["comparisons"][0]["id"], "choice": "left", "seconds": 1}
    for change in (
        {"token": "b" * 32},
        {"comparison": other["comparisons"][0]["id"]},
        {"choice": "up"},
        {"name": "Carl"},
        {"comparison": 1},
    ):
        assert client.post("/api/vote", json=vote | change).status_code in (400, 409)
    assert open_votes.rows() == [] and len(open_votes.raters()) == 2


def test_a_vote_that_cannot_be_written_is_not_acknowledged(client: TestClient, open_votes: Votes, monkeypatch: pytest.MonkeyPatch) -> None:
    given = join(client).json()
    monkeypatch.setattr(Votes, "_append", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    vote = {"name": "Anna", "token": TOKEN, "comparison": given["comparisons"][0]["id"], "choice": "left", "seconds": 1}
    answer = client.post("/api/vote", json=vote)
    assert answer.status_code == 507 and "No space left" in answer.json()["error"]


def test_other_names_of_this_machine_are_not_answered(open_votes: Votes) -> None:
    client = TestClient(application(open_votes.study, open_votes, None, LOOPBACK), base_url="http://evil.example")
    assert client.get("/").status_code == 400


def test_without_the_token_nothing_is_answered_and_the_link_gives_a_cookie(open_votes: Votes) -> None:
    client = TestClient(application(open_votes.study, open_votes, "secret"), base_url="http://192.168.1.5", follow_redirects=False)
    for path in ("/", "/page.js", "/?token=wrong", "/?token=", "/page.js?token=secret"):
        assert client.get(path).status_code == 403
    assert join(client).status_code == 403
    link = client.get("/?token=secret")
    assert link.status_code == 303 and link.headers["location"] == "/" and "httponly" in link.headers["set-cookie"].lower()
    assert client.get("/").status_code == 200 and join(client).status_code == 200


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`serve` in a process of its own."""

    def __init__(self, study: Path, port: int, host: str = "127.0.0.1") -> None:
        command = [sys.executable, "-c", START, str(study), host, str(port)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        assert self.process.stderr is not None
        self.said = self.process.stderr.readline()
        self.url = f"http://127.0.0.1:{port}"

    def post(self, what: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{self.url}/api/{what}", json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def end(self, how: signal.Signals) -> str:
        self.process.send_signal(how)
        return self.process.communicate(timeout=120)[1]


def test_200_votes_of_5_raters_survive_kill_9_and_recover_a_planted_ranking(make_study: Make) -> None:
    study, port = make_study("low high", prompts=40, per_rater=40, gold=0.05, repeats=0.05), free_port()
    server = Server(study.folder, port)
    acknowledged: dict[tuple[str, str], str] = {}

    def rate(number: int) -> None:
        me, random = {"name": f"rater {number}", "token": str(number) * 32}, np.random.default_rng(number)
        given = server.post("join", me)
        shown = {c.id: c for c in study.plan(given["slot"])}
        for comparison in given["comparisons"]:
            if comparison["id"] in given["votes"]:
                continue
            left, right = shown[comparison["id"]].left, shown[comparison["id"]].right
            sides = ["left", "right"] if (-1 if left is None else left) > (-1 if right is None else right) else ["right", "left"]
            luck = 0.0 if None in (left, right) else random.random()
            choice = sides[0] if luck < 0.8 else "tie" if luck < 0.88 else sides[1]
            server.post("vote", {**me, "comparison": comparison["id"], "choice": choice, "seconds": 1.0})
            acknowledged[me["name"], comparison["id"]] = choice

    def rate_until_killed(number: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            rate(number)

    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(rate_until_killed, number) for number in range(5)]
        while len(acknowledged) < 80:
            time.sleep(0.01)
        server.end(signal.SIGKILL)
        for future in running:
            future.result()
    assert 80 <= len(acknowledged) < 5 * len(study.plan(0))
    survived = {(row["rater"], row["comparison"]): row["choice"] for row in counted(study)}
    assert acknowledged.items() <= survived.items()

    server = Server(study.folder, port)  # each goes on where they were
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(rate, range(5)))
    assert "220 votes of 5 people" in server.end(signal.SIGINT)
    assert server.process.returncode == 0
    rows = counted(study)
    assert len(rows) == 220 and sum(row["kind"] == "pair" for row in rows) == 200
    assert acknowledged.items() <= {(row["rater"], row["comparison"]): row["choice"] for row in rows}.items()
    people = analyse(study.folder, replicates=100)["people"]
    assert [row["artifact"] for row in people["elo"]] == ["high", "low"] and people["differences"][0]["interval"][1] < 0


def test_a_second_server_and_a_port_in_use_end_in_a_sentence(make_study: Make) -> None:
    study = make_study()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(MachineError, match=r"cannot be listened on .*give another --port"):
            serve(study.folder, "127.0.0.1", other.getsockname()[1])
    with opened(study), pytest.raises(MachineError, match="another process serves"):
        serve(study.folder, "127.0.0.1", 0)
    with pytest.raises(UsageError, match="--host not"):
        serve(study.folder, "not.a.host.invalid", 0)


def test_hosts_other_than_loopback_get_a_link_with_a_token(make_study: Make) -> None:
    server = Server(make_study().folder, free_port(), "0.0.0.0")
    try:
        link = server.said.split()[-1]
        assert "/?token=" in link
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(server.url, timeout=60)
        token = link.partition("?token=")[2]
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(f"{server.url}/?token={token}", timeout=60) as answer:
            assert answer.status == 200 and "Which picture" in answer.read().decode()
    finally:
        server.end(signal.SIGINT)
