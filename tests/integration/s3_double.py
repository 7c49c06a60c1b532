"""Run moto's S3 as a process, and make clients for it."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager

import boto3
from botocore.config import Config

from adapters.aws.credentials import CredentialChain
from adapters.s3.bucket import Bucket
from adapters.transfer.retry import Backoff

ENVIRON = {"AWS_ACCESS_KEY_ID": "AKIDTEST", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "eu-central-1"}
BUCKET = "models"
SERVE = """
import sys
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.server import MotoRequestHandler
from werkzeug.serving import make_server

app = DomainDispatcherApplication(create_backend_app)
make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler, fd=int(sys.argv[1])).serve_forever()
"""


@contextmanager
def moto_server():
    """Start an S3 with one empty bucket, "models", and yield its port.

    It inherits a listening socket, so no other process can take the port and clients queue until it runs.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        port = listener.getsockname()[1]
        descriptor = listener.fileno()
        server = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(descriptor)],
            pass_fds=[descriptor],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    with server:
        try:
            client = s3_client(port)
            client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
            client.close()
            yield port
        finally:
            server.terminate()


def s3_client(port):
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=ENVIRON["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=ENVIRON["AWS_SECRET_ACCESS_KEY"],
        region_name="eu-central-1",
        config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
    )


def bucket(port, name=BUCKET):
    """Return a Bucket at moto's port that retries after milliseconds."""
    return Bucket(
        name,
        credentials=CredentialChain(ENVIRON),
        endpoint_url=f"http://127.0.0.1:{port}",
        environ=ENVIRON,
        backoff=Backoff(0.001, 0.01),
    )


def clean_environ():
    """Return this process's environment with the test's AWS settings only."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return {**others, **ENVIRON}
