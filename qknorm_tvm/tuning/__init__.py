"""Tuning with MetaSchedule: `tune`, and the logs that it leaves for the build to use."""

from .api import tune

__all__ = ["tune"]
