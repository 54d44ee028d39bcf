"""Deprecated alias, for one release: import `DataConfig` from `sophia_levanter.config.data`."""

from sophia_levanter.config.data import DataConfig

__all__ = ["DataConfig"]
