"""Extract the same fields from every text file of a folder. Prints one JSON line a file.

    python examples/extract_folder.py letters/ '{"type": "object", "properties": {"sender": {"type": "string"}}}'

A document that fails is reported in its line and does not stop the others. SLM_URL and SLM_API_KEY name another
server; the default is http://127.0.0.1:8000. Four requests run at once, as many as the server's N_PARALLEL.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2

URL = os.environ.get("SLM_URL", "http://127.0.0.1:8000")
HEADERS = {"authorization": f"Bearer {os.environ['SLM_API_KEY']}"} if "SLM_API_KEY" in os.environ else {}


def extract(client: httpx2.Client, path: Path, schema: dict[str, object]) -> dict[str, object]:
    response = client.post("/v1/extract", json={"text": path.read_text(), "schema": schema, "max_tokens": 256})
    answer = response.json()
    if response.is_error:
        return {"file": path.name, "error": answer["error"]["message"]}
    return {"file": path.name, "data": answer["data"], "valid": answer["valid"]}


def main() -> None:
    folder, schema = Path(sys.argv[1]), json.loads(sys.argv[2])
    paths = sorted(folder.glob("*.txt"))
    with httpx2.Client(base_url=URL, headers=HEADERS, timeout=600) as client, ThreadPoolExecutor(4) as pool:
        for line in pool.map(lambda path: extract(client, path, schema), paths):
            print(json.dumps(line, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
