"""flashgen: from a rectified-flow text-to-image teacher to a few-step INT4 device artifact."""

__version__ = "0.3.0"
