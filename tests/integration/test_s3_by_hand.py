"""`python -m infra.mirror`: from the hub to the bucket in one command."""

import hashlib
import os
import random
import subprocess
import sys

from adapters.s3.source import S3Storage
from core.store.reference import parse
from tests import gguf_files
from tests.integration.hub_double import HubDouble, Repo
from tests.integration.s3_double import BUCKET, bucket, clean_environ, moto_server

MODEL = gguf_files.gguf(gguf_files.llama_metadata(), [("a", (1024, 700), random.Random(8).randbytes(4 * 1024 * 700))])


def run(environ, *arguments):
    command = [sys.executable, "-m", "infra.mirror", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)


def test_mirror_by_hand(tmp_path):
    """The model is in the bucket, readable by its hub reference; doing it again changes nothing; no file is left."""
    with moto_server() as port, HubDouble({"org/repo": Repo({"tiny.gguf": MODEL})}) as hub:
        environ = {
            **clean_environ(),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hub"),
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        }
        arguments = ("hf://org/repo/tiny.gguf", f"s3://{BUCKET}/some/prefix", "--folder", str(tmp_path))
        first, second = run(environ, *arguments), run(environ, *arguments)
        reader = bucket(port)
        storage = S3Storage(lambda name: reader, mirror=reader, prefix="some/prefix")
        found = storage.resolve(parse("hf://org/repo/tiny.gguf"), refresh=False)
        reader.close()

    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "upload" in first.stderr
    assert "upload" not in second.stderr
    assert "S3_PREFIX=some/prefix" in first.stdout
    assert found is not None
    assert found.files[0].sha256 == hashlib.sha256(MODEL).hexdigest()
    assert not [name for name in os.listdir(tmp_path) if name.startswith("mirror-")]


def test_wrong_arguments():
    """What was given and what is wanted is said, without a traceback."""
    for arguments in (("s3://a/b.gguf", "s3://b/c"), ("hf://org/repo/m.gguf", "bucket"), ("hf://x", "s3://b/c")):
        done = run(clean_environ(), *arguments)
        assert done.returncode == 1
        assert "got" in done.stderr
        assert "Traceback" not in done.stderr
