"""A text source: the docstrings of a Python package, `docstrings:PACKAGE`."""

import ast
from importlib.util import find_spec
from pathlib import Path

from sophia_levanter.data.sources import DataSource, TextSource
from sophia_levanter.errors import InputError


@DataSource.register_subclass("docstrings")
class Docstrings(TextSource):
    """Each docstring of a package's modules, classes and functions is a document."""

    def documents(self):
        for file in self.files():
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                    yield ast.get_docstring(node)

    def identity(self):
        return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in self.files()]

    def files(self):
        package = find_spec(self.path)
        if package is None or not package.submodule_search_locations:
            raise InputError(f"{self.field}: {self.path!r} is not an installed package; write docstrings:PACKAGE")
        return sorted(Path(package.submodule_search_locations[0]).glob("*.py"))
