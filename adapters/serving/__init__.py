"""The ASGI application and the uvicorn server for it. The Lambda runtime serves the same application."""
