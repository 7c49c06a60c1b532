"""The Lambda context of one invocation, as awslambdaric's users know it: `scope["aws.context"]`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters.aws_lambda.runtime_api import Invocation


@dataclass(frozen=True, slots=True)
class LambdaContext:
    aws_request_id: str
    invoked_function_arn: str
    function_name: str
    function_version: str
    memory_limit_in_mb: int
    log_group_name: str
    log_stream_name: str
    identity: Any
    client_context: Any
    tenant_id: str | None
    trace_id: str | None
    deadline: float  # on time.monotonic()'s clock

    def get_remaining_time_in_millis(self) -> int:
        return max(0, int((self.deadline - time.monotonic()) * 1000))


def of(invocation: Invocation, environ: Mapping[str, str]) -> LambdaContext:
    memory = environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "")
    return LambdaContext(
        aws_request_id=invocation.id,
        invoked_function_arn=invocation.arn,
        function_name=environ.get("AWS_LAMBDA_FUNCTION_NAME", ""),
        function_version=environ.get("AWS_LAMBDA_FUNCTION_VERSION", ""),
        memory_limit_in_mb=int(memory) if memory.isdecimal() else 0,
        log_group_name=environ.get("AWS_LAMBDA_LOG_GROUP_NAME", ""),
        log_stream_name=environ.get("AWS_LAMBDA_LOG_STREAM_NAME", ""),
        identity=invocation.identity,
        client_context=invocation.client_context,
        tenant_id=invocation.tenant_id,
        trace_id=invocation.trace_id,
        deadline=invocation.deadline,
    )
