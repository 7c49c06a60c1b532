"""moto's S3 as a process of its own, and what tests keep in it."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import boto3
from botocore.config import Config

from adapters.aws.credentials import CredentialChain
from adapters.s3.bucket import Bucket

ENVIRON = {"AWS_ACCESS_KEY_ID": "AKIDTEST", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "eu-central-1"}
BUCKET = "models"


@contextmanager
def moto_server():
    """The port of a fresh S3 with one bucket, "models"."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _await_port(port, server)
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
    return Bucket(name, credentials=CredentialChain(ENVIRON), endpoint_url=f"http://127.0.0.1:{port}", environ=ENVIRON)


def _await_port(port, server):
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert server.poll() is None, "moto's server ended"
            time.sleep(0.05)
        else:
            return
    raise AssertionError("moto's server does not listen")


def clean_environ():
    """This process's environment without AWS settings, plus the test's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return {**kept, **ENVIRON}
