"""Types of components where diffusers compares them: a graph stands for the model that it was captured from."""

from collections.abc import Mapping

from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def stand_ins(pipe: DiffusionPipeline, expected: Mapping[str, tuple[object, ...]]) -> dict[str, object]:
    """Components of ``pipe`` of another class than a new pipeline expects, whose config is that of an expected one.

    ``from_pipe`` leaves them out unless they are given to it.

    Args:
        pipe: the pipeline that the new one is made of.
        expected: classes of the new pipeline's components, by name.
    """
    found: dict[str, object] = {}
    for name, component in pipe.components.items():
        classes = [cls for cls in expected.get(name, ()) if isinstance(cls, type)]
        own = component.config.get("_class_name") if isinstance(component, ConfigMixin) else None
        if type(component) not in classes and own in [cls.__name__ for cls in classes]:
            found[name] = component
    return found
