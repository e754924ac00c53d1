"""Methods of a model's class, which users and libraries may have replaced by callables of any kind."""

import functools
import inspect
import types
from collections.abc import Callable
from inspect import Parameter
from typing import Any


def get_class_method(model: Any, name: str) -> Callable[..., Any]:
    """Return `model.name` as Python looks it up, but for what the instance itself holds.

    A function of the class is bound to the model. A callable that is no descriptor, such as an object with `__call__`, is not;
    a `staticmethod` and a `classmethod` bind in their own way.
    """
    found = inspect.getattr_static(type(model), name)
    bind = getattr(type(found), "__get__", None)
    return found if bind is None else bind(found, model, type(model))


def get_class_function(model: Any, name: str) -> Callable[..., Any]:
    """Return a function with the signature of the class's method, `self` first, for `functools.wraps` around a replacement."""
    found = inspect.getattr_static(type(model), name)
    if isinstance(found, types.FunctionType):
        return found
    bound = get_class_method(model, name)

    def method(self, *args, **kwargs):
        return bound(*args, **kwargs)

    functools.update_wrapper(method, bound)
    vars(method).pop("__wrapped__")
    first = Parameter("self", Parameter.POSITIONAL_ONLY)
    method.__signature__ = inspect.Signature([first, *inspect.signature(bound).parameters.values()])  # type: ignore[attr-defined]
    return method
