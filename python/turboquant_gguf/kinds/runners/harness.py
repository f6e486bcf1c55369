"""EleutherAI's lm-evaluation-harness with llama-server as the model: its tasks, and a run of them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core import environment
from ...core.messages import nearest
from ...errors import TurboquantError

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.result_schema import EvalResults
    from lm_eval.tasks.manager import TaskDict, TaskManager

REQUEST_SECONDS = 24 * 3600  # one answer, however long and slow: a server that dies is noticed at once
_LOGGERS = ("lm_eval", "datasets", "evaluate", "huggingface_hub")
_NO_PROXY = {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
"""Keeps requests to loopback from a proxy of the environment."""


class UnknownTaskError(TurboquantError, ValueError):
    """A task that neither lm-eval nor the task folder has."""

    exit_code = 2


class Tasks:
    """Tasks and groups of tasks, loaded with their documents. names: of the tasks, groups resolved.

    wanted: names of tasks, groups or tags. folder: where to look for YAML files of tasks besides lm-eval's own.
    Raises UnknownTaskError, and TurboquantError for a task that llama-server cannot be asked, that needs data which is
    not there, or that runs code the model wrote.
    """

    def __init__(self, wanted: Sequence[str], folder: Path | None = None) -> None:
        manager = check(wanted, folder)
        with _captured_log():
            self._loaded = _load(manager, wanted)
        for name, task in self._loaded["tasks"].items():
            _require_generation(name, task.OUTPUT_TYPE)  # of tasks written in Python, which no YAML says
            if not len(task.eval_docs):
                raise _without_documents(name)
        self.names = tuple(self._loaded["tasks"])

    def requests(self, limit: int | None) -> int:
        """How many answers a run asks for with at most `limit` documents of each task."""
        return sum(
            min(len(task.eval_docs), limit or len(task.eval_docs)) * task.get_config("repeats")
            for task in self._loaded["tasks"].values()
        )

    def run(
        self,
        url: str,
        *,
        chat: bool,
        limit: int | None = None,
        num_fewshot: int | None = None,
        max_tokens: int | None = None,
        parallel: int = 1,
        seed: int = 1234,
        on_answer: Callable[[], object] = lambda: None,
    ) -> EvalResults:
        """Put all documents to the llama-server at `url`, greedily, and return what lm-eval makes of the answers.

        chat: as messages in the model's chat template, otherwise as plain text. The rest as in `kinds.tasks.Tasks`.
        on_answer: called after each answer. Raises ConnectionError if the server does not answer, TurboquantError
        if it refuses.
        """
        import aiohttp
        import lm_eval
        import requests

        model = _client(chat, on_answer)(
            base_url=f"{url}/v1/{'chat/' * chat}completions",
            model="llama-server",
            tokenizer_backend=None,
            num_concurrent=parallel,
            max_retries=1,
            timeout=REQUEST_SECONDS,
            seed=seed,
        )
        random.seed(seed)  # some tasks draw with them while they make prompts
        np.random.seed(seed)
        for task in self._loaded["tasks"].values():
            _configure(task, num_fewshot, max_tokens, seed)
        with _captured_log() as log, environment.changed(_NO_PROXY):
            try:
                # Not simple_evaluate, which also runs git and asks PyTorch about the machine, each time.
                return lm_eval.evaluate(
                    model, self._loaded, limit=limit, apply_chat_template=chat, fewshot_as_multiturn=chat
                )
            except (requests.HTTPError, aiohttp.ClientResponseError) as error:
                raise TurboquantError(f"llama-server refused a prompt: {_reason(log) or error}") from error
            except (requests.RequestException, aiohttp.ClientError, TimeoutError) as error:
                raise ConnectionError(str(error)) from error


def check(wanted: Sequence[str], folder: Path | None = None) -> TaskManager:
    """Look for tasks without loading their documents, which may be gigabytes. Raises what `Tasks` does."""
    _require_lm_eval()
    with _captured_log():
        manager = _manager(wanted, folder)
        for name in wanted:
            _require_known(name, manager)
        for name, config in _configs(manager, wanted):
            _require_generation(name, config.get("output_type", "generate_until"))
            if config.get("unsafe_code"):
                raise TurboquantError(f"The task {name} runs code that the model writes. Use lm-eval in a sandbox.")
        return manager


def _require_lm_eval() -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # before lm-eval imports it: there is one progress bar, ours
    if any(find_spec(name) is None for name in ("lm_eval", "aiohttp", "requests", "tenacity")):
        raise TurboquantError(
            "This needs EleutherAI's lm-evaluation-harness. Install it with: pip install 'turboquant-gguf[eval]'"
        )
    import_module("lm_eval.tasks")  # sets up the loggers that are redirected here


def _manager(wanted: Sequence[str], folder: Path | None) -> TaskManager:
    from lm_eval.tasks import TaskManager

    if folder:
        if not folder.is_dir():
            raise TurboquantError(f"There is no folder {folder} with tasks.")
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(wanted) <= set(own.all_subtasks):  # spares reading lm-eval's own, thousands of files
            return own
    return TaskManager(include_path=folder)


def _require_known(name: str, manager: TaskManager) -> None:
    if name not in manager.task_index:
        hint = nearest(name, manager.all_tasks, "lm-eval ls tasks lists those of lm-eval.", most=3)
        raise UnknownTaskError(f"There is no task {name!r}: {hint}")


def _configs(manager: TaskManager, members: Sequence[str | dict]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The names and configurations of tasks as their YAML files have them, groups and tags resolved."""
    for member in members:
        name = member if isinstance(member, str) else member.get("group", member.get("task"))
        entry = manager.task_index.get(name)
        config = (entry.cfg if entry else member) or {"task": sorted(entry.tags)}
        if isinstance(config.get("task"), list):
            yield from _configs(manager, config["task"])
        elif "class" not in config:
            yield name, config


