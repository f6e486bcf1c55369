"""Hugging Face checkpoints to GGUF, with the value rotation folded into the weights where that is exact.

llama.cpp's converter does the reading, the naming, the tokenizer and the metadata. Ours is what happens to the tensors
on their way through, one at a time: `_Tensors`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn

from ..core import outputfile, progress
from ..errors import TurboquantError
from ..llamacpp.modelmemory import ModelMemory, RefusedError
from . import calibration, checkpoint, converter, remotecode, value_rotation
from . import verify as verification

OUTTYPES = {"auto": "GUESSED", "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""Types of the large tensors, and what gguf-py calls the file type."""

ROTATIONS = ("values", "none")


@dataclass(frozen=True)
class Conversion:
    """What was written.

    path: the GGUF. architecture: as GGUF calls it. outtype: type of the large tensors. tensors: their number. size:
    bytes of the file. rotated: whether the weights rotate the values; reason: why not, or None. calibrated: whether the
    keys are calibrated.
    """

    path: Path
    architecture: str
    outtype: str
    tensors: int
    size: int
    rotated: bool
    reason: str | None
    calibrated: bool


def convert(
    model_dir: Path,
    output: Path | None = None,
    *,
    outtype: str = "auto",
    rotate: str | None = None,
    calibrate: bool = False,
    verify: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    console: Console,
) -> Conversion:
    """Write the checkpoint in `model_dir` as a GGUF.

    output: the file; None names it after the folder and the outtype, in the current folder. outtype: of the large
    tensors; "auto" keeps the checkpoint's 16-bit type. rotate: "values" (an error where that is not exact), "none", or
    None for "values" where it is exact. calibrate: calibrate the keys as well, with the text of the package. verify:
    compare the logits with those of transformers before the file gets its name. force: replace an existing file.
    trust_remote_code: run Python files of the checkpoint where it cannot be read without. console: where progress and
    remarks go.

    The file appears under its name only when it is whole. Raises TurboquantError with what to do about it.
    """
    if output:
        outputfile.check(output, force)
    shards = checkpoint.find(model_dir)
    with console.status("Reading the checkpoint"), _converter_errors(console):
        converter.load()
        for shard in shards:
            checkpoint.check_whole(shard)
        tensors = _Tensors()
        with remotecode.allowed(trust_remote_code, console):
            model = _open(model_dir, outtype, tensors)
            model.prepare_tensors()
            model.prepare_metadata(vocab_only=False)
        writer = model.gguf_writer
    outtype = next(name for name, file_type in OUTTYPES.items() if file_type == model.ftype.name)
    if output is None:
        output = Path(f"{model_dir.resolve().name}-{outtype}.gguf")
        outputfile.check(output, force)

    reason = "--rotate none was given" if rotate == "none" else _plan(writer, tensors)
    if reason and rotate == "values":
        raise TurboquantError(
            f"The values of {writer.arch} cannot be rotated in its weights: {reason}. Leave --rotate out to convert "
            "without."
        )
    rotated = "rotated in the weights" if not reason else f"not rotated in the weights: {reason}"
    console.print(f"{escape(model_dir.resolve().name)}: {writer.arch}, values {rotated}", highlight=False)

    with outputfile.beside(output) as unfinished:
        with _converter_errors(console):
            count = _write(writer, unfinished, console)
        _check_loads(unfinished)
        if calibrate:
            calibration.calibrate(unfinished, in_place=True, console=console)
        if verify:
            _verify(model_dir, unfinished, trust_remote_code, console)
        size = unfinished.stat().st_size
    return Conversion(output, writer.arch, outtype, count, size, not reason, reason, calibrate)


#
# the tensors on their way through
#


class _Tensors:
    """Takes every tensor between the converter and the file: none with NaN gets through, and the plan is carried out.

    It is handed lazy tensors and hands on lazy tensors; when they are computed, while the file is written, `plan` says
    what to rotate. It cannot be known earlier, since shapes and metadata come only with the last tensor.
    """

    ROTATABLE = (".attn_v.", ".attn_qkv.", ".attn_output.")

    def __init__(self) -> None:
        self.plan: value_rotation.Plan | None = None
        self.passed: set[str] = set()

    def __call__(self, name: str, tensor: Any) -> Any:
        """`tensor` (a torch.Tensor) as it will be written under the GGUF name `name`."""
        import torch

        if not tensor.dtype.is_floating_point:
            return tensor
        self.passed.add(name)
        lazy = converter.load()[0].LazyTorchTensor
        # Rotated in float32, whatever it was stored in, so that only the file's own type rounds it.
        dtype = torch.float32 if any(part in name for part in self.ROTATABLE) else tensor.dtype
        meta = lazy.meta_with_dtype_and_shape(dtype, tensor.shape)
        return lazy(meta=meta, args=(tensor,), func=lambda data: self._finish(name, data.to(dtype)))

    def _finish(self, name: str, data: Any) -> Any:
        import torch

        # The sum is a quick test that a NaN or an infinity fails; so may a sum that overflows.
        if not torch.isfinite(data.sum(dtype=torch.float32)) and not torch.isfinite(data).all():
            raise TurboquantError(
                f"{name} holds NaN or infinite weights: the checkpoint is damaged. Download it again."
            )
        if self.plan and (part := self.plan.parts.get(name)):
            return torch.from_numpy(value_rotation.apply(part, data.numpy()))
        return data


