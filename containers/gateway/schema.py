"""The accepted requests, key by key.

Any other key is refused by name. This keeps out what the engine accepts beyond OpenAI's API (chat templates from the
client, embeddings to unpickle, images to fetch, engine arguments). Only text is accepted.

Validation stops at the first error in a list and at the first unknown key. A body of a megabyte may have half a million
errors, each with a message of a kilobyte, and creating them would block all other requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from containers.gateway.tokens import Prompt

UNKNOWN_KEY = "unknown_key"
"""Error type for an unknown key; ``name`` in its context is the key, shortened."""
_LONGEST_KEY = 60
_MOST_BIASES = 1024
# Maximum size of a JSON Schema, which the engine validates. Schemas of tools and answers are written by people.
_MOST_SCHEMA_VALUES = 10_000


def _whole(value: object) -> object:
    """Accept 4.0 as an integer, as JSON Schema does."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)  # outermost, so that the bounds appear in the schema
Tokens = Annotated[StrictInt, Field(ge=1, le=10_000_000), Whole]
_TokenId = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
# There may be half a million values: the Python validator `Whole` runs only for those that are not plain integers.
TokenId = Annotated[_TokenId | Annotated[_TokenId, Whole], Field(union_mode="left_to_right")]
Seed = Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1), Whole]
Number = StrictFloat
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Word = Annotated[StrictStr, Field(min_length=1, max_length=256)]
Short = Annotated[StrictStr, Field(max_length=256)]
Bias = Annotated[Number, Field(ge=-100, le=100)]


def _few(value: object) -> object:
    """Check the length before the content; pydantic does it in the other order."""
    if isinstance(value, dict) and len(value) > _MOST_BIASES:
        raise PydanticCustomError("too_long", "at most {most} biases are allowed", {"most": _MOST_BIASES})
    return value


def _small(value: dict[str, Any]) -> dict[str, Any]:
    left: list[object] = [value]
    for _ in range(_MOST_SCHEMA_VALUES):
        if not left:
            return value
        inner = left.pop()
        left.extend(inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ())
    raise PydanticCustomError("too_long", "at most {most} values are allowed", {"most": _MOST_SCHEMA_VALUES})


Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias],
    Field(max_length=_MOST_BIASES, json_schema_extra={"additionalProperties": False}),
    BeforeValidator(_few),
]
Schema = Annotated[dict[str, Any], AfterValidator(_small)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: object) -> object:
        """Stop at the first unknown key; pydantic would list all."""
        unknown = next((key for key in value if key not in cls.model_fields), None) if isinstance(value, dict) else None
        if unknown is not None:
            raise PydanticCustomError(UNKNOWN_KEY, "unknown key", {"name": str(unknown)[:_LONGEST_KEY]})
        return value


class StreamOptions(_Part):
    """What a stream contains besides the answer."""

    include_usage: StrictBool = False


class ResponseFormat(_Part):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class _Request(_Part):
    """Keys of both kinds of request. The last block has sampling parameters that only the engine defines."""

    model: Word
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    n: Annotated[StrictInt, Field(ge=1, le=16), Whole] = 1
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop: Word | Annotated[list[Word], Field(max_length=16, fail_fast=True)] | None = None
    seed: Seed | None = None
    logit_bias: Biases | None = None
    user: Short | None = None
    response_format: ResponseFormat | None = None

    top_k: Annotated[StrictInt, Field(ge=-1, le=2**31 - 1), Whole] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0, le=10_000_000), Whole] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    include_stop_str_in_output: StrictBool | None = None

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return 1

    @property
    def longest_answer(self) -> int | None:
        """Maximum number of tokens of an answer, if the client gives one."""
        return self.max_tokens


