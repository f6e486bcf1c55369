"""The programs and libraries of llama.cpp that this package carries."""

import os
import subprocess
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

PACKAGE = Path(__file__).resolve().parent.parent


def tool_path(name: str) -> Path:
    """The program called name, such as "llama-server"."""
    path = PACKAGE / "bin" / (f"{name}.exe" if sys.platform == "win32" else name)
    if not path.is_file():
        raise FileNotFoundError(
            f"{name} is not in {path.parent}: install this package with `pip install .`, which compiles it"
        )
    return path


def library_dir() -> Path:
    """The folder of libllama and libggml, where LLAMA_CPP_LIB_PATH points. Windows keeps them beside the programs."""
    return PACKAGE / ("bin" if sys.platform == "win32" else "lib")


def run_tool() -> NoReturn:
    """Becomes the program that has the name this process was started under: the entry point of every llama.cpp tool."""
    name = Path(sys.argv[0]).name.removesuffix(".exe")
    try:
        path = tool_path(name)
    except FileNotFoundError as error:
        sys.exit(str(error))
    if name == "ggml-rpc-server" and (host := beyond_loopback(sys.argv[1:])):
        print(
            f"Warning: ggml-rpc-server asks nobody who they are. Whoever reaches {host} can run what they like on this "
            "machine and read its memory: use it in a network of your own only, behind a firewall.",
            file=sys.stderr,
            flush=True,
        )
    if sys.platform == "win32":  # exec would return to the shell before the program ends
        sys.exit(subprocess.call([path, *sys.argv[1:]]))
    os.execv(path, [str(path), *sys.argv[1:]])


def beyond_loopback(arguments: Sequence[str]) -> str | None:
    """The address at which ggml-rpc-server listens with these arguments, if other machines can reach it."""
    hosts = [value for option, value in pairwise(arguments) if option in ("-H", "--host")]
    if not hosts or hosts[-1] == "localhost":
        return None
    try:
        return None if ip_address(hosts[-1]).is_loopback else hosts[-1]
    except ValueError:  # a name
        return hosts[-1]
