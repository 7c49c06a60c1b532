"""The outside world, one foreign thing per module. Only entry points import from here."""
