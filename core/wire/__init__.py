"""The request and response structs of each protocol."""