def _kind_of_prompt(value: object) -> str:
    """Return which form a prompt has, by its first part, so that it is validated against that form only."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else None
    return "texts" if isinstance(first, str) else "token lists" if isinstance(first, list) else "tokens"


_TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class CompletionRequest(_Request):
    """``POST /v1/completions``."""

    prompt: Annotated[
        Annotated[StrictStr, Tag("text")]
        | Annotated[list[StrictStr], Field(min_length=1, max_length=256, fail_fast=True), Tag("texts")]
        | Annotated[_TokenIds, Tag("tokens")]
        | Annotated[list[_TokenIds], Field(min_length=1, max_length=256, fail_fast=True), Tag("token lists")],
        Discriminator(_kind_of_prompt),
    ]
    echo: StrictBool = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=20), Whole] | None = None
    add_special_tokens: StrictBool = True

    @property
    def given(self) -> Prompt:
        """The prompts, as they were sent."""
        return self.prompt

    @property
    def prompts(self) -> int:
        """Number of prompts: one for a text or a list of token ids, else the length of the list."""
        if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int):
            return len(self.prompt)
        return 1


class TextPart(_Part):
    """A text part of a message."""

    type: Literal["text"]
    text: StrictStr


class FunctionCall(_Part):
    """The tool and the arguments of a call; ``arguments`` is a JSON string."""

    name: Word
    arguments: StrictStr


class ToolCall(_Part):
    """A tool call by the assistant."""

    id: Word
    type: Literal["function"]
    function: FunctionCall


class Message(_Part):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = None
    name: Word | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: Word | None = None
    reasoning: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    # Of an answer of the engine, which clients put into the conversation as it came.
    refusal: StrictStr | None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


class Function(_Part):
    """A tool's name, and its parameters as JSON Schema."""

    name: Word
    description: StrictStr | None = None
    parameters: Schema | None = None
    strict: StrictBool | None = None


class Tool(_Part):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Part):
    """The one tool to call."""

    name: Word


class NamedTool(_Part):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


class TemplateOptions(_Part):
    """Options for chat templates."""

    enable_thinking: StrictBool | None = None
    thinking: StrictBool | None = None


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: Tokens | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20), Whole] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @property
    def longest_answer(self) -> int | None:
        """Maximum number of tokens of an answer. The key's newer name takes precedence, as at OpenAI."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def plain_messages(self) -> list[dict[str, object]]:
        """The conversation for a chat template; text parts are joined, and reasoning has both its names, as in vLLM."""
        found = []
        for message in self.messages:
            plain = message.model_dump(exclude_none=True)
            thought = message.reasoning if message.reasoning is not None else message.reasoning_content
            if thought is not None:
                plain["reasoning"] = plain["reasoning_content"] = thought
            if isinstance(message.content, list):
                plain["content"] = "".join(part.text for part in message.content)
            found.append({"content": "", **plain})
        return found

    def template_options(self) -> dict[str, object]:
        """The chat template's options; ``reasoning_effort`` sets ``enable_thinking`` where it is absent, as in vLLM."""
        given = {} if self.chat_template_kwargs is None else self.chat_template_kwargs.model_dump(exclude_unset=True)
        if self.reasoning_effort is None:
            return given
        return {"reasoning_effort": self.reasoning_effort, "enable_thinking": self.reasoning_effort != "none", **given}

    def plain_tools(self) -> list[dict[str, object]] | None:
        """The tools for a chat template."""
        return None if self.tools is None else [tool.model_dump(exclude_none=True) for tool in self.tools]


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class Answer(BaseModel):
    """The answer to a request without ``stream``. Other keys of the engine are passed on unchanged."""

    object: str
    choices: list[dict[str, Any]]
    usage: Usage | None = None


class ErrorDetail(BaseModel):
    """What went wrong; ``code`` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The answer to a request that failed."""

    error: ErrorDetail


class ModelCard(BaseModel):
    """One model of the API."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "slipway"
    max_model_len: int


class ModelList(BaseModel):
    """``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def forwarded(request: _Request, changes: Mapping[str, object]) -> dict[str, object]:
    """Return the document for the engine: the keys set by the client, with these changes. None removes a key."""
    document = {**request.model_dump(mode="json", exclude_unset=True), **changes}
    return {name: value for name, value in document.items() if value is not None or name not in changes}
