"""The plugin's version, read by the build and printed in the start-up line."""

__version__ = "0.1.0"
