"""The outside world: entry points, the HTTP server, AWS, and the sources of models. `core` and `handlers` import
nothing from here."""
