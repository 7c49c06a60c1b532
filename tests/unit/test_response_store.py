"""Stored responses: their bounds, their tenants, and the routes that fetch, continue and delete them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema_rs
import pytest
from openai.types.responses import Response as OpenAIResponse

from core.engine.interface import Arguments, Call, CallEnd, Reasoning
from core.response_store import MAX_AGE_S, OVERHEAD_BYTES, ResponseStore
from core.settings import Settings, SettingsError, keys
from handlers.dispatch import dispatch
from handlers.http import Request
from handlers.openapi import document
from tests.fakes import FakeService, ScriptedEngine, fake_service
from tests.unit.test_chat import read
from tests.unit.test_responses import WEATHER, ask, events, pieces

ENTRY = b"x" * (1000 - OVERHEAD_BYTES % 1000)


def stored(engine: ScriptedEngine | None = None, **settings: Any) -> FakeService:
    return fake_service(engine or pieces("Fine."), **{"responses_store": 1_000_000, **settings})


def create(fake: FakeService, **fields: Any) -> dict[str, Any]:
    status, body = ask(fake, "POST", "/v1/responses", {"input": "Hello", **fields})
    assert status == 200, body
    return dict(body)


def prompt(fake: FakeService) -> str:
    return bytes(fake.engine.requests[-1].prompt).decode()


def test_a_response_goes_on_from_the_one_before() -> None:
    """With its input and output, but not its instructions. A response can have several that follow it."""
    fake = stored()
    first = create(fake, input="One", instructions="Be kind.")
    create(fake, input="Two", previous_response_id=first["id"])
    second = prompt(fake)
    third = create(fake, input="Three", previous_response_id=first["id"])

    assert first["store"] is True
    assert third["previous_response_id"] == first["id"]
    assert [word in second for word in ("One", "Fine.", "Two", "Be kind.")] == [True, True, True, False]
    assert [word in prompt(fake) for word in ("One", "Two", "Three")] == [True, False, True]


def test_the_whole_chain_is_read() -> None:
    """The third response has the input of the first."""
    fake = stored()
    identity = None
    for number in ("One", "Two", "Three"):
        identity = create(fake, input=number, previous_response_id=identity)["id"]

    assert [prompt(fake).count(word) for word in ("One", "Two", "Three", "Fine.")] == [1, 1, 1, 2]


def test_a_streamed_response_is_stored_before_it_ends() -> None:
    """Its last event says so."""
    fake = stored()
    _, stream = ask(fake, "POST", "/v1/responses", {"input": "One", "stream": True})
    last = events(stream)[-1]["response"]

    assert last["store"] is True
    assert ask(fake, "GET", f"/v1/responses/{last['id']}") == (200, last)


def test_a_call_is_answered_by_id() -> None:
    """The output needs no call in the input, because the stored response has it."""
    call = (Reasoning("Hm."), Call("weather"), Arguments("{}"), CallEnd())
    fake = stored(pieces(*call))
    first = create(fake, tools=[WEATHER])
    result = {"type": "function_call_output", "call_id": first["output"][1]["call_id"], "output": "Sunny"}

    assert create(fake, input=[result], previous_response_id=first["id"])["status"] == "completed"
    assert "Sunny" in prompt(fake)
    status, _ = ask(fake, "POST", "/v1/responses", {"input": [{**result, "call_id": "call_7"}]})
    assert status == 400


def test_an_item_can_be_referred_to() -> None:
    """Of the input or of the output. An item without a role or a type is a reference."""
    fake = stored()
    first = create(fake, input=[{"role": "user", "content": "Remember me", "id": "msg_mine"}])
    references = [{"type": "item_reference", "id": "msg_mine"}, {"id": first["output"][0]["id"]}]
    create(fake, input=references)

    assert "Remember me" in prompt(fake)
    assert "Fine." in prompt(fake)


@pytest.mark.parametrize("path", ["/v1/responses", "/responses"])
def test_a_stored_response_is_fetched_and_deleted(path: str) -> None:
    """It is the same JSON. Afterwards it is a 404, and cannot be continued."""
    fake = stored()
    first = create(fake)

    assert ask(fake, "GET", f"{path}/{first['id']}") == (200, first)
    assert ask(fake, "GET", f"{path}/{first['id']}", query={"stream": "true"})[0] == 400
    deleted = {"id": first["id"], "object": "response", "deleted": True}
    assert ask(fake, "DELETE", f"{path}/{first['id']}") == (200, deleted)
    for method in ("GET", "DELETE"):
        status, body = ask(fake, method, f"{path}/{first['id']}")
        assert (status, body["error"]["code"]) == (404, "not_found")
    status, body = ask(fake, "POST", path, {"input": "a", "previous_response_id": first["id"]})
    assert (status, body["error"]["code"]) == (400, "previous_response_not_found")


def test_what_may_not_be_stored_is_not() -> None:
    """`store` false, a store that is off, and a response that is larger than the store."""
    fake = stored()
    for body in (
        create(fake, store=False),
        create(fake_service(ScriptedEngine()), store=True),
        create(stored(responses_store=2000), input="x" * 400),
    ):
        assert body["store"] is False
    assert ask(fake, "GET", f"/v1/responses/{create(fake, store=False)['id']}")[0] == 404


def test_input_items_come_in_pages() -> None:
    """The latest first, each with an id and with parts."""
    fake = stored()
    first = create(fake, input="One")
    items = [{"role": "user", "content": "Two"}, {"role": "assistant", "content": "Ah."}, {"role": "user"}]
    path = f"/v1/responses/{create(fake, input=items, previous_response_id=first['id'])['id']}/input_items"
    _, whole = ask(fake, "GET", path, query={"order": "asc"})
    _, page = ask(fake, "GET", path, query={"limit": "2"})
    _, rest = ask(fake, "GET", path, query={"limit": "100", "after": page["last_id"]})

    texts = [item["content"][0]["text"] for item in whole["data"]]
    assert texts == ["One", "Fine.", "Two", "Ah.", ""]
    assert [item["content"][0]["type"] for item in whole["data"][:2]] == ["input_text", "output_text"]
    assert [item["content"][0]["text"] for item in [*page["data"], *rest["data"]]] == texts[::-1]
    assert (page["has_more"], rest["has_more"], whole["object"]) == (True, False, "list")
    assert (page["first_id"], page["last_id"]) == tuple(item["id"] for item in page["data"])
    for query in ({"limit": "0"}, {"limit": "many"}, {"order": "up"}, {"after": "msg_1"}):
        assert ask(fake, "GET", path, query=query)[0] == 400


def test_the_answers_fit_their_schemas() -> None:
    """Those of the document, and OpenAI's type."""
    fake = stored()
    identity = create(fake)["id"]
    for method, end in (("GET", ""), ("GET", "/input_items"), ("DELETE", "")):
        described: Any = document()["paths"][f"/v1/responses/{{id}}{end}"][method.lower()]
        schema = described["responses"]["200"]["content"]["application/json"]["schema"]
        status, body = ask(fake, method, f"/v1/responses/{identity}{end}")
        assert status == 200
        jsonschema_rs.validate({**schema, "components": document()["components"]}, body)
        if not end and method == "GET":
            OpenAIResponse.model_validate(body)


