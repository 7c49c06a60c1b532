"""Serverless-style functions, one file per operation: Request -> Response. Knows no server and no cloud."""
