"""Generated requests: every answer is below 500, has OpenAI's error object, and shows nothing of another project."""

import json
import os
import random
import socket
import string
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.config import load_service
from tests.support.engines import LocalHandle, start_engine
from tests.support.service import Api, rows, running_api, write_service
from utils.storage.bucket import EMBEDDED_BUCKET

pytestmark = pytest.mark.slow

REQUESTS = 10_000 if os.environ.get("SERVICE_GRID") else 300
CONNECTIONS = 1000 if os.environ.get("SERVICE_GRID") else 50
MARK = "belongs-to-blue"
MAX_GROWTH_BYTES = 300_000_000


@pytest.fixture(scope="module")
def apis(tmp_path_factory: pytest.TempPathFactory, bucket: Any, tiny_model: Path) -> Iterator[list[Api]]:
    storage = f"s3://{EMBEDDED_BUCKET}/fuzz-{random.randrange(10**9)}"
    limits = {"requests_per_minute": 10**6, "jobs": 10**6}
    path = write_service(tmp_path_factory.mktemp("fuzz"), storage, limits=limits)
    engine = start_engine(tiny_model)
    with running_api(load_service(path), ["red", "blue"], {"tiny": LocalHandle(engine)}) as found:
        yield found
    engine.close()


def odd_value(chance: random.Random, depth: int = 0) -> Any:
    kinds: list[Any] = [
        None,
        True,
        -1,
        0,
        2**70,
        1e308,
        0.5,
        "",
        "auto",
        "../" * chance.randrange(1, 9),
        "\x00",
        "\ud800",
        "a" * chance.choice([10, 1000, 100_000]),
        "".join(chance.choices(string.printable + "äß漢🙂\u202e", k=12)),
    ]
    if depth < 3:
        kinds += [
            [odd_value(chance, depth + 1) for _ in range(chance.randrange(4))],
            {
                str(odd_value(chance, 3))[:40]: odd_value(chance, depth + 1)
                for _ in range(chance.randrange(4))
            },
        ]
    return chance.choice(kinds)


def odd_body(chance: random.Random, files: list[str]) -> bytes:
    body: dict[str, Any] = {
        "model": chance.choice(["tiny"] * 9 + ["ft:tiny:blue:x:0"]),
        "training_file": chance.choice([files[0]] * 9 + files),
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        "metadata": {"a": "b"},
        "suffix": "x",
        "seed": 1,
    }
    names = [*body, "validation_file", "integrations", "hyperparameters", "unknown"]
    for _ in range(chance.randrange(1, 4)):
        name = chance.choice(names)
        if chance.random() < 0.3:
            body.pop(name, None)
        else:
            body[name] = odd_value(chance)
    if chance.random() < 0.1:
        body["validation_file"] = chance.choice(files)
    text = json.dumps(body).encode()
    match chance.randrange(10):
        case 0:
            return text[: chance.randrange(len(text))]
        case 1:
            return b"[" * chance.choice([10, 3000, 200_000])
        case 2:
            return chance.randbytes(chance.randrange(200))
        case _:
            return text


def odd_form(chance: random.Random) -> tuple[bytes, str]:
    parts = [
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n',
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{"messages": []}\r\n',
        b'--B\r\nContent-Disposition: form-data; name="\xff"\r\n\r\nx\r\n',
        b"--B\r\nX: " + b"y" * chance.choice([5, 9000]) + b"\r\n\r\nx\r\n",
        b"--B\r\n\r\n" + chance.randbytes(50) + b"\r\n",
        b"--B\r\n"
        + b"".join(b"X-%d: y\r\n" % number for number in range(chance.choice([3, 40])))
        + b"\r\nx\r\n",
        b'--B\r\nContent-Disposition: form-data; name="expires_after[seconds]"\r\n\r\n3600\r\n',
        b"--B\r\nContent-Disposition: form-data; name=file; filename*=UTF-8''%FF%00.jsonl\r\n\r\n{}\r\n",
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="\xf0\x9f\x99"\r\n\r\n{}\r\n',
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + b"z" * 9000 + b"\r\n",
    ]
    form = b"".join(chance.choices(parts, k=chance.randrange(6))) + chance.choice([b"--B--\r\n", b"", b"--B"])
    if chance.random() < 0.3:
        form = form[: chance.randrange(len(form) + 1)]
    kinds = [
        "multipart/form-data; boundary=B",
        "multipart/form-data",
        "multipart/form-data; boundary=" + "z" * 300,
        "text/plain",
    ]
    return form, chance.choice(kinds)


