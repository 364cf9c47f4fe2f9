"""examples/serve.py, as clients of OpenAI's package and of vLLM's control see it."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from checkpoints import random_checkpoint, random_mixtral, write_chat_template
from ranks import child_env

SCRIPT = Path(__file__).parents[1] / "examples" / "serve.py"
TOKEN = "a secret"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PROMPTS = [f"{'prompt ' * (i % 7)}number {i}:" for i in range(64)]
ANSWER = {"model": "tiny", "temperature": 0.0, "max_tokens": 48}


def wait_until(done, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


class Server:
    """A server in a process of its own."""

    def __init__(self, log, *options):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(SCRIPT), "--name", "tiny", "--port", str(port)]
        self._log = log
        with log.open("wb") as out:
            env = child_env(SERVE_CONTROL_TOKEN=TOKEN)
            self.process = subprocess.Popen([*command, *map(str, options)], env=env, stdout=out, stderr=out)

    def wait_until_it_serves(self):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(f"the server did not start: {self._log.read_text()}")

    def get(self, path):
        return httpx.get(self.url + path)

    def post(self, path, **options):
        return httpx.post(self.url + path, timeout=120, **options)

    def client(self):
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="any", timeout=120, max_retries=0)

    def metric(self, name):
        return next(float(line.split()[-1]) for line in self.get("/metrics").text.splitlines() if line.startswith(name))

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


@contextlib.contextmanager
def serving(folder, **options):
    """A server with these options, that serves."""
    # A busy machine must not make ranks give each other up: that is not what is tested here.
    options |= {"ranks": 2, "experts_per_rank": 6, "detect": 10}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    server = Server(folder / "log", *words)
    try:
        server.wait_until_it_serves()
        yield server
        assert server.stop() == 0, (folder / "log").read_text()
    finally:
        server.process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with serving(
        folder, checkpoint=random_checkpoint(folder), max_ranks=4, rows=8, context=128, max_queue=80
    ) as server:
        yield server


async def complete(client, prompt, began=None):
    """One streamed answer; sets the event `began` when its first piece comes."""
    pieces = []
    async for chunk in await client.completions.create(prompt=prompt, stream=True, **ANSWER):
        pieces.append(chunk.choices[0].text)
        if began:
            began.set()
    return "".join(pieces)


@pytest.fixture(scope="module")
def expected(server):
    """The answers to PROMPTS of a group that does not change."""

    async def ask():
        async with server.client() as client:
            return await asyncio.gather(*(complete(client, prompt) for prompt in PROMPTS))

    return asyncio.run(ask())


def test_64_streams_go_on_through_grow_and_shrink(server, expected):
    async def run():
        async with server.client() as client, httpx.AsyncClient(timeout=120) as control:
            changed = False
            answers = []

            async def ask(i):
                while not changed:
                    answers.append((i, await complete(client, PROMPTS[i])))

            async def scale(ranks, drain_s):
                body = {"new_data_parallel_size": ranks, "drain_timeout": drain_s}
                answer = await control.post(f"{server.url}/scale_elastic_ep", json=body, headers=BEARER)
                assert answer.status_code == 200, answer.text
                assert (await control.get(f"{server.url}/health")).json()["members"] == list(range(ranks))
                await asyncio.sleep(1)

            asking = asyncio.gather(*(ask(i) for i in range(len(PROMPTS))))
            await asyncio.sleep(0.5)
            await scale(4, 0)
            await scale(2, 0)
            changed = True
            await asking
            return answers

    answers = asyncio.run(run())
    assert len(answers) >= len(PROMPTS) and {i for i, _ in answers} == set(range(len(PROMPTS)))
    assert [i for i, text in answers if text != expected[i]] == []
    assert len(set(expected)) > len(PROMPTS) // 2, "the prompts matter"
    assert server.metric("nixlep_serving_recompiles") == 0


def test_answers_have_the_form_that_clients_expect(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")
    both = client.completions.create(prompt=PROMPTS[:2], **ANSWER)
    assert [(choice.index, choice.finish_reason) for choice in both.choices] == [(0, "length"), (1, "length")]
    assert both.usage.completion_tokens == 2 * 48 and both.usage.prompt_tokens == sum(map(len, PROMPTS[:2]))
    one = client.completions.create(prompt=list(PROMPTS[1].encode()), **ANSWER)
    assert one.choices[0].text == both.choices[1].text, "tokens or text, alone or with others"

    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(messages=messages, **ANSWER)
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].finish_reason == "length"
    chunks = [
        *client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **ANSWER
        )
    ]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    as_prompt = "system: be brief\nuser: hello\nassistant:"
    assert client.completions.create(prompt=as_prompt, **ANSWER).choices[0].text == whole.choices[0].message.content
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_stop_ends_the_text_before_it(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")
    text = client.completions.create(prompt=PROMPTS[0], **ANSWER).choices[0].text
    stop = text[20:22]
    cut = client.completions.create(prompt=PROMPTS[0], stop=["never there", stop], **ANSWER)
    assert cut.choices[0].text == text[: text.index(stop)] and cut.choices[0].finish_reason == "stop"


def test_samples_depend_on_the_seed_alone(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")
    options = ANSWER | {"temperature": 1.0, "top_p": 0.95}
    seeds = [1, 2, 1, None, None]
    texts = [client.completions.create(prompt=PROMPTS[3], seed=seed, **options).choices[0].text for seed in seeds]
    assert texts[0] == texts[2] and len(set(texts)) == 4


GOOD = {"model": "tiny", "prompt": "a"}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("{", 400, "body: JSON decode error"),
        ({"model": "tiny"}, 400, "prompt: Field required"),
        (GOOD | {"model": "huge"}, 404, "model must be 'tiny'; got 'huge'"),
        (GOOD | {"max_tokens": 0}, 400, "max_tokens"),
        (GOOD | {"max_tokens": 200}, 400, "context of 128 tokens; got 1 and 200"),
        (GOOD | {"prompt": "x" * 128}, 400, "context of 128 tokens; got 128 and 16"),
        (GOOD | {"prompt": ""}, 400, "prompt"),
        (GOOD | {"prompt": [1, 256]}, 400, "tokens, from 0 to 255"),
        (GOOD | {"temperature": -1}, 400, "temperature"),
        (GOOD | {"logprobs": 3}, 400, "logprobs: Extra inputs are not permitted"),
        (GOOD | {"stop": ["a"] * 5}, 400, "stop: List should have at most 4 items"),
        (GOOD | {"stop": ["a", "b" * 257]}, 400, "stop.1: String should have at most 256 characters"),
        (GOOD | {"stop": ""}, 400, "stop.0: String should have at least 1 character"),
        (GOOD | {"stop": "\ud800"}, 400, "stop: must have whole characters"),
        (GOOD | {"prompt": ["a"] * 129}, 400, "prompt: must have at most 128 prompts; got 129"),
        (GOOD | {"prompt": "\ud800"}, 400, "prompt: must have whole characters"),
        (GOOD | {"prompt": ["a", "b\udfff"]}, 400, "prompt: must have whole characters"),
        (GOOD | {"prompt": []}, 400, "prompt: Value should have at least 1 item"),
        ("x" * ((2 << 20) + 1), 413, "at most 2097152 bytes"),
    ],
)
def test_malformed_requests_are_refused_in_openais_form(server, body, status, words):
    content = body if isinstance(body, str) else json.dumps(body)
    answer = server.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status and words in error["message"], answer.text
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


def test_more_than_the_queue_holds_is_refused_and_the_rest_is_answered(server):
    async def run():
        async with server.client() as client:
            calls = (client.completions.create(prompt=PROMPTS[i % 64], **ANSWER) for i in range(150))
            return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = asyncio.run(run())
    refused = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert {type(error) for error in refused} == {openai.RateLimitError}
    assert 0 < len(refused) < 150 - 80 and refused[0].code == "overloaded"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_rows(server, stream):
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        body = json.dumps(GOOD | {"max_tokens": 127, "n": 1, "stream": stream, "prompt": ["a"] * 24}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(lambda: server.get("/health").json()["running"])
    wait_until(lambda: not server.get("/health").json()["running"], 20)


def test_control_needs_the_token_and_one_change_runs_at_a_time(server):
    path, body = "/scale_elastic_ep", {"new_data_parallel_size": 3}
    for value in ("", TOKEN, "Bearer wrong", "Bearer é".encode()):
        assert server.post(path, json=body, headers={"Authorization": value}).status_code == 401
    for bad in ({"new_data_parallel_size": 9}, {"new_data_parallel_size": 1}, {"new_data_parallel_size": "x"}, {}):
        assert server.post(path, json=bad, headers=BEARER).status_code == 400
    assert server.post("/is_scaling_elastic_ep").json() == {"is_scaling_elastic_ep": False}

    async def twice():
        async with httpx.AsyncClient(timeout=120) as client:
            first = asyncio.create_task(client.post(server.url + path, json=body, headers=BEARER))
            while not (await client.post(f"{server.url}/is_scaling_elastic_ep")).json()["is_scaling_elastic_ep"]:
                await asyncio.sleep(0.01)
            second = await client.post(server.url + path, json=body, headers=BEARER)
            return (await first).status_code, second.status_code, second.json()["error"]["message"]

    first, second, message = asyncio.run(twice())
    assert (first, second) == (200, 409) and "one change may run at a time" in message and "to 3 ranks" in message


def rank_processes(server):
    tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
    children = [pid for task in tasks for pid in (task / "children").read_text().split()]
    return [int(pid) for pid in children if "serving.worker" in Path(f"/proc/{pid}/cmdline").read_text()]


def scale(server, ranks):
    answer = server.post("/scale_elastic_ep", json={"new_data_parallel_size": ranks}, headers=BEARER)
    assert answer.status_code == 200, answer.text


def test_a_killed_rank_loses_no_request(server, expected):
    async def run():
        async with server.client() as client:
            began = asyncio.Event()
            asking = [asyncio.create_task(complete(client, prompt, began)) for prompt in PROMPTS]
            await began.wait()  # there are more requests than rows
            os.kill(rank_processes(server)[1], signal.SIGKILL)
            return await asyncio.gather(*asking)

    scale(server, 3)
    restarts, lost = (server.metric(f"nixlep_serving_{name}_total") for name in ("restarts", "ranks_lost"))
    assert asyncio.run(run()) == expected
    assert len(server.get("/health").json()["members"]) == 2
    assert server.metric("nixlep_serving_ranks_lost_total") == lost + 1
    assert server.metric("nixlep_serving_restarts_total") > restarts


def test_requests_wait_while_the_ranks_that_are_left_have_no_room_for_all_experts(server, expected):
    async def run():
        async with server.client() as client:
            os.kill(rank_processes(server)[-1], signal.SIGKILL)
            asking = asyncio.gather(*(complete(client, prompt) for prompt in PROMPTS))
            await asyncio.to_thread(wait_until, lambda: server.get("/health").status_code == 503)
            missing = server.get("/health").json()["missing_experts"]
            await asyncio.to_thread(scale, server, 2)
            return missing, await asking

    scale(server, 2)
    missing, answers = asyncio.run(run())
    assert len(missing) == 2, "8 experts, 6 slots"
    assert answers == expected
    assert server.get("/health").json()["missing_experts"] == []


def test_a_start_that_takes_longer_than_it_may_ends_the_server(tmp_path):
    options = ("--checkpoint", random_checkpoint(tmp_path), "--start-timeout", 1)
    server = Server(tmp_path / "log", *options)
    try:
        assert server.process.wait(60) == 1
    finally:
        server.process.kill()
    assert "a rank did not take a first step in time" in (tmp_path / "log").read_text()


def test_a_folder_of_hugging_face_is_served_through_a_resize(tmp_path):
    random_mixtral(tmp_path)
    with serving(tmp_path, model=tmp_path, context=64) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")
        with pytest.raises(openai.BadRequestError, match="must have a chat template"):
            client.chat.completions.create(messages=[{"role": "user", "content": "hello"}], **ANSWER)
        before = client.completions.create(prompt="hello user", **ANSWER)
        assert before.usage.prompt_tokens == 3, "<s> hello user"
        scale(server, 1)
        assert client.completions.create(prompt=[0, 1, 2], **ANSWER).choices == before.choices
        write_chat_template(tmp_path)
        answer = client.chat.completions.create(messages=[{"role": "user", "content": "hello"}], **ANSWER)
        as_prompt = client.completions.create(prompt=[0, 2, 3, 1, 4, 3], **ANSWER)
        assert answer.choices[0].message.content == as_prompt.choices[0].text
        with pytest.raises(openai.BadRequestError, match="messages must suit the model's template; got no system"):
            client.chat.completions.create(messages=[{"role": "system", "content": "hello"}], **ANSWER)
