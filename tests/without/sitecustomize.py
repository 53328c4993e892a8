"""Read by Python at its start when this folder is on PYTHONPATH: packages named in LABKIT_WITHOUT are as if never installed."""

import importlib.metadata
import os
import sys
from importlib.machinery import PathFinder

NAMES = set(filter(None, os.environ.get("LABKIT_WITHOUT", "").split(",")))


def hidden(name):
    return name.split(".")[0].replace("-", "_") in NAMES


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if hidden(name) else super().find_spec(name, path, target)


found = importlib.metadata.Distribution.from_name.__func__


def from_name(cls, name):
    if hidden(name):
        raise importlib.metadata.PackageNotFoundError(name)
    return found(cls, name)


if NAMES:
    sys.meta_path[:] = [Finder if one is PathFinder else one for one in sys.meta_path]
    importlib.metadata.Distribution.from_name = classmethod(from_name)
