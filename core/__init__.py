"""The service itself. Knows no web framework and no cloud."""
