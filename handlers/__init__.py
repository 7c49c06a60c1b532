"""The HTTP surface as plain functions from Request to Response: routes, authentication, decoding, errors, SSE. Imports
no web framework and no AWS SDK."""