def odd_headers(chance: random.Random) -> dict[str, Any]:
    """Return headers of a request: about half of them are those of OpenAI's client."""
    headers: dict[str, Any] = {
        "content-type": chance.choice(["application/json", "text/plain", "multipart/form-data"])
    }
    if chance.random() < 0.3:
        headers["x-stainless-retry-count"] = chance.choice(["0", "1", "-1", "", "x" * 500])
    if chance.random() < 0.1:
        headers["Authorization"] = chance.choice(
            ["", "Bearer", "Bearer \xff", "Bearer " + "k" * 8000, "Basic eDp5"]
        )
    return headers


def odd_request(chance: random.Random, files: list[str], jobs: list[str]) -> tuple[str, str, dict[str, Any]]:
    identifier = chance.choice(
        [
            *files,
            *jobs,
            "..%2F..%2Fkeys",
            "%00",
            "x" * 500,
            "file-%F0%9F%99%82",
            "ftjob-" + "0" * 24,
            "",
            "ft:tiny:blue::0",
            "%252e%252e%252f",
            "a" * 8000,
            ";x=1",
        ]
    )
    query = chance.choice(
        [
            "",
            "?limit=-1",
            "?limit=1e9",
            "?limit=100000000000000000000",
            "?limit=2",
            f"?after={identifier}",
            "?order=up",
            "?metadata[a]=b",
            "?metadata[]=%FF",
            "?limit=2&limit=-1&after=&after=x",
            "?order=asc&purpose=%00",
            "?" + "&".join(f"metadata[{number}]=%F0%9F%99%82" for number in range(200)),
        ]
    )
    headers = odd_headers(chance)
    match chance.randrange(6):
        case 0 | 1:
            return (
                "POST",
                "/v1/fine_tuning/jobs",
                {"data": odd_body(chance, files), "headers": odd_headers(chance)},
            )
        case 2:
            form, kind = odd_form(chance)
            return "POST", "/v1/files", {"data": form, "headers": {"content-type": kind}}
        case 3:
            action = chance.choice(["", "/cancel", "/pause", "/resume", "/events", "/checkpoints", "/x"])
            method = chance.choice(["GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"])
            return method, f"/v1/fine_tuning/jobs/{identifier}{action}{query}", {"headers": headers}
        case 4:
            method, kind = chance.choice(["GET", "DELETE", "POST"]), chance.choice(["files", "models"])
            return (
                method,
                f"/v1/{kind}/{identifier}{chance.choice(['', '/content', '/x'])}{query}",
                {"headers": headers},
            )
        case _:
            return "GET", f"/v1/{chance.choice(['files', 'fine_tuning/jobs', 'models'])}{query}", {}


def check_metrics(api: Api) -> None:
    """Check that no request was answered with a server error, not even one whose client did not wait for the answer."""
    assert 'status="5' not in api.request("GET", "/metrics").text


def test_no_generated_request_is_answered_with_a_server_error(apis: list[Api]):
    red, blue = apis
    content_of_blue = rows(
        {"messages": [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]}
    )
    of_blue = blue.upload(content_of_blue)["id"]
    job_of_blue = blue.create_job(of_blue, suffix=MARK)["id"]
    of_red = red.upload(rows())["id"]
    job_of_red = red.create_job(of_red)["id"]
    before = psutil.Process().memory_info().rss

    def send(seed: int) -> None:
        chance = random.Random(seed)
        method, path, options = odd_request(chance, [of_red, of_blue], [job_of_red, job_of_blue])
        answer = red.request(method, path, **options)
        assert answer.status_code < 500, (seed, method, path, answer.text)
        assert MARK not in answer.text, (seed, method, path)
        assert answer.status_code >= 400 or of_blue.encode() not in options.get("data", b""), (seed, path)
        if answer.status_code >= 400 and method != "HEAD":
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, (seed, answer.text)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(send, range(REQUESTS)))
    assert psutil.Process().memory_info().rss - before < MAX_GROWTH_BYTES
    assert blue.get(f"/v1/fine_tuning/jobs/{job_of_blue}")["status"] == "validating_files"
    assert blue.request("GET", f"/v1/files/{of_blue}/content").content == content_of_blue
    check_metrics(red)


