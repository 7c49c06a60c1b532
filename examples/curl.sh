#!/bin/sh
# The service with nothing but curl. SLM_URL names another server; SLM_API_KEY is sent if it is set.
set -eu
url=${SLM_URL:-http://127.0.0.1:8000}
key=${SLM_API_KEY:-unused}

echo "# Load the model and wait until it is ready"
curl -sf "$url/health?wait=60"

echo; echo "# Chat, streamed"
curl -sfN "$url/v1/chat/completions" -H "authorization: Bearer $key" -H 'content-type: application/json' \
  -d '{"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16, "stream": true}'

echo "# Extract"
curl -sf "$url/v1/extract" -H "authorization: Bearer $key" -H 'content-type: application/json' -d '{
  "text": "Ada Lovelace was born in London in 1815.",
  "schema": {
    "type": "object",
    "properties": {"name": {"type": "string"}, "city": {"type": "string"}, "year": {"type": "integer"}},
    "required": ["name", "city", "year"],
    "additionalProperties": false
  }
}'
echo
