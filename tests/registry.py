"""Functions by name, from the files `methods/*_oracle.py`, so that a method brings its own."""

import importlib
import pathlib

FOLDER = pathlib.Path(__file__).parent / "methods"


class Registry(dict):
    """A dict that `@registry("name", ...)` adds to; all files are imported when it is asked."""

    def __call__(self, *names):
        def register(function):
            self.update(dict.fromkeys(names, function))
            return function

        return register

    def __missing__(self, name):
        if name not in self:
            raise KeyError(f"{name!r} is registered in none of {FOLDER}/*_oracle.py")
        return self[name]

    def __contains__(self, name):
        for file in sorted(FOLDER.glob("*_oracle.py")):
            if not file.name.startswith("test_"):
                importlib.import_module(f"methods.{file.stem}")
        return super().__contains__(name)
