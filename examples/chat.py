"""Ask one question with the stock OpenAI client.

    python examples/chat.py "Name three rivers."

OPENAI_BASE_URL and OPENAI_API_KEY name another server; the default is http://127.0.0.1:8000/v1.
"""

import os
import sys

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "unused"),
)
model = client.models.list().data[0].id
completion = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": sys.argv[1] if len(sys.argv) > 1 else "Say hello."}],
    max_tokens=64,
)
print(completion.choices[0].message.content)