def test_tenants_do_not_see_each_others_responses() -> None:
    """A response belongs to the key that asked for it."""
    fake = stored(api_keys=keys("secret-of-ada,secret-of-bob"))

    def as_client(name: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        headers = {"content-type": "application/json", "authorization": f"Bearer secret-of-{name}"}
        content = b"" if body is None else json.dumps(body).encode()

        async def go() -> tuple[int, Any]:
            return await read(await dispatch(fake.service, Request(method, path, "r", headers, body=content)))

        return asyncio.run(go())

    _, mine = as_client("ada", "POST", "/v1/responses", {"input": "Hello"})
    path = f"/v1/responses/{mine['id']}"
    reference = [{"type": "item_reference", "id": mine["output"][0]["id"]}]

    assert as_client("bob", "GET", path)[0] == 404
    assert as_client("bob", "DELETE", path)[0] == 404
    assert as_client("bob", "POST", "/v1/responses", {"input": "a", "previous_response_id": mine["id"]})[0] == 400
    assert as_client("bob", "POST", "/v1/responses", {"input": reference})[0] == 400
    assert as_client("ada", "POST", "/v1/responses", {"input": reference})[0] == 200
    assert as_client("ada", "GET", path)[0] == 200


def test_the_store_drops_what_was_not_used_for_longest() -> None:
    """Of the tenant that has the most."""
    size = len(ENTRY) + OVERHEAD_BYTES
    store = ResponseStore(4 * size)
    for tenant, identity in (("a", "1"), ("b", "2"), ("b", "3"), ("b", "4")):
        assert store.put(tenant, identity, ENTRY, b"")
    assert store.get("b", "2") is not None
    assert store.put("b", "5", ENTRY, b"")

    assert store.size == 4 * size
    assert store.get("a", "1") is not None
    assert [store.get("b", identity) is None for identity in "2345"] == [False, True, False, False]
    assert not store.put("c", "6", ENTRY * 10, b"")


def test_the_store_forgets_after_a_day() -> None:
    """The bytes are free again."""
    now = 0.0
    store = ResponseStore(10_000, clock=lambda: now)
    store.put("a", "1", ENTRY, b"")
    now = MAX_AGE_S
    assert store.get("a", "1") is not None
    now += 1

    assert store.get("a", "1") is None
    assert list(store.latest("a")) == []
    assert store.size == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("", 0), ("0", 0), ("67108864", 67108864), ("64MB", 64_000_000), ("64 MiB", 1 << 26), ("1g", 10**9)],
)
def test_sizes(text: str, size: int) -> None:
    """Bytes, or with a unit."""
    assert Settings.from_env({"RESPONSES_STORE": text}).responses_store == size


@pytest.mark.parametrize("text", ["-1", "many", "1.5GB", "64i", "64TB"])
def test_other_sizes_stop_the_start(text: str) -> None:
    """With the name of the setting."""
    with pytest.raises(SettingsError, match="RESPONSES_STORE"):
        Settings.from_env({"RESPONSES_STORE": text})
