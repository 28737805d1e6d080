"""A teacher on a server: asked as OpenAI's are, patiently, with a key that nobody else sees."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from test_instruct import GOOD, TOLD, written

from nanovlm.errors import UserError
from nanovlm.making.instruct import main, messages
from nanovlm.making.teachers import Endpoint


@pytest.fixture
def server():
    """(address, replies to give in turn: (status, body, headers) or seconds to sleep, requests that came)."""
    replies, requests = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers.get("Authorization"), body))
            reply = replies.pop(0)
            if isinstance(reply, float):
                time.sleep(reply)
                return
            status, content, headers = reply
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def do_GET(self):  # what urllib makes of a redirected POST
            requests.append((self.path, self.headers.get("Authorization"), None))
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            """Silence."""

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", replies, requests
    httpd.shutdown()
    httpd.server_close()


def said(text: str) -> tuple[int, dict, dict]:
    return 200, {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 100, "completion_tokens": 20}}, {}


def endpoint(address: str, **how) -> tuple[Endpoint, list[float]]:
    waits: list[float] = []
    return Endpoint(address, "some-model", wait=waits.append, **how), waits


def test_a_server_is_asked_as_openai_is(server, monkeypatch):
    address, replies, requests = server
    monkeypatch.setenv("MY_KEY", "secret-17")
    teacher, _ = endpoint(address, key_from="MY_KEY")
    replies += [said(GOOD), said("x")]
    assert teacher(messages("conversation", TOLD)) == GOOD and teacher([]) == "x"
    path, key, body = requests[0]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret-17", "some-model")
    assert body["messages"] == messages("conversation", TOLD)
    assert (teacher.calls, teacher.tokens_in, teacher.tokens_out) == (2, 200, 40)
    assert teacher.cost(10, 50) == pytest.approx(0.004)


def test_what_may_pass_is_tried_again(server):
    address, replies, _ = server
    teacher, waits = endpoint(address, per_minute=1e9)
    replies += [(503, {}, {}), (429, {}, {"Retry-After": "7"}), said("at last")]
    assert teacher([]) == "at last"
    assert [wait for wait in waits if wait] == [2.0, 7.0]


def test_no_more_requests_than_allowed(server):
    address, replies, _ = server
    now = [100.0]
    waits: list[float] = []
    teacher = Endpoint(address, "m", per_minute=30, wait=waits.append, clock=lambda: now[0])
    replies += [said("a"), said("b"), said("c")]
    teacher([])
    now[0] += 0.5
    teacher([])
    now[0] += 5
    teacher([])
    assert waits == [0.0, 1.5, 0.0]


def test_a_refusal_is_final_and_shows_no_key(server, monkeypatch, capsys, tmp_path):
    address, replies, requests = server
    monkeypatch.setenv("MY_KEY", "secret-17")
    replies.append((401, {"error": "bad key secret-17"}, {}))
    assert main(["scenes:2", "--out", str(tmp_path / "made.json"), "--teacher", address, "--model", "m", "--key-from", "MY_KEY"]) == 2
    out, err = capsys.readouterr()
    assert "refuses: HTTP 401" in err and "the key" in err and "is kept in" in err
    assert len(requests) == 1
    everything = out + err + "".join(path.read_text() for path in tmp_path.rglob("*") if path.suffix != ".png" and path.is_file())
    assert "secret-17" not in everything


def test_nobody_there_and_too_slow(server):
    address, replies, _ = server
    replies += [0.6, 0.6]
    teacher, waits = endpoint(address, timeout=0.2, tries=2, per_minute=1e9)
    with pytest.raises(UserError, match=r"gave no answer in 2 tries \(the last time: .*timed out"):
        teacher([])
    nobody, _ = endpoint("http://127.0.0.1:9", tries=3)
    with pytest.raises(UserError, match=r"127.0.0.1:9/chat/completions gave no answer in 3 tries \(the last time: .*refused"):
        nobody([])


def test_a_key_is_not_sent_on(server, monkeypatch):
    """Where a server redirects, whoever is there gets no key."""
    address, replies, requests = server
    monkeypatch.setenv("MY_KEY", " secret-17\n")
    replies += [(302, {}, {"Location": f"{address}/elsewhere"}), said("x")]
    with pytest.raises(UserError):
        endpoint(address, key_from="MY_KEY", tries=1)[0]([])
    assert [key for _, key, _ in requests] == ["Bearer secret-17"] or requests[1][1] is None


@pytest.mark.parametrize(("url", "key", "rate", "complaint"), [
    ("myserver/v1", "k", 60, "myserver/v1 is no address"), ("http://x", "", 60, "MY_KEY, which is to hold the key, is empty"),
    ("http://x", "a\nb", 60, "holds something else"), ("http://x", "k", 0, "0 requests a minute")])
def test_an_endpoint_that_cannot_be(url, key, rate, complaint, monkeypatch):
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UserError, match=complaint) as refused:
        Endpoint(url, "m", key_from="MY_KEY", per_minute=rate)
    assert "a\nb" not in str(refused.value)


def test_a_server_that_is_gone_in_the_middle(server):
    address, replies, _ = server
    replies += [(200, b"{}", {"Content-Length": "999"}), said("whole")]
    assert endpoint(address, per_minute=1e9, timeout=2)[0]([]) == "whole"


@pytest.mark.parametrize("content", [b"<html>", {"choices": []}, {"choices": [{"message": {"content": None}}]}, [1]])
def test_an_answer_that_is_no_reply(server, content):
    address, replies, _ = server
    replies.append((200, content, {}))
    assert endpoint(address)[0]([]) == ""


def test_a_whole_set_made_by_a_server(server, tmp_path, capsys):
    address, replies, _ = server
    replies += [said("nonsense"), said(GOOD), said(GOOD)]
    assert main(["scenes:2", "--out", str(tmp_path / "made.json"), "--kinds", "conversation", "--teacher", address, "--model", "m",
                 "--per-minute", "1e9", "--price-in", "10", "--price-out", "50"]) == 0
    out = capsys.readouterr().out
    assert "2 conversations about 2 pictures; 0 left out, 1 replies of the wrong form" in out
    assert "3 calls, 300 tokens in, 60 out, 0.01 spent" in out
    assert len(written(tmp_path / "made.json")) == 2
