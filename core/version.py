"""The version, as `--version` says it; a test keeps it, pyproject.toml and CHANGELOG.md in step."""

VERSION = "0.1.0"