def odd_message(chance: random.Random) -> Any:
    """Return a message of a chat: about half of them are valid."""
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message: dict[str, Any] = chance.choice(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2 + 2?"},
            {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "4"},
        ]
    )
    if chance.random() < 0.4:
        message = message | {chance.choice(["role", "content", "tool_calls", "name", "x"]): odd_value(chance)}
    return message if chance.random() < 0.95 else odd_value(chance)


def odd_chat(chance: random.Random) -> bytes:
    """Return the body of a chat request."""
    body: dict[str, Any] = {
        "model": chance.choice(["tiny", "tiny", "tiny", "ft:tiny:blue::00", "none"]),
        "messages": [odd_message(chance) for _ in range(chance.randrange(1, 4))],
        "max_tokens": chance.randrange(1, 4),
    }
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
    options: dict[str, Any] = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "stop": ["4", "a" * chance.choice([1, 1000])],
        "temperature": chance.choice([0, 1e-9, 1.5, 2]),
        "top_p": chance.choice([1e-12, 0.5, 1]),
        "seed": chance.choice([0, -1, 2**62]),
        "n": chance.choice([1, 2, 128]),
        "logprobs": True,
        "top_logprobs": chance.choice([0, 20]),
        "tools": [{"type": "function", "function": function}],
        "tool_choice": chance.choice(["auto", "none", "required"]),
        "chat_template_kwargs": {"enable_thinking": False},
        "response_format": {"type": "text"},
        "user": "a",
    }
    for name in chance.sample(sorted(options), chance.randrange(4)):
        body[name] = options[name] if chance.random() < 0.6 else odd_value(chance)
    if chance.random() < 0.2:
        body[chance.choice(["model", "messages", "max_completion_tokens", "x"])] = odd_value(chance)
    text = json.dumps(body if chance.random() < 0.95 else odd_value(chance)).encode()
    return text if chance.random() < 0.95 else text[: chance.randrange(len(text))]


def test_no_generated_chat_is_answered_with_a_server_error(apis: list[Api]):
    red = apis[0]
    answered: Counter[int] = Counter()

    def send(seed: int) -> None:
        content = odd_chat(random.Random(seed))
        answer = red.request("POST", "/v1/chat/completions", data=content)
        answered[answer.status_code] += 1
        assert answer.status_code < 500, (seed, content[:2000], answer.text)
        assert '"server_error"' not in answer.text, (seed, content[:2000], answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, (seed, answer.text)
        elif answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.text.endswith("data: [DONE]\n\n") or '"error"' in answer.text, (seed, answer.text)
        else:
            assert answer.json()["choices"], (seed, answer.text)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(send, range(REQUESTS)))
    assert min(answered[200], answered[400], answered[404]) > REQUESTS // 100
    check_metrics(red)


def test_slow_and_cut_requests_do_not_block_others(apis: list[Api]):
    host, port = apis[0].url.removeprefix("http://").split(":")
    part = '--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    begun = [
        ("/v1/files", "multipart/form-data; boundary=B", part),
        ("/v1/fine_tuning/jobs", "application/json", '{"model": "tiny", '),
        ("/v1/chat/completions", "application/json", '{"messages": [{"role": "user", "content": "'),
    ]
    heads = [
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {apis[0].key}\r\n"
        f"Content-Type: {kind}\r\nContent-Length: 100000\r\n\r\n{content}"
        for path, kind, content in begun
    ]
    connections = [socket.create_connection((host, int(port))) for _ in range(CONNECTIONS)]
    try:
        for number, connection in enumerate(connections):
            connection.sendall(heads[number % len(heads)].encode())
        before = len(apis[0].get("/v1/files")["data"])
        for connection in connections[::2]:
            connection.close()
        assert len(apis[0].get("/v1/files")["data"]) == before
    finally:
        for connection in connections:
            connection.close()
    apis[0].upload(rows())
    check_metrics(apis[0])
