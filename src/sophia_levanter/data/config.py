"""The former place of `DataConfig`, for one release. Import it from `sophia_levanter.config.data`."""

from sophia_levanter.config.data import DataConfig

__all__ = ["DataConfig"]
