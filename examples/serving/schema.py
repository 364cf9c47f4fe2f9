"""What clients of the OpenAI interface may send. A field that is not here is refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256  # each is looked for whenever a token comes
MAX_PROMPTS = 128


def _check_characters(value: Any) -> Any:
    r"""Refuses half of a surrogate pair ("\ud800" in JSON) in a text or a list of them: no tokenizer takes it."""
    try:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError(
            "characters", "must have whole characters; got half of a surrogate pair; send both halves, or none"
        ) from None
    return value


def _check_count(prompt: Any) -> Any:
    if isinstance(prompt, list) and not isinstance(prompt[0], int) and len(prompt) > MAX_PROMPTS:
        raise PydanticCustomError(
            "too_many",
            "must have at most {most} prompts; got {count}; send several requests",
            {"most": MAX_PROMPTS, "count": len(prompt)},
        )
    return prompt


def _as_list(stop: Any) -> Any:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


T = TypeVar("T")
Items = Annotated[list[T], Field(fail_fast=True)]  # to collect the errors of a million wrong items takes seconds
Characters = BeforeValidator(_check_characters)
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    include_usage: bool = False


class Generation(_Strict):
    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: Annotated[Items[Stop], Field(max_length=MAX_STOPS), Characters, BeforeValidator(_as_list)] = []
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False  # as vLLM has it
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Generation):
    prompt: Annotated[
        str | Items[int] | Items[str] | Items[Items[int]],
        Field(min_length=1),
        AfterValidator(_check_count),
        Characters,
    ]
    max_tokens: int = Field(16, ge=1)

    @property
    def prompts(self) -> list[Any]:
        """Each a text or tokens."""
        return [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt


class TextPart(_Strict):
    type: Literal["text"]
    text: Annotated[str, Characters]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | Items[TextPart], Characters]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Generation):
    messages: Items[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class ScaleRequest(_Strict):
    """As vLLM has it.

    Attributes:
      new_data_parallel_size: ranks to have.
      drain_timeout: seconds that ranks that leave may go on with the requests they have.
    """

    new_data_parallel_size: int = Field(ge=1)
    drain_timeout: float = Field(120.0, ge=0, le=3600)
