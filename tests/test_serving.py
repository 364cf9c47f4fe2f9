"""The parts of examples/serving that need no processes: rows, choice of tokens, text, what requests are refused."""

import asyncio
import contextlib
import dataclasses
import io
import json
import threading
import time
from types import SimpleNamespace

import httpx
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest
from checkpoints import random_checkpoint
from serving import router as router_module
from serving import worker as worker_module
from serving.api import create_app
from serving.byte_model import ByteModel
from serving.detokenizer import Detokenizer
from serving.model import find_checkpoint, open_model
from serving.program import Batch, choose
from serving.router import Options, Router, ScaleError, Unavailable
from serving.router import _Rank as Rank
from serving.rows import Request, Rows
from serving.schema import ChatRequest, CompletionRequest
from serving.worker import Worker

CHUNK = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("model"))


# --- Rows. ---


class Counting:
    """In place of a model: the token after position p is p + 1; checks that a row's cache has no holes."""

    def __init__(self, rows):
        self.read = [[] for _ in range(rows)]

    def __call__(self, batch):
        for b, (tokens, start, length) in enumerate(zip(batch.tokens, batch.start, batch.lengths, strict=True)):
            if length:
                if start == 0:
                    self.read[b] = []
                assert len(self.read[b]) == start, "positions follow each other"
                self.read[b] += tokens[:length].tolist()
        return batch.start + batch.lengths


def run(rows, model, steps):
    made = []
    for _ in range(steps):
        batch = rows.next_batch()
        made.append((batch.tokens.shape[1], rows.accept(batch, model(batch))))
    return made


def test_a_request_reads_its_prompt_in_pieces_and_then_its_own_tokens():
    rows, model = Rows(2, CHUNK, eos_ids=()), Counting(2)
    rows.add(Request(7, tuple(range(100, 106)), max_tokens=3))
    made = run(rows, model, 4)
    assert [width for width, _ in made] == [CHUNK, CHUNK, 1, 1]
    assert [token for _, tokens in made for token in tokens] == [(7, 0, 6, ""), (7, 1, 7, ""), (7, 2, 8, "length")]
    assert model.read[0] == [*range(100, 106), 6, 7] and len(rows) == 0


def test_prompts_and_answers_take_turns():
    rows, model = Rows(2, CHUNK, eos_ids=()), Counting(2)
    rows.add(Request(0, (1,), max_tokens=20))
    run(rows, model, 2)
    rows.add(Request(1, tuple(range(3 * CHUNK)), max_tokens=1))
    made = run(rows, model, 6)
    assert [width for width, _ in made] == [CHUNK, 1, CHUNK, 1, CHUNK, 1]
    assert [[token.request for token in tokens] for _, tokens in made] == [[], [0], [], [0], [1], [0]]


def test_a_sequence_ends_at_eos_unless_told_otherwise():
    for ignore_eos, tokens in ((False, [(0, 0, 2, ""), (0, 1, 3, "stop")]), (True, [(0, 0, 2, ""), (0, 1, 3, "")])):
        rows, model = Rows(1, CHUNK, eos_ids={3}), Counting(1)
        rows.add(Request(0, (9, 9), max_tokens=9, ignore_eos=ignore_eos))
        assert [token for _, made in run(rows, model, 2) for token in made] == tokens


def test_a_cancelled_request_frees_its_row():
    rows, model = Rows(1, CHUNK, eos_ids=()), Counting(1)
    rows.add(Request(0, (9,), max_tokens=9))
    run(rows, model, 2)
    rows.cancel(5)
    rows.cancel(0)
    rows.add(Request(1, (8,), max_tokens=1))
    assert [token for _, made in run(rows, model, 1) for token in made] == [(1, 0, 1, "length")]


def test_the_same_batch_comes_until_it_is_accepted():
    rows = Rows(2, CHUNK, eos_ids=())
    rows.add(Request(0, tuple(range(6)), max_tokens=9, temperature=0.5, top_p=0.9, seed=3))
    first, second = rows.next_batch(), rows.next_batch()
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.temperature[0], first.seeds[0]) == (0.5, 3)


# --- The choice of a token. ---


def batch_of(temperature, top_p, seeds):
    rows = len(seeds)
    return Batch.empty(rows, 1)._replace(
        temperature=np.full(rows, temperature, np.float32),
        top_p=np.full(rows, top_p, np.float32),
        seeds=np.array(seeds, np.uint32),
    )


def test_zero_temperature_takes_the_likeliest():
    logits = jnp.array([[0.0, 3.0, 1.0], [2.0, 0.0, 1.9]])
    assert choose(logits, batch_of(0.0, 1.0, [1, 2]), jnp.zeros(2, jnp.int32)).tolist() == [1, 0]


