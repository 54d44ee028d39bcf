"""The former place of `prepare`, for one release. Import it from `sophia_levanter.data.corpora`."""

from sophia_levanter.data.corpora import prepare

__all__ = ["prepare"]
