"""The service: operations, engine and store. Imports no web framework and no AWS SDK."""