def _open(model_dir: Path, outtype: str, tensors: _Tensors) -> Any:
    """llama.cpp's converter for the checkpoint, every tensor of which goes through `tensors`."""
    conversion, gguf = converter.load()
    hparams = _hparams(conversion, model_dir)
    name = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    try:
        known = conversion.get_model_class(name)
    except NotImplementedError as error:
        raise TurboquantError(
            f"The llama.cpp of this package cannot convert {name}. A newer turboquant-gguf may."
        ) from error

    arguments = (model_dir, gguf.LlamaFileType[OUTTYPES[outtype]], model_dir / "unused.gguf")
    if "impl" in getattr(known, "__annotations__", {}):  # it only chooses another class, for Mistral 3 and 4
        known = type(known(*arguments, hparams=hparams).impl)

    def modify_tensors(self: Any, data: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
        for new_name, tensor in known.modify_tensors(self, data, name, bid):
            yield new_name, tensors(new_name, tensor)

    ours = type(known.__name__, (known,), {"model_arch": known.model_arch, "modify_tensors": modify_tensors})
    try:
        return ours(*arguments, hparams=hparams)
    except AssertionError:
        if not known.supports_mtp_export:
            raise
        # Fine-tunes are often saved without the head for multi-token prediction, which Qwen's converters count on.
        ours.no_mtp = True
        return ours(*arguments, hparams=hparams)


def _hparams(conversion: Any, model_dir: Path) -> dict[str, Any]:
    """The configuration as the converter reads it, in the words that it knows."""
    hparams = conversion.ModelBase.load_hparams(model_dir, is_mistral_format=False)
    written = json.loads((model_dir / checkpoint.CONFIG).read_text("utf-8"))
    hparams = {**written, **hparams}
    _respell(hparams)
    return hparams


# Kinds of layers as older checkpoints call them, and as transformers 5 does when it reads those or saves new ones.
_GRANITE_LAYERS = {"linear_attention": "mamba", "full_attention": "attention"}
_NEMOTRON_LAYERS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}
# Those whose experts are always chosen by a sigmoid, so that transformers 5 does not write it down.
_SIGMOID = (
    "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "Dots1ForCausalLM", "ExaoneMoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
)  # fmt: skip


def _respell(hparams: dict[str, Any]) -> None:
    """Gives what transformers 5 calls otherwise, or leaves out, the name by which the converter looks for it."""
    if "rope_parameters" in hparams:
        hparams.setdefault("rotary_pct", (hparams["rope_parameters"] or {}).get("partial_rotary_factor", 1.0))
    if kinds := hparams.get("mlp_layer_types"):
        dense = next((number for number, kind in enumerate(kinds) if kind != "dense"), len(kinds))
        hparams.setdefault("first_k_dense_replace", dense)
    architecture = (hparams.get("architectures") or [None])[0]
    if architecture in _SIGMOID:
        hparams.setdefault("scoring_func", "sigmoid")
    if architecture == "GraniteMoeHybridForCausalLM" and (kinds := hparams.get("layer_types")):
        hparams["layer_types"] = [_GRANITE_LAYERS.get(kind, kind) for kind in kinds]
    if architecture == "NemotronHForCausalLM":
        if kinds := hparams.get("layers_block_type"):
            hparams["hybrid_override_pattern"] = "".join(_NEMOTRON_LAYERS[kind] for kind in kinds)
        if "E" not in hparams.get("hybrid_override_pattern", "E"):  # transformers counts experts where there are none
            for key in ("n_group", "n_routed_experts", "num_experts_per_tok", "n_shared_experts"):
                hparams.pop(key, None)


def _plan(writer: Any, tensors: _Tensors) -> str | None:
    """Plans the rotation of what `writer` holds, and says so in its metadata; or returns the reason against it."""
    metadata = {key: entry.value for shard in writer.kv_data for key, entry in shard.items()}
    shapes = {name: info.shape for shard in writer.tensors for name, info in shard.items()}
    try:
        plan = value_rotation.plan(writer.arch, metadata, shapes)
        if packed := set(plan.parts) - tensors.passed:
            raise value_rotation.NotRotatable(f"the converter keeps {min(packed)} packed")
    except value_rotation.NotRotatable as reason:
        return str(reason)
    for key, value in plan.metadata().items():
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)]
        add(key, value)
    tensors.plan = plan
    return None


#
# the file
#


