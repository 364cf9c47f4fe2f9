"""The HTTP side: OpenAI's completions and chat completions, vLLM's control of the number of ranks, health, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal, NamedTuple

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.detokenizer import Detokenizer
from serving.metrics import Metrics
from serving.router import ChangeRuns, Overloaded, Router, ScaleError, Stream, Unavailable
from serving.schema import ChatRequest, CompletionRequest, Generation, ScaleRequest

_MAX_BODY_BYTES = 2 << 20
_DISCONNECT_POLL_S = 0.5
_log = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer in OpenAI's form of an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Choice:
    """The text of one answer.

    Attributes:
      num_tokens: that its text so far is made of.
      finish: "stop" or "length" at the end.
    """

    def __init__(self, router: Router, stream: Stream, stops: list[str]):
        self.stream, self._detokenizer = stream, Detokenizer(router.model, stops)
        self._silent = frozenset() if stream.request.ignore_eos else router.model.eos_ids
        self.num_tokens = 0
        self.finish: Literal["", "stop", "length"] = ""

    async def pieces(self) -> AsyncIterator[str]:
        async for token in self.stream:
            self.num_tokens += 1
            if token not in self._silent and (text := self._detokenizer.push(token)):
                yield text
            if self._detokenizer.stopped:
                self.stream.cancel()
                self.finish = "stop"
                return
        if text := self._detokenizer.finish():
            yield text
        self.finish = "stop" if self._detokenizer.stopped else self.stream.finish

    async def text(self) -> str:
        return "".join([piece async for piece in self.pieces()])


class Form(NamedTuple):
    """How answers to an endpoint look.

    Attributes:
      prefix: of their ids.
      object, chunk: "object" of a whole answer and of a piece.
      whole: (text) -> fields of a choice in a whole answer.
      piece: (text) -> fields of a choice in a piece.
      opening: fields of the first piece of a choice, or None.
    """

    prefix: str
    object: str
    chunk: str
    whole: Callable[[str], dict[str, Any]]
    piece: Callable[[str], dict[str, Any]]
    opening: dict[str, Any] | None


COMPLETION = Form("cmpl", "text_completion", "text_completion", lambda t: {"text": t}, lambda t: {"text": t}, None)
CHAT = Form(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text: {"delta": {"content": text} if text else {}},
    {"delta": {"role": "assistant", "content": ""}},
)


def create_app(router: Router, name: str, control_token: str) -> FastAPI:
    """The application.

    Args:
      router: started.
      name: of the model.
      control_token: what the bearer must know to change the number of ranks.
    """
    app = FastAPI(title="jax_nixlep serving", openapi_url=None)
    app.add_middleware(LimitBody)
    metrics = Metrics(router)

    def check_control_token(request: Request) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.encode(), control_token.encode()):
            raise ApiError(401, "Authorization must be Bearer and the control token", code="invalid_api_key")

    # --- Generation. ---

    def submit(body: Generation, prompts: list[list[int]], max_tokens: int) -> list[Choice]:
        if body.model != name:
            raise ApiError(404, f"model must be {name!r}; got {body.model!r}", param="model", code="model_not_found")
        seed = secrets.randbits(32) if body.seed is None else body.seed % (1 << 32)
        sampling = {"temperature": body.temperature, "top_p": body.top_p, "seed": seed, "ignore_eos": body.ignore_eos}
        choices: list[Choice] = []
        try:
            for prompt in prompts:
                choices.append(Choice(router, router.submit(prompt, max_tokens, **sampling), body.stop))
        except Exception:
            for choice in choices:
                choice.stream.cancel()
            raise
        return choices

    async def respond(request: Request, body: Generation, choices: list[Choice], form: Form) -> Any:
        head = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        if body.stream:
            pieces = stream_pieces(head, choices, form, body.include_usage)
            metrics.answered(200)
            return StreamingResponse(pieces, media_type="text/event-stream")
        try:
            texts = await unless_gone(request, asyncio.gather(*(choice.text() for choice in choices)))
        finally:
            end(choices)
        metrics.answered(200)
        return head | {
            "object": form.object,
            "choices": [_choice(i, form.whole(text), choices[i].finish) for i, text in enumerate(texts)],
            "usage": _usage(choices),
        }

    async def stream_pieces(
        head: dict[str, Any], choices: list[Choice], form: Form, include_usage: bool
    ) -> AsyncIterator[str]:
        news: asyncio.Queue[tuple[int, str | Exception | None]] = asyncio.Queue()

        async def follow(i: int, choice: Choice) -> None:
            try:
                async for text in choice.pieces():
                    news.put_nowait((i, text))
                news.put_nowait((i, None))
            except Exception as error:  # whatever it is: the reader waits for news
                news.put_nowait((i, error))

        def event(choice: dict[str, Any] | None, **more: Any) -> str:
            value = head | {"object": form.chunk, "choices": [choice] if choice else []} | more
            return f"data: {json.dumps(value)}\n\n"

        tasks = [asyncio.create_task(follow(i, choice)) for i, choice in enumerate(choices)]
        try:
            if form.opening:
                for i in range(len(choices)):
                    yield event(_choice(i, form.opening))
            left = len(choices)
            while left:
                i, text = await news.get()
                if isinstance(text, Exception):
                    yield f"data: {json.dumps(_stream_error(text).body())}\n\n"
                    return
                left -= text is None
                yield event(_choice(i, form.piece(text or ""), choices[i].finish if text is None else ""))
            if include_usage:
                yield event(None, usage=_usage(choices))
            yield "data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()
            end(choices)

    def end(choices: list[Choice]) -> None:
        for choice in choices:
            choice.stream.cancel()
            metrics.finished(choice.stream)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Any:
        def encode() -> list[list[int]]:
            return [router.model.encode(one) if isinstance(one, str) else one for one in body.prompts]

        prompts = await asyncio.to_thread(encode)  # long texts take long: the event loop has answers to hand on
        return await respond(request, body, submit(body, prompts, body.max_tokens), COMPLETION)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        prompt = await asyncio.to_thread(router.model.apply_chat, messages)
        room = max(1, router.options.context - len(prompt))
        max_tokens = body.max_completion_tokens or body.max_tokens or room
        return await respond(request, body, submit(body, [prompt], max_tokens), CHAT)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "jax_nixlep"}]}

    # --- Control. ---

    @app.post("/scale_elastic_ep", dependencies=[Depends(check_control_token)])
    async def scale_elastic_ep(body: ScaleRequest) -> Any:
        try:
            await router.scale(
                body.new_data_parallel_size,
                drain_timeout_s=body.drain_timeout,
                deadline_s=body.drain_timeout + router.options.start_timeout_s,
            )
        except ChangeRuns as error:
            raise ApiError(409, str(error)) from None
        except ScaleError as error:
            raise ApiError(500, str(error)) from None
        return {"message": f"Scaled to {body.new_data_parallel_size} data parallel engines"}

    @app.post("/is_scaling_elastic_ep")
    async def is_scaling_elastic_ep() -> Any:
        return {"is_scaling_elastic_ep": bool(router.scaling)}

    @app.get("/health")
    async def health() -> Any:
        state = {"members": router.members, "epoch": router.epoch, "scaling": router.scaling}
        state["missing_experts"] = router.missing_experts
        load = {"running": router.running, "waiting": router.waiting}
        return JSONResponse(state | load, 200 if router.members and not router.missing_experts else 503)

    @app.get("/metrics")
    async def prometheus() -> Any:
        return Response(metrics.text(), media_type=Metrics.MEDIA_TYPE)

    # --- Errors. ---

    def error_response(error: ApiError) -> Response:
        metrics.answered(error.status)
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        whole = first["type"] == "json_invalid"  # its place is a position in the text
        param = "" if whole else ".".join(str(part) for part in first["loc"][1:])
        return error_response(ApiError(400, f"{param or 'body'}: {first['msg']}", param=param or None))

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> Response:
        return error_response(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(ValueError)
    @app.exception_handler(FileNotFoundError)  # a model without a tokenizer, or without a chat template
    async def on_refusal(_: Request, error: Exception) -> Response:
        return error_response(ApiError(400, str(error)))

    @app.exception_handler(Overloaded)
    async def on_overload(_: Request, error: Overloaded) -> Response:
        return error_response(ApiError(429, str(error), code="overloaded"))

    @app.exception_handler(Unavailable)
    async def on_unavailable(_: Request, error: Unavailable) -> Response:
        return error_response(ApiError(503, str(error)))

    return app


class LimitBody:
    """Middleware that refuses bodies beyond `_MAX_BODY_BYTES` before they are held in memory."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > _MAX_BODY_BYTES:
                raise HTTPException(413, f"the body must be at most {_MAX_BODY_BYTES} bytes")
            return message

        await self._app(scope, counted, send)


async def unless_gone(request: Request, work: asyncio.Future[Any]) -> Any:
    """The result of `work`, which is cancelled when the client hangs up.

    Raises:
      ApiError: it did; nobody reads this.
    """
    while not work.done():
        await asyncio.wait([work], timeout=_DISCONNECT_POLL_S)
        if not work.done() and await request.is_disconnected():
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            raise ApiError(499, "the client hung up")
    return work.result()


def _stream_error(error: Exception) -> ApiError:
    """What ended a stream, as its reader is told. The text of what nobody expected is for the log alone."""
    if isinstance(error, Unavailable):
        return ApiError(503, str(error))
    _log.error("an answer ended with an unexpected error", exc_info=error)
    return ApiError(500, "the server failed to go on with this answer; its log says why")


def _choice(index: int, fields: dict[str, Any], finish: str = "") -> dict[str, Any]:
    return {"index": index, **fields, "logprobs": None, "finish_reason": finish or None}


def _usage(choices: list[Choice]) -> dict[str, int]:
    prompt = sum(len(choice.stream.request.prompt) for choice in choices)
    made = sum(choice.num_tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
