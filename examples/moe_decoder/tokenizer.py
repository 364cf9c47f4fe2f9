"""Text to token ids and back, and conversations to prompts, as the files of a checkpoint's folder say."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_decoder.config import read_json


class Tokenizer:
    """Reads `tokenizer.json`, and `chat_template.jinja` or the template of `tokenizer_config.json`, when first needed.

    Raises:
      FileNotFoundError: by the methods: the folder has no such file.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer as Reader

        path = self._folder / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(f"encode: {path} must exist; got no such file; download it, or give token ids")
        return Reader.from_file(str(path))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; with `special` those that begin a text, if the model has them."""
        # A batch of one: other than `encode`, it lets other threads run meanwhile.
        return self._tokenizer.encode_batch([text], add_special_tokens=special)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))

    def apply_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt for the assistant's next message after `messages`, {"role": ..., "content": ...} each.

        Raises:
          ValueError: the model's template refuses them; says why.
        """
        import jinja2

        template, names = self._template
        try:
            text = template.render(messages=list(messages), add_generation_prompt=True, **names)
        except jinja2.TemplateError as error:
            raise ValueError(f"apply_chat: messages must suit the model's template; got {error}; change them") from None
        return self.encode(text, special=False)  # the template writes them

    @functools.cached_property
    def _template(self) -> tuple[Any, dict[str, str]]:
        """The template, and the special tokens by name."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # the template comes from a stranger

        config, file = self._folder / "tokenizer_config.json", self._folder / "chat_template.jinja"
        values = read_json(config) if config.exists() else {}
        source = file.read_text() if file.exists() else values.get("chat_template")
        if isinstance(source, list):  # several by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not isinstance(source, str):
            raise FileNotFoundError(
                f"apply_chat: {self._folder} must have a chat template; got none in {file.name} and {config.name}; "
                "use a model made for conversations, or plain text"
            )

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        special = {name: value for name, value in values.items() if name.endswith("_token")}
        names = {name: value["content"] if isinstance(value, dict) else value for name, value in special.items()}
        return environment.from_string(source), {name: value for name, value in names.items() if value is not None}
