"""The engines by name. Adding one: a file here, a line in `ENGINES`, an extra in pyproject.toml."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from labkit.types import LabkitError, NotInstalled

ENGINES = ("llamacpp", "onnxruntime", "olive", "openvino", "mlx")


def engine(name: str) -> ModuleType:
    """The engine's module; it imports the heavy library only when it builds or loads."""
    if name not in ENGINES:
        raise LabkitError(f"Unknown engine {name!r}; expected one of {', '.join(ENGINES)}.")
    return import_module(f"labkit.engines.{name}")


def version(name: str) -> str | None:
    """Installed version of the engine's distribution, or None when it is absent."""
    from importlib import metadata  # here, as it brings a dozen modules along

    try:
        return metadata.version(engine(name).PACKAGE)
    except metadata.PackageNotFoundError:
        return None


def available() -> dict[str, str | None]:
    """Engine name -> installed version, None for an absent one."""
    return {name: version(name) for name in ENGINES}


def require(name: str) -> ModuleType:
    """The engine's module, or one sentence with the command that installs what it needs."""
    module = engine(name)
    if version(name) is None:
        raise NotInstalled(f'{module.TITLE} is not installed. Try:  pip install "labkit[{module.EXTRA}]"')
    return module
