"""Triton's interpreter without the work that it repeats for every function that a kernel calls.

It searches all of triton.language for functions to replace by its own, although they have been replaced since the kernel began.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def hurry() -> None:
    """Let the interpreter replace each function once, and remember the dtypes of numpy. The results are the same."""
    module: Any = interpreter
    core: Any = tl.core
    replace = module._patch_lang

    def replace_once(fn: Any) -> Any:
        used = [lang for lang in (tl, core) if any(value is lang for value in fn.__globals__.values())]
        return replace(fn) if any(core.is_builtin(lang.load) for lang in used) else module._LangPatchScope()

    real, known = module._get_np_dtype, dict[str, Any]()

    def np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = real(dtype)
        return known[name]

    module._patch_lang, module._get_np_dtype = replace_once, np_dtype
