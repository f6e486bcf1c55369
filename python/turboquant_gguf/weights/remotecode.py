"""Python files that a checkpoint brings: transformers runs them only where the user has said so.

llama.cpp's converter passes trust_remote_code=True for many architectures, and config.json chooses the architecture;
for others transformers asks on the terminal. So what is passed does not count here, and nobody is asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.markup import escape

from ..errors import TurboquantError

FLAG = "--trust-remote-code"


class RemoteCodeError(TurboquantError, ValueError):
    """A checkpoint cannot be read without code of its own. A ValueError, as what transformers raises then."""


@contextmanager
def allowed(trusted: bool, console: Console) -> Iterator[None]:
    """Have transformers run code of checkpoints inside the block if `trusted`, saying which on `console`, else never.

    Where transformers has a class of its own, that one is taken, unless `trusted` and the caller prefers the
    checkpoint's. Raises RemoteCodeError where there is none. Needs transformers.
    """
    from transformers import dynamic_module_utils
    from transformers.integrations import hub_kernels
    from transformers.models.auto import auto_factory, configuration_auto, tokenization_auto

    get_file, get_kernel = dynamic_module_utils.get_cached_module_file, hub_kernels.load_and_register_attn_kernel
    said = set()

    def say(what: str) -> None:
        if not trusted:
            raise RemoteCodeError(
                f"The checkpoint cannot be read without running code that it names, {what}, which could do anything on "
                f"this machine. If you trust its author, or have read it, add {FLAG}."
            )
        if what not in said:
            said.add(what)
            console.print(f"Running code that the checkpoint names: {escape(what)}", highlight=False)

    def resolve(trust: bool | None, _model: object, has_class: bool, has_code: bool, *_: object, **__: object) -> bool:
        """Whether to run code. Stands in for resolve_trust_remote_code, which believes `trust`, and asks if None."""
        if not has_code or has_class and not (trusted and trust):
            return False
        if trust is False:  # the converter reads config.json itself then
            raise RemoteCodeError(f"config.json names code to read it with, and this needs {FLAG}.")
        return True

    def files(source: str | os.PathLike, name: str, **options: Any) -> str:
        """Stands in for get_cached_module_file, through which every file passes before anything in it runs."""
        path = Path(source, name)
        say(name if path.is_file() else f"{name} of {source}")
        if path.is_file():
            for needed in dynamic_module_utils.get_relative_import_files(path):
                say(Path(needed).name)
        return get_file(source, name, **options)

    def kernel(name: str, *arguments: Any, **options: Any) -> object:
        """Stands in for load_and_register_attn_kernel, to which attn_implementation in config.json leads."""
        say(f"the kernel {name}")
        return get_kernel(name, *arguments, **options)

    with ExitStack() as patched:
        for module in (auto_factory, configuration_auto, tokenization_auto):
            patched.enter_context(patch.object(module, "resolve_trust_remote_code", resolve))
        patched.enter_context(patch.object(dynamic_module_utils, "get_cached_module_file", files))
        patched.enter_context(patch.object(hub_kernels, "load_and_register_attn_kernel", kernel))
        yield
