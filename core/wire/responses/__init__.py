"""OpenAI's Responses: the request, its translation, the response, and the events of a stream."""
