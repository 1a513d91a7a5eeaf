"""Speeds up Triton's interpreter for the tests.

For every function that a kernel calls, it searches triton.language for functions to replace, although they are replaced already.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def hurry() -> None:
    """Let the interpreter replace each function once, and cache numpy's dtypes. Results are the same."""
    module: Any = interpreter
    if not all(hasattr(module, name) for name in ("_patch_lang", "_LangPatchScope", "_get_np_dtype")):
        return  # another version of Triton: slower, and as correct
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