def test_samples_follow_the_probabilities_and_the_seed_alone():
    count, probabilities = 4000, np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.tile(jnp.log(jnp.array(probabilities, jnp.float32)), (count, 1))
    positions = jnp.full(count, 7, jnp.int32)
    taken = np.asarray(choose(logits, batch_of(1.0, 1.0, range(count)), positions))
    np.testing.assert_allclose(np.bincount(taken, minlength=4) / count, probabilities, atol=0.03)
    again = np.asarray(choose(logits[::-1], batch_of(1.0, 1.0, range(count)[::-1]), positions))
    np.testing.assert_array_equal(again[::-1], taken)
    nucleus = np.asarray(choose(logits, batch_of(1.0, 0.7, range(count)), positions))
    np.testing.assert_allclose(np.bincount(nucleus, minlength=4) / count, [0.625, 0.375, 0, 0], atol=0.03)
    only = np.asarray(choose(logits, batch_of(1.0, 1e-6, range(count)), positions))
    assert (only == 0).all()


# --- Text. ---


def pieces(checkpoint, text, stops=()):
    detokenizer = Detokenizer(ByteModel(checkpoint), stops)
    made = []
    for byte in text.encode() if isinstance(text, str) else text:
        made.append(detokenizer.push(byte))
        if detokenizer.stopped:
            break
    return [*made, detokenizer.finish()]


def test_characters_come_whole(checkpoint):
    assert pieces(checkpoint, "aé€b") == ["a", "", "é", "", "", "€", "b", ""]
    assert pieces(checkpoint, "é".encode()[:1]) == ["", "\ufffd"]


def test_text_ends_before_a_stop_and_is_held_back_until_that_is_certain(checkpoint):
    assert pieces(checkpoint, "one\ntwo\n\nthree", ["\n\n"]) == [*"one", "", "\nt", *"wo", "", "", ""]
    assert "".join(pieces(checkpoint, "abcd", ["cde", "x"])) == "abcd"
    assert "".join(pieces(checkpoint, "aab", ["ab"])) == "a"


# --- What is refused. ---


def test_sources_and_checkpoints_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(ValueError, match='must have "checkpoint" or "folder"'):
        open_model({"path": "x"})
    with pytest.raises(ValueError, match="make one with"):
        find_checkpoint(tmp_path)


def test_requests_that_cannot_be_served_are_refused(checkpoint):
    async def refuse():
        async with Router(
            Options({"checkpoint": str(checkpoint)}, max_ranks=4, experts_per_rank=3, context=64)
        ) as router:
            for prompt, tokens, words in (
                ([], 1, "must have tokens"),
                ([256], 1, "from 0 to 255; got"),
                ([1] * 60, 5, "context of 64 tokens; got 60 and 5"),
                ([1], 0, "got 1 and 0"),
            ):
                with pytest.raises(ValueError, match=words):
                    router.submit(prompt, tokens)
            with pytest.raises(Unavailable):
                router.submit([1], 1)
            with pytest.raises(ValueError, match="ranks must be 3 to 4, for 8 experts in 3 slots each; got 2"):
                await router.start(2)

    asyncio.run(refuse())


def test_a_rank_that_cannot_start_says_why(checkpoint, tmp_path):
    async def start():
        options = Options({"checkpoint": str(broken)}, max_ranks=2, experts_per_rank=8)
        async with Router(options) as router:
            broken.unlink()  # between the front end's look and the ranks'
            with pytest.raises(ScaleError, match="No such file"):
                await router.start(1)

    broken = tmp_path / "model.safetensors"
    broken.write_bytes(checkpoint.read_bytes())
    asyncio.run(start())


# --- The front end, with ranks that are no processes. ---


class SilentProcess:
    """In place of a `RankProcess`: hears everything, and ends when it is killed."""

    def __init__(self, settings):
        self.settings, self.told, self.killed = settings, [], asyncio.Event()

    def tell(self, **message):
        self.told.append(message)

    def kill(self):
        self.killed.set()

    async def messages(self):
        await self.killed.wait()
        for message in ():
            yield message

    async def wait(self):
        return "status -9"

    async def stop(self):
        self.kill()

    def generates(self):
        return [message["request"]["id"] for message in self.told if message["do"] == "generate"]


@contextlib.asynccontextmanager
async def front_end(checkpoint, ranks, members):
    """A router with so many ranks, of which `members` serve."""
    options = Options({"checkpoint": str(checkpoint)}, max_ranks=4, experts_per_rank=8, context=64)
    async with Router(options) as router:
        for r in range(ranks):
            rank = router._ranks[r] = Rank(SilentProcess(SimpleNamespace(rank=r)))
            rank.stepped = r in members
            router._spawn(router._follow(rank))
        switch_to(router, 1, members)
        yield router


def switch_to(router, epoch, members):
    details = {"members": [*members], "lost": [], "change": "c", "blocked_ms": 0.0, "at": 0.0}
    router._hear(router._ranks[members[0]], {"event": "switch", "epoch": epoch} | details)


def say(router, rank, *tokens):
    router._hear(rank, {"event": "tokens", "tokens": tokens, "at": time.monotonic()})


