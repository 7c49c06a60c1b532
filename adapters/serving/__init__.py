"""The ASGI application, and uvicorn configured for it. `adapters.aws_lambda` serves the same application."""
