"""Run configuration: frozen dataclasses <-> YAML <-> command line."""
