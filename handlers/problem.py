"""Problems: what a client is told of an exception. Used by dispatch before the first byte, by streams after it."""

from __future__ import annotations

import logging

from core.errors import ApiError
from handlers.request_context import request_id

logger = logging.getLogger(__name__)


def told(error: Exception) -> ApiError:
    """An ApiError speaks for itself; anything else is logged whole and told as a fixed sentence with the request id."""
    if isinstance(error, ApiError) and error.status != ApiError.status:
        return error
    logger.error("unforeseen: %s", type(error).__name__, exc_info=error)
    return ApiError(f"The server failed to answer; its log tells why under request id {request_id.get()}.")
