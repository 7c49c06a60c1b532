"""Lambda on this machine: a function URL and the Runtime API, for the tests and `make url`."""
