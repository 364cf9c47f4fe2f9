"""The parts of examples/serving that need no processes: rows, choice of tokens, text, what requests are refused."""

import asyncio

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import random_checkpoint
from serving.byte_model import ByteModel
from serving.detokenizer import Detokenizer
from serving.model import find_checkpoint, open_model
from serving.program import Batch, choose
from serving.router import Options, Router, ScaleError, Unavailable
from serving.rows import Request, Rows

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
