"""The requests of Ollama's interface, field by field: what is honoured, and what only an empty value may be given for.

Source of the fields: docs/api.md of ollama/ollama.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from labkit.serve.openai_api import Natural, Positive, Seed, Strict, Text, Word, whole

FromMinusOne = Annotated[int, Field(ge=-1), BeforeValidator(whole)]


class Options(Strict):
    """The options that belong to a request. Those of the loaded model (num_gpu, num_thread …) are set at its start."""

    num_predict: FromMinusOne | None = Field(None, description="at most; -1 or 0: up to the end of the context")
    num_ctx: Positive | None = Field(None, description="a limit below the model's own context")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Natural | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    repeat_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    repeat_last_n: FromMinusOne | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: Word | Annotated[list[Word], Field(max_length=16)] | None = None

    def given(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: Text
    images: Annotated[list[str], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


class Asked(Strict):
    model: Word
    stream: bool | None = Field(None, description="left out: true, as Ollama does")
    options: Options | None = None
    format: Literal[""] | None = None
    think: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    keep_alive: Literal[-1, "-1"] | None = Field(None, description="the one model of this server stays loaded")


class GenerateRequest(Asked):
    prompt: Text | None = Field(None, description="left out or empty: only says that the model is loaded")
    system: Text | None = None
    raw: bool | None = None
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    images: Annotated[list[str], Field(max_length=0)] | None = None
    context: Annotated[list[int], Field(max_length=0)] | None = None


class ChatRequest(Asked):
    messages: Annotated[list[Message], Field(max_length=1000)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None


class EmbedRequest(Strict):
    model: Word
    input: Text | Annotated[list[Text], Field(max_length=512)]
    truncate: bool | None = None
    options: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    keep_alive: Literal[-1, "-1"] | None = None
    dimensions: None = None


NewName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*(:[A-Za-z0-9._-]+)?$")]


class NameRequest(Strict):
    model: Word
    verbose: bool | None = None


class CopyRequest(Strict):
    source: Word
    destination: NewName


class DeleteRequest(Strict):
    model: Word


class CreateRequest(Strict):
    model: NewName
    from_: Word = Field(alias="from")
    system: Text | None = None
    parameters: Options | None = None
    messages: Annotated[list[Message], Field(max_length=1000)] | None = None
    license: Text | list[Text] | None = None
    stream: bool | None = None
    template: Literal[""] | None = None
    quantize: Literal[""] | None = None
    files: Annotated[dict[str, str], Field(max_length=0)] | None = None
    adapters: Annotated[dict[str, str], Field(max_length=0)] | None = None


class OllamaError(BaseModel):
    error: str
