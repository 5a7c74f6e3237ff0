"""Refusals of a graph that is asked for what only the modules of a model can do."""

from typing import Any, NoReturn

import torch


class ModuleMethodsRefused:
    """Base of a graph that stands for a model of diffusers: refuses what the model's modules had, in a sentence."""

    _class: str
    """Name of the class of the model that the graph was captured from."""

    @property
    def _float_class(self) -> type | None:
        """Class of the model that the graph was captured from; None if diffusers has none of that name."""
        import diffusers

        return getattr(diffusers, self._class, None)

    def __getattr__(self, name: str) -> Any:
        """Refuses in a sentence what the float model has and a graph does not; ``hasattr`` stays False."""
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            own = vars(self)
            if name.startswith("_") or "_internal_dict" not in own or "lowered" not in own["_modules"]:
                raise
            graph: torch.nn.Module = own["_modules"]["lowered"]
            if not hasattr(self._float_class, name) and name not in dict(graph.named_children()):
                raise
        raise AttributeError(self._only_of_modules(name))

    def _only_of_modules(self, name: str) -> str:
        return (
            f"a quantized graph has no {name}, which is of the modules of {self._class}: use the module form, "
            "pipe.transformer = pipe.transformer.to_modules(), or load_pipeline(folder, form='module')"
        )

    def enable_group_offload(self, *args: object, **kwargs: object) -> NoReturn:
        """Refused: a graph calls no modules, one after the other, that could be offloaded."""
        raise ValueError(self._only_of_modules("enable_group_offload"))

    def enable_layerwise_casting(self, *args: object, **kwargs: object) -> NoReturn:
        """Refused: a graph calls no modules that could be cast before and after."""
        raise ValueError(self._only_of_modules("enable_layerwise_casting"))

    def set_attention_backend(self, backend: str) -> NoReturn:
        """Refused: attention is an operator of the graph, which chooses the backend."""
        raise ValueError(self._only_of_modules("set_attention_backend"))
