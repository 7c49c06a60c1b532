"""Tools around the service: the Lambda emulator, images, benchmarks, and scripts for operators. The service imports
nothing from here."""
