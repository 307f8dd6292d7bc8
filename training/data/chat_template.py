"""A chat template: renders messages with the tokenizer's special tokens, the variables of the YAML and the date of the run."""

import json
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from difflib import get_close_matches
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError
from jinja2.runtime import LoopContext

from training.data.errors import DataError, RowError, only_one_call
from training.data.records import Chat, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QUESTION = "What is it?"
"""A question with which templates are probed."""
_LOOP = frozenset(("first", "last", "index", "index0"))
_TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, AttributeError),
    *(LookupError, ArithmeticError, RecursionError),
)
"""Exceptions that the code of a template raises for a row."""


SET_BY_RENDERING = frozenset({"messages", "tools", "add_generation_prompt", "strftime_now"})
"""Variables of chat templates that neither `chat_template_kwargs` nor a request to the service may set."""
_IS_SET = "it is set for each rendering. Remove it."


class ChatTemplate:
    """The chat template of a model, or of a model without one: then it renders nothing."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        variables: Mapping[str, Any] = {},
        today: date | None = None,
    ):
        """Read the template.

        Args:
            tokenizer: Tokenizer with its chat template.
            variables: Variables of the template (`chat_template_kwargs`).
            today: Date that the template prints, if it prints one; None: the date of each rendering.
        """
        self._tokenizer = tokenizer
        self._fixed_date = today
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self.variables = variables
        for name in SET_BY_RENDERING & self.variables.keys():
            raise DataError(f"chat_template_kwargs.{name}: {_IS_SET}")
        self.source = str(tokenizer.get_chat_template(None, None)) if tokenizer.chat_template else ""
        """The template of rows without tools; empty if the model has none."""

    @cached_property
    def names(self) -> set[str]:
        """Return the names that the template of rows without tools reads as variables."""
        return _names_in(self.source)

    @property
    def date(self) -> str | None:
        """Return the date that the template prints (ISO 8601), or None if it prints none."""
        return self._now.date().isoformat() if "strftime_now" in str(self._tokenizer.chat_template) else None

    @property
    def _now(self) -> datetime:
        return datetime.combine(self._fixed_date or datetime.now(), time())

    def source_for(self, tools: list[dict[str, Any]] | None) -> str:
        """Return the template of rows with or without tools; models may have one for each."""
        return str(self._tokenizer.get_chat_template(None, tools)) if self._tokenizer.chat_template else ""

    def render(
        self,
        messages: list[Message],
        chat: Chat,
        *,
        prompt: bool = False,
        switch: Mapping[str, bool] | None = None,
    ) -> str:
        """Render messages with the tools and the variables of a chat."""
        for name in SET_BY_RENDERING & chat.variables.keys():
            raise RowError("template", f"chat_template_kwargs.{name}: {_IS_SET}")
        try:
            # Equivalent to tokenizer.apply_chat_template, without its constant work per row.
            template = _compiled(self._tokenizer.get_chat_template(None, chat.tools))
        except TemplateSyntaxError as error:
            raise DataError(
                f"{self._place_of(chat.tools)}the chat template has a syntax error ({error}, template line {error.lineno}). Copy the file "
                "again from the original model or adapter, or set chat_template."
            ) from error
        render = partial(
            template.render,
            tools=chat.tools,
            strftime_now=self._now.strftime,
            add_generation_prompt=prompt,
            **{
                "documents": None,
                **self._special_tokens,
                **self.variables,
                **chat.variables,
                **(switch or {}),
            },
        )
        try:
            return render(messages=messages)
        except _TEMPLATE_ERRORS as error:
            raise RowError("template", _rejection(chat, messages, render, error)) from error

    def _place_of(self, tools: list[dict[str, Any]] | None) -> str:
        """Return the file of the template of rows with or without tools, as a message names it; empty for one that was set."""
        name, source = self._tokenizer.name_or_path, self.source_for(tools)
        directory = Path(name or "no tokenizer")  # one that was built in memory
        for file in (*directory.glob("*.jinja"), *directory.glob("*/*.jinja")):
            if file.read_text("utf-8") == source:
                return f"{file}: "
        config = directory / "tokenizer_config.json"
        is_there = config.exists() and json.loads(config.read_text("utf-8")).get("chat_template") == source
        return f"{config}: " if is_there else ""

    def reject_unknown_variables(self) -> None:
        """Raise DataError for a variable of the YAML that the template does not read: a misspelled one would change nothing."""
        for name in self.variables if self.source else ():
            if name not in self.known_variables:
                raise DataError(f"chat_template_kwargs.{name}: {self.explain_unknown(name)}")

    @cached_property
    def known_variables(self) -> set[str]:
        """Return the names in the template, or in the templates with and without tools."""
        given = self._tokenizer.chat_template
        return set().union(*map(_names_in, given.values() if isinstance(given, dict) else [self.source]))

    def explain_unknown(self, name: str) -> str:
        """Return what is said about a variable that the template does not read."""
        near = get_close_matches(name, sorted(self.known_variables), n=1, cutoff=0.7)
        return f"the chat template reads no such variable. {f'Did you mean {near[0]}?' if near else 'Remove it.'}"


@lru_cache
def _compiled(chat_template: str) -> Template:
    """Compile a template with transformers' sandbox and globals, merged once; Jinja would merge them for every row."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(chat_template).environment
    checked = environment.getattr

    def get(obj: Any, attribute: str) -> Any:
        # The sandbox takes a tenth of a row's time to find that the numbers of a loop are safe.
        is_safe = type(obj) is LoopContext and attribute in _LOOP
        return getattr(obj, attribute) if is_safe else checked(obj, attribute)

    environment.getattr = get  # pyright: ignore[reportAttributeAccessIssue]
    return Template.from_code(environment, environment.compile(chat_template), dict(environment.globals))


