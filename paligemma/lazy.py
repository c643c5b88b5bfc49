"""Names of a package that are imported when they are first touched, so that importing the package stays light."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from paligemma.errors import nearest


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        homes: public name -> module it comes from; a module that ends with the name is the name itself.
    """

    def get(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module '{package}' has no attribute {name!r}.{nearest(name, homes)}")
        module = importlib.import_module(home)
        return module if home == f"{package}.{name}" else getattr(module, name)

    return get, lambda: sorted(homes)
