"""Methods of a model's class. Users and libraries may have replaced them by callables of any kind."""

import functools
import inspect
import types
from collections.abc import Callable
from inspect import Parameter
from typing import Any


def get_class_method(model: Any, name: str) -> Callable[..., Any]:
    """Return `model.name` as Python looks it up, without the attributes of the instance.

    Functions, `staticmethod` and `classmethod` bind as usual. A callable without `__get__`, such as an object with `__call__`,
    is returned unbound.
    """
    attribute = inspect.getattr_static(type(model), name)
    bind = getattr(type(attribute), "__get__", None)
    return attribute if bind is None else bind(attribute, model, type(model))


def get_class_function(model: Any, name: str) -> Callable[..., Any]:
    """Return a function with the signature of the class's method, including `self`, for `functools.wraps` of a replacement."""
    attribute = inspect.getattr_static(type(model), name)
    if isinstance(attribute, types.FunctionType):
        return attribute
    bound = get_class_method(model, name)

    def method(self, *args, **kwargs):
        return bound(*args, **kwargs)

    functools.update_wrapper(method, bound)
    vars(method).pop("__wrapped__")
    first = Parameter("self", Parameter.POSITIONAL_ONLY)
    method.__signature__ = inspect.Signature([first, *inspect.signature(bound).parameters.values()])  # type: ignore[attr-defined]
    return method
