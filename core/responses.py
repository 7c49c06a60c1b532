"""Answer a Responses request with a response or its events. A response is the one of a stream's last event."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from core import conversation as conversations
from core import tokens
from core.conversation import Conversation
from core.errors import ApiError, InvalidRequest, NotFound
from core.response_store import StoredResponse
from core.service import Service
from core.session import Session
from core.wire.responses import answer, translation, writer
from core.wire.responses.answer import Deleted, ItemList, Response
from core.wire.responses.events import StreamEvent
from core.wire.responses.request import InputItem, ResponsesRequest, input_item
from core.wire.responses.tools import declared
from core.wire.responses.writer import Writer, new_id
from core.wire.tokens import InputTokens

NO_STORE = "This server stores no responses: set RESPONSES_STORE (for example to 64MB) to change that."
PAGE = 100  # the most input items in one answer


class Turn:
    """One request and its response. It is an operation for `handlers.generate.respond`."""

    def __init__(self, service: Service, tenant: str) -> None:
        self._service = service
        self._tenant = tenant
        self._id = new_id("resp")
        self._created = int(time.time())
        self._items: list[InputItem] = []  # the whole conversation before the response
        self._conversation = Conversation([])
        self._request = ResponsesRequest(input=[])
        self._writer: Writer | None = None

    async def check(self, service: Service, request: ResponsesRequest) -> None:
        """Check what needs no loaded model, and read the stored conversation before the input.

        Raises InvalidRequest or ModelNotFound.
        """
        history = self._history(request.previous_response_id)
        self._request = request
        self._items = [*history, *(self._resolved(item, index) for index, item in enumerate(request.items))]
        with _names_of_fields():
            self._conversation = translation.conversation(request, self._items)
            await conversations.check(service, request.model, self._conversation)

    async def begin(
        self, service: Service, request: ResponsesRequest, *, tenant: str = "", ends: float | None = None
    ) -> Session:
        """Start a request that has passed `check` and wait for its first delta. The caller closes the Session."""
        with _names_of_fields():
            return await conversations.begin(service, request.model, self._conversation, tenant=tenant, ends=ends)

    async def complete(self, session: Session, request: ResponsesRequest) -> Response:
        """Return the whole response."""
        return writer.fold([event async for event in self.stream(session, request)])

    async def stream(self, session: Session, request: ResponsesRequest) -> AsyncIterator[StreamEvent]:
        """Yield the beginning of the response, its items, and its end with the whole response."""
        current = self._writer = self._begun(session.card.name)
        for event in current.start():
            yield event
        async for delta in session:
            for event in current.write(delta):
                yield event
            if delta.finish_reason is not None:
                for event in current.finish(delta, _usage(session), int(time.time())):
                    yield event
        current.response.store = self._store(current.response)  # before a client can continue the response
        yield current.end()

    def failure(self, error: ApiError, latest: StreamEvent | None) -> Iterable[StreamEvent]:
        """Yield the events of an error after the status was sent."""
        current = self._writer or self._begun(self._request.model or self._service.host.state().model or "")
        return current.fail(error)

    async def count(self, ends: float | None) -> InputTokens:
        """Return the prompt tokens of a request that has passed `check`."""
        with _names_of_fields():
            prompt = await tokens.prompt(self._service, self._request.model, self._conversation, ends)
        return InputTokens(len(prompt.tokens))

    def _begun(self, model: str) -> Writer:
        request = self._request
        response = answer.in_progress(
            request, self._conversation, identity=self._id, created=self._created, model=model, store=self._stores
        )
        by_name = {each.tool.name: each for each in declared(request.tools or ())}
        return Writer(response, by_name, encrypted=request.includes("reasoning.encrypted_content"))

    @property
    def _stores(self) -> bool:
        return self._service.responses.enabled and self._request.store is not False

    def _store(self, response: Response) -> bool:
        if not self._stores:
            return False
        items = msgspec.json.encode([input_item(item, new_id) for item in self._items])
        return self._service.responses.put(self._tenant, response.id, items, msgspec.json.encode(response))

    def _history(self, previous: str | None) -> list[InputItem]:
        """Return the items of a stored response and of the conversation before it."""
        if previous is None:
            return []
        stored = self._service.responses.get(self._tenant, previous)
        if stored is None:
            reason = "" if self._service.responses.enabled else f" {NO_STORE}"
            raise InvalidRequest(
                f"Previous response with id {previous[:80]!r} not found.{reason}",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return [*_input(stored), *_output(stored)]

    def _resolved(self, item: InputItem, index: int) -> InputItem:
        """Return the stored item that an `item_reference` refers to. Other items are returned as they are."""
        if item.kind != "item_reference":
            return item
        for stored in self._service.responses.latest(self._tenant):
            for candidate in (*_output(stored), *_input(stored)):
                if candidate.id == item.id:
                    return candidate
        reason = "" if self._service.responses.enabled else f" {NO_STORE}"
        raise InvalidRequest(
            f"'input[{index}]' refers to the item {str(item.id)[:80]!r}, which is not stored.{reason}",
            param=f"input[{index}]",
        )


def retrieve(service: Service, tenant: str, identity: str) -> bytes:
    """Return the JSON of a stored response. Raises NotFound."""
    return _stored(service, tenant, identity).response


def delete(service: Service, tenant: str, identity: str) -> Deleted:
    """Delete a stored response. Raises NotFound."""
    _stored(service, tenant, identity)
    service.responses.delete(tenant, identity)
    return Deleted(identity)


def input_items(service: Service, tenant: str, identity: str, query: Mapping[str, str]) -> ItemList:
    """Return a page of the conversation before a stored response, the latest item first by default.

    The query may have `limit` (1 to 100, default 20), `order` (asc or desc) and `after` (an item's id).
    """
    items: list[dict[str, Any]] = msgspec.json.decode(_stored(service, tenant, identity).items)
    limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 5 and 1 <= int(limit) <= PAGE):
        raise InvalidRequest(f"'limit' must be a whole number from 1 to {PAGE}, got {limit[:40]!r}.", param="limit")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"'order' must be 'asc' or 'desc', got {order[:40]!r}.", param="order")
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"'after' must be the id of an input item, got {after[:80]!r}.", param="after")
        items = items[places[0] + 1 :]
    page = items[: int(limit)]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return ItemList(page, first, last, len(items) > len(page))


def _stored(service: Service, tenant: str, identity: str) -> StoredResponse:
    stored = service.responses.get(tenant, identity)
    if stored is None:
        reason = "" if service.responses.enabled else f" {NO_STORE}"
        raise NotFound(f"Response with id {identity[:80]!r} not found.{reason}")
    return stored


def _input(stored: StoredResponse) -> list[InputItem]:
    return msgspec.json.decode(stored.items, type=list[InputItem])


class _Output(msgspec.Struct):
    output: list[InputItem]


def _output(stored: StoredResponse) -> list[InputItem]:
    return msgspec.json.decode(stored.response, type=_Output).output


def _usage(session: Session) -> answer.ResponseUsage:
    return answer.usage(
        session.prompt_tokens, session.completion_tokens, session.cached_tokens, session.reasoning_tokens
    )


@contextmanager
def _names_of_fields() -> Iterator[None]:
    """Name the fields of this protocol in errors about the neutral request."""
    try:
        yield
    except InvalidRequest as error:
        error.param = {"messages": "input", "max_tokens": "max_output_tokens"}.get(error.param or "", error.param)
        raise
