"""Deprecated alias, for one release: import `prepare` from `sophia_levanter.data.corpora`."""

from sophia_levanter.data.corpora import prepare

__all__ = ["prepare"]