def _write(writer: Any, path: Path, console: Console) -> int:
    """Computes and writes every tensor, with a bar; returns how many."""
    infos = [info for shard in writer.tensors for info in shard.values()]
    size = sum(info.nbytes for info in infos)
    outputfile.check_space(path, size)
    columns = (*progress.BYTES, TextColumn(f"{{task.fields[tensors]}}/{len(infos)} tensors"))
    with progress.bar(console, columns) as bar, ThreadPoolExecutor(1) as disk:
        task = bar.add_task("writing", total=size, tensors=0)
        flushed: Future[None] | None = None

        def written(number: int, bytes_: int, file: BinaryIO) -> None:
            nonlocal flushed
            bar.update(task, advance=bytes_, tensors=number)
            if not flushed or flushed.done():  # the disk works while the next tensors are computed
                flushed = disk.submit(os.fsync, file.fileno())

        for number, info in enumerate(infos, start=1):
            info.tensor = _Watched(info.tensor, partial(written, number, info.nbytes))
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            if flushed:
                flushed.result()
        finally:
            writer.close()
    return len(infos)


class _Watched:
    """A tensor of gguf-py's that says when it is written, and why if it cannot be."""

    def __init__(self, tensor: Any, written: Callable[[BinaryIO], None]) -> None:
        self.nbytes = tensor.nbytes
        self._tensor = tensor
        self._written = written

    def tofile(self, file: BinaryIO) -> None:
        """Computes the tensor and writes it."""
        gguf = converter.load()[1]
        if isinstance(self._tensor, gguf.LazyChunkedTensor):
            self._tensor.tofile(file)
        else:  # not numpy's tofile, whose error does not say that the disk is full
            data = gguf.LazyNumpyTensor.to_eager(self._tensor)
            file.write(np.ascontiguousarray(data).data.cast("B"))
        self._written(file)


def _check_loads(path: Path) -> None:
    try:
        with ModelMemory(path):
            pass
    except RefusedError as error:
        raise TurboquantError(
            "llama.cpp cannot load what was written, so it was not kept. Do config.json and the weights belong to one "
            "model?",
            error.details or str(error),
        ) from error


def _verify(model_dir: Path, path: Path, trust_remote_code: bool, console: Console) -> None:
    found = verification.verify(model_dir, path, trust_remote_code=trust_remote_code, console=console)
    console.print(
        f"{found.tokens} tokens: KL divergence from transformers {found.kl_mean:.1e}, relative error of the logits "
        f"{found.relative_error:.1e}",
        highlight=False,
    )
    if not found.kl_mean <= verification.DEFAULT_MAX_KL:  # also if it is NaN
        raise TurboquantError(
            "The converted model does not predict what the checkpoint predicts, so it was not kept. Please report the "
            "architecture."
        )


#
# llama.cpp's converter speaks to programmers
#


@contextmanager
def _converter_errors(console: Console) -> Iterator[None]:
    """Turns what the converter raises into sentences, and shows its warnings, each once."""
    handler = _Warnings(console)
    loggers = [logging.getLogger(name) for name in ("hf-to-gguf", "gguf")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    except TurboquantError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise TurboquantError(
                f"The file could not be written whole: {error.strerror}. Free some space, or write elsewhere with -o."
            ) from error
        if isinstance(error, FileNotFoundError):
            name = Path(error.filename or str(error).rpartition(": ")[2]).name
            raise TurboquantError(
                f"The checkpoint lacks a file that its architecture needs: {name}. Download it too."
            ) from error
        raise TurboquantError(f"The checkpoint cannot be read: {error}. Download it again.") from error
    except pickle.UnpicklingError as error:  # what it says is how to run it nevertheless
        raise TurboquantError(
            "A pytorch_model*.bin holds more than weights, which would run as code if it was read. Get the checkpoint "
            "with safetensors."
        ) from error
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code != 1:  # 1 is how the converter exits, others are signals to us
            raise
        raise TurboquantError(_advice(error), f"{type(error).__name__}: {error}") from error
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True


def _advice(error: Exception) -> str:
    text = str(error)
    if "pre-tokenizer was not recognized" in text:
        return (
            "llama.cpp's converter does not know this tokenizer: it recognizes tokenizers by how they split a test "
            "text, and this one splits it like none it knows. Are the tokenizer's files complete and those of the "
            "original model?"
        )
    if isinstance(error, NotImplementedError) and re.search("[Qq]uant|gptq|compressed", text):
        return (
            f"llama.cpp's converter cannot undo how this checkpoint is quantized ({text}). Convert the checkpoint it "
            "was made from."
        )
    if text.startswith("Can not map tensor"):
        return f"The checkpoint holds a tensor that its architecture does not have: {text.rpartition(' ')[2]}."
    if isinstance(error, KeyError):
        return f"config.json lacks {text}, which this architecture needs."
    return "llama.cpp's converter failed on this checkpoint."


# The first is said of every checkpoint whose configuration transformers 5 has read, the second of those it has not.
_HARMLESS = ("Unknown RoPE type: default", "Trying to load config.json instead")


class _Warnings(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Shows the record, unless it was shown before or says nothing."""
        text = record.getMessage().strip(" \n*")
        if text and text not in self._said and not text.startswith(_HARMLESS) and remotecode.FLAG not in text:
            self._said.add(text)
            self._console.print(f"[dim]converter: {escape(text)}[/]", highlight=False)
