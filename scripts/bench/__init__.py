"""Measures this package and the other MQTT clients for Python on identical work; see ``run --help``."""