def test_requests_of_a_rank_that_left_go_on_elsewhere_at_once_and_it_is_killed_if_it_does_not_end(
    checkpoint, monkeypatch
):
    async def shrink():
        async with front_end(checkpoint, ranks=3, members=(0, 1)) as router:
            ended = []
            router.on_event.append(lambda event, **details: ended.append(details) if event == "ended" else None)
            ranks = [router._ranks[r] for r in range(3)]
            stays, leaver, newcomer = (rank.process for rank in ranks)
            streams = [router.submit([1], 8) for _ in range(4)]
            assert (stays.generates(), leaver.generates()) == ([0, 2], [1, 3])
            say(router, ranks[1], (1, 0, 65, ""))
            ranks[1].leaving = True
            switch_to(router, 2, (0,))
            assert stays.generates() == [0, 2, 1, 3], "while the other's process is still there"
            say(router, ranks[1], (1, 1, 66, "stop"))
            assert streams[1].tokens == [65] and not streams[1].finish, "it is not asked any more"
            assert not leaver.killed.is_set(), "it has some time"
            await asyncio.wait_for(leaver.killed.wait(), 10)
            await asyncio.wait_for(router._until(lambda: 1 not in router._ranks, "end", time.monotonic() + 10), 10)
            assert not stays.killed.is_set() and not newcomer.killed.is_set()
            assert stays.generates() == [0, 2, 1, 3] and router.waiting == 0, "none is queued twice"
            assert [stream.restarts for stream in streams] == [0, 1, 0, 1]
            assert ended == [{"rank": 1, "requests": 2, "expected": True}]

    monkeypatch.setattr(router_module, "_LEAVE_S", 0.2)
    asyncio.run(shrink())


def test_a_rank_waits_for_others_as_long_as_it_may_take_to_start(checkpoint, monkeypatch):
    async def settings():
        options = Options({"checkpoint": str(checkpoint)}, max_ranks=2, experts_per_rank=8, start_timeout_s=600.0)
        async with Router(options) as router:
            await router._start(0, (0, 1))
            return router._ranks[0].process.settings

    async def start(settings, *_):
        return SilentProcess(settings)

    def initialize(*_, **options):
        raise NotImplementedError(options["init_timeout_s"])

    monkeypatch.setattr(router_module.RankProcess, "start", start)
    monkeypatch.setattr(worker_module.nx, "initialize", initialize)
    monkeypatch.setattr(worker_module, "compile_steps", lambda *_: {})
    monkeypatch.setattr(worker_module.jax.monitoring, "register_event_duration_secs_listener", lambda _: None)
    monkeypatch.setattr(Worker, "_read", lambda *_: None)
    worker = Worker(0, io.BytesIO())
    worker._inbox.put(dataclasses.asdict(asyncio.run(settings())))
    with pytest.raises(NotImplementedError, match="600"):
        worker.run()


# --- HTTP. ---


@pytest.mark.parametrize("content", ["\ud800", [{"type": "text", "text": "a"}, {"type": "text", "text": "\ud800"}]])
def test_messages_must_have_whole_characters(content):
    with pytest.raises(pydantic.ValidationError, match="must have whole characters"):
        ChatRequest.model_validate({"model": "tiny", "messages": [{"role": "user", "content": content}]})


def test_a_long_list_of_wrong_items_is_refused_at_the_first():
    for request, field in ((CompletionRequest, "prompt"), (CompletionRequest, "stop"), (ChatRequest, "messages")):
        with pytest.raises(pydantic.ValidationError) as refusal:
            request.model_validate({"model": "tiny", "prompt": "a", field: [{}] * 1000})
        assert refusal.value.error_count() < 10, field


async def post(router, path, **body):
    transport = httpx.ASGITransport(create_app(router, "tiny", "token"))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.post(path, json={"model": "tiny"} | body)


def test_text_becomes_tokens_outside_of_the_event_loop(checkpoint):
    async def ask():
        async with front_end(checkpoint, ranks=1, members=(0,)) as router:
            threads = []
            router.model.encode = router.model.apply_chat = lambda _: threads.append(threading.get_ident()) or [0] * 99
            answers = [
                await post(router, "/v1/completions", prompt=["a", "b"]),
                await post(router, "/v1/chat/completions", messages=[{"role": "user", "content": "a"}]),
            ]
            assert [answer.status_code for answer in answers] == [400, 400] and "got 99" in answers[1].text
            assert len(threads) == 3 and threading.get_ident() not in threads

    asyncio.run(ask())


def test_a_stream_that_fails_ends_with_an_error_whose_cause_is_in_the_log_alone(checkpoint, caplog):
    def decode(_):
        raise KeyError("a secret")

    async def ask():
        async with front_end(checkpoint, ranks=1, members=(0,)) as router:
            router.model.decode = decode
            asking = asyncio.create_task(post(router, "/v1/completions", prompt="a", stream=True))
            while not router.running:
                await asyncio.sleep(0.01)
            say(router, router._ranks[0], (0, 0, 65, ""))
            return await asyncio.wait_for(asking, 10)

    answer = asyncio.run(ask())
    error = json.loads(answer.text.removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and "its log says why" in error["message"]
    assert "a secret" not in answer.text and "a secret" in caplog.text