def _names_in(source: str) -> set[str]:
    """Return the names that a template reads as variables, which are not those of attributes, strings and comments."""
    tokens = [
        (kind, text) for _, kind, text in Environment(autoescape=True).lex(source) if kind != "whitespace"
    ]
    return {text for (_, before), (kind, text) in pairwise(tokens) if kind == "name" and before != "."}


def _rejected_message(render: Callable[..., str], messages: list[Message], error: Exception) -> int | None:
    """Return the index of the first message with which a template raises an error, or None if it does so without the messages."""
    for count in range(len(messages) + 1):
        try:
            render(messages=messages[:count] or [{"role": "user", "content": QUESTION}])
        except _TEMPLATE_ERRORS as earlier:
            if str(earlier) == str(error):
                return count - 1 if count else None
    return len(messages) - 1


def _fails(render: Callable[..., str], **changes: Any) -> bool:
    """Return whether a template raises an error."""
    try:
        render(**changes)
    except _TEMPLATE_ERRORS:
        return True
    return False


def _rejection(chat: Chat, messages: list[Message], render: Callable[..., str], error: Exception) -> str:
    """Return the error for a row that a template rejects, with the message or the tool and what to do about it."""
    index = _rejected_message(render, messages, error)
    if index is None:
        for number, tool in enumerate(chat.tools or (), start=1):
            if _fails(render, messages=[{"role": "user", "content": QUESTION}], tools=[tool]):
                function = tool.get("function")
                keys = ", ".join(function if isinstance(function, dict) else tool)
                return f"tool {number} of `tools` (keys: {keys}) cannot be rendered by the chat template ({error}). Fix the tool, or set chat_template"
        return f"cannot be rendered by the chat template, whatever the messages are ({error}). Set chat_template, or change `tools` or chat_template_kwargs"
    if index >= len(chat.messages):
        return f"is rejected by the chat template ({error}). Set chat_template, or fix the row"
    calls = messages[index].get("tool_calls", ()) if messages else ()
    if len(calls) > 1 and not _fails(
        render, messages=[*messages[:index], {**messages[index], "tool_calls": calls[:1]}]
    ):
        return only_one_call(chat.name_of(index), len(calls))
    message = chat.messages[index]
    if (
        index
        and message["role"] in ("system", "developer")
        and chat.messages[0]["role"] in ("system", "developer")
    ):
        fix = f"Move its text into {chat.name_of(0)}"
    elif message["role"] in ("system", "developer"):
        fix = "Move its text into the first user message, or use a model whose template has system messages"
    elif message["role"] == "tool" or "tool_calls" in message:
        fix = "Use a model whose template renders tool calls, or set chat_template"
    else:
        fix = "Fix or remove the message, or set chat_template"
    return f"{chat.name_of(index)} is rejected by the chat template ({error}). {fix}"
