"""Errors meant for users. Each carries its exit code; the message ends in what mends it."""

from __future__ import annotations


class FlashgenError(Exception):
    """Base class; the exit code of a plain one says that it is a bug of flashgen."""

    exit_code = 1
    is_shared = False  # whether every process of a launch raises it, so that the first one speaks for all


class UsageError(FlashgenError):
    """Wrong usage, recipe or option value."""

    exit_code = 2


class ArtifactError(FlashgenError):
    """An artifact is missing, broken or of the wrong kind."""

    exit_code = 3


class NumericsError(FlashgenError):
    """NaN, divergence, or parity below its floor."""

    exit_code = 4


class MachineError(FlashgenError):
    """A missing extra, not enough memory or disk."""

    exit_code = 5
