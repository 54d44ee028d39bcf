"""The settings of the text, by their old name; they are in `sophia_levanter.config.data`."""

from sophia_levanter.config.data import DataConfig

__all__ = ["DataConfig"]
