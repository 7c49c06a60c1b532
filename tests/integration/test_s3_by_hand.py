"""`python -m infra.mirror` copies a model from the hub to a bucket."""

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


def test_a_model_is_mirrored_by_command(tmp_path):
    """The model can be read by its hub reference. A second run uploads nothing, and no local file remains."""
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
        resolved = storage.resolve(parse("hf://org/repo/tiny.gguf"), refresh=False)
        reader.close()

    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "upload" in first.stderr
    assert "upload" not in second.stderr
    assert "S3_PREFIX=some/prefix" in first.stdout
    assert resolved is not None
    assert resolved.files[0].sha256 == hashlib.sha256(MODEL).hexdigest()
    assert not [name for name in os.listdir(tmp_path) if name.startswith("mirror-")]


def test_wrong_arguments_are_one_line_errors():
    """The error names the argument, without a traceback."""
    for arguments in (("s3://a/b.gguf", "s3://b/c"), ("hf://org/repo/m.gguf", "bucket"), ("hf://x", "s3://b/c")):
        process = run(clean_environ(), *arguments)
        assert process.returncode == 1
        assert "got" in process.stderr
        assert "Traceback" not in process.stderr