def _load(manager: TaskManager, wanted: Sequence[str]) -> TaskDict:
    try:
        return manager.load(list(wanted))
    except OSError as error:
        raise TurboquantError(
            f"Documents of {', '.join(wanted)} are missing: {error}. Run it once with a network, which leaves them in "
            "the cache of Hugging Face (HF_DATASETS_OFFLINE=1 then asks nobody), or give tasks of your own with "
            "--task-folder."
        ) from error
    except StopIteration as error:
        raise _without_documents(", ".join(wanted)) from error
    except Exception as error:  # a task is a program of its author
        raise TurboquantError(f"{', '.join(wanted)} cannot be loaded: {type(error).__name__}: {error}") from error


def _without_documents(name: str) -> TurboquantError:
    return TurboquantError(f"The task {name} has no documents: its data is empty.")


def _require_generation(name: str, output_type: str | None) -> None:
    if output_type != "generate_until":
        raise TurboquantError(
            f"The task {name} ({output_type}) needs log-probabilities of prompts, which llama-server does not give. "
            "Choose one in which the model writes its answer (generate_until), such as gsm8k."
        )


def _configure(task: Task, num_fewshot: int | None, max_tokens: int | None, seed: int) -> None:
    options = {"max_gen_toks": max_tokens} if max_tokens else {}
    task.set_config("generation_kwargs", {"do_sample": False, "temperature": 0, **options}, update=True)
    if num_fewshot is not None and task.get_config("num_fewshot") != 0:  # lm-eval's rule: 0 in a task is final
        task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(seed)


def _client(chat: bool, on_answer: Callable[[], object]) -> type:
    """lm-eval's client of an OpenAI-like server, which tells `on_answer` of each answer."""
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    class Client(LocalChatCompletion if chat else LocalCompletionsAPI):
        def parse_generations(self, outputs: dict, **kwargs: Any) -> list[str]:
            on_answer()
            return super().parse_generations(outputs, **kwargs)

        async def get_batched_requests(self, *args: Any, **kwargs: Any) -> list:
            # When one request fails, asyncio would print the failures of the others under way.
            asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
            return await super().get_batched_requests(*args, **kwargs)

    return Client


@contextmanager
def _captured_log() -> Iterator[list[str]]:
    """Collects what lm-eval and the libraries it loads data with log inside the block, instead of printing it."""
    messages: list[str] = []
    collector = logging.Handler()
    collector.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [collector], False
    try:
        yield messages
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


def _reason(log: list[str]) -> str | None:
    """The message of llama-server's last refusal, which lm-eval only logs."""
    found = re.findall(r'"message":\s*("(?:[^"\\]|\\.)*")', "\n".join(log))
    return json.loads(found[-1]) if found else None
