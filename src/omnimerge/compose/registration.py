"""Tell transformers' auto classes of composed models, at no cost before anybody asks them.

`import omnimerge` imports neither torch nor transformers. Three modules of this room register what
they define when they are imported; `register` sees to it that each is imported together with the
module of transformers where its auto classes live: at once if that is there already, otherwise just
after it has been imported. A program that never comes to an auto class pays nothing, and one that
asks for a tokenizer only does not import the model's code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_OURS = {
    "transformers.models.auto.configuration_auto": "omnimerge.compose.configuration",
    "transformers.models.auto.processing_auto": "omnimerge.compose.processing",
    "transformers.models.auto.modeling_auto": "omnimerge.compose.modeling",
}
"""Home of auto classes -> the module that registers something with them."""


def register() -> None:
    """Make composed models known to transformers' auto classes, now or when they are imported."""
    for theirs, ours in _OURS.items():
        if theirs in sys.modules:
            import_module(ours)
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def ensure() -> None:
    """Import the auto classes, and all that is registered with them."""
    for ours in _OURS.values():
        import_module(ours)


class _AfterImport(MetaPathFinder):
    """Finds nothing new; has the modules of `_OURS` followed by ours."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a home of auto classes, with a loader that goes on to ours.

        Args:
            fullname: the module that is being imported.
            path: where its package lies.
            target: see `importlib`.

        Returns:
            The spec; None for any other module.
        """
        ours = _OURS.get(fullname)
        spec = PathFinder.find_spec(fullname, path, target) if ours else None
        loader: Any = spec.loader if spec else None
        if ours is None or loader is None:
            return None
        execute = loader.exec_module

        def execute_and_go_on(module: ModuleType) -> None:
            execute(module)
            # What is missing in another version of transformers must not keep it from being
            # imported; `ensure` says what it was.
            with suppress(ImportError):
                import_module(ours)

        loader.exec_module = execute_and_go_on
        return spec
